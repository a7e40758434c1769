"""The look at images before a decoder: what is sound passes, and nothing hostile does."""

from __future__ import annotations

import io
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edge.errors import InvalidImage
from edge.formats.images import MAX_IMAGE_BYTES, MAX_SCANS, ImageFacts, check_image
from tests.vision import picture


def saved(mode: str = "RGB", *, size: tuple[int, int] = (37, 21), kind: str = "PNG", option: str = "optimize") -> bytes:
    out = io.BytesIO()
    Image.effect_noise(size, 90).convert(mode).save(out, kind, **{option: True})
    return out.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, pixels: bytes, *, depth: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_kind_of_png_passes(mode: str) -> None:
    assert check_image(saved(mode)) == ImageFacts("png", 37, 21)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (9, 3), (33, 17)])
def test_interlaced_png_is_measured_right(depth: int, size: tuple[int, int]) -> None:
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    width, height = size
    pixels = b""
    for x, y, dx, dy in passes:
        columns, rows = len(range(x, width, dx)), len(range(y, height, dy))
        pixels += bytes(rows * (1 + (columns * depth + 7) // 8)) if columns else b""
    data = png(width, height, pixels, depth=depth, colour=0, interlace=1)
    assert check_image(data) == ImageFacts("png", width, height)
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()  # an independent decoder agrees


@pytest.mark.parametrize("option", ["optimize", "progressive", "restart_marker_blocks"])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_every_kind_of_jpeg_passes(mode: str, option: str) -> None:
    assert check_image(saved(mode, kind="JPEG", option=option)) == ImageFacts("jpeg", 37, 21)


def test_what_comes_behind_a_picture_is_of_no_account() -> None:
    check_image(picture(1) + b"and more")
    check_image(picture(1, kind="JPEG") + b"and more")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"Hello, I am a text.", "neither a PNG nor a JPEG"),
        (saved(kind="GIF"), "a GIF"),
        (saved(kind="WEBP"), "a WebP"),
        (saved(kind="BMP"), "neither"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "neither"),
        (picture(1)[:40], "cut short"),
        (picture(1)[:-20], "cut short"),
        (picture(1, kind="JPEG")[:200], "cut short"),
        (b"\xff\xd8\xff", "cut short"),
        (b"\xff\xd8\xff\xd9", "no picture"),
        (b"\x89PNG\r\n\x1a\n", "cut short"),
        (png(100_000, 100_000, b""), "100,000 by 100,000"),
        (png(20_000, 1, b""), "20,000 by 1"),
        (png(0, 5, b""), "0 by 5"),
        (png(8, 8, bytes(8 * 25), depth=3), "header is damaged"),
        (png(8, 8, bytes(8 * 25), interlace=2), "header is damaged"),
        (png(4000, 4000, b"", depth=16, colour=6), "64 bits take"),
        (png(8, 8, bytes(8 * 25 - 1)), "cut short"),
        (png(8, 8, bytes(8 * 25 + 1)), "more than the 200 bytes"),
        (png(64, 64, bytes(1 << 24)), "more than the"),
        (b"\x89PNG\r\n\x1a\n" + b"\xff" * MAX_IMAGE_BYTES, "are allowed"),
    ],
)  # fmt: skip
def test_what_is_hostile_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidImage, match=reason):
        check_image(data)


def test_a_jpeg_that_goes_over_the_picture_again_and_again_is_refused() -> None:
    data = picture(1, kind="JPEG")
    scan = data[data.index(b"\xff\xda") : -2]
    check_image(data[:-2] + scan * (MAX_SCANS - 1) + b"\xff\xd9")
    with pytest.raises(InvalidImage, match="scans"):
        check_image(data[:-2] + scan * MAX_SCANS + b"\xff\xd9")


@given(
    seed=st.sampled_from(
        [picture(1), picture(2, kind="JPEG"), saved("RGBA"), saved(kind="JPEG", option="progressive")]
    ),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=4)), min_size=1, max_size=6),
    end=st.floats(0, 1),
)
@settings(max_examples=200, deadline=None)
def test_a_damaged_file_is_sound_or_refused(seed: bytes, edits: list[tuple[float, bytes]], end: float) -> None:
    data = bytearray(seed)
    for where, bytes_ in edits:
        at = int(where * (len(data) - 1))
        data[at : at + len(bytes_)] = bytes_
    try:
        facts = check_image(bytes(data[: max(1, int(end * len(data) * 2))]))
    except InvalidImage:
        return
    assert 0 < facts.width * facts.height <= 1 << 24
