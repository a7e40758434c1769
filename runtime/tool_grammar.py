"""The grammar of an answer that calls tools: their names, and arguments that obey their schemas. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from edge.errors import InvalidRequest
from runtime.grammar import JSON_STYLE, MAX_CONSTRAINT_CHARS
from runtime.json_values import is_list, is_object
from runtime.request import TokenId
from runtime.tool_syntax import MAX_CALLS, Gap, Tagged, ToolSyntax, Wild
from runtime.wire import Tool

_TAGGABLE = frozenset({
    "type", "properties", "required", "additionalProperties", "$defs", "definitions", "title", "description",
})  # fmt: skip
_PLAIN_TEXT = frozenset({"type", "enum", "title", "description", "default", "examples"})
_ANNOTATIONS = frozenset({
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment",
})  # fmt: skip
_SCHEMA_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_VERBATIM = frozenset({"enum", "const"})

Spell = Callable[[str], Sequence[str | TokenId]]
"""A text as what the model writes: texts, and the control tokens among them."""


def schema_of(tool: Tool) -> dict[str, object]:
    """The schema of a tool's arguments, which are an object."""
    found: object = json.loads(tool.parameters or "{}")
    assert is_object(found), "parsed where it came in"
    if not found.keys() - {"title", "description"}:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return found if "type" in found else {"type": "object", **found}


def can_be_tagged(tool: Tool) -> bool:
    """Whether arguments can stand one by one: the schema is one of an object with properties and nothing more."""
    schema = schema_of(tool)
    properties = _properties(schema)
    refers_up = any(f'"#/{part}' in tool.parameters for part in ("properties", '"'))
    return schema.keys() <= _TAGGABLE and not refers_up and all(n in properties for n in _required(schema))


def _properties(schema: Mapping[str, object]) -> dict[str, object]:
    found = schema.get("properties", {})
    return found if is_object(found) else {}


def _required(schema: Mapping[str, object]) -> list[object]:
    found = schema.get("required")
    return found if is_list(found) else []


def text_keys(tool: Tool) -> frozenset[str]:
    """The arguments whose values are texts that stand as they are, where arguments stand one by one."""
    return frozenset(k for k, v in _properties(schema_of(tool)).items() if is_object(v) and _is_plain_text(v))


def _is_plain_text(schema: Mapping[str, object]) -> bool:
    return schema.get("type") == "string" and schema.keys() <= _PLAIN_TEXT


def calls_grammar(
    syntax: ToolSyntax, tools: Sequence[Tool], *, parallel: bool, after_trigger: bool, spell: Spell,
    or_schema: str = "",
) -> str:  # fmt: skip
    """A Lark grammar of calls.

    Args:
        after_trigger: It begins behind the trigger.
        or_schema: What the answer may be as well, a JSON schema.

    Raises:
        InvalidRequest: It would be too long.
    """
    lark = _Lark(spell)
    opening = lark.gap(syntax.after_trigger if after_trigger else syntax.opening)
    calls = " | ".join(lark.call(i, tool, syntax) for i, tool in enumerate(tools))
    more = f" ({lark.gap(syntax.between)} call){{0,{MAX_CALLS - 1}}}" if parallel and syntax.between else ""
    start = "calls | answer" if or_schema else "calls"
    rules = [f"start: {start}", f"calls: {opening} call{more} {lark.gap(syntax.closing)}", f"call: {calls}"]
    rules += [f"answer: {_json(json.loads(or_schema))}"] if or_schema else []
    return "\n".join([*map(lark.counted, rules), *lark.rules]) + "\n"


class _Lark:
    """Writes the rules of one grammar."""

    def __init__(self, spell: Spell) -> None:
        self._spell = spell
        self.rules: list[str] = []
        self._num_chars = 0

    def counted(self, rule: str) -> str:
        """The rule. Tools repeat their definitions for each argument: what is too much is refused while it grows."""
        self._num_chars += len(rule) + 1
        if self._num_chars > MAX_CONSTRAINT_CHARS:
            raise InvalidRequest(
                f"'tools' cannot be followed: their grammar is longer than {MAX_CONSTRAINT_CHARS:,} characters.",
                field="tools", hint="Send fewer tools, or simpler schemas.",
            )  # fmt: skip
        return rule

    def _add(self, rule: str) -> None:
        self.rules.append(self.counted(rule))

    def text(self, text: str) -> str:
        return " ".join(f"<[{p}]>" if isinstance(p, int) else _quoted(p) for p in self._spell(text) if p != "")

    def gap(self, gap: Gap) -> str:
        return " ".join(f"/{part.value}/" if isinstance(part, Wild) else self.text(part) for part in gap)

    def call(self, index: int, tool: Tool, syntax: ToolSyntax) -> str:
        """The name of a rule for a tool's name and arguments."""
        first, *rest = syntax.middle or ("",)
        # Name and what follows are one text: so no name is the beginning of another's.
        head = (
            self.text(tool.name + first) if isinstance(first, str) else f"{self.text(tool.name)} {self.gap((first,))}"
        )
        schema = schema_of(tool)
        arguments = _json(schema) if syntax.tagged is None else self._arguments(index, schema, syntax.tagged)
        self._add(f"call{index}: {head} {self.gap(tuple(rest))} {arguments}")
        return f"call{index}"

    def _arguments(self, index: int, schema: Mapping[str, object], tagged: Tagged) -> str:
        """Arguments one by one, in the schema's order. Between two stands something: which is the first has to be
        known, so `n` rules say what may follow when something came before, and `n` when nothing did."""
        required = _required(schema)
        definitions = {k: schema[k] for k in ("$defs", "definitions") if k in schema}
        properties = list(_properties(schema).items())
        names = [f"args{index}_{i}" for i in range(len(properties) + 1)]
        for i, (key, inner) in enumerate(properties):
            argument = f"arg{index}_{i}"
            self._add(f"{argument}: {self._argument(key, inner, definitions, tagged)}")
            between = self.text(tagged.between)
            for tail, ahead in (("", ""), ("m", between)):
                taken = f"{ahead} {argument} {names[i + 1]}m"
                skipped = "" if key in required else f" | {names[i + 1]}{tail}"
                self._add(f"{names[i]}{tail}: {taken}{skipped}")
        self._add(f'{names[-1]}: ""')
        self._add(f'{names[-1]}m: ""')
        return names[0]

    def _argument(self, key: str, inner: object, definitions: Mapping[str, object], tagged: Tagged) -> str:
        if is_object(inner) and _is_plain_text(inner):
            ahead, behind = tagged.text
            head = self.text(f"{tagged.before_key}{key}{ahead}")
            if is_list(choices := inner.get("enum")):
                return f"{head} ({' | '.join(self.text(f'{c}{behind}') for c in choices)})"
            return f"{head} {self._until(behind)}"
        ahead, behind = tagged.value
        refers = '"$ref"' in json.dumps(inner)
        value = _json({**inner, **definitions} if refers and is_object(inner) else inner)
        return f"{self.text(f'{tagged.before_key}{key}{ahead}')} {value} {self.text(behind)}"

    def _until(self, end: str) -> str:
        """Any text, up to and with what ends it."""
        first, *rest = [p for p in self._spell(end) if p != ""]
        tail = " ".join(f"<[{p}]>" if isinstance(p, int) else _quoted(p) for p in rest)
        if isinstance(first, int):
            return f"/(?s:.*)/ <[{first}]> {tail}"
        name = f"text{len(self.rules)}"
        self._add(f"{name}[suffix={_quoted(first)}]: /(?s:.*)/")
        return f"{name} {tail}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _json(schema: object) -> str:
    body = {**_bare(schema), "x-guidance": {**JSON_STYLE, "lenient": False}} if is_object(schema) else schema
    return f"%json {json.dumps(body, ensure_ascii=False)}"


def _bare(schema: Mapping[str, object]) -> dict[str, object]:
    """A schema without what only people and models read of it."""
    return {k: _bare_value(k, v) for k, v in schema.items() if k not in _ANNOTATIONS}


def _bare_value(keyword: str, value: object) -> object:
    if keyword in _VERBATIM:
        return value
    if is_list(value):
        return [_bare(v) if is_object(v) else v for v in value]
    if not is_object(value):
        return value
    return {n: _bare_value("", v) for n, v in value.items()} if keyword in _SCHEMA_MAPS else _bare(value)
