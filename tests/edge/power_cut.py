"""A disk whose power can be cut: what was done is recorded, and replayed without what was not yet synced.

A name (created, renamed, linked, removed) is certain once its directory was synced, content once its file was. After a
cut, anything less certain is there or not, each for itself: that is more than any journaling file system allows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from typing_extensions import override

from edge.store.files import FileOps


@dataclass
class _Content:
    now: bytes = b""
    certain: bytes = b""


@dataclass
class _Directory:
    now: dict[str, _Content] = field(default_factory=dict[str, _Content])
    certain: dict[str, _Content] = field(default_factory=dict[str, _Content])


Change = Callable[["Disk"], None]


class Disk:
    """What is on the disk, now and for certain."""

    def __init__(self) -> None:
        self.directories: dict[Path, _Directory] = {}

    @classmethod
    def holding(cls, root: Path) -> Disk:
        """A disk on which all that lies under a directory now is certain."""
        disk = cls()
        for path in root.rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                directory = disk.directory(path.parent)
                directory.now[path.name] = directory.certain[path.name] = _Content(data, data)
        return disk

    def directory(self, path: Path) -> _Directory:
        return self.directories.setdefault(path, _Directory())

    def content(self, path: Path) -> _Content:
        return self.directory(path.parent).now.setdefault(path.name, _Content())

    def after_cut(self, rng: random.Random) -> dict[Path, bytes]:
        """The files that are there when the power comes back."""
        files: dict[Path, bytes] = {}
        for path, directory in self.directories.items():
            for name in {**directory.certain, **directory.now}:
                maps = (directory.certain, directory.now) if rng.random() < 0.5 else (directory.now,)
                content = maps[0].get(name)
                if content is not None:
                    files[path / name] = _after_cut(content, rng)
        return files


def _after_cut(content: _Content, rng: random.Random) -> bytes:
    if content.now == content.certain or rng.random() < 0.3:
        return content.now
    # Length and content reach the disk apart: the rest may read as zeros.
    rest = max(0, len(content.now) - len(content.certain))
    return content.certain if rng.random() < 0.5 else content.certain + bytes(rest)


@dataclass
class RecordingFileOps(FileOps):
    """Does everything for real, and remembers it as changes to a :class:`Disk`."""

    root: Path
    changes: list[Change] = field(default_factory=list[Change])

    def add(self, change: Change) -> None:
        self.changes.append(change)

    @override
    def open_append(self, path: Path) -> FileIO:
        file = super().open_append(path)
        self.add(lambda disk: _note(disk.content(path)))
        return file

    @override
    def write(self, file: FileIO, data: bytes | memoryview) -> None:
        path, copied = Path(str(file.name)), bytes(data)
        super().write(file, data)

        def change(disk: Disk) -> None:
            disk.content(path).now += copied

        self.add(change)

    @override
    def write_at(self, file: FileIO, start: int, data: bytes) -> None:
        path = Path(str(file.name))
        super().write_at(file, start, data)

        def change(disk: Disk) -> None:
            content = disk.content(path)
            content.now = content.now[:start].ljust(start, b"\0") + data + content.now[start + len(data) :]

        self.add(change)

    @override
    def truncate(self, file: FileIO, size_bytes: int) -> None:
        path = Path(str(file.name))
        super().truncate(file, size_bytes)

        def change(disk: Disk) -> None:
            content = disk.content(path)
            content.now = content.now[:size_bytes]

        self.add(change)

    @override
    def allocate(self, file: FileIO, size_bytes: int) -> None:
        return None  # its content is nothing

    @override
    def sync(self, file: FileIO) -> None:
        path = Path(str(file.name))

        def change(disk: Disk) -> None:
            content = disk.content(path)
            content.certain = content.now

        self.add(change)

    @override
    def sync_dir(self, path: Path) -> None:
        def change(disk: Disk) -> None:
            directory = disk.directory(path)
            directory.certain = dict(directory.now)

        self.add(change)

    @override
    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)

        def change(disk: Disk) -> None:
            content = disk.content(source)
            disk.directory(target.parent).now[target.name] = content
            del disk.directory(source.parent).now[source.name]

        self.add(change)

    @override
    def link(self, source: Path, target: Path) -> bool:
        data = source.read_bytes()

        def change(disk: Disk) -> None:
            disk.directory(target.parent).now[target.name] = _Content(data, data)

        self.add(change)
        return super().link(source, target)

    @override
    def remove(self, path: Path) -> None:
        super().remove(path)
        self.add(lambda disk: _note(disk.directory(path.parent).now.pop(path.name, None)))

    @override
    def remove_tree(self, path: Path) -> None:
        super().remove_tree(path)

        def change(disk: Disk) -> None:
            for inner, directory in disk.directories.items():
                if inner.is_relative_to(path):
                    directory.now.clear()

        self.add(change)


def _note(_: object) -> None:
    return None


class WithoutFileSync(RecordingFileOps):
    """A planted fault: content is never synced."""

    @override
    def sync(self, file: FileIO) -> None:
        return None


class WithoutDirectorySync(RecordingFileOps):
    """A planted fault: names are never synced."""

    @override
    def sync_dir(self, path: Path) -> None:
        return None


def cuts(disk: Disk, changes: list[Change], rng: random.Random, *, per_step: int) -> Iterator[dict[Path, bytes]]:
    """The disk after a cut behind each step, several times each."""
    for change in changes:
        change(disk)
        for _ in range(per_step):
            yield disk.after_cut(rng)


def restore(files: dict[Path, bytes], *, old_root: Path, new_root: Path) -> None:
    """Write the files that were under one directory to another."""
    new_root.mkdir(parents=True)
    for path, data in files.items():
        if path.is_relative_to(old_root):
            target = new_root / path.relative_to(old_root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
