"""Deltas between devices: fetched from a real registry instead of the whole, and never a reason to fail."""

from __future__ import annotations

import logging
import random
from collections.abc import Generator, Iterable
from pathlib import Path

import msgspec
import pytest

from edge.errors import DiskFull
from edge.store.blobs import BlobStore
from edge.store.delta import DELTA_BYTES, DELTA_TYPE, attach_delta, delta_for
from edge.store.digest import Digest
from edge.store.fetch import pull
from edge.store.manifest import Descriptor
from edge.store.models import ModelStore, StoredModel
from edge.store.network import Network
from edge.store.registry import pull as registry_pull
from edge.store.registry.push import push
from edge.store.sources import RegistrySource
from edge.store.transfer import Control
from tests.edge.gguf_files import Tensor, gguf_bytes
from tests.edge.registries import Registry, Wire, docker_registry, wire_to
from tests.edge.store_support import NoSync, add_model, assert_sound

IDLE = Control(lambda _: None, lambda: False)
REPO = "models/tiny"


@pytest.fixture
def registry(tmp_path: Path) -> Generator[Registry]:
    with docker_registry(tmp_path / "registry") as found:
        yield found


@pytest.fixture
def wire(registry: Registry) -> Generator[Wire]:
    with wire_to(registry.port) as found:
        yield found


@pytest.fixture
def ggufs(tmp_path: Path) -> tuple[Path, Path]:
    """Two versions of 360 kB."""
    rng = random.Random(1)
    empty = gguf_bytes(tensors=[Tensor("blk.0.weight", (64, 10_000), 2, 360_000)], fill=b"\x00")
    first = bytearray(empty[:-360_000] + rng.randbytes(360_000))
    (tmp_path / "v1.gguf").write_bytes(first)
    for at in range(len(first) - 360_000, len(first), 99):
        first[at] ^= 1
    (tmp_path / "v2.gguf").write_bytes(first)
    return tmp_path / "v1.gguf", tmp_path / "v2.gguf"


@pytest.fixture
def builder(tmp_path: Path, ggufs: tuple[Path, Path], registry: Registry) -> ModelStore:
    """Has pushed both versions, the second with its delta."""
    store = ModelStore(tmp_path / "builder", files=NoSync())
    models = [add_model(store, f"tiny:v{number}", path) for number, path in enumerate(ggufs, 1)]
    attach_delta(store, models[0], models[1], IDLE)
    for model in models:
        push(store, str(model.ref), RegistrySource(registry.host, REPO), network=Network(), control=IDLE)
    return store


@pytest.fixture
def device(tmp_path: Path, ggufs: tuple[Path, Path]) -> ModelStore:
    """Has the first version."""
    store = ModelStore(tmp_path / "device", files=NoSync())
    add_model(store, "tiny:v1", ggufs[0])
    return store


def update(device: ModelStore, wire: Wire) -> StoredModel:
    wire.down_bytes = 0
    return pull(device, f"oci://{wire.host}/{REPO}:v2")


def delta_of(builder: ModelStore) -> tuple[Path, int]:
    (attached,) = builder.referrers(builder.get("tiny:v2").digest, DELTA_TYPE)
    layer = builder.read_referrer(attached).layers[0]
    return builder.blobs.path(layer.digest), layer.size


def test_who_has_the_base_fetches_the_delta(builder: ModelStore, device: ModelStore, wire: Wire) -> None:
    mine, (_, delta_bytes) = builder.get("tiny:v2"), delta_of(builder)
    theirs = update(device, wire)
    assert (theirs.digest, theirs.manifest) == (mine.digest, mine.manifest)
    assert delta_bytes < mine.size_bytes / 8
    assert wire.down_bytes < delta_bytes + 4096
    assert device.referrers(theirs.digest) == []
    assert list(device.blobs.ingest_dir.iterdir()) == []
    assert len(assert_sound(device.root)) == 2
    assert device.collect().num_blobs == 0


def test_who_has_it_not_fetches_the_whole(builder: ModelStore, tmp_path: Path, wire: Wire) -> None:
    store = ModelStore(tmp_path / "empty", files=NoSync())
    assert update(store, wire).digest == builder.get("tiny:v2").digest
    assert wire.down_bytes > 360_000


@pytest.mark.parametrize("damage", ["on the disk of the registry", "of the base"])
def test_a_damaged_delta_is_passed_over(
    damage: str, builder: ModelStore, device: ModelStore, registry: Registry, wire: Wire,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    path, _ = delta_of(builder)
    if damage == "of the base":
        base = device.get("tiny:v1").weights
        base.write_bytes(base.read_bytes()[:-1] + b"\x00")
    else:
        kept = registry.blob(Digest(f"sha256:{path.name}"))
        data = bytearray(kept.read_bytes())
        data[len(data) // 2] ^= 1
        kept.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert update(device, wire).digest == builder.get("tiny:v2").digest
    assert "is fetched whole, its delta is of no use" in caplog.text
    assert wire.down_bytes > 360_000
    assert all(check.is_good for check in device.verify("tiny:v2"))


@pytest.mark.parametrize("case", ["no room for the result", "another size than was said"])
def test_a_useless_delta_leaves_nothing_and_the_whole_comes(
    case: str, builder: ModelStore, device: ModelStore, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise DiskFull(required_bytes=2, available_bytes=1)

    def lied(layer: Descriptor, referrers: Iterable[Descriptor], blobs: BlobStore) -> Descriptor | None:
        found = delta_for(layer, referrers, blobs)
        return found and msgspec.structs.replace(found, annotations={**found.annotations, DELTA_BYTES: "1"})

    if case == "no room for the result":
        monkeypatch.setattr(registry_pull, "rebuilt", full)
    else:
        monkeypatch.setattr(registry_pull, "delta_for", lied)
    assert update(device, wire).digest == builder.get("tiny:v2").digest
    assert wire.down_bytes > 360_000
    assert list(device.blobs.ingest_dir.iterdir()) == []
