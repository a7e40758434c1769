"""A strict, bounded look at PNG and JPEG files: no decoder sees one before it, and no size in it is believed.

Formats: PNG, third edition (W3C 2025); JPEG, ITU-T T.81. What stb_image reads as well (GIF, BMP, PSD, TGA, HDR, PIC,
PNM) is refused: nobody asks for it, and each is one more parser for hostile bytes.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from edge.errors import InvalidImage

MAX_IMAGE_BYTES = 10 << 20
MAX_PIXELS = 1 << 24
"""4096 by 4096, or a camera's 16 megapixels."""
MAX_SIDE = 1 << 14
MAX_INFLATED_BYTES = 64 << 20
"""Of a PNG's pixels before they are filtered; 16 megapixels of eight bits and four channels."""
MAX_SCANS = 100
"""Of a JPEG: each goes over the whole picture again. Cameras write one, browsers' encoders ten."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row and their steps, of each pass of an interlaced PNG."""
_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
"""In the coded data of a JPEG: stuffed zeros and restart markers are no markers."""
_FRAMES = (0xC0, 0xC1, 0xC2)
"""Baseline, extended and progressive; the others (lossless, arithmetic, hierarchical) nobody writes."""


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What a file says of itself, as far as it was checked."""

    format: Literal["png", "jpeg"]
    width: int
    height: int


def check_image(data: bytes) -> ImageFacts:
    """Look at a whole file without decoding it.

    A PNG's pixels are inflated, up to the size that its header gives, and thrown away: so a bomb costs what an honest
    picture of that size does, and what is cut short or damaged is seen here.

    Raises:
        InvalidImage: It is none of the two formats, too large, cut short or damaged.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise InvalidImage(
            f"it has {len(data):,} bytes, and {MAX_IMAGE_BYTES:,} are allowed", hint="Send it smaller, or as JPEG."
        )
    if data.startswith(_SIGNATURE):
        return _check_png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _check_jpeg(data)
    raise InvalidImage(f"it is {_looks_like(data)}", hint="Send PNG or JPEG.")


def _looks_like(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "a WebP, which is not read"
    if data[:4] in (b"GIF8", b"%PDF"):
        return f"a {data[:4].decode().strip('%8')}, which is not read"
    return "neither a PNG nor a JPEG" if data else "empty"


def _check_size(width: int, height: int) -> None:
    if not width or not height:
        raise InvalidImage(f"its header says {width:,} by {height:,} pixels")
    if width > MAX_SIDE or height > MAX_SIDE or width * height > MAX_PIXELS:
        raise InvalidImage(
            f"its header says {width:,} by {height:,} pixels, and {MAX_PIXELS:,} together and {MAX_SIDE:,} a side are "
            "allowed",
            hint="Send it smaller: models look at a few hundred pixels a side.",
        )


# PNG


def _check_png(data: bytes) -> ImageFacts:
    chunks = _png_chunks(data)
    kind, header = next(chunks)
    if kind != b"IHDR" or len(header) != 13:
        raise InvalidImage("its header is damaged")
    width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
    depth, colour, compression, filtering, interlace = header[8:]
    _check_size(width, height)
    if depth not in _DEPTHS.get(colour, ()) or compression or filtering or interlace > 1:
        raise InvalidImage("its header is damaged")
    bits = depth * _CHANNELS[colour]
    size = _interlaced_bytes(width, height, bits) if interlace else _pixel_bytes(width, height, bits)
    if size > MAX_INFLATED_BYTES:
        raise InvalidImage(
            f"its {width:,} by {height:,} pixels of {bits} bits take {size:,} bytes, and {MAX_INFLATED_BYTES:,} are "
            "allowed",
            hint="Send it with eight bits a channel, or smaller.",
        )
    _check_pixels((body for name, body in chunks if name == b"IDAT"), size)
    return ImageFacts("png", width, height)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    view, at = memoryview(data), len(_SIGNATURE)
    while True:
        length = int.from_bytes(view[at : at + 4], "big")
        end = at + 12 + length
        if end > len(data) or at + 12 > len(data):
            raise InvalidImage("it is cut short")
        kind = bytes(view[at + 4 : at + 8])
        if kind == b"IEND":
            return
        yield kind, view[at + 8 : end - 4]
        at = end


def _pixel_bytes(width: int, height: int, bits: int) -> int:
    """Of rows, each behind the byte that names its filter."""
    return height * (1 + (width * bits + 7) // 8) if width else 0


def _interlaced_bytes(width: int, height: int, bits: int) -> int:
    return sum(_pixel_bytes(-(-(width - x) // dx), -(-(height - y) // dy), bits) for x, y, dx, dy in _ADAM7)


def _check_pixels(bodies: Iterator[memoryview], size: int) -> None:
    """See that the pixels inflate to what the header promises, and to no more."""
    inflater, left = zlib.decompressobj(), size
    try:
        for body in bodies:
            rest: bytes | memoryview = body
            while rest and not inflater.eof:
                left -= len(inflater.decompress(rest, min(1 << 20, left + 1)))
                rest = inflater.unconsumed_tail
                if left < 0:
                    raise InvalidImage(f"its pixels inflate to more than the {size:,} bytes of its header")
    except zlib.error as e:
        raise InvalidImage(f"its pixels are damaged ({e})") from e
    if left or not inflater.eof:
        raise InvalidImage("its pixels are cut short")


# JPEG


def _check_jpeg(data: bytes) -> ImageFacts:
    size: tuple[int, int] | None = None
    num_scans = 0
    for code, body in _jpeg_segments(data):
        if code == 0xDA:
            num_scans += 1
            if size is None or num_scans > MAX_SCANS:
                raise InvalidImage("its scans are damaged" if size is None else f"it has more than {MAX_SCANS} scans")
        elif 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            if code not in _FRAMES or size is not None or len(body) < 6 or body[0] != 8 or body[5] not in (1, 3, 4):
                raise InvalidImage("it is of a kind of JPEG that is not read", hint="Send it as baseline JPEG or PNG.")
            size = int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big")
            _check_size(*size)
    if size is None or not num_scans:
        raise InvalidImage("it has no picture in it")
    return ImageFacts("jpeg", *size)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, memoryview]]:
    """Each segment's marker and body, up to the end of the picture."""
    view, at = memoryview(data), 2
    while True:
        found = _MARKER.search(data, at)
        if found is None:
            raise InvalidImage("it is cut short")
        code = found[1][0]
        if code == 0xD9:
            return
        length = int.from_bytes(view[found.end() : found.end() + 2], "big")
        at = found.end() + length
        if length < 2 or at > len(data):
            raise InvalidImage("it is cut short")
        yield code, view[found.end() + 2 : at]
