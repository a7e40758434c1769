"""Files of a Hugging Face hub: huggingface-hub finds them and knows the access rights, our own code fetches them.

Its downloader would fill a cache of its own beside the store; ours resumes, can be cancelled and hashes on the way.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from edge.errors import InvalidReference, SourceUnavailable, UnsupportedFormat, root_cause

from .blobs import BlobStore, Partial, Staged
from .digest import Digest
from .http import HttpFetcher
from .network import Network
from .sources import HubSource, is_safe_path, parse_source
from .transfer import Control, Offer

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TIMEOUT_S = 15.0
_RETRIES = 2
_BACKOFF_S = 0.5
_MAX_FILES = 100_000
_WITHOUT_HUB = "Without a hub in reach: edge pull smollm2:135m-instruct, or a file's path."


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    url: str
    commit: str
    size_bytes: int | None
    digest: Digest | None


@dataclass(frozen=True, slots=True)
class HubFetcher:
    """A file of a hub's repository."""

    source: HubSource
    network: Network

    def look(self, control: Control) -> Offer:
        """Ask the hub for the file, its size and, where it stores it as a large file, its sha256."""
        control.check()
        file = self._find()
        source = HubSource(self.source.repo, file.path, file.commit)
        return Offer(str(source), file.path.rpartition("/")[2], file.size_bytes, file.digest)

    def _find(self) -> _File:
        hub = _library()
        _configure(hub, self.network.proxy)
        if hub.constants.HF_HUB_OFFLINE:
            raise SourceUnavailable(f"HF_HUB_OFFLINE keeps {self.source} out of reach.", hint=_WITHOUT_HUB)
        with _hub_errors(self.source):
            path = self.source.file or _only_gguf(self.source, self._ggufs(hub))
            return _describe(hub, self.source, path)

    def _ggufs(self, hub: Any) -> list[str]:
        api = hub.HfApi(library_name="slm-edge")
        entries = api.list_repo_tree(self.source.repo, recursive=True, revision=self.source.revision)
        paths = [str(entry.path) for entry in itertools.islice(entries, _MAX_FILES)]
        return sorted(path for path in paths if path.lower().endswith(".gguf") and is_safe_path(path))

    def fetch(self, offer: Offer, blobs: BlobStore, partial: Partial, control: Control) -> Staged:
        """Fetch the file at the commit that was offered."""
        offered = parse_source(offer.source)
        if not isinstance(offered, HubSource):
            raise InvalidReference(f"{offer.source} is not of a hub.")
        url, headers = address_of(offered)
        return HttpFetcher(url, offer.file_name, headers, self.network).fetch(offer, blobs, partial, control)


def address_of(source: HubSource) -> tuple[str, Mapping[str, str]]:
    """Where a file of a hub is fetched from, and the headers that let one in.

    Raises:
        SourceUnavailable: The hub's library does not know.
    """
    with _hub_errors(source):
        url = _library().hf_hub_url(source.repo, source.file, revision=source.revision)
        return str(url), _library(".utils").build_hf_headers(library_name="slm-edge")


def _library(submodule: str = "") -> Any:
    # Read when the library is imported: it would tell its maker about each download.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    return importlib.import_module(f"huggingface_hub{submodule}")


def _configure(hub: Any, proxy: str) -> None:
    """Let the library ask as often, as long and by the way that we want, and leave the talking to us."""
    hub.configure_http_backend(backend_factory=lambda: _session(proxy))
    for name in ("huggingface_hub", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _session(proxy: str) -> Any:
    """A session of requests that gives up after `_RETRIES`; the library's own retries take 23 s more.

    The library tries again where requests' own errors or a 5xx come out of it, so neither does.
    """
    requests = importlib.import_module("requests")
    retry = importlib.import_module("urllib3").Retry(
        total=_RETRIES,
        backoff_factor=_BACKOFF_S,
        status_forcelist=(500, 502, 503, 504),
        allowed_methods=None,
        raise_on_status=False,
        respect_retry_after_header=False,
    )
    session = requests.Session()
    for scheme in ("https://", "http://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
    if proxy:
        session.proxies = {"http": proxy, "https": proxy}
    ask = session.request

    def request(*args: Any, **options: Any) -> Any:
        try:
            response = ask(*args, **{"timeout": _TIMEOUT_S, **options})
        except (requests.ConnectionError, requests.Timeout) as e:
            raise ConnectionError(str(e)) from e
        if response.status_code >= 500:
            raise OSError(f"it answered {response.status_code} {response.reason}")
        return response

    session.request = request
    return session


def _only_gguf(source: HubSource, ggufs: Sequence[str]) -> str:
    if len(ggufs) == 1:
        return ggufs[0]
    if not ggufs:
        raise UnsupportedFormat(
            f"{source} holds no GGUF file.", hint="Quantize its checkpoint with: edge quantize DIRECTORY."
        )
    listed = "".join(f"\n  hf://{source.repo}/{path}" for path in ggufs[:40])
    raise InvalidReference(f"{source} holds {len(ggufs)} GGUF files.", hint=f"Name one of them:{listed}")


def _describe(hub: Any, source: HubSource, path: str) -> _File:
    url = str(hub.hf_hub_url(source.repo, path, revision=source.revision))
    found = hub.get_hf_file_metadata(url, timeout=_TIMEOUT_S, library_name="slm-edge")
    commit, etag = str(found.commit_hash or ""), str(found.etag or "")
    if not _COMMIT.fullmatch(commit):
        raise SourceUnavailable(f"The hub does not tell which commit {source} is.")
    # A large file's ETag is the sha256 of its bytes; a small one's is a git object's, which is no use here.
    digest = Digest(f"sha256:{etag}") if _SHA256.fullmatch(etag) else None
    size_bytes = found.size if isinstance(found.size, int) and found.size >= 0 else None
    return _File(path, url, commit, size_bytes, digest)


@contextmanager
def _hub_errors(source: HubSource) -> Generator[None]:
    try:
        yield
    # The library's own errors are these (requests' are OSErrors); a hub that answers nonsense gives the others.
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise _translated(e, source) from e


def _translated(error: Exception, source: HubSource) -> SourceUnavailable:
    errors = _library(".errors")
    if isinstance(error, errors.GatedRepoError):
        return SourceUnavailable(f"{source} is gated.", hint="Accept its licence on the hub and set HF_TOKEN.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return SourceUnavailable(f"The hub has no {source.repo}.", hint="A private one needs HF_TOKEN.")
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceUnavailable(f"{source.repo} has no revision '{source.revision}'.")
    if isinstance(error, errors.EntryNotFoundError):
        return SourceUnavailable(f"{source.repo} has no file '{source.file}'.")
    reason = root_cause(error)[:200].rstrip(".")
    if isinstance(error, OSError):
        host = urlsplit(str(_library(".constants").ENDPOINT)).netloc
        return SourceUnavailable(f"The model hub cannot be reached for {source}: {host}: {reason}.", hint=_WITHOUT_HUB)
    return SourceUnavailable(f"The hub's answer about {source} makes no sense: {reason}.")
