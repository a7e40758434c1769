"""Files over HTTP: streamed, resumed with Range and If-Range (RFC 9110 §13.1.5, §14), never believed."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeVar
from urllib.parse import urlsplit

import httpx

from edge import __version__
from edge.errors import DigestMismatch, SourceUnavailable, root_cause

from .blobs import BlobStore, Partial, Staged
from .internet import InternetTransport
from .sources import HttpSource, file_name_of, without_query
from .transfer import Control, Offer, require_room

_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
_MAX_TRIES = 5
"""In a row without a byte gained; a link that gives a little each time goes on for ever."""
_BACKOFF_S = 0.5
_RETRY_STATUS = (408, 425, 429, 500, 502, 503, 504)
_NO_HEAD = (403, 405, 501)
"""What servers answer to HEAD when they, or a signature in the URL, know only GET."""
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_T = TypeVar("_T")


@cache
def _tls_context() -> ssl.SSLContext:
    # Reading the certificates takes 40 ms; a client is made for each request.
    return httpx.create_ssl_context()


class _Again(Exception):
    """The server did something that another try may mend."""


@dataclass(frozen=True, slots=True)
class HttpFetcher:
    """A file at a URL."""

    url: str
    file_name: str
    headers: Mapping[str, str]
    """Sent to the URL's own host only."""
    private_hosts: frozenset[str] | None = None
    """Hosts that may be asked beside those of the internet; None is any. See `edge.store.internet`."""

    @classmethod
    def of(cls, source: HttpSource, private_hosts: frozenset[str] | None = None) -> HttpFetcher:
        return cls(source.url, file_name_of(source), {}, private_hosts)

    def look(self, control: Control) -> Offer:
        """Ask for the file's size by HEAD; a server that does not answer HEAD leaves it open.

        Raises:
            SourceUnavailable: The host cannot be reached, or has no such file.
        """
        return Offer(without_query(self.url), self.file_name, _retried(self.url, control, self._size))

    def _size(self) -> int | None:
        with self._client() as client:
            response = client.head(self.url)
        if response.status_code in _NO_HEAD:
            return None
        _check_status(response, self.url)
        return _length_of(response)

    def _client(self) -> httpx.Client:
        # identity: a compressed transfer has no stable byte positions to resume at.
        headers = {"User-Agent": f"slm-edge/{__version__}", "Accept-Encoding": "identity", **self.headers}
        tls = _tls_context()
        transport = InternetTransport(self.private_hosts, tls) if self.private_hosts is not None else None
        return httpx.Client(
            headers=headers, timeout=_TIMEOUT, follow_redirects=True, max_redirects=10, verify=tls, transport=transport
        )

    def fetch(self, offer: Offer, blobs: BlobStore, partial: Partial, control: Control) -> Staged:
        """Fetch what is missing; if what was there before proves wrong in the end, fetch all of it once more."""
        require_room(blobs, (offer.size_bytes or 0) - partial.size_bytes, partial)
        had_bytes = partial.size_bytes > 0
        staged = self._fetch(offer, blobs, partial, control)
        if offer.digest and staged.digest != offer.digest and had_bytes:
            partial.restart()
            staged = self._fetch(offer, blobs, partial, control)
        if offer.digest and staged.digest != offer.digest:
            raise DigestMismatch(offer.source, expected=offer.digest, actual=staged.digest)
        return staged

    def _fetch(self, offer: Offer, blobs: BlobStore, partial: Partial, control: Control) -> Staged:
        def attempt() -> None:
            with self._client() as client:
                _Transfer(client, self.url, offer, blobs, partial, control).run()

        _retried(self.url, control, attempt, gained=lambda: partial.size_bytes)
        if digest := partial.published:
            return Staged(blobs.path(digest), digest, blobs.path(digest).stat().st_size)
        return partial.complete()


def _retried(url: str, control: Control, attempt: Callable[[], _T], *, gained: Callable[[], int] = lambda: 0) -> _T:
    tries, before = 0, gained()
    while True:
        control.check()
        try:
            return attempt()
        except (_Again, httpx.TransportError) as e:
            tries, before = (1, gained()) if gained() > before else (tries + 1, before)
            if tries >= _MAX_TRIES:
                what = "cannot be reached" if isinstance(e, httpx.ConnectError) else "stopped answering"
                raise SourceUnavailable(
                    f"{urlsplit(url).netloc} {what}: {root_cause(e)}.",
                    hint="Check the network and pull again to continue.",
                ) from e
            control.pause(_BACKOFF_S * 2 ** (tries - 1))
        except (httpx.InvalidURL, httpx.TooManyRedirects, httpx.DecodingError) as e:
            raise SourceUnavailable(f"The source cannot be used: {e}.") from e


@dataclass(frozen=True, slots=True)
class _Transfer:
    """One request and its answer."""

    client: httpx.Client
    url: str
    offer: Offer
    blobs: BlobStore
    partial: Partial
    control: Control

    def run(self) -> None:
        with self.client.stream("GET", self.url, headers=self._conditions()) as response:
            if self.url.startswith("https:") and response.url.scheme != "https":
                raise SourceUnavailable(f"{self.offer.source} leads to a place without TLS.")
            if response.status_code == 304:
                return
            if response.status_code == 416:
                self.partial.restart()
                raise _Again("the file became shorter")
            _check_status(response, self.url)
            total = self._begin(response)
            self._receive(response, total)

    def _conditions(self) -> dict[str, str]:
        have, note = self.partial.size_bytes, self.partial.note
        is_published = self.partial.published is not None and self.blobs.has_sound(self.partial.published)
        if have and not note.validator and not self.offer.digest:
            self.partial.restart()  # nothing could tell whether the rest belongs to it
            return {}
        if note.validator and (is_published or (have and have == note.total_bytes)):
            return {"If-None-Match" if note.validator.startswith('"') else "If-Modified-Since": note.validator}
        if not have:
            return {}
        resume = {"Range": f"bytes={have}-"}
        return {**resume, "If-Range": note.validator} if note.validator else resume

    def _begin(self, response: httpx.Response) -> int | None:
        if response.status_code == 206:
            total = self._check_range(response)
        else:
            self.partial.restart()
            total = _length_of(response)
            self.partial.remember(source=self.offer.source, validator=_validator_of(response), total_bytes=total)
        require_room(self.blobs, (total or 0) - self.partial.size_bytes, self.partial)
        return total

    def _check_range(self, response: httpx.Response) -> int:
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        known = self.partial.note.total_bytes
        if not found or int(found[1]) != self.partial.size_bytes or known not in (None, int(found[3])):
            self.partial.restart()
            raise _Again("the server answered another range than was asked for")
        return int(found[3])

    def _receive(self, response: httpx.Response, total: int | None) -> None:
        message = f"fetching {self.offer.file_name}"
        self.control.report(self.partial.size_bytes, total, message)
        for chunk in response.iter_raw():
            if total is not None and self.partial.size_bytes + len(chunk) > total:
                self.partial.restart()
                raise _Again("the server sent more than it announced")
            self.partial.write(chunk)
            self.control.report(self.partial.size_bytes, total, message)
        if total is not None and self.partial.size_bytes < total:
            raise _Again(f"the connection ended at {self.partial.size_bytes:,} of {total:,} bytes")


def _check_status(response: httpx.Response, url: str) -> None:
    code, url = response.status_code, without_query(url)
    if code in _RETRY_STATUS:
        raise _Again(f"the server answered {code}")
    if code in (401, 403):
        raise SourceUnavailable(f"{url} is not allowed ({code}).", hint="A hub's gated model needs HF_TOKEN.")
    if code not in (200, 206):
        raise SourceUnavailable(f"{url} answered {code} {response.reason_phrase}.", hint="Check the address.")


def _length_of(response: httpx.Response) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isdigit() and len(text) <= 18 and "Content-Encoding" not in response.headers else None


def _validator_of(response: httpx.Response) -> str:
    # Only a strong validator may stand in If-Range; Last-Modified is one where nothing better is given.
    etag = str(response.headers.get("ETag", ""))
    return etag if etag.startswith('"') else str(response.headers.get("Last-Modified", ""))
