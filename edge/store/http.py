"""Files over HTTP: streamed, resumed with Range and If-Range (RFC 9110 §13.1.5, §14), never believed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

import httpx

from edge.errors import DigestMismatch, SourceUnavailable, root_cause

from .blobs import BlobStore, Partial, Staged
from .network import Network
from .sources import HttpSource, file_name_of, without_query
from .transfer import CHECK_EVERY_BYTES, Control, Offer, require_room

MAX_TRIES = 5
"""In a row without a byte gained; a link that gives a little each time goes on for ever."""
_BACKOFF_S = 0.5
RETRY_STATUS = (408, 425, 429, 500, 502, 503, 504)
_NO_HEAD = (403, 405, 501)
"""What servers answer to HEAD when they, or a signature in the URL, know only GET."""
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_T = TypeVar("_T")


class Again(Exception):
    """The server did something that another try may mend."""


@dataclass(frozen=True, slots=True)
class HttpFetcher:
    """A file at a URL."""

    url: str
    file_name: str
    headers: Mapping[str, str]
    """Sent to the URL's own host only."""
    network: Network
    auth: httpx.Auth | None = None
    tries: int = MAX_TRIES
    is_addressed: bool = False
    """The URL can only mean the bytes that the offer states, so that what one place began another may go on with."""
    denied_hint: str = "A hub's gated model needs HF_TOKEN."

    @classmethod
    def of(cls, source: HttpSource, network: Network) -> HttpFetcher:
        return cls(source.url, file_name_of(source), {}, network)

    def look(self, control: Control) -> Offer:
        """Ask for the file's size by HEAD; a server that does not answer HEAD leaves it open.

        Raises:
            SourceUnavailable: The host cannot be reached, or has no such file.
        """
        return Offer(without_query(self.url), self.file_name, self._retried(control, self._size))

    def _size(self) -> int | None:
        with self._client() as client:
            response = client.head(self.url)
        if response.status_code in _NO_HEAD:
            return None
        check_status(response, self.url, self.denied_hint)
        return _length_of(response)

    def _client(self) -> httpx.Client:
        return self.network.client(self.headers, auth=self.auth)

    def _retried(self, control: Control, attempt: Callable[[], _T], gained: Callable[[], int] = lambda: 0) -> _T:
        return retried(self.url, control, attempt, gained=gained, tries=self.tries)

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
            self.network.pace.admit(control)
            with self._client() as client:
                _Transfer(client, self, offer, blobs, partial, control).run()

        if self.is_addressed and partial.size_bytes == offer.size_bytes:
            return partial.complete()
        self._retried(control, attempt, gained=lambda: partial.size_bytes)
        if digest := partial.published:
            return Staged(blobs.path(digest), digest, blobs.path(digest).stat().st_size)
        return partial.complete()


def retried(
    url: str,
    control: Control,
    attempt: Callable[[], _T],
    *,
    gained: Callable[[], int] = lambda: 0,
    tries: int = MAX_TRIES,
) -> _T:
    """Do what may fail by the network's fault, again after a pause where it does.

    Args:
        url: Whose host an error names.
        attempt: Raises `Again` where the server did something that another try may mend.
        gained: Bytes there are; an attempt that brought some begins the counting anew.
        tries: In a row without a byte gained.

    Raises:
        SourceUnavailable: All were in vain, or no other would help.
        Cancelled: Somebody asked for it.
    """
    failed, before = 0, gained()
    while True:
        control.check()
        try:
            return attempt()
        except (Again, httpx.TransportError) as e:
            failed, before = (1, gained()) if gained() > before else (failed + 1, before)
            if failed >= tries:
                what = "cannot be reached" if isinstance(e, httpx.ConnectError) else "stopped answering"
                raise SourceUnavailable(
                    f"{urlsplit(url).netloc} {what}: {root_cause(e)}.",
                    hint="Check the network and try again: what was done is kept.",
                ) from e
            control.pause(_BACKOFF_S * 2 ** (failed - 1))
        except (httpx.InvalidURL, httpx.TooManyRedirects, httpx.DecodingError) as e:
            reason = str(e).rstrip(".")
            raise SourceUnavailable(f"{urlsplit(url).netloc} cannot be used: {reason}.") from e


@dataclass(frozen=True, slots=True)
class _Transfer:
    """One request and its answer."""

    client: httpx.Client
    of: HttpFetcher
    offer: Offer
    blobs: BlobStore
    partial: Partial
    control: Control

    def run(self) -> None:
        with self.client.stream("GET", self.of.url, headers=self._conditions()) as response:
            if self.of.url.startswith("https:") and response.url.scheme != "https":
                raise SourceUnavailable(f"{self.offer.source} leads to a place without TLS.")
            if response.status_code == 304:
                return
            if response.status_code == 416:
                self.partial.restart()
                raise Again("the file became shorter")
            check_status(response, self.of.url, self.of.denied_hint)
            total = self._begin(response)
            self._receive(response, total)

    def _conditions(self) -> dict[str, str]:
        have, note = self.partial.size_bytes, self.partial.note
        if self.of.is_addressed:
            return {"Range": f"bytes={have}-"} if have else {}
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
            total = self._check_size(self._check_range(response))
        else:
            total = self._check_size(_length_of(response))
            self.partial.restart()
            self.partial.remember(source=self.offer.source, validator=_validator_of(response), total_bytes=total)
        require_room(self.blobs, (total or 0) - self.partial.size_bytes, self.partial)
        return total

    def _check_size(self, stated: int | None) -> int | None:
        known = self.offer.size_bytes if self.offer.digest else None  # else the file may have changed since
        if None not in (known, stated) and known != stated:
            raise SourceUnavailable(f"{self.offer.source} has {stated:,} bytes there instead of {known:,}.")
        return stated if known is None else known

    def _check_range(self, response: httpx.Response) -> int:
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        known = self.partial.note.total_bytes
        if not found or int(found[1]) != self.partial.size_bytes or known not in (None, int(found[3])):
            self.partial.restart()
            raise Again("the server answered another range than was asked for")
        return int(found[3])

    def _receive(self, response: httpx.Response, total: int | None) -> None:
        message = f"fetching {self.offer.file_name}"
        self.control.report(self.partial.size_bytes, total, message)
        next_check = self.partial.size_bytes
        for chunk in response.iter_raw():
            if total is None and self.partial.size_bytes >= next_check:
                require_room(self.blobs, CHECK_EVERY_BYTES, self.partial)
                next_check = self.partial.size_bytes + CHECK_EVERY_BYTES
            if total is not None and self.partial.size_bytes + len(chunk) > total:
                self.partial.restart()
                raise Again("the server sent more than it announced")
            self.partial.write(chunk)
            self.control.report(self.partial.size_bytes, total, message)
            self.of.network.pace.take(len(chunk), self.control)
            if self.partial.size_bytes != total and not self.of.network.pace.is_open:
                raise Again("the time for it is over")
        if total is not None and self.partial.size_bytes < total:
            raise Again(f"the connection ended at {self.partial.size_bytes:,} of {total:,} bytes")


def check_status(response: httpx.Response, url: str, denied_hint: str) -> None:
    """Refuse what is no success.

    Raises:
        Again: Another try may get it.
        SourceUnavailable: None would.
    """
    code, url = response.status_code, without_query(url)
    if code in RETRY_STATUS:
        raise Again(f"the server answered {code}")
    if code in (401, 403):
        raise SourceUnavailable(f"{url} is not allowed ({code}).", hint=denied_hint)
    if code not in (200, 206):
        raise SourceUnavailable(f"{url} answered {code} {response.reason_phrase}.", hint="Check the address.")


def _length_of(response: httpx.Response) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isdigit() and len(text) <= 18 and "Content-Encoding" not in response.headers else None


def _validator_of(response: httpx.Response) -> str:
    # Only a strong validator may stand in If-Range; Last-Modified is one where nothing better is given.
    etag = str(response.headers.get("ETag", ""))
    return etag if etag.startswith('"') else str(response.headers.get("Last-Modified", ""))
