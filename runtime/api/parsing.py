"""Bodies to structs: what is wrong names its field, what is not honoured is refused or listed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice
from typing import TypeVar

import msgspec

from edge.errors import InvalidRequest

T = TypeVar("T")

MAX_VALUES = 300_000
"""Of one field: OpenAI takes as many tokens in a request. A body of millions of numbers takes ten times its size in
memory, and a second in which nobody else is answered."""
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
    ".type": "Parts are of type 'text' or, for models that see, 'image_url'.",
    "messages": "It is a list of objects with role and content, at least one.",
    "model": "GET /v1/models lists the names.",
}
# Fields without effect on the answer: taken without a word.
_HARMLESS = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"})


def parse_body(body: bytes, kind: type[T]) -> tuple[T, list[str]]:
    """A request, and a warning for each field that was left out of account.

    Raises:
        InvalidRequest: Not JSON, a value of the wrong type or outside its range, or a field that asks for what this
            version does not do.
    """
    try:
        raw = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        for name, value in raw.items():
            _check_size(name, bytes(value))
        parsed = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as e:
        message, _, path = str(e).partition(" - at `$")
        field = path.strip("`.") or _missing_field(message)
        where = f"'{field}': " if field else ""
        hint = next((h for end, h in _HINTS.items() if field and field.endswith(end)), None)
        raise InvalidRequest(f"{where}{message}.", field=field, hint=hint) from e
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise InvalidRequest(f"The body is not valid JSON: {e}.", hint="Send one JSON object.") from e
    known = {f.encode_name for f in msgspec.structs.fields(kind)}  # pyright: ignore[reportArgumentType]  # kind is a Struct
    return parsed, _check_others({k: v for k, v in raw.items() if k not in known})


def check_items(body: bytes, list_name: str, known: frozenset[str], refused: frozenset[str]) -> list[str]:
    """Warnings for fields of a list's objects that were left out of account. `body` was parsed already.

    Raises:
        InvalidRequest: A field of `refused` asks for something.
    """
    items = msgspec.json.decode(body, type=dict[str, msgspec.Raw])[list_name]
    names: dict[str, None] = {}
    for i, item in enumerate(msgspec.json.decode(items, type=list[dict[str, msgspec.Raw]])):
        for name in item.keys() - known:
            asks = bytes(item[name]) not in (b"null", b"[]")
            if name in refused and asks:
                field = f"{list_name}[{i}].{name}"
                raise InvalidRequest(f"'{field}' is not supported by this version.", field=field, hint="Leave it out.")
            if asks:
                names[name] = None
    return [f"unknown field '{name[:64]}' in {list_name} was ignored" for name in sorted(names)][:20]


def _check_size(name: str, value: bytes) -> None:
    """Count the commas between the values of a field; those in texts only where there may be too many."""
    if value.count(b",") > MAX_VALUES:
        commas = (match for match in _STRING_OR_COMMA.finditer(value) if match.end() - match.start() == 1)
        if next(islice(commas, MAX_VALUES, None), None) is not None:
            raise InvalidRequest(f"'{name}' holds more than {MAX_VALUES:,} values.", field=name, hint="Send several.")


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
        elif name not in _HARMLESS and bytes(raw) != b"null":
            warnings.append(f"unknown field '{name[:64]}' was ignored")
    return warnings[:20]
