"""By how much a video's header asks to turn its frames, as decord 0.6 reads it.

Phones store frames as the sensor sees them and write a quarter turn into the header. decord turns the frames upright;
PyAV hands them out as they are stored. decord (on FFmpeg 4) looks at two places: a tag "rotate" of the stream
(Matroska), and the display matrix of an MP4 or QuickTime file. Newer FFmpeg knows more (the pose of a Matroska
projection, orientation messages inside an H.264 stream); decord leaves such frames as they are, and so do we: the same
file must give the same frames with every reader. The matrix is read from the file itself, because what PyAV tells of it
differs between its versions and mixes in what decord does not see.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import numpy as np

#: clockwise degrees -> quarter turns of `np.rot90`
_TURNS = {90: -1, 180: 2, 270: 1}
#: fraction bits of the three columns of a display matrix (ISO/IEC 14496-12, 6.2.2)
_SHIFTS = (16, 16, 30)
_LONGEST_HEADER = 256  # bytes; a movie or track header has about 100


def rotation_of(path: str | os.PathLike[str], metadata: Mapping[str, str], track: int) -> int:
    """Clockwise degrees that turn the frames of a file upright: 0, 90, 180 or 270.

    Any other angle, and a matrix that is no rotation at all, counts as 0, as in decord. A mirrored picture is turned
    and stays mirrored.

    Args:
        path: the file.
        metadata: tags of the video stream.
        track: its number in the file (PyAV `stream.id`).
    """
    tag = next((value for name, value in metadata.items() if name.lower() == "rotate"), "")
    number = re.match(r"\s*[+-]?(\d+\.?\d*|\.\d+)", tag)
    angle = float(number[0]) if number else 0.0
    if not angle:
        matrix = display_matrix(path, track)
        angle = 0.0 if matrix is None else _angle(matrix)
    degrees = int(math.fmod(angle, 360) % 360)
    return degrees if degrees in _TURNS else 0


def upright(frames: np.ndarray, degrees: int) -> np.ndarray:
    """Frames [T, height, width, 3] turned clockwise by 0, 90, 180 or 270 degrees."""
    return np.ascontiguousarray(np.rot90(frames, _TURNS[degrees], axes=(1, 2))) if degrees else frames


def display_matrix(path: str | os.PathLike[str], track: int) -> list[int] | None:
    """The nine numbers of a track's display matrix times that of the movie; None: no such file or track."""
    try:
        with open(path, "rb") as file:
            return _matrix(file, track)
    except (OSError, struct.error):  # damaged or cut: what can be decoded is decoded, unturned
        return None


def _matrix(file: BinaryIO, track: int) -> list[int] | None:
    movie = found = None
    for start, stop in _boxes(file, 0, os.fstat(file.fileno()).st_size, b"moov"):
        for head in _boxes(file, start, stop, b"mvhd"):
            movie = _header(file, *head, places=(36, 48))[1]
        for inside in _boxes(file, start, stop, b"trak"):
            for head in _boxes(file, *inside, b"tkhd"):
                number, matrix = _header(file, *head, places=(40, 52))
                found = matrix if number == track else found
    if found is None or movie is None:
        return found
    return _product(found, movie)


def _boxes(file: BinaryIO, start: int, stop: int, kind: bytes) -> Iterator[tuple[int, int]]:
    """Where the contents of the boxes of one kind lie between two places."""
    while start + 8 <= stop:
        file.seek(start)
        size, name = struct.unpack(">I4s", file.read(8))
        head = 8
        if size == 1:
            size, head = struct.unpack(">Q", file.read(8))[0], 16
        elif size == 0:  # to the end
            size = stop - start
        if size < head:
            return
        if name == kind:
            yield start + head, min(start + size, stop)
        start += size


def _header(file: BinaryIO, start: int, stop: int, places: tuple[int, int]) -> tuple[int, list[int]]:
    """(number of the track, matrix) of a header box; for `mvhd` the number means nothing.

    Args:
        places: where the matrix stands in a box of version 0 (32-bit times) and 1 (64-bit times).
    """
    file.seek(start)
    data = file.read(min(stop - start, _LONGEST_HEADER))
    wide = data[:1] == b"\x01"
    return struct.unpack_from(">I", data, 20 if wide else 12)[0], list(struct.unpack_from(">9i", data, places[wide]))


def _product(first: list[int], second: list[int]) -> list[int]:
    """Product of two display matrices in their fixed point."""
    return [
        sum((first[3 * row + k] * second[3 * k + column]) >> _SHIFTS[k] for k in range(3))
        for row in range(3)
        for column in range(3)
    ]


def _angle(matrix: list[int]) -> float:
    """Clockwise degrees of a matrix, rounded as FFmpeg 4 writes them down (six digits); 0 where it is no rotation."""
    across, down = math.hypot(matrix[0], matrix[3]), math.hypot(matrix[1], matrix[4])
    if not across or not down:
        return 0.0
    return float(f"{math.degrees(math.atan2(matrix[1] / down, matrix[0] / across)) % 360:.6g}")
