"""Push a stored model to a registry: its blobs, its manifest, then what is attached to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from edge.errors import InvalidReference

from ..digest import digest_bytes
from ..manifest import MANIFEST_TYPE, Descriptor
from ..models import ModelStore, StoredModel
from ..network import Network
from ..sources import RegistrySource
from ..transfer import Control
from .client import RegistryClient
from .docker_spec import docker_model


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push did."""

    target: RegistrySource
    """With the manifest's digest."""
    sent_bytes: int
    present_bytes: int
    """Of blobs that the registry had already."""
    num_attached: int
    docker: RegistrySource | None = None
    """The second manifest, in Docker's form."""


@dataclass(frozen=True, slots=True)
class _Push:
    store: ModelStore
    client: RegistryClient
    repository: str
    control: Control

    def missing(self, blobs: Sequence[Descriptor]) -> list[Descriptor]:
        """Those that the registry does not have yet; each once."""
        unique = {blob.digest: blob for blob in blobs}
        return [blob for blob in unique.values() if not self.client.has_blob(self.repository, blob.digest)]

    def send(self, blobs: Sequence[Descriptor]) -> int:
        """Have the registry take these blobs of the store; gives the bytes that were sent."""
        return sum(self._sent(blob) for blob in self.missing(blobs))

    def _sent(self, blob: Descriptor) -> int:
        what = blob.filepath or "a document"

        def waiting() -> None:
            self.control.report(0, blob.size, f"waiting for another push of {what}")

        # The partial holds no bytes here: it is the place that the upload reached, and one push at a time.
        key = f"push {self.client.url} {self.repository} {blob.digest}"
        with self.store.blobs.ingest(key, before_poll=waiting) as partial:
            path = self.store.blobs.path(blob.digest)
            sent_bytes = self.client.upload(self.repository, blob, path, partial, what)
            partial.discard()
            return sent_bytes


def push(
    store: ModelStore,
    ref: str,
    target: RegistrySource,
    *,
    docker_tag: str = "",
    network: Network,
    control: Control,
) -> Pushed:
    """Push a model with all that is attached to it. Blocks: call it from a thread. What is there already is not sent,
    and an upload that was interrupted goes on.

    Args:
        target: Without a tag the model's own is used.
        docker_tag: Give the model a second manifest under this tag, in Docker's form over the same blobs.

    Raises:
        ModelNotFound, InvalidModelFile, StoreError: The model is not in the store, or damaged there.
        InvalidReference: The target names a digest; the model has its own.
        UnsupportedFormat: Docker's form has no place for such a model.
        SourceUnavailable: The registry cannot be reached, or refuses.
        DigestMismatch: The stored bytes are not what they should be.
        Cancelled: Somebody asked for it.
    """
    model = store.get(ref)
    if target.digest:
        raise InvalidReference(f"{target}: a push names a tag.", hint=f"{model.ref} has the digest {model.digest}.")
    target = replace(target, tag=target.tag or model.ref.tag)
    docker = docker_model(model) if docker_tag else None
    with store.lease(model.digest), RegistryClient(target.host, network, control=control) as client:
        pushing = _Push(store, client, target.repository, control)
        blobs = [model.manifest.config, *model.manifest.layers]
        sent_bytes = pushing.send(blobs)
        client.put_manifest(target.repository, target.tag, store.blobs.path(model.digest).read_bytes(), MANIFEST_TYPE)
        attached = [_attach(pushing, model, descriptor) for descriptor in store.referrers(model.digest)]
        if docker:
            client.put_blob(target.repository, docker.config)
            client.put_manifest(target.repository, docker_tag, docker.manifest, MANIFEST_TYPE)
    return Pushed(
        target=replace(target, digest=model.digest),
        sent_bytes=sent_bytes + sum(attached),
        present_bytes=sum({blob.digest: blob.size for blob in blobs}.values()) - sent_bytes,
        num_attached=len(attached),
        docker=replace(target, tag=docker_tag, digest=digest_bytes(docker.manifest)) if docker else None,
    )


def _attach(pushing: _Push, model: StoredModel, descriptor: Descriptor) -> int:
    referrer = pushing.store.read_referrer(descriptor)
    sent_bytes = pushing.send([referrer.config, *referrer.layers])
    data = pushing.store.blobs.path(descriptor.digest).read_bytes()
    entry = msgspec.structs.replace(descriptor, annotations=referrer.annotations)
    pushing.client.put_referrer(pushing.repository, model.digest, entry, data)
    return sent_bytes
