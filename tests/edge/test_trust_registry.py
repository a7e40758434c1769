"""A signed model on its way through a real registry that somebody else has the run of."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import httpx
import pytest

from edge.errors import ReleaseTooOld, SignedForOtherName, Unsigned, Untrusted
from edge.formats.gguf import read_gguf
from edge.store.details import details_of
from edge.store.digest import Digest
from edge.store.fetch import pull
from edge.store.manifest import MANIFEST_TYPE, ModelRef
from edge.store.models import ModelStore, PackageFile, StoredModel
from edge.store.network import Network
from edge.store.registry.push import push
from edge.store.sources import RegistrySource
from edge.store.transfer import Control
from edge.trust.keys import TrustFiles
from edge.trust.policy import admit, confirm, insist, sbom_of
from quantize.sbom import attach_sbom
from quantize.signing import SigningKey, sign_model
from tests.edge.registries import Registry, docker_registry
from tests.edge.store_support import assert_sound, write_gguf
from tests.edge.trust_support import make_pair, settings_at

NAME = "tiny:q8"


class Way:
    """A builder, a registry, and a device that enforces."""

    def __init__(self, root: Path, registry: Registry) -> None:
        self.root, self.host = root, registry.host
        self.pair = make_pair(root, "plant")
        self.builder = ModelStore(root / "builder")
        self.settings = settings_at(root / "device")
        self.device = ModelStore(self.settings.store_dir)
        TrustFiles.of(self.settings).add(self.pair.public)

    def publish(self, name: str = NAME, *, fill: bytes, release: int | None) -> StoredModel:
        gguf = write_gguf(self.root / "m.gguf", fill=fill, num_rows=4096)
        model = self.builder.add(name, [PackageFile(gguf, "m.gguf")], details_of(read_gguf(gguf)))
        if release is not None:
            attach_sbom(self.builder, model)
            sign_model(self.builder, name, SigningKey(self.pair.private), release=release)
        target = RegistrySource(self.host, f"models/{model.ref.name}", tag=model.ref.tag)
        push(self.builder, name, target, network=Network(), control=Control(lambda _: None, lambda: False))
        return model

    def move_tag(self, model: StoredModel, name: str = NAME) -> None:
        """What whoever has the registry can do: no byte is changed, and a tag leads elsewhere."""
        ref = ModelRef.parse(name)
        url = f"http://{self.host}/v2/models/{ref.name}/manifests/{ref.tag}"
        data = self.builder.blobs.path(model.digest).read_bytes()
        answer = httpx.put(url, content=data, headers={"Content-Type": MANIFEST_TYPE}, trust_env=False)
        assert answer.status_code == 201

    def pull(self, *, force: bool = False) -> StoredModel:
        def gate(digest: Digest, ref: ModelRef) -> object:
            return admit(self.device, digest, ref, self.settings, force=force)

        return pull(self.device, f"oci://{self.host}/models/{NAME}", admit=gate)

    def refuses(self, kind: type[Untrusted]) -> None:
        before = [(model.ref, model.digest) for model in self.device.list()]
        with pytest.raises(kind):
            self.pull()
        assert [(model.ref, model.digest) for model in self.device.list()] == before
        self.device.collect()
        assert_sound(self.device.root)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Generator[Registry]:
    with docker_registry(tmp_path_factory.mktemp("registry") / "data") as found:
        yield found


@pytest.fixture
def way(tmp_path: Path, registry: Registry) -> Way:
    return Way(tmp_path, registry)


def test_signature_and_bill_come_with_the_model(way: Way) -> None:
    way.publish(fill=b"\x01", release=3)
    model = way.pull()
    verdict = admit(way.device, model.digest, model.ref, way.settings)
    assert (verdict.state, verdict.release, verdict.key_name) == ("trusted", 3, "plant")
    assert sbom_of(way.device, model.digest) is not None


def test_what_is_not_signed_is_refused_before_its_weights_are_fetched(way: Way) -> None:
    model = way.publish("tiny:bare", fill=b"\x02", release=None)
    way.move_tag(model)
    way.refuses(Unsigned)
    way.publish(fill=b"\x02", release=None)
    with pytest.raises(Unsigned):
        way.pull()
    assert not way.device.blobs.has(model.files[0].digest)


def test_a_tag_that_was_moved_to_another_signed_model_is_refused(way: Way) -> None:
    way.publish(fill=b"\x03", release=3)
    way.move_tag(way.publish("tiny:other", fill=b"\x04", release=9))
    way.refuses(SignedForOtherName)


def test_an_old_release_is_refused_unless_somebody_insists(way: Way) -> None:
    old = way.publish(fill=b"\x05", release=1)
    way.publish(fill=b"\x06", release=2)
    new = way.pull()
    confirm(way.device, new.digest, way.settings)
    way.move_tag(old)
    way.refuses(ReleaseTooOld)
    assert way.device.get(NAME).digest == new.digest
    assert way.pull(force=True).digest == old.digest
    way.refuses(ReleaseTooOld)
    insist(way.device, old.digest, old.ref, way.settings)
    assert way.pull().digest == old.digest
