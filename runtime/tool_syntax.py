"""How a model writes calls of tools: found out by rendering calls that are known. Pure.

What the template makes of one call and of three is taken apart at their names and arguments; what stands between is the
syntax. The idea is llama.cpp's (docs/autoparser.md); what is compared, and what for, differs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from edge.errors import InvalidRequest

MAX_CALLS = 16
"""Calls of one answer."""


class Wild(Enum):
    """What differs from call to call, as an expression."""

    ID = "[A-Za-z0-9_-]{1,40}"
    SHORT_ID = "[A-Za-z0-9]{9}"
    COUNT = "[0-9]{1,3}"


Gap = tuple[str | Wild, ...]
"""What stands between names and arguments, in order."""


@dataclass(frozen=True, slots=True)
class Tagged:
    """Arguments that stand one by one, each with its key.

    Attributes:
        before_key: What begins an argument.
        between: What stands between two.
        text: What stands between its key and a value that is a text, and behind it. Texts stand as they are.
        value: The same of any other value, which is JSON.
    """

    before_key: str
    between: str
    text: tuple[str, str]
    value: tuple[str, str]

    @property
    def behind_key(self) -> str:
        """With what a key ends, whatever its value."""
        return _shared(self.text[0], self.value[0])


@dataclass(frozen=True, slots=True)
class ToolSyntax:
    """How calls stand in an answer.

    Attributes:
        opening: Before the first name.
        middle: Between a name and its arguments.
        between: Between arguments and the name of the next call; None where there is one call only.
        closing: After the last arguments.
        tagged: How arguments stand; None where they are one JSON object.
        trigger: With what the opening begins, and nothing else in an answer.
        at_start: Whether that means calls only at the beginning of an answer.
    """

    opening: Gap
    middle: Gap
    between: Gap | None
    closing: Gap
    tagged: Tagged | None
    trigger: str
    at_start: bool = False

    @property
    def after_trigger(self) -> Gap:
        """The rest of the opening."""
        first, *rest = self.opening
        assert isinstance(first, str), "a trigger is a text"
        left = first.removeprefix(self.trigger)
        return (left, *rest) if left else tuple(rest)

    def texts(self) -> Iterator[str]:
        """All that is the same in every answer."""
        for gap in (self.opening, self.middle, self.between or (), self.closing):
            yield from (part for part in gap if isinstance(part, str))
        if (t := self.tagged) is not None:
            yield from (t.before_key, t.between, *t.text, *t.value)


OURS = ToolSyntax(
    opening=('<tool_call>\n{"name": "',),
    middle=('", "arguments": ',),
    between=('}\n</tool_call>\n<tool_call>\n{"name": "',),
    closing=("}\n</tool_call>",),
    tagged=None,
    trigger="<tool_call>",
)
"""For models whose template knows no tools: the form that most others have."""


@dataclass(frozen=True, slots=True)
class SampleCall:
    """A call to render."""

    id: str
    name: str
    arguments: Mapping[str, object]


Render = Callable[[Sequence[SampleCall]], str]
"""The text of an answer with these calls, from the end of what the user said before it; InvalidRequest where there is
none."""

LONG_IDS = ("call_0a1b2c3d4e5f6071", "call_1b2c3d4e5f607182", "call_2c3d4e5f60718293")
SHORT_ID_CHARS = 9
"""Mistral's templates take no others."""
_NAMES = ("zebra_walk", "yak_climb", "xerus_dig")
_KEYS = ("quill", "plume")
_VALUES = ("violet", "indigo", "cobalt")
_NUMBER = 70913
_MARKER = re.compile(r'<[^<>\s]{2,60}>|<[a-z_]{2,40}=|<[a-z_]{2,40} name="|\[[A-Z_]{3,40}\]|[a-z_]{4,30}\[')
_PART_OF_MARKER = re.compile(r"<[^<>\s]*\Z|\[[A-Z_]*\Z")
_AN_ID, _A_COUNT = "\ue000", "\ue001"
"""Private characters that stand for what is wild."""


def find_syntax(
    render: Render, *, header: str, plain: str, ids: Sequence[str], ends: Sequence[str], thinking_end: str
) -> ToolSyntax | None:
    """The syntax of a template's calls; None where it has none that can be followed.

    Args:
        header: What a prompt has between what the user said and the answer.
        plain: The same for an answer in words, with these.
        ids: Of the calls.
        ends: Texts that end an answer.
        thinking_end: What ends a thinking block.

    Raises:
        InvalidRequest: The template refuses calls.
    """
    samples = [SampleCall(i, n, {_KEYS[0]: v}) for i, n, v in zip(ids, _NAMES, _VALUES, strict=True)]
    tagged = None
    one = _take_apart(render(samples[:1]), samples[:1], None)
    if one is None:
        tagged = _find_tagged(lambda arguments: render([SampleCall(ids[0], _NAMES[0], arguments)]))
        one = _take_apart(render(samples[:1]), samples[:1], tagged) if tagged else None
    if one is None:
        return None
    gaps, middles = one
    three = _of_three(render, samples, tagged)
    opening, closing = _without_header(gaps[0], header, thinking_end), _cut(gaps[-1], ends)
    middle = _merged(three[1] if three else middles, ids)
    between = _merged(three[0][1:-1], ids) if three and not any(e in g for e in ends for g in three[0][1:-1]) else None
    trigger, at_start = _trigger(opening)
    if not trigger or trigger in header + plain or middle is None or any(n in "".join(gaps + middles) for n in _NAMES):
        return None
    is_short = len(ids[0]) == SHORT_ID_CHARS

    def gap(text: str) -> Gap:
        return _parts(_without_ids(text, ids), is_short=is_short)

    return ToolSyntax(
        gap(opening), gap(middle), None if between is None else gap(between), gap(closing), tagged, trigger, at_start
    )


def write_arguments(arguments: Mapping[str, str], tagged: Tagged) -> str:
    """Arguments, all texts, as they stand one by one."""
    ahead, behind = tagged.text
    return tagged.between.join(f"{tagged.before_key}{k}{ahead}{v}{behind}" for k, v in arguments.items())


def _take_apart(
    text: str, samples: Sequence[SampleCall], tagged: Tagged | None
) -> tuple[list[str], list[str]] | None:  # fmt: skip
    """What stands before, between and behind the calls; and between each name and its arguments."""
    gaps, middles = list[str](), list[str]()
    for sample in samples:
        gap, name, rest = text.partition(sample.name)
        found = _arguments_of(sample, tagged).search(rest) if name else None
        if found is None:
            return None
        gaps.append(gap)
        middles.append(rest[: found.start()])
        text = rest[found.end() :]
    return [*gaps, text], middles


def _arguments_of(sample: SampleCall, tagged: Tagged | None) -> re.Pattern[str]:
    if tagged is not None:
        return re.compile(re.escape(write_arguments({k: str(v) for k, v in sample.arguments.items()}, tagged)))
    ((key, value),) = sample.arguments.items()
    return re.compile(rf'\{{\s*"{key}"\s*:\s*"{value}"\s*\}}')


def _of_three(
    render: Render, samples: Sequence[SampleCall], tagged: Tagged | None
) -> tuple[list[str], list[str]] | None:  # fmt: skip
    """Three calls taken apart; None where the template writes one only."""
    try:
        return _take_apart(render(samples), samples, tagged)
    except InvalidRequest:
        return None


def _find_tagged(render: Callable[[Mapping[str, object]], str]) -> Tagged | None:
    """How arguments stand that are no JSON object, from calls with none, one and two of them."""

    def behind_name(**arguments: object) -> str:
        return render(arguments).partition(_NAMES[0])[2]

    (key, other), (value, last, _) = _KEYS, _VALUES
    none = behind_name()
    head, has_key, rest = behind_name(**{key: value}).partition(key)
    ahead, has_value, tail = rest.partition(value)
    number_ahead, has_number, number_tail = behind_name(**{key: _NUMBER}).partition(key)[2].partition(str(_NUMBER))
    two = behind_name(**{key: value, other: last}).partition(value)[2]
    gap, has_two, _ = two.partition(other)
    if not (has_key and has_value and has_number and has_two):
        return None
    for cut in range(len(_shared(none, head)), -1, -1):
        close, before = none[cut:], head[cut:]
        if none[:cut].endswith("<") or not (tail.endswith(close) and number_tail.endswith(close)):
            continue  # a marker stays whole
        behind, number_behind = (t[: len(t) - len(close)] for t in (tail, number_tail))
        found = Tagged(
            before, gap[len(behind) : len(gap) - len(before)], (ahead, behind), (number_ahead, number_behind)
        )
        if behind and found.behind_key and gap.startswith(behind) and gap[len(behind) :].endswith(before):
            return found
    return None


def _without_header(text: str, header: str, thinking_end: str) -> str:
    """What of the text before the first name is part of the answer, and of the calls."""
    same = text[: len(_shared(text, header))]
    if begun := _PART_OF_MARKER.search(same):
        same = same[: begun.start()]
    text = text[len(same) :]
    return (text.rpartition(thinking_end)[2] if thinking_end else text).lstrip()


def _cut(text: str, ends: Sequence[str]) -> str:
    found = [at for end in ends if end and (at := text.find(end)) >= 0]
    return text[: min(found)].rstrip() if found else text.rstrip()


def _trigger(opening: str) -> tuple[str, bool]:
    """What tells that calls begin, and whether only at the beginning of the answer; empty where nothing does."""
    if found := _MARKER.match(opening):
        return found[0], False
    return (opening, True) if opening[:1] in ("{", "[") else ("", False)


def _merged(texts: Sequence[str], ids: Sequence[str]) -> str | None:
    """The one text that all of them are but for ids and a number that counts; None where they differ in more."""
    first, *others = (_without_ids(t, ids) for t in texts)
    for other in others:
        if other == first or re.fullmatch(re.escape(first).replace(_A_COUNT, "[0-9]+"), other):
            continue
        head = _shared(first, other).rstrip("0123456789")
        tail = _shared(first[::-1], other[::-1])[::-1].lstrip("0123456789")
        numbers = [t[len(head) : len(t) - len(tail)] for t in (first, other)]
        if not all(n.isdecimal() for n in numbers):
            return None
        first = head + _A_COUNT + tail
    return first


def _without_ids(text: str, ids: Sequence[str]) -> str:
    for call_id in ids:
        text = text.replace(call_id, _AN_ID)
    return text


def _parts(text: str, *, is_short: bool) -> Gap:
    wild = {_AN_ID: Wild.SHORT_ID if is_short else Wild.ID, _A_COUNT: Wild.COUNT}
    return tuple(wild.get(part, part) for part in re.split(f"([{_AN_ID}{_A_COUNT}])", text) if part)


def _shared(one: str, other: str) -> str:
    """What both begin with."""
    length = min(len(one), len(other))
    return one[: next((i for i in range(length) if one[i] != other[i]), length)]
