"""Bodies to structs: what is wrong names its field, what is not honoured is refused or listed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from functools import cache
from itertools import islice
from typing import TypeVar

import msgspec
from msgspec import inspect

from edge.errors import InvalidRequest

T = TypeVar("T")

MAX_VALUES = 300_000
"""Of one field: OpenAI takes as many tokens in a request. A body of millions of numbers takes ten times its size in
memory, and a second in which nobody else is answered."""
MAX_PARTS = 10_000
"""Of one field that is an object, which is made of objects in turn: a schema of 0.8 MB, made for a moment before it was
refused, left 6 MiB of Python's memory in use."""
MAX_FIELDS = 1000
"""Of a body. Those that nobody knows cost microseconds each, and a body has room for a million."""
MAX_COLONS = 10_000
"""Where a body without its known fields has no more of them, it can be looked at field by field."""
MAX_WARNINGS = 20
_STRING_OR_COMMA = re.compile(rb'"(?:[^"\\]++|\\.)*+"|,', re.DOTALL)

# A field that asks for something this version does not do, and the values with which it asks for nothing.
_REFUSED: dict[str, tuple[object, ...]] = {
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "truncation": (None, "disabled"),
    "background": (None, False),
    "conversation": (None,),
    "context_management": (None, []),
    "moderation": (None,),
    "container": (None,),
    "mcp_servers": (None, []),
    # samplers of llama-server that are not here
    "mirostat": (None, 0),
    "dynatemp_range": (None, 0),
    "top_n_sigma": (None, 0, -1),
    "adaptive_target": (None, -1),
    "min_keep": (None, 0),
    "samplers": (None, []),
}
_HINTS = {
    ".role": "Roles: system, developer, user, assistant, tool, function.",
    "].type": "Parts are of type 'text' or, for models that see, 'image_url'; "
    "in responses 'input_text', 'output_text' and 'input_image'.",
    "messages": "It is a list of objects with role and content, at least one.",
    "model": "GET /v1/models lists the names.",
}
# Fields without effect on the answer: taken without a word, unless the request is strict.
_INEFFECTIVE = frozenset({"user", "service_tier", "safety_identifier"})
_HARMLESS = _INEFFECTIVE | {"metadata", "store", "parallel_tool_calls", "cache_control"}
_APART = "is_checked_apart"
CHECKED_APART = msgspec.Meta(extra={_APART: True})
"""Of a field whose own fields are looked at elsewhere."""
_is_strict: ContextVar[bool] = ContextVar("is_strict", default=False)


def set_strict(header: str | None, *, by_default: bool) -> None:
    """Say for the request of this task whether fields that would be left out of account are refused.

    Args:
        header: Its `x-edge-strict`.

    Raises:
        InvalidRequest: That is neither true nor false.
    """
    value = {None: by_default, "true": True, "false": False}.get(header and header.lower())
    if value is None:
        raise InvalidRequest(f"x-edge-strict is true or false, got {header!r:.40}.", field="x-edge-strict")
    _is_strict.set(value)


def passed_over(field: str, warning: str) -> str:
    """The warning that a field is left out of account.

    Raises:
        InvalidRequest: The request is strict.
    """
    if _is_strict.get():
        hint = "Leave it out, or ask without x-edge-strict."
        raise InvalidRequest(f"In a strict request every field counts: {warning}.", field=field[:300], hint=hint)
    return warning


def parse_body(body: bytes, kind: type[T]) -> tuple[T, list[str]]:
    """A request, and a warning for each field that was left out of account.

    Args:
        kind: A struct. Its `hints`, where it has any, say what to send instead, by the end of a field's path.

    Raises:
        InvalidRequest: Not JSON, a value of the wrong type or outside its range, or a field that asks for what this
            version does not do.
    """
    try:
        known = frozenset(f.encode_name for f in msgspec.structs.fields(kind))  # pyright: ignore[reportArgumentType]  # kind is a Struct
        check_num_fields(body, known.union(_REFUSED, _HARMLESS))
        raw = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        if len(raw) > MAX_FIELDS:
            raise _too_many_fields()
        for name, value in raw.items():
            check_size(name, bytes(value))
        parsed = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as e:
        message, _, path = str(e).partition(" - at `$")
        field = path.strip("`.") or _missing_field(message)
        where = f"'{field}': " if field else ""
        hints: Mapping[str, str] = getattr(kind, "hints", _HINTS)
        hint = next((h for end, h in hints.items() if field and field.endswith(end)), None)
        raise InvalidRequest(f"{where}{message}.", field=field, hint=hint) from e
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise InvalidRequest(f"The body is not valid JSON: {e}.", hint="Send one JSON object.") from e
    for name in _INEFFECTIVE & known & raw.keys():
        _check_effect(name, raw[name])
    warnings = _check_others({k: v for k, v in raw.items() if k not in known})
    return parsed, (warnings + _warnings_inside(raw, kind))[:MAX_WARNINGS]


def check_num_fields(body: bytes, known: frozenset[str], *, is_list: bool = False) -> None:
    """See that an object, or the objects of a list, do not have unknown fields without number, before each is made an
    object of its own.

    Raises:
        InvalidRequest: They do.
    """
    if (num := body.count(b":")) > MAX_COLONS:
        kind = _raw_fields(known)
        found = msgspec.json.decode(body, type=list[kind]) if is_list else [msgspec.json.decode(body, type=kind)]
        values = (bytes(value) for fields in found for value in msgspec.structs.astuple(fields))
        if num - sum(1 + value.count(b":") for value in values if value) > MAX_COLONS:
            raise _too_many_fields()


@cache
def _raw_fields(names: frozenset[str]) -> type[msgspec.Struct]:
    """A struct of these fields as they stand; others are passed over, at a hundredth of the cost."""
    renamed = {f"field{i}": name for i, name in enumerate(names)}
    return msgspec.defstruct("RawFields", [(f, msgspec.Raw, msgspec.Raw()) for f in renamed], rename=renamed)


def _too_many_fields() -> InvalidRequest:
    return InvalidRequest(f"The body has more than {MAX_FIELDS:,} fields, or unknown ones of too many parts.")


def check_items(body: bytes, list_name: str, known: frozenset[str], refused: frozenset[str]) -> None:
    """Refuse fields of a list's objects that ask for what is not done. `body` was parsed already.

    Raises:
        InvalidRequest: A field of `refused` asks for something.
    """
    items = msgspec.json.decode(body, type=dict[str, msgspec.Raw])[list_name]
    check_num_fields(bytes(items), known | refused, is_list=True)
    if not refused:
        return
    for i, item in enumerate(msgspec.json.decode(items, type=list[dict[str, msgspec.Raw]])):
        for name in item.keys() - known:
            if name in refused and bytes(item[name]) not in (b"null", b"[]"):
                field = f"{list_name}[{i}].{name}"
                raise InvalidRequest(f"'{field}' is not supported by this version.", field=field, hint="Leave it out.")


def check_size(name: str, value: bytes) -> None:
    """Count the commas between the values of a field; those in texts only where there may be too many.

    Raises:
        InvalidRequest: There are.
    """
    most = MAX_PARTS if value.startswith(b"{") else MAX_VALUES
    if value.count(b",") > most:
        commas = (match for match in _STRING_OR_COMMA.finditer(value) if match.end() - match.start() == 1)
        if next(islice(commas, most, None), None) is not None:
            raise InvalidRequest(f"'{name}' holds more than {most:,} values.", field=name, hint="Send several.")


def _missing_field(message: str) -> str | None:
    return message.split("`")[1] if "missing required field `" in message else None


def _check_others(others: Mapping[str, msgspec.Raw]) -> list[str]:
    warnings: list[str] = []
    for name, raw in others.items():
        if name in _REFUSED:
            value: object = msgspec.json.decode(raw)
            if value not in _REFUSED[name]:
                raise InvalidRequest(
                    f"'{name}' is not supported by this version.", field=name, hint="Leave the field out."
                )
        elif name in _HARMLESS:
            _check_effect(name, raw)
        elif len(warnings) < MAX_WARNINGS and bytes(raw) != b"null":
            warnings.append(passed_over(name, f"unknown field '{name[:64]}' was ignored"))
    return warnings


def _check_effect(name: str, raw: msgspec.Raw) -> None:
    """Refuse in a strict request what has no effect in any."""
    if bytes(raw) != b"null":
        passed_over(name, f"'{name}' has no effect here")


# ---------------------------------------------------------------- fields inside of fields


@cache
def _inner_fields(kind: type) -> tuple[frozenset[str], dict[str, inspect.Type]]:
    """The names of a struct's fields, and the types of those in which there are structs."""
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    names = [f.encode_name for f in info.fields] + ([info.tag_field] if info.tag_field else [])
    return frozenset(names), {f.encode_name: f.type for f in info.fields if _holds_structs(f.type)}


def _kinds(kind: inspect.Type) -> Iterator[inspect.Type]:
    """What a value of a type may be."""
    if isinstance(kind, inspect.UnionType):
        for k in kind.types:
            yield from _kinds(k)
    elif not isinstance(kind, inspect.Metadata):
        yield kind
    elif not (kind.extra or {}).get(_APART):  # pyright: ignore[reportUnknownMemberType]  # a dict of anything
        yield from _kinds(kind.type)


def _holds_structs(kind: inspect.Type) -> bool:
    return any(
        isinstance(k, inspect.StructType) or (isinstance(k, inspect.ListType) and _holds_structs(k.item_type))
        for k in _kinds(kind)
    )


def _unknown_inside(raw: msgspec.Raw, kind: inspect.Type, path: str) -> Iterator[tuple[str, str]]:
    """Where there are fields that their struct does not have, and their names. `raw` was parsed as of this kind."""
    first = bytes(memoryview(raw)[:1])
    if first == b"[":
        for k in _kinds(kind):
            if isinstance(k, inspect.ListType) and _holds_structs(k.item_type):
                for item in msgspec.json.decode(raw, type=list[msgspec.Raw]):
                    yield from _unknown_inside(item, k.item_type, path)
    elif first == b"{":
        structs = [k for k in _kinds(kind) if isinstance(k, inspect.StructType)]
        if not structs:
            return
        if len(memoryview(raw)) > MAX_COLONS:
            check_num_fields(bytes(raw), frozenset[str]().union(*(_inner_fields(k.cls)[0] for k in structs)))
        fields = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        for k in structs:
            if k.tag_field and msgspec.json.decode(fields[k.tag_field]) != k.tag:
                continue
            names, inner = _inner_fields(k.cls)
            for name, value in fields.items():
                if name in inner:
                    yield from _unknown_inside(value, inner[name], f"{path}.{name}")
                elif name not in names and bytes(value) not in (b"null", b"[]"):
                    yield path, name


def _warnings_inside(raw: Mapping[str, msgspec.Raw], kind: type) -> list[str]:
    found: dict[tuple[str, str], None] = {}
    for field, inner in _inner_fields(kind)[1].items():
        if field in raw:
            found |= dict.fromkeys(islice(_unknown_inside(raw[field], inner, field), MAX_FIELDS))
    return [
        passed_over(f"{path}.{name}", f"unknown field '{name[:64]}' in {path} was ignored")
        for path, name in sorted(found)[:MAX_WARNINGS]
    ]
