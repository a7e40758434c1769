"""One registry's API: manifests, blobs, ranges of blobs, uploads that go on, referrers.

Source: OCI distribution specification 1.1 (spec.md). What comes from a registry is foreign: bounded, and compared with
the digest it was asked for.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, TypeVar
from urllib.parse import urlsplit

import httpx
import msgspec

from edge.errors import DigestMismatch, InvalidModelFile, SourceUnavailable, StoreError

from ..blobs import Partial
from ..digest import Digest, digest_bytes, digest_file
from ..files import translated
from ..http import MAX_TRIES, RETRY_STATUS, Again, HttpFetcher, retried
from ..manifest import INDEX_TYPE, MANIFEST_TYPE, MAX_DOCUMENT_BYTES, Descriptor, Index, decode, encode
from ..network import Network
from ..transfer import Control
from .auth import HINT, RegistryAuth, credentials_for, read_bounded

DOCKER_MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST_TYPE = "application/vnd.docker.distribution.manifest.list.v2+json"
UPLOAD_BYTES = 8 << 20
"""Of one request of an upload: what a lost connection costs at most. Amazon's registry wants 5 MiB at least."""
_LEAST_UPLOAD_BYTES = 64 << 10
_MAX_RANGE_BYTES = 64 << 20
_MAX_ERROR_BYTES = 64 << 10
_MAX_REFERRERS = 256
_ACCEPT = ", ".join((MANIFEST_TYPE, INDEX_TYPE, DOCKER_MANIFEST_TYPE, DOCKER_LIST_TYPE))
_RANGE = re.compile(r"(?:bytes=)?0-(\d{1,18})")
"""Of an upload. The specification has it without a unit; some registries give one."""
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(?:\d{1,18}|\*)")
_ALIASES = {"docker.io": "registry-1.docker.io", "index.docker.io": "registry-1.docker.io"}
_TRIES_WITH_MIRRORS = 2
_T = TypeVar("_T")
log = logging.getLogger("edge.store")
_IDLE = Control(lambda _: None, lambda: False)


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest or an index, as it came."""

    data: bytes
    media_type: str
    digest: Digest


@dataclass(frozen=True, slots=True)
class Answer:
    """What a registry said, read to its end."""

    status: int
    headers: Mapping[str, str]
    data: bytes

    @property
    def media_type(self) -> str:
        return self.headers.get("Content-Type", "").partition(";")[0].strip()

    @property
    def reason(self) -> str:
        """The registry's own words about a failure, fit for a terminal."""
        try:
            errors = msgspec.json.decode(self.data, type=_Errors).errors
        except msgspec.MsgspecError:
            errors = []
        text = ", ".join(error.message or error.code for error in errors[:3]) or f"status {self.status}"
        return "".join(c if c.isprintable() else "?" for c in text[:300]).rstrip(".")

    def has_error(self, code: str) -> bool:
        """Whether it is a failure of this kind (spec.md, "Error Codes")."""
        return code.encode() in self.data


class _Error(msgspec.Struct, frozen=True):
    code: str = ""
    message: str = ""


class _Errors(msgspec.Struct, frozen=True):
    errors: list[_Error] = []


class RegistryClient:
    """One registry, or one of its mirrors. Used by one thread at a time, and closed by whoever made it.

    Args:
        host: With its port, where it has one.
        prefix: What stands before the names of repositories at a mirror.
        tries: Of each request that fails by the network's fault.
    """

    def __init__(
        self, host: str, network: Network, *, prefix: str = "", control: Control = _IDLE, tries: int = MAX_TRIES
    ) -> None:
        self.host = host
        self._network = network
        self._prefix = prefix
        self._control = control
        self._tries = tries
        self.url = network.base_url(_ALIASES.get(host, host))
        self.auth = RegistryAuth(self.url, credentials_for(network.auth_file, host))
        self._client = network.client({}, auth=self.auth)

    def close(self) -> None:
        """Let go of its connections. Closing twice is fine."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ reading

    def manifest(self, repo: str, reference: str) -> Document:
        """The manifest or index that a tag or a digest names.

        Raises:
            SourceUnavailable: The registry cannot be reached, refuses, or has none.
            DigestMismatch: It is not what the digest says.
        """
        url = self._at(repo, f"manifests/{reference}")
        answer = self._asked("GET", url, headers={"Accept": _ACCEPT}, limit=MAX_DOCUMENT_BYTES)
        self.check(answer, f"{repo}:{reference}")
        document = Document(answer.data, answer.media_type, digest_bytes(answer.data))
        stated = reference if ":" in reference else answer.headers.get("Docker-Content-Digest", "")
        if stated.startswith("sha256:") and stated != document.digest:
            raise DigestMismatch(f"The manifest of {self.host}/{repo}", expected=stated, actual=document.digest)
        return document

    def has_blob(self, repo: str, digest: Digest) -> bool:
        """Whether the registry says that it has the blob; its bytes are not looked at.

        Raises:
            SourceUnavailable: The registry cannot be reached, or refuses.
        """
        answer = self._asked("HEAD", self._at(repo, f"blobs/{digest}"))
        if answer.status == 404:
            return False
        self.check(answer, repo)
        return True

    def blob(self, repo: str, descriptor: Descriptor, *, limit: int = MAX_DOCUMENT_BYTES) -> bytes:
        """A small blob, in memory.

        Raises:
            SourceUnavailable: The registry cannot be reached, refuses, or does not have it.
            InvalidModelFile: It is larger than `limit`.
            DigestMismatch: The bytes are not those of the digest.
        """
        if descriptor.size > limit:
            raise InvalidModelFile(f"A document of {self.host}/{repo}", f"it has {descriptor.size:,} bytes")
        answer = self._asked("GET", self._at(repo, f"blobs/{descriptor.digest}"), limit=descriptor.size)
        self.check(answer, f"{repo}@{descriptor.digest}")
        actual = digest_bytes(answer.data)
        if actual != descriptor.digest:
            raise DigestMismatch(f"A blob of {self.host}/{repo}", expected=descriptor.digest, actual=actual)
        return answer.data

    def fetcher(self, repo: str, digest: Digest, file_name: str) -> HttpFetcher:
        """Fetches a blob into the store, going on where another began."""
        url = self._at(repo, f"blobs/{digest}")
        return HttpFetcher(
            url, file_name, {}, self._network, auth=self.auth, tries=self._tries, is_addressed=True, denied_hint=HINT
        )

    def fetch_range(self, repo: str, digest: Digest, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` (not with it) of a blob. Nothing tells whether they are right: the caller compares.

        Raises:
            SourceUnavailable: The registry cannot be reached, refuses, or gives no ranges.
        """
        if not 0 <= start < stop <= start + _MAX_RANGE_BYTES:
            raise ValueError(f"a range of {start} to {stop}")
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        answer = self._asked("GET", self._at(repo, f"blobs/{digest}"), headers=headers, limit=stop - start)
        self.check(answer, f"{repo}@{digest}")
        found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        answered = (int(found[1]), int(found[2]) + 1) if found else None
        if answer.status != 206 or answered != (start, stop) or len(answer.data) != stop - start:
            raise SourceUnavailable(f"{self.host} gives no part of a blob.", hint="Pull the model again, whole.")
        return answer.data

    def referrers(self, repo: str, digest: Digest) -> list[Descriptor]:
        """What the registry has about a manifest: signatures, bills of material. By its API, else by the tag that
        stands in for one (spec.md, "Unavailable Referrers API").

        Raises:
            SourceUnavailable: The registry cannot be reached, or refuses.
        """
        answer = self._asked(
            "GET", self._at(repo, f"referrers/{digest}"), headers={"Accept": INDEX_TYPE}, limit=MAX_DOCUMENT_BYTES
        )
        is_told = answer.status == 200 and answer.media_type == INDEX_TYPE
        index = self._index_of(answer) if is_told else self._fallback(repo, digest)
        return index.manifests[:_MAX_REFERRERS] if index else []

    def _fallback(self, repo: str, digest: Digest) -> Index | None:
        url = self._at(repo, f"manifests/{fallback_tag(digest)}")
        answer = self._asked("GET", url, headers={"Accept": INDEX_TYPE}, limit=MAX_DOCUMENT_BYTES)
        if answer.status == 404:
            return None
        self.check(answer, repo)
        return self._index_of(answer)

    def _index_of(self, answer: Answer) -> Index:
        try:
            return decode(answer.data, Index, what="The list of referrers")
        except InvalidModelFile as e:
            raise SourceUnavailable(f"{self.host} lists what is attached in a way that cannot be read.") from e

    # ------------------------------------------------------------------ writing

    def put_manifest(self, repo: str, reference: str, data: bytes, media_type: str) -> bool:
        """Give a manifest its name; whatever it leads to is there already. Tells whether the registry took note of its
        subject.

        Raises:
            SourceUnavailable: The registry cannot be reached, or refuses.
            DigestMismatch: It got other bytes.
        """
        url = self._at(repo, f"manifests/{reference}")
        answer = self._asked("PUT", url, headers={"Content-Type": media_type}, content=data)
        self.check(answer, f"{repo}:{reference}")
        digest = digest_bytes(data)
        stated = answer.headers.get("Docker-Content-Digest", digest)
        if stated != digest:
            raise DigestMismatch(f"The manifest at {self.host}/{repo}", expected=digest, actual=stated)
        return "OCI-Subject" in answer.headers

    def put_referrer(self, repo: str, subject: Digest, descriptor: Descriptor, data: bytes) -> None:
        """The same of a manifest with a subject; where the registry does not list it, the stand-in tag does.

        Raises:
            SourceUnavailable, DigestMismatch: As `put_manifest`.
        """
        if self.put_manifest(repo, descriptor.digest, data, descriptor.media_type):
            return
        before = self._fallback(repo, subject) or Index(schema_version=2, media_type=INDEX_TYPE, manifests=[])
        if any(known.digest == descriptor.digest for known in before.manifests):
            return
        index = msgspec.structs.replace(before, media_type=INDEX_TYPE, manifests=[*before.manifests, descriptor])
        self.put_manifest(repo, fallback_tag(subject), encode(index), INDEX_TYPE)

    def put_blob(self, repo: str, data: bytes) -> None:
        """Have the registry take a small blob.

        Raises:
            SourceUnavailable: The registry cannot be reached, or refuses.
        """
        digest = digest_bytes(data)
        if self.has_blob(repo, digest):
            return
        begun = self._asked("POST", (url := self._at(repo, "blobs/uploads/")))
        self.check(begun, repo)
        location = httpx.URL(self.located(url, begun)).copy_merge_params({"digest": str(digest)})
        headers = {"Content-Type": "application/octet-stream"}
        self.check(self._asked("PUT", str(location), headers=headers, content=data), repo)

    def upload(self, repo: str, blob: Descriptor, path: Path, partial: Partial, what: str) -> int:
        """Send a blob, going on where an upload stopped that this partial knows of; gives the bytes that were sent.

        Raises:
            SourceUnavailable: The registry cannot be reached, or refuses.
            DigestMismatch: What arrived are other bytes than the digest's.
            StoreError: The file cannot be read.
        """
        upload = _Upload(self, self._at(repo, "blobs/uploads/"), blob, path, partial, what)
        retried(self.url, self._control, upload.attempt, gained=lambda: upload.reached_bytes, tries=self._tries)
        return upload.sent_bytes

    @property
    def upload_bytes(self) -> int:
        """Of one request of an upload: not more than goes in a second, where there is a rate."""
        rate = self._network.pace.rate_bytes_s
        return min(UPLOAD_BYTES, max(_LEAST_UPLOAD_BYTES, rate)) if rate else UPLOAD_BYTES

    def wait_for(self, num_bytes: int, done_bytes: int, total_bytes: int, message: str) -> None:
        """Tell how far an upload is, and wait until more of it may go. A chunk is sent whole, then waited for: to end
        one in the middle makes registries forget the upload.

        Raises:
            Cancelled: Somebody asked for it.
        """
        self._network.pace.admit(self._control)
        self._control.report(done_bytes, total_bytes, message)
        self._network.pace.take(num_bytes, self._control)

    # ------------------------------------------------------------------ asking

    def _at(self, repo: str, path: str) -> str:
        name = f"library/{repo}" if self.host in _ALIASES and "/" not in repo else repo
        return f"{self.url}/v2/{self._prefix}{name}/{path}"

    def _asked(
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, content: bytes = b"", limit: int = 0
    ) -> Answer:
        return retried(
            self.url, self._control, tries=self._tries,
            attempt=lambda: self.send(method, url, headers=headers or {}, content=content, limit=limit),
        )  # fmt: skip

    def send(
        self, method: str, url: str, *, headers: Mapping[str, str], content: bytes = b"", limit: int = 0
    ) -> Answer:
        """One request and its answer; of a success not more than `limit` bytes, else as much as an error may have.

        Raises:
            Again: The server has too much to do.
            httpx.TransportError: The network failed.
        """
        with self._client.stream(method, url, headers=headers, content=content or None) as response:
            if self.url.startswith("https:") and response.url.scheme != "https":
                raise SourceUnavailable(f"{self.host} leads to a place without TLS.")
            if response.status_code in RETRY_STATUS:
                raise Again(f"it answered {response.status_code}")
            most = limit if response.status_code in (200, 206) else _MAX_ERROR_BYTES
            return Answer(response.status_code, response.headers, read_bounded(response, most))

    def located(self, asked: str, answer: Answer) -> str:
        """Where the next request goes, as an answer has it.

        Raises:
            SourceUnavailable: It does not say, or leads away from TLS.
        """
        base, url = httpx.URL(self.url), httpx.URL(asked).join(answer.headers.get("Location", ""))
        if url.host == base.host and url.scheme != base.scheme:
            url = url.copy_with(scheme=base.scheme, port=base.port)  # a registry behind a proxy that ends TLS
        if "Location" not in answer.headers or (base.scheme == "https" and url.scheme != "https"):
            raise SourceUnavailable(f"{self.host} does not say where the upload goes on, or to a place without TLS.")
        return str(url)

    def check(self, answer: Answer, what: str) -> None:
        """Refuse what is no success.

        Raises:
            SourceUnavailable: It is none.
        """
        match answer.status:
            case 200 | 201 | 202 | 204 | 206:
                return
            case 404:
                raise SourceUnavailable(f"{self.host} has no {what}.", hint="Check the name and the tag.")
            case 401 | 403:
                raise SourceUnavailable(f"{self.host} does not allow {what}: {answer.reason}.", hint=HINT)
            case _:
                raise SourceUnavailable(f"{self.host} refuses {what}: {answer.reason}.")


class _Upload:
    """One blob on its way to a registry: a session there, in chunks, whose place the partial remembers."""

    def __init__(
        self, client: RegistryClient, url: str, blob: Descriptor, path: Path, partial: Partial, what: str
    ) -> None:
        self._client = client
        self._url = url
        self._blob = blob
        self._path = path
        self._partial = partial
        self._what = what
        self._is_new = False
        self.sent_bytes = 0
        self.reached_bytes = 0
        """The furthest that an attempt came."""

    def attempt(self) -> None:
        """Send what the registry does not have yet.

        Raises:
            Again: Another attempt may go on.
            DigestMismatch: The file is not what its digest says.
        """
        location, offset = self._resumed() or self._begun()
        with translated(self._path, "Reading"), self._path.open("rb", buffering=0) as file:
            file.seek(offset)
            while offset < self._blob.size:
                data = file.read(self._client.upload_bytes)
                location = self._sent(location, offset, data)
                offset += len(data)
                self.reached_bytes = max(self.reached_bytes, offset)
        self._finish(location)

    def _resumed(self) -> tuple[str, int] | None:
        location = self._partial.note.validator
        if not location:
            return None
        answer = self._client.send("GET", location, headers={})
        found = _RANGE.fullmatch(answer.headers.get("Range", ""))
        # "0-0" is said both of one byte and of none.
        offset = int(found[1]) + 1 if found and found[1] != "0" else 0
        if answer.status != 204 or offset > self._blob.size:
            self._partial.restart()  # it was given up there, or has expired
            return None
        self._is_new = False
        return self._remembered(location, answer), offset

    def _begun(self) -> tuple[str, int]:
        answer = self._client.send("POST", self._url, headers={})
        if answer.status != 202:
            self._client.check(answer, self._what)
            raise SourceUnavailable(f"{self._client.host} does not take {self._what}: {answer.reason}.")
        self._is_new = True
        return self._remembered(self._url, answer), 0

    def _remembered(self, asked: str, answer: Answer) -> str:
        location = self._client.located(asked, answer)
        self._partial.remember(source=self._what, validator=location, total_bytes=self._blob.size)
        return location

    def _sent(self, location: str, offset: int, data: bytes) -> str:
        self._client.wait_for(len(data), offset, self._blob.size, f"sending {self._what}")
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Range": f"{offset}-{offset + len(data) - 1}",
        }
        if not data:
            raise StoreError(f"{self._path} is shorter than it was.", hint="Pull the model again.")
        answer = self._client.send("PATCH", location, headers=headers, content=data)
        self.sent_bytes += len(data)
        if answer.status in (400, 404, 416):
            raise Again(f"the upload cannot go on there: {answer.reason}")
        self._client.check(answer, self._what)
        return self._remembered(location, answer)

    def _finish(self, location: str) -> None:
        url = httpx.URL(location).copy_merge_params({"digest": str(self._blob.digest)})
        answer = self._client.send("PUT", str(url), headers={})
        if answer.status == 201:
            return
        self._partial.restart()
        if self._is_new and (actual := digest_file(self._path)) != self._blob.digest:
            raise DigestMismatch(
                f"{self._what} of this store", expected=self._blob.digest, actual=actual,
                hint="It is damaged on this device: pull the model again; edge verify shows all that is amiss.",
            )  # fmt: skip
        raise Again(f"what was sent did not arrive: {answer.reason}")


def fallback_tag(digest: Digest) -> str:
    """The tag under which registries without the API keep the list of a manifest's referrers."""
    return f"sha256-{digest.hex}"


@contextmanager
def clients_of(host: str, network: Network, control: Control) -> Generator[Sequence[RegistryClient]]:
    """A registry and its mirrors, in the order of asking: itself first, unless it stands among its mirrors."""
    places = network.mirrors.get(host, ())
    places = places if host in places else (host, *places)
    if network.private_hosts is not None:  # mirrors are the operator's word
        names = {urlsplit(f"//{place}").hostname or "" for place in places if place != host}
        network = replace(network, private_hosts=network.private_hosts | names)
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                RegistryClient(
                    place.partition("/")[0], network, prefix=_prefix(place), control=control,
                    tries=MAX_TRIES if len(places) == 1 else _TRIES_WITH_MIRRORS,
                )
            )
            for place in places
        ]  # fmt: skip


def _prefix(place: str) -> str:
    prefix = place.partition("/")[2].strip("/")
    return f"{prefix}/" if prefix else ""


def first_of(clients: Sequence[RegistryClient], ask: Callable[[RegistryClient], _T]) -> _T:
    """The first good answer of a registry and its mirrors.

    Raises:
        SourceUnavailable, DigestMismatch: None had one; the error is the first's.
    """
    failures: list[SourceUnavailable | DigestMismatch] = []
    for client in clients:
        try:
            return ask(client)
        except (SourceUnavailable, DigestMismatch) as e:
            if len(clients) > 1:
                log.warning("%s: %s", client.host, e.message)
            failures.append(e)
    raise failures[0]
