"""JSON schemas by number: nested, with references, bounds, patterns and formats, in the letters of many languages, and
of answers that come to an end."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

Schema = dict[str, Any]
NAMES = (
    "name", "age", "größe", "名前", "prix (€)", "emoji 😀", 'a "quoted" one', "back\\slash", "a/b~c", "été", "x",
    "$id_", "اسم", "is valid?", "line\nbreak",
)  # fmt: skip
WORDS = ("red", "green", "blau", "青", "été", "", " ", "a\tb", '"', "\\", "😀", "null", "17", "ß")
PATTERNS = (
    "^[A-Z]{2}-[0-9]{3}$", "^(red|green|blau)$", "^[a-z]{1,8}@[a-z]{1,8}\\.(com|org)$", "^\\d{4}-\\d{2}$",
    "^[αβγ]{1,3}$", "^(a|b){2,5}$", "^\\S{1,6}$", "^[0-9a-f]{8}$", "^x?y{0,3}z$", "^(?:ab|cd)+$",
)  # fmt: skip
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "ipv6", "duration")
"""Those that need no more than 36 letters."""


class _Maker:
    """One schema."""

    def __init__(self, number: int) -> None:
        self._rng = random.Random(number)
        self._definitions: dict[str, Schema] = {}
        self._expressions_left = 6
        """So many the appliance takes where schemas are merged."""

    def whole(self) -> Schema:
        made = self._object(3) if self._rng.random() < 0.8 else self._any(3)
        return {**made, "$defs": self._definitions} if self._definitions else made

    def _any(self, depth: int) -> Schema:
        leaves = [
            self._string, self._pattern, self._format, self._integer, self._number, self._multiple, self._enum,
            self._const, self._simple, self._nullable,
        ]  # fmt: skip
        inner: list[Callable[[int], Schema]] = [
            self._object,
            self._array,
            self._tuple,
            self._any_of,
            self._one_of,
            self._reference,
            self._all_of,
            self._map,
        ]
        if depth > 0 and self._rng.random() < 0.45:
            return self._rng.choice(inner)(depth - 1)
        return self._rng.choice(leaves)()

    # ---------------------------------------------------------------- plain values

    def _string(self) -> Schema:
        least = self._rng.choice([0, 0, 1, 4])
        return {"type": "string", "minLength": least, "maxLength": least + self._rng.randint(1, 12)}

    def _pattern(self) -> Schema:
        self._expressions_left -= 1
        if self._expressions_left < 0:
            return self._string()
        return {"type": "string", "pattern": self._rng.choice(PATTERNS), "maxLength": 20}

    def _format(self) -> Schema:
        self._expressions_left -= 1
        if self._expressions_left < 0:
            return self._string()
        return {"type": "string", "format": self._rng.choice(FORMATS), "maxLength": 36}

    def _integer(self) -> Schema:
        low = self._rng.choice([0, 1, -5, -1000, 10**9, -(10**15)])
        lower = self._rng.choice(["minimum", "exclusiveMinimum"])
        upper = self._rng.choice(["maximum", "exclusiveMaximum"])
        return {"type": "integer", lower: low, upper: low + self._rng.choice([2, 9, 150, 10**6])}

    def _number(self) -> Schema:
        low = self._rng.choice([0, -1.5, 0.25, 100, -273.15])
        lower = self._rng.choice(["minimum", "exclusiveMinimum"])
        upper = self._rng.choice(["maximum", "exclusiveMaximum"])
        high = low + self._rng.choice([0.5, 1, 99.5])
        return {"type": "number", lower: low, upper: high, "multipleOf": 0.01}  # else its digits go on for ever

    def _multiple(self) -> Schema:
        step = self._rng.choice([2, 5, 7, 10])
        return {"type": "integer", "multipleOf": step, "minimum": 0, "maximum": step * self._rng.randint(1, 40)}

    def _enum(self) -> Schema:
        values: list[Any] = [*WORDS, 0, -1, 2.5, True, None, [1, "a"], {"k": "é"}]
        return {"enum": self._rng.sample(values, self._rng.randint(1, 6))}

    def _const(self) -> Schema:
        return {"const": self._rng.choice([*WORDS, 3, {"a": [1, {"b": None}]}])}

    def _simple(self) -> Schema:
        return {"type": self._rng.choice(["boolean", "null"])}

    def _nullable(self) -> Schema:
        return {"type": ["string", "null"], "maxLength": 8}

    # ---------------------------------------------------------------- what holds others

    def _object(self, depth: int) -> Schema:
        names = self._rng.sample(NAMES, self._rng.randint(1, 4))
        required = self._rng.sample(names, self._rng.randint(0, len(names)))
        properties = {name: self._any(depth) for name in names}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    def _array(self, depth: int) -> Schema:
        least = self._rng.randint(0, 2)
        return {"type": "array", "items": self._any(depth), "minItems": least, "maxItems": least + 1}

    def _tuple(self, depth: int) -> Schema:
        number = self._rng.randint(1, 3)
        return {
            "type": "array", "prefixItems": [self._any(depth) for _ in range(number)], "items": False,
            "minItems": number,
        }  # fmt: skip

    def _any_of(self, depth: int) -> Schema:
        return {"anyOf": [self._any(depth) for _ in range(self._rng.randint(1, 3))]}

    def _one_of(self, depth: int) -> Schema:
        return {
            "oneOf": [
                {
                    "type": "object", "properties": {"kind": {"const": kind}, "value": self._any(depth)},
                    "required": ["kind", "value"], "additionalProperties": False,
                }
                for kind in self._rng.sample(["a", "b", "c"], 2)
            ]
        }  # fmt: skip

    def _reference(self, depth: int) -> Schema:
        name = self._rng.choice(["part", "Größe", "node"])
        if name not in self._definitions:
            self._definitions[name] = {}  # while it is made it cannot hold itself
            made = self._object(depth) if name != "node" else self._list_of_nodes()
            self._definitions[name] = made
        elif not self._definitions[name]:
            return self._string()
        return {"$ref": f"#/$defs/{name}"}

    def _list_of_nodes(self) -> Schema:
        """Of two at most: what may hold itself, small models write on and on."""
        last = {"type": "object", "properties": {"value": self._integer()}, "additionalProperties": False}
        self._definitions["last node"] = last
        properties = {"value": self._integer(), "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/last node"}]}}
        return {
            "type": "object",
            "properties": properties,
            "required": ["value", "next"],
            "additionalProperties": False,
        }

    def _all_of(self, _depth: int) -> Schema:
        low = self._rng.randint(-20, 20)
        return {"allOf": [{"type": "integer", "minimum": low}, {"maximum": low + self._rng.randint(1, 50)}]}

    def _map(self, _depth: int) -> Schema:
        return {
            "type": "object", "patternProperties": {"^[a-z]{1,3}$": self._integer()}, "additionalProperties": False,
            "minProperties": 1, "maxProperties": 2,
        }  # fmt: skip


def schema(number: int) -> Schema:
    """The schema of this number."""
    return _Maker(number).whole()


def keywords(part: object) -> set[str]:
    """What a schema is made of."""
    if isinstance(part, Mapping):
        found: set[str] = {str(key) for key in part}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]  # JSON
        return found.union(*(keywords(value) for value in part.values()))  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]  # as above
    if isinstance(part, list):
        return set[str]().union(*(keywords(value) for value in part))  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]  # as above
    return set()
