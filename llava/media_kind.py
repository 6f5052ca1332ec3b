"""What a file shows, by its content: a suffix may be unknown (`.jfif`), wrong (a clip named `.jpg`) or missing.

FFmpeg reads a still picture as a video of one frame, out of which sampling makes as many equal frames as are asked for.
Whoever is given a path therefore asks here first.
"""

from __future__ import annotations

import os
import warnings
from typing import Literal

from PIL import Image, UnidentifiedImageError

#: "picture": one still picture; "animation": a moving GIF, WebP, PNG or AVIF, which Pillow reads; "video"; or "unknown"
Kind = Literal["picture", "animation", "video", "unknown"]

#: usual suffixes of pictures, and of videos
PICTURE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif", ".heic", ".jp2", ".ppm"}
)
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".flv", ".mpg", ".mpeg", ".ts", ".wmv", ".3gp", ".ogv"}
)

#: Pillow's formats whose further pictures are frames. Those of TIFF, MPO or PSD are pages, views and layers.
_MOVING = frozenset({"GIF", "WEBP", "PNG", "AVIF"})
#: what Pillow knows of videos (MPEG without reading it; FLI)
_VIDEOS = frozenset({"MPEG", "FLI"})
#: beginnings of pictures that this Pillow may not be able to read: they are pictures all the same
_BEGINNINGS = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"8BPS"),
    *(b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"\0\0\0\x0cJXL ", b"\xff\x0a"),
)
#: brands of HEIF files with one picture (ISO/IEC 23008-12); "msf1", "hevc" and "avis" are sequences
_STILL_BRANDS = frozenset({b"mif1", b"heic", b"heix", b"heim", b"heis", b"avif", b"miaf"})
#: beginnings of videos: Matroska, FLV, MPEG (a program stream or a bare one), Ogg, ASF
_VIDEO_BEGINNINGS = (b"\x1aE\xdf\xa3", b"FLV", b"\0\0\1\xba", b"\0\0\1\xb3", b"OggS", b"0&\xb2u\x8ef\xcf\x11")
_MOVIE_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp"})


def kind_of(path: str | os.PathLike[str]) -> Kind:
    """What a file shows. Folders, missing and empty files are "unknown", and so are videos of a rare format.

    A damaged picture is still a picture, as long as its beginning is there: reading it then fails with its own reason.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(32)
    except OSError:
        return "unknown"
    if not start:
        return "unknown"
    if _begins_as_video(start):
        return "video"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whoever reads the picture hears of its size, not whoever looks at it
            with Image.open(path) as image:
                if image.format in _VIDEOS:
                    return "video"
                return "animation" if image.format in _MOVING and _moves(image) else "picture"
    except UnidentifiedImageError:
        return "picture" if _begins_as_picture(start) else "unknown"
    except Exception:  # Pillow knew the format, and what it read then was too large or damaged
        return "picture"


def is_picture(path: str | os.PathLike[str]) -> bool:
    """Whether a file is to be read as one still picture: by its content, and by its suffix where that says nothing."""
    kind = kind_of(path)
    return kind == "picture" or (kind == "unknown" and os.path.splitext(path)[1].lower() in PICTURE_SUFFIXES)


def _moves(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # cut before its second frame
        return False


def _begins_as_video(start: bytes) -> bool:
    if start[4:8] in _MOVIE_BOXES:
        return start[4:8] != b"ftyp" or start[8:12] not in _STILL_BRANDS | {b"avis"}
    return start.startswith(_VIDEO_BEGINNINGS) or (start[:4] == b"RIFF" and start[8:12] == b"AVI ")


def _begins_as_picture(start: bytes) -> bool:
    if start[4:8] == b"ftyp":
        return start[8:12] in _STILL_BRANDS
    return start.startswith(_BEGINNINGS) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
