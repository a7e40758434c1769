"""The answer of `/v1/responses` as it comes to be: its items, and the events that tell of them, in OpenAI's order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from runtime import wire
from runtime.api import sse
from runtime.api.errors import Fault
from runtime.api.logprobs import chat_logprobs
from runtime.api.openai_schema import ContentLogprob, Usage
from runtime.api.responses_items import item_id
from runtime.api.responses_schema import (
    Event,
    IncompleteDetails,
    InputDetails,
    Item,
    OutputDetails,
    OutputText,
    Part,
    ReasoningText,
    ResponseFault,
    ResponseObject,
    ResponseUsage,
    Status,
)
from runtime.request import TokenLogprob


class Composer:
    """Makes a response of what the engine gives. One item is open at a time; what opens another closes it.

    Attributes:
        response: As far as it came.
    """

    def __init__(self, response: ResponseObject) -> None:
        self.response = response
        self._sequence_number = 0
        self._events: list[bytes] = []
        self._item: Item | None = None
        self._call = 0
        self._texts: list[str] = []
        self._logprobs: list[ContentLogprob] = []
        self._early: list[TokenLogprob] = []

    def take(self) -> bytes:
        """The events since the last call, as they are sent."""
        events, self._events = self._events, []
        return b"".join(events)

    def begin(self) -> None:
        """The engine accepted the request."""
        self._emit("response.created", response=self.response)
        self._emit("response.in_progress", response=self.response)

    def add(
        self, text: str, logprobs: Sequence[TokenLogprob] | None = None, *, reasoning: str = "",
        calls: Sequence[wire.CallDelta] = (),
    ) -> None:  # fmt: skip
        """Add what a step gave. Tokens without text are the message's only where one is open or comes first: else they
        are markers, or part of a call."""
        if reasoning or calls:
            self._early = []
        if reasoning:
            self.add_reasoning(reasoning)
        is_message = self._item is not None and self._item.type == "message"
        if text or (logprobs and is_message and not calls):
            self.add_text(text, logprobs)
        elif logprobs and not (reasoning or calls or self._item or self.response.output):
            self._early += logprobs
        for c in calls:
            self.add_call(c.index, c.arguments, call_id=c.id, name=c.name)

    def add_reasoning(self, delta: str) -> None:
        """Add to what the model thought."""
        item = self._opened("reasoning")
        self._texts.append(delta)
        self._emit("response.reasoning_text.delta", **self._place(item), delta=delta)

    def add_text(self, delta: str, logprobs: Sequence[TokenLogprob] | None = None) -> None:
        """Add to the text."""
        item = self._opened("message")
        told = chat_logprobs([*self._early, *(logprobs or ())]).content
        self._early = []
        self._texts.append(delta)
        self._logprobs += told
        self._emit("response.output_text.delta", **self._place(item), delta=delta, logprobs=told)

    def add_call(self, index: int, arguments: str, *, call_id: str = "", name: str = "") -> None:
        """Begin a function call, or add to the arguments of the open one.

        Args:
            index: Which of the answer's calls; each follows the one before.
        """
        item = self._item
        if item is None or item.type != "function_call" or self._call != index:
            self._close("completed")
            item = self._open("function_call")
            item.call_id, item.name, item.arguments = call_id, name, ""
            self._call = index
            self._emit("response.output_item.added", output_index=self._index, item=item)
        if arguments:
            self._texts.append(arguments)
            place = {"item_id": item.id, "output_index": self._index}
            self._emit("response.function_call_arguments.delta", **place, delta=arguments)

    def end(self, reason: str, usage: Usage, *, completed_at: int) -> None:
        """The answer is over; its last event is left to :meth:`tell_end`, so that it can be kept before it is told.

        Args:
            reason: The engine's: ``length`` leaves it incomplete.
        """
        is_whole = reason != "length"
        if self._item is None and not self.response.output:
            self._opened("message")  # an empty answer is one
            if self._early:
                self.add_text("")
        self._close("completed" if is_whole else "incomplete")
        response = self.response
        response.status = "completed" if is_whole else "incomplete"
        response.incomplete_details = None if is_whole else IncompleteDetails()
        response.completed_at = completed_at if is_whole else None
        response.usage = _usage(usage)

    def tell_end(self) -> None:
        """The last event of an answer that ended."""
        self._emit(f"response.{self.response.status}", response=self.response)

    def fail(self, fault: Fault) -> None:
        """The answer ends with an error, and no more is told of what is open."""
        self._item = None
        self.response.status = "failed"
        self.response.error = _fault(fault)
        self._emit("response.failed", response=self.response)

    def _opened(self, kind: Literal["message", "reasoning"]) -> Item:
        """The open item, which is of that kind."""
        if self._item is not None and self._item.type == kind:
            return self._item
        self._close("completed")
        item = self._open(kind)
        if kind == "message":
            item.role = "assistant"
        else:
            item.summary = []
        item.content = []
        self._emit("response.output_item.added", output_index=self._index, item=item)
        part: Part = OutputText("") if kind == "message" else ReasoningText("")
        self._emit("response.content_part.added", **self._place(item), part=part)
        return item

    def _open(self, kind: str) -> Item:
        name = item_id(self.response.id, kind, len(self.response.output), is_input=False)
        self._item = Item(type=kind, id=name, status="in_progress")
        self._texts, self._logprobs = [], []
        return self._item

    def _close(self, status: Status) -> None:
        item, self._item = self._item, None
        if item is None:
            return
        item.status = status
        text = "".join(self._texts)
        if item.type == "function_call":
            self._close_call(item, text)
        else:
            self._close_text(item, text)
        self._emit("response.output_item.done", output_index=self._index, item=item)
        self.response.output.append(item)

    def _close_call(self, item: Item, arguments: str) -> None:
        item.arguments = arguments
        place = {"item_id": item.id, "output_index": self._index}
        self._emit("response.function_call_arguments.done", **place, name=item.name, arguments=arguments)

    def _close_text(self, item: Item, text: str) -> None:
        part: Part = ReasoningText(text)
        if item.type == "message":
            part = OutputText(text, logprobs=self._logprobs)
            self._emit("response.output_text.done", **self._place(item), text=text, logprobs=self._logprobs)
        else:
            self._emit("response.reasoning_text.done", **self._place(item), text=text)
        self._emit("response.content_part.done", **self._place(item), part=part)
        item.content = [part]

    @property
    def _index(self) -> int:
        return len(self.response.output)

    def _place(self, item: Item) -> dict[str, Any]:
        return {"item_id": item.id, "output_index": self._index, "content_index": 0}

    def _emit(self, kind: str, **fields: Any) -> None:
        event = Event(type=kind, sequence_number=self._sequence_number, **fields)
        self._sequence_number += 1
        self._events.append(sse.event(kind, msgspec.json.encode(event)))


def _usage(usage: Usage) -> ResponseUsage:
    thought = usage.completion_tokens_details
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputDetails(
            reasoning_tokens=thought.reasoning_tokens if thought and thought.reasoning_tokens else 0
        ),
        total_tokens=usage.total_tokens,
    )


def _fault(fault: Fault) -> ResponseFault:
    """An error as clients read it: OpenAI's code, and ours as the type."""
    message = f"{fault.message} {fault.hint}" if fault.hint else fault.message
    code = "server_error"
    if fault.status < 500:
        code = "rate_limit_exceeded" if fault.status == 429 else "invalid_prompt"
    return ResponseFault(code=code, message=message, type=fault.code, param=fault.field)
