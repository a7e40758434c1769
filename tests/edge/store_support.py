"""What the store's tests share: a model to add, the law that holds at every moment, and a disk that fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from typing_extensions import override

from edge.formats.gguf import read_gguf
from edge.store.details import details_of
from edge.store.files import FileOps
from edge.store.models import ModelStore, PackageFile, StoredModel
from tests.edge.gguf_files import sized_gguf


def add_model(store: ModelStore, ref: str, path: Path, *, move: bool = False) -> StoredModel:
    """Package the GGUF at `path`."""
    return store.add(ref, [PackageFile(path, "model.gguf", move=move)], details_of(read_gguf(path)))


def write_gguf(path: Path, *, num_rows: int = 4, fill: bytes = b"\x01") -> Path:
    """A small sound GGUF; files with another `fill` differ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(sized_gguf(num_rows, fill=fill))
    return path


def assert_sound(root: Path) -> Sequence[StoredModel]:
    """The store's law: what is visible is whole, and every reference leads somewhere."""
    store = ModelStore(root)
    assert store.damaged() == []
    for model in store.list():
        assert all(check.is_good for check in store.verify(model.ref))
    return store.list()


class NoSync(FileOps):
    """Does not wait for the disk: for runs in which no power is cut."""

    @override
    def sync(self, file: FileIO) -> None:
        return None

    @override
    def sync_dir(self, path: Path) -> None:
        return None


class NoLinks(FileOps):
    """A file system without hard links."""

    @override
    def link(self, source: Path, target: Path) -> bool:
        return False


class Killed(BaseException):
    """The process is gone; nothing catches this."""


@dataclass
class KillingFileOps(FileOps):
    """Dies before the operation of the given number, and does nothing after that."""

    die_before: int = 1 << 30
    performed: list[str] = field(default_factory=list[str])

    def die(self) -> None:
        raise Killed

    def step(self, name: str, path: Path | FileIO) -> None:
        if len(self.performed) >= self.die_before:
            self.die()
        shown = path if isinstance(path, Path) else Path(str(path.name))
        self.performed.append(f"{name} {shown.name}")

    @override
    def make_dir(self, path: Path) -> None:
        self.step("make_dir", path)
        super().make_dir(path)

    @override
    def open_append(self, path: Path) -> FileIO:
        self.step("open", path)
        return super().open_append(path)

    @override
    def write(self, file: FileIO, data: bytes | memoryview) -> None:
        self.step("write", file)
        super().write(file, data)

    @override
    def open_update(self, path: Path) -> FileIO:
        self.step("open", path)
        return super().open_update(path)

    @override
    def write_at(self, file: FileIO, start: int, data: bytes) -> None:
        self.step("write_at", file)
        super().write_at(file, start, data)

    @override
    def truncate(self, file: FileIO, size_bytes: int) -> None:
        self.step("truncate", file)
        super().truncate(file, size_bytes)

    @override
    def allocate(self, file: FileIO, size_bytes: int) -> None:
        self.step("allocate", file)

    @override
    def sync(self, file: FileIO) -> None:
        self.step("sync", file)  # a process that dies loses nothing that it wrote, so the disk need not wait

    @override
    def sync_dir(self, path: Path) -> None:
        self.step("sync_dir", path)

    @override
    def rename(self, source: Path, target: Path) -> None:
        self.step("rename", target)
        super().rename(source, target)

    @override
    def link(self, source: Path, target: Path) -> bool:
        self.step("link", target)
        return super().link(source, target)

    @override
    def remove(self, path: Path) -> None:
        self.step("remove", path)
        super().remove(path)

    @override
    def remove_tree(self, path: Path) -> None:
        self.step("remove_tree", path)
        super().remove_tree(path)
