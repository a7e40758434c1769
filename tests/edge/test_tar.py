"""The strict tar reader."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import InvalidModelFile
from edge.formats.tar import MAX_HEADERS, TarMember, read_tar
from tests.edge.bundles import tar_bytes

FILES: Mapping[str, bytes] = {"oci-layout": b"{}", "index.json": b"x" * 512, "blobs/sha256/" + "a" * 64: b"y" * 513}


def read(data: bytes, directory: Path) -> dict[str, TarMember]:
    path = directory / "stick.tar"
    path.write_bytes(data)
    with path.open("rb", buffering=0) as file:
        return read_tar(file, what="stick.tar")


def contents(data: bytes, directory: Path) -> dict[str, bytes]:
    return {name: data[at.offset : at.offset + at.size_bytes] for name, at in read(data, directory).items()}


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_python_writes_is_read(tar_format: int, tmp_path: Path) -> None:
    assert contents(tar_bytes(FILES, tar_format=tar_format), tmp_path) == FILES
    assert contents(tar_bytes({}, tar_format=tar_format), tmp_path) == {}


def test_long_and_prefixed_names_and_attributes_are_read(tmp_path: Path) -> None:
    named = {f"{'d' * 80}/{'f' * 90}": b"prefixed", f"{'d' * 200}/{'f' * 200}": b"extended", "zwölf": b"12"}
    assert contents(tar_bytes(named, pax_headers={"SCHILY.xattr.user.a": "b", "mtime": "1.5"}), tmp_path) == named


def test_what_gnu_tar_writes_of_a_directory_is_read(tmp_path: Path) -> None:
    tar = shutil.which("tar")
    assert tar is not None
    for name, data in FILES.items():
        path = tmp_path / "layout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    made = tmp_path / "made.tar"
    for form in ("gnu", "posix", "ustar"):
        subprocess.run([tar, "-cf", made, f"--format={form}", "-C", tmp_path / "layout", "."], check=True, timeout=30)
        assert contents(made.read_bytes(), tmp_path) == FILES


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_file_beyond_8_gib_is_found(tar_format: Literal[1, 2], tmp_path: Path) -> None:
    path, entry = tmp_path / "large.tar", tarfile.TarInfo("weights")
    entry.size = 9 << 30
    begin = entry.tobuf(tar_format)
    path.write_bytes(begin)
    os.truncate(path, len(begin) + entry.size + len(END))
    with path.open("rb", buffering=0) as file:
        assert read_tar(file, what="large.tar") == {"weights": TarMember("weights", len(begin), 9 << 30)}


def header(name: str = "file", *, kind: bytes = b"0", size: int = 0, link: str = "") -> bytes:
    entry = tarfile.TarInfo(name)
    entry.type, entry.size, entry.linkname = kind, size, link
    return entry.tobuf(tarfile.GNU_FORMAT)


def extended(*records: bytes, kind: bytes = b"x") -> bytes:
    data = b"".join(records)
    return header(kind=kind, size=len(data)) + data + bytes(-len(data) % 512)


def record(text: str) -> bytes:
    return f"{len(text) + 4} {text}\n".encode()


END = bytes(1024)
SOUND = header() + END
REFUSED: Mapping[str, tuple[bytes, str]] = {
    "nothing": (b"", "cut short"),
    "no end": (header(), "cut short"),
    "cut in a file": (header(size=600) + bytes(512) + END[:512], "cut short"),
    "no archive": (b"G" * 2048, "is refused: it is no tar archive"),
    "compressed": (b"\x1f\x8b" + bytes(2048), "is refused: it is no tar archive"),
    "no entry": (header() + b"G" * 512 + END, "no entry begins at byte 512"),
    "a flipped bit": (b"g" + SOUND[1:], "the entry at byte 0 is damaged"),
    "behind the end": (SOUND[:1024] + header() + END, "behind its end"),
    "a huge size": (header(size=1 << 60), "claims 1,152,921,504,606,846,976 bytes"),
    "more than there is": (header(size=1 << 40) + END, "cut short"),
    "leads up": (header("../../etc/passwd") + END, "path '../../etc/passwd'"),
    "leads up within": (header("blobs/../../x") + END, "not allowed"),
    "absolute": (header("/etc/passwd") + END, "not allowed"),
    "a second spelling": (header("blobs/./x") + END, "not allowed"),
    "control characters": (header("a\x1b[2J") + END, "not allowed"),
    "a directory that leads up": (header("../x/", kind=b"5") + END, "not allowed"),
    "a symbolic link": (header(kind=b"2", link="/etc/passwd") + END, "neither a file nor a directory"),
    "a hard link": (header(kind=b"1", link="index.json") + END, "neither a file nor a directory"),
    "a device": (header(kind=b"3") + END, "neither a file nor a directory"),
    "holes": (header(kind=b"S") + END, "neither a file nor a directory"),
    "twice": (header() + header("./file") + END, "stands in it twice"),
    "a path in an extended header": (extended(record("path=../../x")) + header() + END, "path '../../x'"),
    "a size in an extended header": (extended(record("size=99999999999")) + header() + END, "cut short"),
    "a bad size in one": (extended(record("size=-10")) + header() + END, "a size in an extended header"),
    "holes in one": (extended(record("GNU.sparse.major=1")) + header() + END, "stored with holes"),
    "a length beyond it": (extended(b"99 path=x\n") + header() + END, "extended header is damaged"),
    "a length within": (extended(b"5 path=x\n") + header() + END, "extended header is damaged"),
    "no length": (extended(b"path=x\n") + header() + END, "extended header is damaged"),
    "one for all": (extended(record("path=xx"), kind=b"g") + header() + END, "for all entries at once"),
    "one for none": (extended(record("path=xx")) + END, "behind its end"),
    "long extended headers": (header(kind=b"x", size=2 << 20) + bytes(2 << 20) + SOUND, "more than 1,048,576 bytes"),
    "many entries": (b"".join(header(str(n)) for n in range(MAX_HEADERS)) + END, "more than 16,384 entries"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_hostile_or_damaged_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    data, reason = REFUSED[name]
    with pytest.raises(InvalidModelFile) as refused:
        read(data, tmp_path)
    assert reason in str(refused.value)


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 5000), st.binary(max_size=12)), max_size=6), cut=st.integers(0, 9000))
def test_any_bytes_give_members_within_the_file_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, bytes]], cut: int
) -> None:
    data = bytearray(tar_bytes(FILES, pax_headers={"comment": "c" * 40}))
    for at, new in changes:
        data[at : at + len(new)] = new
    directory = tmp_path_factory.getbasetemp()
    try:
        found = read(bytes(data[:cut]), directory)
    except InvalidModelFile:
        return
    for name, member in found.items():
        assert name == member.name
        assert 0 <= member.offset <= member.offset + member.size_bytes <= len(data)
        assert not {"", ".."} & set(name.split("/"))
