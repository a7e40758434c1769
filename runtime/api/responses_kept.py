"""The kept responses of one API key, and the conversations that they make."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import msgspec

from edge.errors import InvalidRequest, ResponseNotFound, StoreError
from edge.responses import KeptResponse, ResponseStore
from runtime.api.access import BYTES_PER_TOKEN, Meter
from runtime.api.responses_items import is_reference, is_response_id, response_of
from runtime.api.responses_schema import Item, ResponseObject

MAX_CHAIN = 500
"""Responses of one conversation."""
MAX_REFERENCED = 32
"""Responses whose items one request refers to."""
KEEP_S = 30.0
"""How long an answer waits for the disk that is to keep it."""


class _Output(msgspec.Struct):
    """Of a kept response, what a conversation is made of."""

    output: list[Item]


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept for one key.

    Attributes:
        meter: Of the request that asks: what it goes on from is held of its key's day, as its body is.
        max_bytes: Of one conversation: no more than a request could bring.
    """

    store: ResponseStore
    meter: Meter
    max_bytes: int

    @property
    def key(self) -> str:
        """Its id."""
        return self.meter.caller.id

    async def get(self, response_id: str) -> ResponseObject:
        """A response.

        Raises:
            ResponseNotFound: There is none of that id.
            StoreError: The disk failed.
        """
        found = await self._read(response_id, max_responses=1)
        if not found:
            raise ResponseNotFound(response_id)
        return msgspec.json.decode(found[0].body, type=ResponseObject)

    async def delete(self, response_id: str) -> None:
        """Forget a response.

        Raises:
            ResponseNotFound: There is none of that id.
            StoreError: The disk failed.
        """
        found = is_response_id(response_id)
        if not found or not await asyncio.wrap_future(self.store.delete(self.key, response_id)):
            raise ResponseNotFound(response_id)

    async def keep(self, response: ResponseObject, items: Sequence[Item]) -> str | None:
        """Keep a response and what was asked; why it could not be kept."""
        body, asked = msgspec.json.encode(response), msgspec.json.encode(items)
        kept = KeptResponse(response.id, self.key, response.previous_response_id, asked, body)
        written = self.store.keep(kept)
        try:
            async with asyncio.timeout(KEEP_S):
                await asyncio.wrap_future(written)
        except StoreError as e:
            return str(e)
        except TimeoutError:
            return self._given_up(written, response.id)
        return None

    def _given_up(self, written: Future[None], response_id: str) -> str:
        """See that a response that comes to the disk too late does not stay there, since its client is told so."""
        problem = f"The disk did not take it in {KEEP_S:.0f} s."
        if written.cancel():
            return problem
        self.store.delete(self.key, response_id)  # after what is being written; where it fails, the store tells
        return f"{problem} It is still at it; what comes there is deleted again, unless the device stops before."

    async def conversation(self, response_id: str, *, field: str | None = None, with_answer: bool) -> list[Item]:
        """All that was said up to a response, the oldest first.

        Args:
            field: Of the request that names it.
            with_answer: And in it.

        Raises:
            InvalidRequest: It is too long.
            RateLimited: It may use up the day.
            ResponseNotFound: There is no such response, or not all that it goes on from.
            StoreError: The disk failed.
        """
        chain = await self._read(response_id, max_responses=MAX_CHAIN)
        if not chain:
            raise ResponseNotFound(response_id, field=field)
        if (missing := chain[0].previous) is not None:
            if len(chain) < MAX_CHAIN and sum(kept.size_bytes for kept in chain) < self.max_bytes:
                raise ResponseNotFound(missing, field=field)
            raise InvalidRequest(
                f"The conversation before '{response_id}' has more than {MAX_CHAIN:,} responses or "
                f"{self.max_bytes:,} bytes.",
                field=field,
                hint="Begin a new one with what matters of it.",
            )
        self._hold(sum(kept.size_bytes for kept in chain))
        return await asyncio.to_thread(_said, chain, with_answer=with_answer)

    async def resolved(self, items: Iterable[Item]) -> list[Item]:
        """Items, with those that references mean in their place.

        Raises:
            InvalidRequest: They refer to items of too many responses, or bring more than a request could.
            RateLimited: They may use up the day.
            ResponseNotFound: There is no such item.
            StoreError: The disk failed.
        """
        items = list(items)
        wanted = {r for item in items if is_reference(item) and (r := response_of(item.id or "")) is not None}
        known: dict[str | None, Item] = {}
        size_bytes = 0
        for num, response_id in enumerate(wanted, 1):
            found = await self._read(response_id, max_responses=1)
            size_bytes += sum(kept.size_bytes for kept in found)
            if num > MAX_REFERENCED or size_bytes > self.max_bytes:
                raise self._too_much()
            known |= {item.id: item for item in await asyncio.to_thread(_said, found, with_answer=True)}
        meant = [_meant(item, known, i) if is_reference(item) else item for i, item in enumerate(items)]
        names = Counter(item.id for item in items if is_reference(item))
        brought_bytes = await asyncio.to_thread(_size_bytes, names, known)
        if brought_bytes > self.max_bytes:
            raise self._too_much()
        self._hold(brought_bytes)
        return meant

    def _hold(self, size_bytes: int) -> None:
        self.meter.hold(size_bytes // BYTES_PER_TOKEN)

    def _too_much(self) -> InvalidRequest:
        return InvalidRequest(
            f"'input' refers to items of more than {MAX_REFERENCED} responses or {self.max_bytes:,} bytes.",
            field="input",
            hint="Send the items themselves, or previous_response_id.",
        )

    async def _read(self, response_id: str, *, max_responses: int) -> list[KeptResponse]:
        if not is_response_id(response_id):
            return []
        found = self.store.chain(self.key, response_id, max_responses=max_responses, max_bytes=self.max_bytes)
        return await asyncio.wrap_future(found)


def _said(chain: Sequence[KeptResponse], *, with_answer: bool) -> list[Item]:
    said: list[Item] = []
    for i, kept in enumerate(chain, 1):
        said += msgspec.json.decode(kept.items, type=list[Item])
        if i < len(chain) or with_answer:
            said += msgspec.json.decode(kept.body, type=_Output).output
    return said


def _size_bytes(names: Counter[str | None], known: Mapping[str | None, Item]) -> int:
    """Of what references bring, as JSON: an item counts as often as it is named."""
    return sum(count * len(msgspec.json.encode(known[name])) for name, count in names.items())


def _meant(reference: Item, known: Mapping[str | None, Item], number: int) -> Item:
    if (found := known.get(reference.id)) is None:
        raise ResponseNotFound(reference.id or "", kind="item", field=f"input[{number}].id")
    return found
