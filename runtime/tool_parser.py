"""An answer taken apart while it is written: what the model thinks, what it says, which tools it calls. Pure.

Nothing is held back but what may yet turn out to be a marker or the white space before one, so that any way to split
the text gives the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field

from runtime.tool_syntax import Gap, ToolSyntax
from runtime.wire import CallDelta

_NAME = re.compile(r"[A-Za-z0-9_.-]*")
_WILD = re.compile(r"[A-Za-z0-9_-]*")
_SCALAR = re.compile(r"[A-Za-z0-9+.-]*")
_WHITE = " \t\n\r\x0b\f"
"""What guides pass over, which look at bytes; to `str`, more is white."""


@dataclass(frozen=True, slots=True)
class Thinking:
    """The markers around what a model thinks."""

    start: str
    end: str


@dataclass(slots=True)
class Reading:
    """What a part of an answer turned out to be."""

    text: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list[CallDelta])


class JsonScanner:
    """Finds the end of one JSON value."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_text = self._escaped = self._is_scalar = False
        self.is_over = False

    def push(self, text: str) -> int:
        """How many of these characters belong to the value."""
        for i, c in enumerate(text):
            if self._is_scalar:
                if not _SCALAR.fullmatch(c):
                    self.is_over = True
                    return i
            elif self._in_text:
                if self._escaped or c == "\\":
                    self._escaped = not self._escaped
                elif c == '"':
                    self._in_text = False
                    self.is_over = not self._depth
            elif c == '"':
                self._in_text = True
            elif c in "{[":
                self._depth += 1
            elif c in "}]":
                self._depth -= 1
                self.is_over = not self._depth
            elif not self._depth:
                self._is_scalar = True
            if self.is_over:
                return i + 1
        return len(text)


class AnswerReader:
    """Reads one answer, bit by bit.

    Args:
        thinking: How the model marks what it thinks; None where it does not.
        is_thinking: Whether the prompt began that for it.
        syntax: How it writes calls; None where it has no tools.
        text_keys: Of each tool, the arguments that are texts, where arguments stand one by one.
        new_id: Makes the id of a call.
    """

    def __init__(
        self, thinking: Thinking | None, *, is_thinking: bool, syntax: ToolSyntax | None,
        text_keys: Mapping[str, Set[str]], new_id: Callable[[], str],
    ) -> None:  # fmt: skip
        self._thinking = thinking
        self._syntax = syntax
        self._text_keys = text_keys
        self._new_id = new_id
        self._held = ""
        self._out = Reading()
        self._num_calls = 0
        self._name = ""
        self._num_arguments: int = 0
        self._is_text = self._is_quoted = False
        self._scanner = JsonScanner()
        self._gap: Gap = ()
        self._behind_gap = self._on_name
        self._at_start = True
        self._state: Callable[[], bool] = self._on_thinking if is_thinking else self._on_opening
        self._was_thinking = False
        self._num_reasoning = 0
        self.has_begun = False
        """Whether a call was begun, be it ever so little of it."""

    def push(self, text: str) -> Reading:
        """Take more of the answer; what is certain comes out."""
        self._was_thinking = self._state == self._on_thinking
        self._held += text
        while self._state():
            pass
        out, self._out = self._out, Reading()
        return out

    def finish(self) -> Reading:
        """The answer is over: what was held back."""
        out = Reading()
        if self._state == self._on_thinking:
            out.reasoning = self._held
        elif self._state in (self._on_opening, self._on_text, self._on_plain_text):
            out.text = self._held
        self._held = ""
        return out

    def count_reasoning(self, num_output: int) -> int:
        """Tokens of thinking, of so many: those up to the step with which it ended. Call it after each `push`."""
        if self._was_thinking or self._state == self._on_thinking:
            self._num_reasoning = num_output
        return self._num_reasoning

    # Each state takes what it knows from what is held; whether there is more to do.

    def _on_opening(self) -> bool:
        """Nothing was said yet: it may be the beginning of a thinking block."""
        said = self._held.lstrip(_WHITE)
        if self._thinking is not None:
            if said.startswith(self._thinking.start):
                self._held = said[len(self._thinking.start) :]
                return self._go(self._on_thinking)
            if self._thinking.start.startswith(said):
                return False
        self._at_start = False
        return self._go(self._on_text)

    def _on_thinking(self) -> bool:
        assert self._thinking is not None, "who thinks has markers"
        said = self._held.lstrip(_WHITE) if self._at_start else self._held
        thought, end, rest = said.partition(self._thinking.end)
        keep = 0 if end else held_back(said, self._thinking.end)
        certain = thought[: len(thought) - keep].rstrip()
        self._out.reasoning += certain
        self._at_start = self._at_start and not certain
        self._held = rest if end else said[len(certain) :]
        if not end:
            return False
        self._at_start = True
        return self._go(self._on_text)

    def _on_text(self) -> bool:
        """What it says, as long as no call begins. After thinking, white space before it is left out."""
        said = self._held.lstrip(_WHITE) if self._at_start else self._held
        syntax = self._syntax
        if syntax is None or syntax.at_start:
            return self._on_beginning(said, syntax)
        text, trigger, rest = said.partition(syntax.trigger)
        certain = (text if trigger else text[: len(text) - held_back(said, syntax.trigger)]).rstrip()
        self._say(certain)
        self._held = rest if trigger else said[len(certain) :]
        return bool(trigger) and self._begin_calls(syntax)

    def _on_beginning(self, said: str, syntax: ToolSyntax | None) -> bool:
        """Where only the beginning can be a call, the rest is passed on as it comes."""
        if syntax is not None:
            start = said.lstrip(_WHITE)
            if start.startswith(syntax.trigger):
                self._held = start[len(syntax.trigger) :]
                return self._begin_calls(syntax)
            if syntax.trigger.startswith(start):
                return False
        self._held = said
        return bool(said) and self._go(self._on_plain_text)

    def _on_plain_text(self) -> bool:
        self._say(self._held)
        self._held = ""
        return False

    def _say(self, text: str) -> None:
        self._out.text += text
        self._at_start = self._at_start and not text

    def _begin_calls(self, syntax: ToolSyntax) -> bool:
        self.has_begun = True
        return self._expect(syntax.after_trigger, self._on_name)

    def _expect(self, gap: Gap, then: Callable[[], bool]) -> bool:
        self._gap, self._behind_gap = gap, then
        return self._go(self._on_gap)

    def _on_gap(self) -> bool:
        while self._gap:
            part = self._gap[0]
            if isinstance(part, str):
                if not self._held.startswith(part):
                    return not part.startswith(self._held) and self._go(self._on_rest)
                self._held = self._held[len(part) :]
            else:
                length = _length(_WILD, self._held)
                if length == len(self._held):
                    return False
                self._held = self._held[length:]
            self._gap = self._gap[1:]
        return self._go(self._behind_gap)

    def _on_name(self) -> bool:
        length = _length(_NAME, self._held)
        if length == len(self._held):
            return False
        self._name, self._held = self._held[:length], self._held[length:]
        self._out.calls.append(CallDelta(self._num_calls, self._new_id(), self._name))
        self._num_calls += 1
        self._num_arguments = 0
        self._scanner = JsonScanner()
        syntax = self._known_syntax
        return self._expect(syntax.middle, self._on_object if syntax.tagged is None else self._on_first_key)

    @property
    def _known_syntax(self) -> ToolSyntax:
        assert self._syntax is not None, "calls have a syntax"
        return self._syntax

    def _on_object(self) -> bool:
        self._pass_on_value()
        return self._scanner.is_over and self._go(self._on_next_call)

    def _pass_on_value(self) -> None:
        length = self._scanner.push(self._held)
        self._argue(self._held[:length])
        self._held = self._held[length:]

    def _argue(self, fragment: str) -> None:
        if fragment:
            self._out.calls.append(CallDelta(self._num_calls - 1, arguments=fragment))

    def _on_first_key(self) -> bool:
        self._argue("{")
        return self._go(self._on_key_or_end)

    def _on_key_or_end(self) -> bool:
        """Another argument, or the end of them."""
        tagged = self._known_syntax.tagged
        assert tagged is not None
        start = (tagged.between if self._num_arguments else "") + tagged.before_key
        if not self._held or (start.startswith(self._held) and start != self._held):
            return False
        behind = self._held[len(start) :]
        if self._held.startswith(start) and (start or _length(_NAME, behind)):
            self._held = behind
            return self._go(self._on_key)
        self._argue("}")
        return self._go(self._on_next_call)

    def _on_key(self) -> bool:
        tagged = self._known_syntax.tagged
        assert tagged is not None
        key, ahead, rest = self._held.partition(tagged.behind_key)
        if not ahead:
            return False
        self._is_text = key in self._text_keys.get(self._name, ())
        self._argue((", " if self._num_arguments else "") + json.dumps(key, ensure_ascii=False) + ": ")
        self._num_arguments += 1
        self._held = rest
        self._scanner, self._is_quoted = JsonScanner(), False
        more = (tagged.text if self._is_text else tagged.value)[0].removeprefix(tagged.behind_key)
        return self._expect((more,), self._on_text_value if self._is_text else self._on_value)

    def _on_text_value(self) -> bool:
        tagged = self._known_syntax.tagged
        assert tagged is not None
        behind = tagged.text[1]
        value, end, rest = self._held.partition(behind)
        certain = value if end else value[: len(value) - held_back(value, behind)]
        if not self._is_quoted and (certain or end):
            self._is_quoted = True
            self._argue('"')
        self._argue(json.dumps(certain, ensure_ascii=False)[1:-1])
        self._held = rest if end else value[len(certain) :]
        if not end:
            return False
        self._argue('"')
        return self._go(self._on_key_or_end)

    def _on_value(self) -> bool:
        self._pass_on_value()
        tagged = self._known_syntax.tagged
        assert tagged is not None
        return self._scanner.is_over and self._expect((tagged.value[1],), self._on_key_or_end)

    def _on_next_call(self) -> bool:
        between = self._known_syntax.between
        first = between[0] if between else None
        if not isinstance(first, str) or between is None:
            return self._go(self._on_rest)
        if self._held.startswith(first):
            return self._expect(between, self._on_name)
        return not first.startswith(self._held) and self._go(self._on_rest)

    def _on_rest(self) -> bool:
        """Behind the calls nothing is said."""
        self._held = ""
        return False

    def _go(self, state: Callable[[], bool]) -> bool:
        self._state = state
        return True


def held_back(text: str, marker: str) -> int:
    """How many characters at the end of a text may begin a marker."""
    for n in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:n]):
            return n
    return 0


def _length(expression: re.Pattern[str], text: str) -> int:
    found = expression.match(text)
    return found.end() if found else 0
