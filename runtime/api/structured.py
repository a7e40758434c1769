"""What form an answer shall have: `response_format`, `structured_outputs` and `grammar` of a request."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from edge.errors import ConstraintFailed, InvalidRequest
from runtime.api.json_schema import check_answer, parse_schema
from runtime.api.parsing import check_size
from runtime.request import Constraint

MAX_TEXT_CHARS = 128 << 10
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_TEXT_CHARS)]
Schema = dict[str, object]


class JsonSchema(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """OpenAI's `json_schema`. It is held in any case; `strict` asks for nothing more."""

    name: str | None = None
    description: str | None = None
    schema: Schema
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """OpenAI's `response_format`; `schema` beside the type is llama-server's way to say it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema: Schema | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's `structured_outputs`: one of these."""

    json: Schema | str | None = None
    regex: Text | None = None
    choice: Annotated[list[Text], msgspec.Meta(min_length=1, max_length=1000)] | None = None
    grammar: Text | None = None
    json_object: bool | None = None


@dataclass(frozen=True, slots=True)
class Structure:
    """A form that was asked for, and how a whole answer is held against it."""

    constraint: Constraint

    def check(self, text: str) -> None:
        """Make sure that an answer that ended by itself has the form. Expressions and grammars hold by decoding alone.

        Raises:
            ConstraintFailed: It has not.
        """
        kind, asked = self.constraint.kind, self.constraint.text
        if kind in ("json_object", "json_schema"):
            check_answer(text, asked or '{"type":"object"}')
        elif kind == "choice" and text not in json.loads(asked):
            raise ConstraintFailed("The answer is none of the choices.", hint="A stop string may have cut it.")


def structure_of(
    response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None, grammar: str | None
) -> Structure | None:
    """The form that a request asks for; None where it leaves the answer free.

    Raises:
        InvalidRequest: It asks for two, or for one that is not done.
    """
    found = [
        *_of_format(response_format),
        *_of_outputs(structured_outputs),
        *([_of_grammar(grammar, "grammar")] if grammar else []),
    ]
    if len(found) > 1:
        fields = " and ".join(f"'{c.field}'" for c in found)
        raise InvalidRequest(f"An answer has one form, and {fields} ask for two.", field=found[1].field)
    return Structure(found[0]) if found else None


def _of_format(asked: ResponseFormat | None) -> list[Constraint]:
    if asked is None or asked.type == "text":
        return []
    path = "response_format"
    if asked.json_schema is not None and asked.type == "json_schema":
        return [_of_schema(asked.json_schema.schema, f"{path}.json_schema.schema")]
    if asked.schema is not None:
        return [_of_schema(asked.schema, f"{path}.schema")]
    if asked.type == "json_schema":
        field = f"{path}.json_schema"
        raise InvalidRequest(f"'{field}' is missing.", field=field, hint="Send name and schema in it.")
    return [Constraint("json_object", field=path)]


def _of_outputs(asked: StructuredOutputs | None) -> list[Constraint]:
    if asked is None:
        return []
    path, found = "structured_outputs", list[Constraint]()
    if asked.json is not None:
        found.append(_of_schema(_decoded(asked.json, f"{path}.json"), f"{path}.json"))
    if asked.regex is not None:
        found.append(Constraint("regex", asked.regex, f"{path}.regex"))
    if asked.choice is not None:
        found.append(Constraint("choice", json.dumps(asked.choice), f"{path}.choice"))
    if asked.grammar is not None:
        found.append(_of_grammar(asked.grammar, f"{path}.grammar"))
    if asked.json_object:
        found.append(Constraint("json_object", field=f"{path}.json_object"))
    if not found:
        raise InvalidRequest(f"'{path}' asks for nothing.", field=path, hint="Send json, regex, choice or grammar.")
    return found


def _decoded(schema: Schema | str, path: str) -> Schema:
    if not isinstance(schema, str):
        return schema
    try:
        check_size(path, schema.strip().encode())
        return msgspec.json.decode(schema, type=Schema)
    except (msgspec.MsgspecError, RecursionError, ValueError) as e:
        raise InvalidRequest(f"'{path}' is no JSON object: {e}.", field=path) from e


def _of_schema(schema: Schema, path: str) -> Constraint:
    return Constraint("json_schema", parse_schema(schema, path), path)


def _of_grammar(grammar: str, path: str) -> Constraint:
    return Constraint("gbnf" if "::=" in grammar else "lark", grammar, path)
