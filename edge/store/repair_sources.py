"""The places that parts of a damaged file are fetched from: peers, registries, web servers, hubs, sticks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import assert_never
from urllib.parse import urlsplit

import httpx

from edge.config import Settings, listed
from edge.errors import EdgeError, InvalidReference, SourceUnavailable

from .bundle import Bundle
from .details import SOURCE
from .files import translated
from .http import Again, check_status, retried
from .hub import address_of
from .manifest import ModelRef
from .models import ModelStore
from .network import Network
from .registry.client import RegistryClient
from .repair import LayoutSource, MemorySource, Source, read_piece
from .scrub import Piece
from .sources import (
    FileSource,
    HttpSource,
    HubSource,
    PackageSource,
    RegistrySource,
    parse_source,
    without_query,
)
from .transfer import Control

FORMS = (
    "oci://HOST[:PORT] (another appliance), oci://HOST[:PORT]/NAME, https://HOST/FILE.gguf, hf://OWNER/REPO/FILE.gguf, "
    "a bundle's path (.tar), a store's directory, or the model's file"
)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


@dataclass(frozen=True, slots=True)
class PeerSource:
    """A registry, or another appliance, which speaks as one."""

    host: str
    repository: str
    network: Network

    @property
    def name(self) -> str:
        """As it is written."""
        return f"oci://{self.host}/{self.repository}"

    def fetch(self, piece: Piece, control: Control) -> bytes:
        """Ask for the part of the blob."""
        with RegistryClient(self.host, self.network, control=control) as client:
            try:
                return client.fetch_range(self.repository, piece.blob, piece.start, piece.stop)
            except SourceUnavailable:
                if not piece.is_whole:
                    raise
                return client.manifest(self.repository, piece.blob).data  # registries keep manifests apart from blobs


@dataclass(frozen=True, slots=True)
class UrlSource:
    """The model's file on a web server."""

    url: str
    network: Network
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    """Sent to the URL's own host only."""

    @property
    def name(self) -> str:
        """As others may read it."""
        return without_query(self.url)

    def fetch(self, piece: Piece, control: Control) -> bytes:
        """Ask for the part of the file; a broken connection is gone on from."""
        data = bytearray()

        def attempt() -> None:
            self.network.pace.admit(control)
            self._append(data, piece, control)

        retried(self.url, control, attempt, gained=lambda: len(data))
        return bytes(data)

    def _append(self, data: bytearray, piece: Piece, control: Control) -> None:
        at, size = piece.start + len(data), piece.stop - piece.start
        wanted = {"Range": f"bytes={at}-{piece.stop - 1}"}
        with self.network.client(self.headers) as client, client.stream("GET", self.url, headers=wanted) as response:
            self._check(response, at, piece)
            for chunk in response.iter_raw():
                data += chunk[: size - len(data)]
                control.report(len(data), size, f"fetching a part of {self.name}")
                self.network.pace.take(len(chunk), control)
        if len(data) < size:
            raise Again(f"the connection ended at {len(data):,} of {size:,} bytes")

    def _check(self, response: httpx.Response, at: int, piece: Piece) -> None:
        """See that what comes is the part of the file that was asked for."""
        if self.url.startswith("https:") and response.url.scheme != "https":
            raise SourceUnavailable(f"{self.name} leads to a place without TLS.")
        check_status(response, self.url, "A hub's gated model needs HF_TOKEN.")
        if response.status_code != 206 and (at, piece.stop) != (0, piece.blob_bytes):
            raise SourceUnavailable(f"{self.name} gives no parts of files.")
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        is_wanted = found and tuple(map(int, found.groups())) == (at, piece.stop - 1, piece.blob_bytes)
        if response.status_code == 206 and not is_wanted:
            raise SourceUnavailable(f"{self.name} is another file now.")


@dataclass(frozen=True, slots=True)
class HubFileSource:
    """The model's file on a hub."""

    source: HubSource
    network: Network

    @property
    def name(self) -> str:
        """As it is written."""
        return str(self.source)

    def fetch(self, piece: Piece, control: Control) -> bytes:
        """Find the file, and ask for the part."""
        control.check()
        url, headers = address_of(self.source)
        return UrlSource(url, self.network, headers).fetch(piece, control)


@dataclass(frozen=True, slots=True)
class FileCopySource:
    """The model's file on this machine."""

    path: Path

    @property
    def name(self) -> str:
        """Its path."""
        return str(self.path)

    def fetch(self, piece: Piece, control: Control) -> bytes:
        """Read the part."""
        control.check()
        return read_piece(self.path, piece)


@dataclass(frozen=True, slots=True)
class BundleSource:
    """A bundle that somebody exported."""

    path: Path

    @property
    def name(self) -> str:
        """Its path."""
        return str(self.path)

    def fetch(self, piece: Piece, control: Control) -> bytes:
        """Read the part of its blob."""
        with Bundle(self.path) as bundle:
            data = bytearray()
            for part in bundle.open_blob_range(piece.blob, piece.start, piece.stop):
                data += part
                control.report(len(data), piece.stop - piece.start, f"reading {self.path.name}")
            return bytes(data)


def sources_for(settings: Settings, store: ModelStore, models: Sequence[str]) -> list[Source]:
    """Where parts of these models' files may be had, the nearest first: memory, the seed, the peers, their origin."""
    network = Network.of(settings)
    found: list[Source] = [MemorySource(store.blobs)]
    if (settings.seed / "index.json").exists():
        found.append(LayoutSource(settings.seed))
    for host in sorted(listed(settings.peers)):
        found += [PeerSource(host, name, network) for name in sorted({ModelRef.parse(m).name for m in models})]
    for model in models:
        if (text := source_of(store, model)) and (origin := _origin(text, network)):
            found.append(origin)
    return found


def source_of(store: ModelStore, ref: str) -> str | None:
    """Where a model came from, also one that cannot be opened; None where nothing says so."""
    try:
        return store.manifest(ref).annotations.get(SOURCE)
    except EdgeError:
        return None


def _origin(text: str, network: Network) -> Source | None:
    """The place that a model says it came from, if parts of files can be had there."""
    try:
        return _parsed(text, network)
    except InvalidReference:
        return None  # one of another version, or of a package


def named_source(text: str, store: ModelStore, ref: str, network: Network) -> Source:
    """The place that somebody names to repair a model from.

    Raises:
        InvalidReference: Parts of files cannot be had there.
        SourceUnavailable: It is a path, and nothing is there.
    """
    parts = urlsplit(text) if "://" in text else None
    if parts is not None and parts.scheme in ("oci", "http", "https") and parts.path in ("", "/"):
        if parts.scheme == "http":
            network = replace(network, http_hosts=network.http_hosts | {parts.netloc.lower()})
        return PeerSource(parts.netloc.lower(), store.resolve(ref).name, network)
    return _parsed(text, network)


def _parsed(text: str, network: Network) -> Source:
    match source := parse_source(text):
        case RegistrySource():
            return PeerSource(source.host, source.repository, network)
        case HttpSource():
            return UrlSource(source.url, network)
        case HubSource():
            return HubFileSource(source, network)
        case FileSource():
            return _local(source.path)
        case PackageSource():
            raise InvalidReference(f"Parts of {source} cannot be had: it is packed.", hint=f"Places: {FORMS}.")
        case _:
            assert_never(source)


def _local(path: Path) -> Source:
    with translated(path, "Looking at"):
        if (path / "blobs").is_dir():
            return LayoutSource(path)
        if path.is_file():
            return BundleSource(path) if path.suffix == ".tar" else FileCopySource(path)
    raise SourceUnavailable(f"{path} is neither a store nor a file.", hint=f"Places: {FORMS}.")
