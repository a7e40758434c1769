"""Pull: from whatever somebody names to a checked model in the store, or to nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import assert_never

from edge.errors import DigestMismatch, InvalidModelFile, InvalidReference, ModelNotFound
from edge.formats.gguf import FILE_TYPES, GgufFile, read_gguf

from .catalog import CatalogEntry, catalog
from .checkpoints import Converter, is_checkpoint
from .details import ModelDetails, Sampling, details_of
from .digest import Digest
from .http import HttpFetcher
from .hub import HubFetcher
from .local import FileFetcher
from .manifest import WEIGHT_TYPE, ModelRef
from .models import ModelStore, PackageFile, StoredModel
from .network import Network
from .packages import PackageFetcher
from .registry.pull import Admit, plan_artifact, pull_artifact
from .sources import (
    FORMS,
    FileSource,
    HttpSource,
    HubSource,
    PackageSource,
    RegistrySource,
    Source,
    file_name_of,
    parse_source,
    without_query,
)
from .transfer import Control, Fetcher, Offer, Progress, expect, free_bytes

__all__ = ["Progress", "PullPlan", "in_catalog", "package_of", "plan", "pull"]


@dataclass(frozen=True, slots=True)
class PullPlan:
    """What a pull would do."""

    source: str
    """Exact: revision and file filled in."""
    ref: ModelRef | None
    """The name it would get; None while only the file's content can tell."""
    file_name: str
    size_bytes: int | None
    """Of the model file; None where the source does not tell beforehand."""
    digest: Digest | None
    is_present: bool
    """The bytes are in the store already."""
    free_bytes: int
    license: str | None


@dataclass(frozen=True, slots=True)
class _Wanted:
    source: Source
    fetcher: Fetcher
    ref: ModelRef | None
    digest: Digest | None
    license: str | None
    sampling: Sampling
    file_name: str


def pull(
    store: ModelStore,
    source: str,
    *,
    name: str | None = None,
    sha256: str | None = None,
    projector: str | None = None,
    converter: Converter | None = None,
    network: Network | None = None,
    admit: Admit = lambda _digest, _ref: None,
    progress: Callable[[Progress], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> StoredModel:
    """Fetch a model into the store. Blocks: call it from a thread. What is in the store already is not fetched.

    Args:
        source: A catalog name, or any form of `edge.store.sources`.
        name: The model's name; by default the catalog's, or one made of the file's name.
        sha256: What the model file must be, 64 hexadecimal digits.
        projector: Where what makes images readable for the model comes from, in any form that `source` has. A directory
            that holds both brings it by itself.
        converter: Makes a GGUF of a checkpoint directory; without one such a source is refused.
        network: How other machines are reached; by default as the environment says. Where it has `private_hosts`, URLs
            and registries are of the internet and of these hosts only; hub and package index are where the device's
            own settings say.
        admit: Looks at what a registry has, its manifest and what is attached being in the store, before the files are
            fetched; raises to refuse it.
        progress: Called often, from this thread.
        cancelled: Asked often; once it is true the pull stops, and a later one goes on from there.

    Raises:
        InvalidReference: Source or name cannot be read, or more than one file fits.
        Forbidden: It is in a private network, and not of the network's `private_hosts`.
        ModelNotFound: It is a bare name, and neither of the catalog nor a file.
        SourceUnavailable: The source cannot be reached or does not have it.
        InvalidModelFile: What came is no sound GGUF.
        DigestMismatch: What came is not what it should be.
        DiskFull: It does not fit on the disk.
        MissingExtra: The source is a checkpoint and there is no converter.
        EdgeError: The checkpoint cannot be converted.
        Cancelled: `cancelled` said so.
        StoreError: The store cannot be written.
    """
    network, control = network or Network(), Control(progress, cancelled)
    if (registry := _registry_of(source)) is not None:
        if sha256 or projector:
            raise InvalidReference(f"{registry} is a whole package.", hint="Insist on a digest with @sha256:…")
        return pull_artifact(store, registry, name=name, network=network, control=control, admit=admit)
    if not projector and (pair := _pair_in(source)) is not None:
        source, projector = pair
    wanted = _resolve(source, name, sha256, network, converter)
    beside = _resolve(projector, None, None, network) if projector else None
    # Looked at first, so that a store that cannot take the model says so before it is fetched.
    store.refs()
    with ExitStack() as stack:
        extra = _projector(store, beside, control, stack) if beside else None
        file, offer = _got(store, wanted, control, stack)
        gguf = _checked(file.path, offer.file_name)
        ref = wanted.ref or derived_ref(offer.file_name, gguf.quantization)
        details = details_of(gguf, source=offer.source, license=wanted.license, sampling=wanted.sampling)
        if extra is None:
            return store.add(ref, [file], details)
        if details.kind != "text":
            raise InvalidModelFile(offer.file_name, f"it is for {details.kind}, and a projector is of no use to it")
        if extra.name == file.name:
            extra = replace(extra, name=f"mmproj-{extra.name}")
        return store.add(ref, [file, extra], replace(details, projector=extra.name))


def _projector(store: ModelStore, wanted: _Wanted, control: Control, stack: ExitStack) -> PackageFile:
    """The smaller file of the two: where it is not what it should be, the model is not fetched."""
    file, offer = _got(store, wanted, control, stack)
    gguf = read_gguf(file.path, what=offer.file_name)
    if not gguf.is_projector:
        raise InvalidModelFile(offer.file_name, "it is no projector (its architecture is not 'clip')")
    if gguf.metadata.get("clip.has_vision_encoder") is not True:
        raise InvalidModelFile(offer.file_name, "it is a projector for other things than images")
    return file


def _got(store: ModelStore, wanted: _Wanted, control: Control, stack: ExitStack) -> tuple[PackageFile, Offer]:
    """A file, there for as long as the stack is open."""
    offer, present = _locate(store, wanted, control)
    if present:
        stack.enter_context(store.lease(present))
        if not store.blobs.has(present):  # collected before it was leased
            return _got(store, wanted, control, stack)
    getting = _in_store(store, offer, present) if present else _fetched(store, wanted, offer, control)
    file = stack.enter_context(getting)
    control.report(0, None, "checking the file")
    return file, offer


def _pair_in(source: str) -> tuple[str, str] | None:
    """A model and its projector, where a directory holds these two GGUFs."""
    directory = Path(source).expanduser()
    if "://" in source or not directory.is_dir() or is_checkpoint(directory):
        return None
    files = sorted(path for path in directory.iterdir() if path.suffix.lower() == ".gguf")
    if len(files) != 2:
        return None
    model, projector = sorted(files, key=lambda path: read_gguf(path).is_projector)
    return str(model), str(projector)


def _registry_of(source: str) -> RegistrySource | None:
    parsed = parse_source(source) if source.lower().startswith("oci://") else None
    return parsed if isinstance(parsed, RegistrySource) else None


def plan(
    store: ModelStore, source: str, *, name: str | None = None, sha256: str | None = None,
    network: Network | None = None,
) -> PullPlan:  # fmt: skip
    """What `pull` would do with the same arguments. The source is asked, nothing is fetched or written.

    Raises:
        InvalidReference, ModelNotFound, SourceUnavailable, DigestMismatch: As `pull`.
    """
    network = network or Network()
    if (registry := _registry_of(source)) is not None:
        return _plan_artifact(store, registry, name, network)
    wanted = _resolve(source, name, sha256, network)
    offer, present = _locate(store, wanted, Control(lambda _: None, lambda: False))
    return PullPlan(
        source=offer.source,
        ref=wanted.ref,
        file_name=offer.file_name,
        size_bytes=store.blobs.path(present).stat().st_size if present else offer.size_bytes,
        digest=offer.digest,
        is_present=present is not None,
        free_bytes=free_bytes(store.blobs),
        license=wanted.license,
    )


def _plan_artifact(store: ModelStore, source: RegistrySource, name: str | None, network: Network) -> PullPlan:
    found = plan_artifact(store, source, name=name, network=network)
    return PullPlan(
        source=str(found.source),
        ref=found.ref,
        file_name=file_name_of(source),
        size_bytes=found.size_bytes,
        digest=found.source.digest,
        is_present=found.is_present,
        free_bytes=free_bytes(store.blobs),
        license=None,
    )


def package_of(store: ModelStore, digest: Digest, file_name: str) -> tuple[PackageFile, ModelDetails]:
    """A model file that the store has under its digest, ready to be added under a name, and what it says of itself.

    Raises:
        InvalidReference: There are no such bytes.
        InvalidModelFile: They are no sound GGUF.
    """
    if not store.blobs.has(digest):
        raise InvalidReference(f"There is no blob {digest}.", hint="Send it first: POST /api/blobs/DIGEST.")
    gguf = _checked(store.blobs.path(digest), file_name)
    return PackageFile(store.blobs.path(digest), _file_name(file_name), WEIGHT_TYPE, digest=digest), details_of(gguf)


def _resolve(
    source: str, name: str | None, sha256: str | None, network: Network, converter: Converter | None = None
) -> _Wanted:  # fmt: skip
    ref = ModelRef.parse(name) if name else None
    digest = Digest.parse(sha256) if sha256 else None
    if found := in_catalog(source):
        known, entry = found
        if digest and digest != entry.digest:
            hint = f"Leave the digest out to take the catalog's, or pull another source; the catalog's: {entry.source}."
            raise DigestMismatch(
                f"The catalog's {known} is another file", expected=digest, actual=entry.digest, hint=hint
            )
        parsed = parse_source(entry.source)
        fetcher = _fetcher_of(parsed, entry, network, converter)
        file_name = entry.title or file_name_of(parsed)
        return _Wanted(parsed, fetcher, ref or known, entry.digest, entry.license, entry.sampling, file_name)
    parsed = parse_source(source)
    if isinstance(parsed, FileSource) and "/" not in source and not parsed.path.exists():
        names = ", ".join(str(known) for known in catalog())
        raise ModelNotFound(
            source, message=f"There is no model or file '{source}' to pull.", hint=f"Sources: {FORMS} ({names})."
        )
    fetcher = _fetcher_of(parsed, None, network, converter)
    return _Wanted(parsed, fetcher, ref, digest, None, Sampling(), file_name_of(parsed))


def in_catalog(source: str) -> tuple[ModelRef, CatalogEntry] | None:
    """What the catalog has under this name."""
    names = {str(known): known for known in catalog()}
    if known := names.get(source):
        return known, catalog()[known]
    same_name = [known for known in catalog() if known.name == source]
    return (same_name[0], catalog()[same_name[0]]) if len(same_name) == 1 else None


def _fetcher_of(source: Source, entry: CatalogEntry | None, network: Network, converter: Converter | None) -> Fetcher:
    match source:
        case HubSource():
            return HubFetcher(source, network)
        case RegistrySource():
            raise InvalidReference(f"{source} is a whole package.", hint=f"Pull it by itself: edge pull {source}.")
        case PackageSource() if entry:
            sizes = (entry.container_size_bytes, entry.size_bytes)
            return PackageFetcher(
                source, entry.container_digest, *sizes, title=entry.title, converter=converter, network=network
            )
        case PackageSource():
            return PackageFetcher(source, converter=converter, network=network)
        case HttpSource():
            return HttpFetcher.of(source, network)
        case FileSource():
            return FileFetcher(source.path, converter)
        case _:
            assert_never(source)


def _locate(store: ModelStore, wanted: _Wanted, control: Control) -> tuple[Offer, Digest | None]:
    """What the source offers, and its digest if the store has those bytes already."""
    # Hashed again, not believed: pulling is how people mend a damaged model.
    if wanted.digest and store.has_sound(wanted.digest):
        source = without_query(str(wanted.source))
        return Offer(source, _file_name(wanted.file_name), None, wanted.digest), wanted.digest
    offer = expect(wanted.fetcher.look(control), wanted.digest)
    offer = replace(offer, file_name=_file_name(offer.file_name))
    is_present = offer.digest and offer.digest != wanted.digest and store.has_sound(offer.digest)
    return offer, offer.digest if is_present else None


@contextmanager
def _in_store(store: ModelStore, offer: Offer, present: Digest) -> Generator[PackageFile]:
    yield PackageFile(store.blobs.path(present), offer.file_name, WEIGHT_TYPE, digest=present)


@contextmanager
def _fetched(store: ModelStore, wanted: _Wanted, offer: Offer, control: Control) -> Generator[PackageFile]:
    """The fetched file, for as long as the block runs. Bytes that proved wrong are thrown away, and those of a
    file of this machine; those of a fetch that was interrupted stay, and the next one goes on from there."""

    def waiting() -> None:
        control.report(0, None, "waiting for another pull of the same file")

    with store.blobs.ingest(f"{wanted.source} {offer.source} {offer.digest}", before_poll=waiting) as partial:
        try:
            staged = wanted.fetcher.fetch(offer, store.blobs, partial, control)
            yield PackageFile(staged.path, offer.file_name, WEIGHT_TYPE, move=True, digest=staged.digest)
        except BaseException as e:
            is_copy = isinstance(wanted.source, FileSource) and not wanted.source.path.is_dir()  # it begins anew anyhow
            if is_copy or isinstance(e, (InvalidModelFile, DigestMismatch)):
                partial.discard()
            raise
        partial.discard()


def _checked(path: Path, what: str) -> GgufFile:
    gguf = read_gguf(path, what=what)
    if not gguf.tensors:
        raise InvalidModelFile(what, "it holds a vocabulary and no tensors")
    if gguf.is_projector:
        raise InvalidModelFile(what, "it is a projector: edge pull MODEL.gguf --projector FILE")
    return gguf


def _file_name(name: str) -> str:
    cleaned = re.sub(r"[^A-Za-z0-9._+-]+", "_", name).lstrip(".")[-200:] or "model"
    return cleaned if cleaned.lower().endswith(".gguf") else f"{cleaned}.gguf"


_QUANTIZATION = re.compile(rf"[-._]({'|'.join(sorted(FILE_TYPES.values(), key=len, reverse=True))})$", re.IGNORECASE)


def derived_ref(file_name: str, quantization: str | None) -> ModelRef:
    """A model name made of a file's: ``SmolLM2-135M-Instruct.Q4_1.gguf`` is ``smollm2-135m-instruct:q4_1``.

    Where the file's name does not end in a type, the tag is the one that the file has.
    """
    stem = re.sub(r"\.gguf$", "", file_name, flags=re.IGNORECASE)
    found = _QUANTIZATION.search(stem)
    name = stem[: found.start()] if found else stem
    tag = found[1] if found else quantization or "latest"
    cleaned = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("_", "-")).strip("-")[:120].strip("-")
    return ModelRef(cleaned or "model", tag.lower())
