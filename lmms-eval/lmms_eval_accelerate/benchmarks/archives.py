"""Unpacking archives that may be cut or damaged: an error that says which, never a video of which a part is missing.

A member appears under its name when all of it is there and its checksum is right (zip, gzip, bzip2 and xz have one; a
plain tar has none of its contents, only of its headers).
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from accelerate_methods.stages.errors import MethodError

#: called with the number of bytes that were worked through
Progress = Callable[[int], None]

_BLOCK = 1 << 20
#: what the readers of archives raise for one that is damaged; a full disk is an OSError too, but one with a number
_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, struct.error)
_UNREADABLE = (NotImplementedError, RuntimeError, UnicodeDecodeError)  # another compression, a password, odd names
_COMPRESSED = {b"\x1f\x8b": gzip.GzipFile, b"BZh": bz2.BZ2File, b"\xfd7zXZ\0": lzma.LZMAFile}
_UNKNOWN = {b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4", b"PK": "zip", b"7z\xbc\xaf": "7z", b"Rar!": "rar"}


@contextlib.contextmanager
def naming(files: Sequence[Path]) -> Iterator[None]:
    """Errors of reading an archive that consists of ``files`` name it.

    Raises:
        MethodError: it is damaged, cut, or of a kind that cannot be read; or there is no room for what is in it.
    """
    name = str(files[0]) if len(files) == 1 else f"{files[0]} (with {len(files) - 1} more parts, to {files[-1].name})"
    try:
        yield
    except _DAMAGE as error:
        raise MethodError(f"{name} is damaged ({_line(error)}); delete it and run prepare again.") from error
    except _UNREADABLE as error:
        raise MethodError(f"{name} cannot be unpacked ({_line(error)}).") from error
    except OSError as error:
        if error.errno is None:  # bz2 reports damage like this
            raise MethodError(f"{name} is damaged ({_line(error)}); delete it and run prepare again.") from error
        raise MethodError(f"{name} cannot be unpacked ({_line(error)}).") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def unpack_zip(file: Path, target: Path, begin: Progress, advance: Progress) -> None:
    """All members of a zip file. What is there with the member's size and checksum is not written again.

    Args:
        begin: called once with the sum of the members' sizes.
    """
    with zipfile.ZipFile(file) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        begin(sum(member.file_size for member in members))
        for member in members:
            path = target / member.filename
            if not (path.is_file() and path.stat().st_size == member.file_size and _checksum(path) == member.CRC):
                _extract(archive, member, target)
            advance(member.file_size)


def unpack_tar(files: Sequence[Path], target: Path, advance: Progress) -> None:
    """All members of a tar file, plain or compressed; its files are parts of one archive, or archives one by one.

    They get their places when the last of them was read: a lost part shows at the next header, a wrong checksum at the
    end.
    """
    stream = _decompressed(io.BufferedReader(_Joined(files, advance), _BLOCK))
    with _aside(target) as part:
        # ignore_zeros: several whole archives after each other are read as one
        with tarfile.open(fileobj=stream, mode="r|", ignore_zeros=True, tarinfo=_Strict, bufsize=_BLOCK) as archive:
            archive.extractall(part, filter="data")
        while stream.read(_BLOCK):  # checksums stand at the end
            pass
        for path in sorted(part.rglob("*")):
            _move(path, target / path.relative_to(part))


def place(source: Path, target: Path) -> None:
    """The same file at a second place, without a second copy where the file system can do that."""
    if target.exists() and target.stat().st_size == source.stat().st_size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), part)
    except OSError:
        shutil.copyfile(source, part)
    part.replace(target)
    part.unlink(missing_ok=True)  # two names of one file: replacing does nothing then


def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    with _aside(target) as part:
        written = Path(archive.extract(member, part))  # makes the names harmless
        _move(written, target / written.relative_to(part))


@contextlib.contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """An empty folder on the file system of ``target``, gone afterwards."""
    part = target / ".part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def _decompressed(stream: io.BufferedReader) -> Any:
    """The stream's contents. tarfile's own reader of compressed streams checks no checksum, and stops after the first
    of several compressed archives."""
    start = stream.peek(8)[:8]
    for beginning, name in _UNKNOWN.items():
        if start.startswith(beginning):
            raise NotImplementedError(f"it holds {name} data; unpack it by hand into a .tar or .zip file")
    opener = next((kind for beginning, kind in _COMPRESSED.items() if start.startswith(beginning)), None)
    if opener is None:
        return stream
    return opener(fileobj=stream) if opener is gzip.GzipFile else opener(stream)


class _Strict(tarfile.TarInfo):
    """Headers of members that must all be right. tarfile itself takes a damaged header for the end of the archive, or,
    where zeros are to be ignored, looks for the next one that it can read."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            member = super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # a block of zeros
            archive.ended = True
            raise
        except tarfile.EmptyHeaderError as error:
            if not getattr(archive, "ended", False):
                raise tarfile.ReadError("it ends without the mark of its end: it was cut") from error
            raise
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
            raise tarfile.ReadError(f"{error} at byte {archive.offset}") from error
        archive.ended = False
        return member


class _Joined(io.RawIOBase):
    """Several files as one stream."""

    def __init__(self, files: Sequence[Path], advance: Progress):
        self._files, self._advance = list(files), advance
        self._current: IO[bytes] | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._current is not None or self._files:
            if self._current is None:
                self._current = self._files.pop(0).open("rb")
            count = self._current.readinto(buffer)
            if count:
                self._advance(count)
                return count
            self._current.close()
            self._current = None
        return 0

    def close(self) -> None:
        if self._current is not None:
            self._current.close()
            self._current = None
        super().close()
