"""JSON schemas that requests bring: what is taken of them, and whether an answer obeys.

The dialect is JSON Schema 2020-12 without what the decoder cannot hold. What is not in these tables is refused with its
path, never passed over: a constraint that nobody enforces would be a lie.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from decimal import Decimal
from functools import cache
from typing import Any
from urllib.parse import quote

from edge.errors import ConstraintFailed, InvalidRequest
from runtime.json_values import is_list, is_object

MAX_DEPTH = 32
MAX_NODES = 2000
"""Values in a schema, small and large."""
MAX_SCHEMA_CHARS = 128 << 10
MAX_REFERENCES = 200
"""They may form a chain, down which compiler and checker descend."""
MAX_INTERSECTED = 6
"""Patterns and formats in a schema that merges schemas: whether an intersection of expressions is empty takes time
exponential in their number (20 of them: more than 20 s)."""
CHECK_STEPS = 50_000
"""Keywords that the checking of one answer may apply, about half a second's work."""

_TYPES = ("string", "number", "integer", "boolean", "null", "object", "array")
_ANNOTATIONS = frozenset({
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "contentEncoding",
    "contentMediaType", "discriminator",
})  # fmt: skip
_SCHEMA_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_SCHEMA_LISTS = frozenset({"prefixItems", "anyOf", "oneOf", "allOf"})
_SCHEMAS = frozenset({"items", "additionalProperties"})
_URI = "#/~%!$&'()*+,;=:@?"
"""What stands in a URI as it is (RFC 3986, 3.5), escapes among it. Names of definitions may be in any letters, and
programs write references to them as they are."""
_MERGING = frozenset({"allOf", "anyOf", "oneOf", "$ref"})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_texts(value: object) -> bool:
    return is_list(value) and all(isinstance(v, str) for v in value)


def _is_type(value: object) -> bool:
    return value in _TYPES or (is_list(value) and bool(value) and all(v in _TYPES for v in value))


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_reference(value: object) -> bool:
    return value == "#" or (isinstance(value, str) and value.startswith("#/"))


_VALUES: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "type": (_is_type, f"one of {', '.join(_TYPES)}, or a list of them"),
    "enum": (lambda v: is_list(v) and bool(v), "a list of values"),
    "const": (lambda _: True, "a value"),
    "required": (_is_texts, "a list of names"),
    "pattern": (lambda v: isinstance(v, str), "an expression"),
    "format": (lambda v: isinstance(v, str), "a name"),
    "$ref": (_is_reference, "a reference into this schema, such as #/$defs/name"),
    "multipleOf": (_is_positive, "a positive number"),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), (_is_number, "a number")),
    **dict.fromkeys(
        ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), (_is_count, "a count")
    ),
}


class _Walk:
    """One look at a schema, whose references become URIs."""

    def __init__(self) -> None:
        self.num_nodes = self.num_references = self.num_expressions = 0
        self.is_merging = False

    def schema(self, schema: object, path: str, depth: int) -> None:
        path = path[:300]  # names may be long, and each level repeats them
        self._count(path, depth)
        if isinstance(schema, bool):
            return
        schema = _object(schema, path)
        for keyword, value in schema.items():
            if keyword in _SCHEMA_MAPS:
                for name, inner in _object(value, f"{path}.{keyword}").items():
                    self.schema(inner, f"{path}.{keyword}.{name}", depth + 1)
            elif keyword in _SCHEMA_LISTS:
                for i, inner in enumerate(_some(value, f"{path}.{keyword}")):
                    self.schema(inner, f"{path}.{keyword}[{i}]", depth + 1)
            elif keyword in _SCHEMAS:
                self.schema(value, f"{path}.{keyword}", depth + 1)
            else:
                self._value(keyword, value, f"{path}.{keyword}", depth)
            if keyword == "$ref":
                self.num_references += 1
                schema["$ref"] = quote(str(value), safe=_URI)
            self.num_expressions += keyword in ("pattern", "format")
            self.is_merging = self.is_merging or keyword in _MERGING

    def _value(self, keyword: str, value: object, path: str, depth: int) -> None:
        if keyword in _ANNOTATIONS or (keyword.startswith("x-") and keyword != "x-guidance"):
            return
        if keyword not in _VALUES:
            raise InvalidRequest(
                f"'{path[:300]}': the keyword '{keyword[:64]}' is not supported.",
                field=path[:300],
                hint="Leave it out. docs/api.md lists the keywords that are done.",
            )
        fits, what = _VALUES[keyword]
        if not fits(value):
            raise InvalidRequest(f"'{path[:300]}' has to be {what}.", field=path[:300])
        self._data(value, path, depth + 1)

    def _data(self, value: object, path: str, depth: int) -> None:
        """Count what a value holds; `enum` and `const` may hold anything."""
        self._count(path, depth)
        inner = value if is_list(value) else list(value.values()) if is_object(value) else []
        for v in inner:
            self._data(v, path, depth + 1)

    def _count(self, path: str, depth: int) -> None:
        self.num_nodes += 1
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"'{path[:300]}': the schema is nested deeper than {MAX_DEPTH}.", field=path[:300])
        if self.num_nodes > MAX_NODES:
            raise InvalidRequest(f"'{path[:300]}': the schema has more than {MAX_NODES:,} values.", field=path[:300])


def _object(value: object, path: str) -> dict[str, object]:
    if not is_object(value):
        raise InvalidRequest(f"'{path[:300]}' has to be an object.", field=path[:300])
    return value


def _some(value: object, path: str) -> list[object]:
    if not is_list(value) or not value:
        raise InvalidRequest(f"'{path[:300]}' has to be a list of schemas.", field=path[:300])
    return value


def parse_schema(schema: Mapping[str, object], path: str) -> str:
    """A schema as the decoder takes it: checked, bounded, and JSON text.

    Args:
        path: Where the request has it.

    Raises:
        InvalidRequest: It has keywords or values that are not taken, or is too large; the field is the path to them.
    """
    body = {k: v for k, v in schema.items() if k not in ("$schema", "$id")}  # all are read as of one dialect
    walk = _Walk()
    walk.schema(body, path, 0)
    if walk.num_references > MAX_REFERENCES:
        raise InvalidRequest(f"'{path}' has more than {MAX_REFERENCES} references.", field=path)
    if walk.is_merging and walk.num_expressions > MAX_INTERSECTED:
        raise InvalidRequest(
            f"'{path}' has more than {MAX_INTERSECTED} patterns and formats beside allOf, anyOf, oneOf or $ref.",
            field=path,
        )
    text = json.dumps(body, ensure_ascii=False)
    if len(text) > MAX_SCHEMA_CHARS:
        raise InvalidRequest(f"'{path}' is longer than {MAX_SCHEMA_CHARS:,} characters.", field=path)
    return text


# ---------------------------------------------------------------- answers

_steps_left: ContextVar[int] = ContextVar("steps_left")

_Keyword = Callable[[Any, Any, Any, Any], Iterator[Any] | None]


def _counted(keyword: _Keyword) -> _Keyword:
    def apply(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any] | None:
        left = _steps_left.get() - 1
        _steps_left.set(left)
        if left < 0:
            raise RecursionError("too many steps")
        return keyword(validator, value, instance, schema)

    return apply


def _unchecked(_validator: Any, _value: Any, _instance: Any, _schema: Any) -> Iterator[Any]:
    """Patterns are held by the decoder, in linear time. Python's matcher could be made to run for hours."""
    return iter(())


@cache
def _checker() -> Any:
    from jsonschema import Draft202012Validator, validators

    keywords: dict[str, _Keyword] = dict(Draft202012Validator.VALIDATORS)
    additional = keywords["additionalProperties"]

    def additional_properties(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any] | None:
        return None if "patternProperties" in schema else additional(validator, value, instance, schema)

    keywords |= {
        "pattern": _unchecked, "patternProperties": _unchecked, "additionalProperties": additional_properties
    }  # fmt: skip
    untyped: Any = validators
    return untyped.extend(Draft202012Validator, {k: _counted(v) for k, v in keywords.items()})


def _exact(text: str) -> Any:
    """Parse JSON with exact numbers: 0.3 is a multiple of 0.1."""
    return json.loads(text, parse_float=Decimal)


def check_answer(text: str, schema: str) -> None:
    """Make sure that a whole answer obeys a schema, but for its patterns.

    Args:
        schema: As `parse_schema` gave it.

    Raises:
        ConstraintFailed: It does not, or that cannot be told in a second.
    """
    _steps_left.set(CHECK_STEPS)
    try:
        error = next(_checker()(_exact(schema)).iter_errors(_exact(text)), None)
    except (ValueError, ArithmeticError, RecursionError) as e:
        raise ConstraintFailed(f"The answer is not JSON that can be checked: {str(e)[:200]}.") from e
    if error is not None:
        raise ConstraintFailed(
            f"The answer does not obey the schema at {error.json_path[:200]}.",
            hint="A stop string may have cut it: leave 'stop' out.",
        )
