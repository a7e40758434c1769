"""What a worker makes of a request for a chat: its prompt, what its answer must look like, and who reads that."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from edge.errors import InvalidRequest
from runtime import wire
from runtime.backends.base import Backend
from runtime.chat import ChatTemplate
from runtime.request import Constraint, TokenId
from runtime.tool_grammar import Spell, calls_grammar, schema_of, text_keys
from runtime.tool_parser import AnswerReader
from runtime.tool_prompts import Dialogue, ToolPrompts

_OF_JSON = ("json_object", "json_schema")


class Dialogues:
    """Chats with one model.

    Args:
        source: Its chat template.

    Raises:
        UnsupportedFormat: That does not compile.
    """

    def __init__(self, backend: Backend, source: str) -> None:
        facts = backend.facts
        self._tokenizer = backend.tokenizer
        self._controls = frozenset(facts.control_texts)
        template = ChatTemplate(source, markers=facts.control_texts, bos=facts.bos, eos=facts.eos)
        ends = sorted(backend.tokenizer.text(t) for t in backend.tokenizer.eog_tokens)
        self._prompts = ToolPrompts(template, ends=ends)
        self.variables = tuple(template.variables)
        """What the template looks for beside messages and tools."""

    @property
    def thinks(self) -> bool:
        """Whether the model marks what it thinks."""
        return self._prompts.thinking is not None

    def of(self, message: wire.Generate) -> Dialogue:
        """The conversation of a request.

        Raises:
            InvalidRequest: The template refuses it.
        """
        options: dict[str, object] = json.loads(message.template_options or "{}")
        known = {k: v for k, v in options.items() if k in self.variables}
        tools = () if message.tool_choice == "none" else message.tools
        return self._prompts.dialogue(
            message.messages or [], tools, options=known, or_schema=_has_alternative(message)
        )  # fmt: skip

    def spelled(self, dialogue: Dialogue) -> Mapping[TokenId, bytes]:
        """The control tokens that are part of an answer's text."""
        return {token: text.encode() for text, token in self._markers(dialogue).items()}

    def _markers(self, dialogue: Dialogue) -> dict[str, TokenId]:
        texts = [*(dialogue.syntax.texts() if dialogue.syntax else ())]
        texts += [dialogue.thinking.start, dialogue.thinking.end] if dialogue.thinking else []
        found = {c for c in self._controls if any(c in text for text in texts)}
        tokens = {c: self._tokenizer.encode(c, add_special=False, parse_special=True) for c in found}
        return {c: t[0] for c, t in tokens.items() if len(t) == 1}

    def reader(self, dialogue: Dialogue, message: wire.Generate) -> AnswerReader | None:
        """Who reads the answer; None where it is text alone."""
        syntax = dialogue.syntax
        thinking = dialogue.thinking if dialogue.is_thinking or dialogue.may_think else None
        if syntax is not None and _has_alternative(message):
            syntax = replace(syntax, at_start=True)  # calls or the schema: a trigger in the schema's texts is none
        if syntax is None and thinking is None:
            return None
        keys = {t.name: text_keys(t) for t in message.tools} if syntax and syntax.tagged else {}
        return AnswerReader(
            thinking, is_thinking=dialogue.is_thinking, syntax=syntax, text_keys=keys,
            new_id=lambda: f"call_{secrets.token_hex(12)}",
        )  # fmt: skip

    def constraint(self, dialogue: Dialogue, message: wire.Generate) -> Constraint | None:
        """What the answer must look like.

        Raises:
            InvalidRequest: Two things are asked for that do not go together.
        """
        found = message.constraint if dialogue.syntax is None else self._with_calls(dialogue, message)
        thinking = dialogue.thinking
        if found is None or thinking is None or not (dialogue.is_thinking or dialogue.may_think):
            return found
        return replace(found, begins_after=thinking.end, opens_with="" if dialogue.is_thinking else thinking.start)

    def _with_calls(self, dialogue: Dialogue, message: wire.Generate) -> Constraint:
        syntax, form = dialogue.syntax, message.constraint
        assert syntax is not None
        is_auto = message.tool_choice == "auto"
        if form is not None and is_auto and form.kind not in _OF_JSON:
            raise InvalidRequest(
                f"'{form.field}' and tools do not go together, unless a tool has to be called.", field=form.field
            )
        is_lazy = is_auto and form is None
        chosen = [t for t in message.tools if message.tool_choice in ("auto", "required", f"={t.name}")]
        schema = (form.text or '{"type":"object"}') if form is not None and is_auto else ""
        text = calls_grammar(
            syntax, chosen, parallel=message.parallel_tools, after_trigger=is_lazy, or_schema=schema,
            spell=self._speller(dialogue),
        )  # fmt: skip
        if not is_lazy:
            return Constraint("calls", text, "tools")
        return Constraint("calls", text, "tools", trigger=syntax.trigger, triggers_at_start=syntax.at_start)

    def _speller(self, dialogue: Dialogue) -> Spell:
        markers = self._markers(dialogue)
        expression = re.compile("|".join(map(re.escape, sorted(markers, key=len, reverse=True))) or r"(?!)")

        def spell(text: str) -> Sequence[str | TokenId]:
            parts: list[str | TokenId] = []
            at = 0
            for found in expression.finditer(text):
                parts += [text[at : found.start()], markers[found[0]]]
                at = found.end()
            return [*parts, text[at:]]

        return spell


def _has_alternative(message: wire.Generate) -> bool:
    """Whether the answer may obey a schema instead of calling tools."""
    return message.constraint is not None and message.tool_choice == "auto"


def parts_of(constraint: Constraint, message: wire.Generate) -> Iterator[Constraint]:
    """Each schema that a constraint is made of."""
    if constraint.kind != "calls":
        return
    for i, tool in enumerate(message.tools):
        yield Constraint("json_schema", json.dumps(schema_of(tool)), f"tools[{i}].function.parameters")
    if message.constraint is not None:
        yield message.constraint


def num_chars(message: wire.Generate) -> int:
    """Characters of a conversation, and of the tools it has."""
    said = sum(_num_content_chars(m) for m in message.messages or ())
    return said + sum(len(t.name) + len(t.description) + len(t.parameters) for t in message.tools)


def _num_content_chars(message: wire.ChatMessage) -> int:
    parts = [message.content] if isinstance(message.content, str) else message.content
    texts = [*(p for p in parts if isinstance(p, str)), message.reasoning, *(c.arguments for c in message.tool_calls)]
    return sum(map(len, texts))
