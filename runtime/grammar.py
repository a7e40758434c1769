"""Answers that keep to a schema, an expression or a grammar: which tokens may come next, and which must.

llguidance (https://github.com/guidance-ai/llguidance) parses; it is imported with the first constraint.
"""

from __future__ import annotations

import json
from collections import OrderedDict, deque
from collections.abc import Set
from enum import Enum, auto
from functools import cached_property
from typing import TYPE_CHECKING, assert_never

import numpy as np
from numpy.typing import NDArray

from edge.errors import ConstraintFailed, InvalidRequest, UnsupportedFormat
from runtime.request import Constraint, TokenId
from runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_GRAMMARS = 64
"""Compiled grammars kept."""
MAX_CONSTRAINT_CHARS = 128 << 10
MAX_GRAMMAR_CHARS = 32 << 10
"""Of GBNF and Lark: reading GBNF takes 1.4 s for 120 KB."""
MAX_RULES = 1000
"""Rules of a grammar. The compiler descends from rule to rule: 20,000 in a chain overflowed a stack of 8 MB."""
MAX_INTERSECTIONS = 6
"""Uses of `&` in a grammar: whether an intersection is empty takes time exponential in its parts."""
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One way to write it, the one models have seen most: free white space lets small models write blank lines until they
are cut, and leaves nothing between values to be forced."""
_MAX_REASON_CHARS = 300
_NEVER = b"\xff"
"""A byte that no text has."""


def _limits() -> LLParserLimits:
    """What one step may cost: milliseconds with ordinary grammars, at most some 20 before a request is given up.

    The library's own limits let a step of an ambiguous grammar take 160 ms, in which every other request waits, and a
    lexer 500 MB.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=300_000, max_items_in_row=1000, step_max_items=10_000, step_lexer_fuel=100_000,
        max_lexer_states=20_000, max_grammar_size=100_000, verbose_errors=False,
    )  # fmt: skip


class _Vocabulary:
    """A model's tokens as llguidance wants them. A token without text, such as a control token, is never part of an
    answer."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self._tokenizer = tokenizer
        pieces = [tokenizer.piece(t) for t in range(size)]
        self.eos_token_id = min(tokenizer.eog_tokens)
        self.bos_token_id = None
        self.special_token_ids = [t for t, piece in enumerate(pieces) if not piece or t in tokenizer.eog_tokens]
        self.tokens = [piece or b"<%d>" % t for t, piece in enumerate(pieces)]

    def __call__(self, text: str) -> list[TokenId]:
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # llguidance tries bytes to learn what is taken
            raise TypeError("a text, not bytes")
        return self._tokenizer.encode(text, add_special=False, parse_special=False)


class Vocabulary:
    """A model's tokens as guides look at them."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self._tokenizer = tokenizer
        self.size = size
        self.eog_tokens = tokenizer.eog_tokens
        self._beyond: dict[bytes, list[tuple[TokenId, bytes]]] = {}
        self._tokens_of: dict[bytes, TokenId | None] = {}

    @cached_property
    def _pieces(self) -> list[bytes]:
        return [self._tokenizer.piece(t) for t in range(self.size)]

    def spelling(self, token: TokenId) -> bytes:
        """What spells a token, control tokens too."""
        return self._tokenizer.piece(token) or self._tokenizer.text(token).encode()

    def encode(self, data: bytes) -> list[TokenId]:
        """Tokens of a text that is part of an answer."""
        return self._tokenizer.encode(data.decode("utf-8", "replace"), add_special=False, parse_special=False)

    def token_of(self, spelling: bytes) -> TokenId | None:
        """The one token that spells a text; None where it takes several."""
        if spelling not in self._tokens_of:
            found = self._tokenizer.encode(spelling.decode(), add_special=False, parse_special=True)
            self._tokens_of[spelling] = found[0] if len(found) == 1 else None
        return self._tokens_of[spelling]

    def beyond(self, end: bytes) -> list[tuple[TokenId, bytes]]:
        """Tokens that begin with a text and go on, and with what. The whole vocabulary is looked at once for each."""
        if end not in self._beyond:
            self._beyond[end] = [
                (t, piece[len(end) :]) for t, piece in enumerate(self._pieces)
                if len(piece) > len(end) and piece.startswith(end)
            ]  # fmt: skip
        return self._beyond[end]


class _Phase(Enum):
    """How far an answer is that is not to be held from its beginning."""

    OPENING = auto()
    """It may still turn out to begin with what makes it free."""
    THINKING = auto()
    """It is free up to a text."""
    FREE = auto()
    """It is free, and may end, until it writes the trigger."""
    FORM = auto()
    """It is held."""


class Guide:
    """A grammar on its way through one answer. One thread owns it.

    Args:
        matcher: At the beginning of the form; it runs ahead over what is forced.
        constraint: Says what is free before the form.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary, constraint: Constraint) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._opens_with = constraint.opens_with.encode()
        self._begins_after = constraint.begins_after.encode()
        self._trigger = constraint.trigger.encode()
        self._triggers_at_start = constraint.triggers_at_start
        self._tail = b""
        self._forced: deque[TokenId] = deque()
        self._phase = _Phase.FREE if self._trigger else _Phase.FORM
        if self._begins_after:
            self._phase = _Phase.OPENING if self._opens_with else _Phase.THINKING
        if self._phase is _Phase.FORM:
            self._look_ahead()

    @property
    def forced(self) -> TokenId | None:
        """The token that must come next, where the grammar leaves one way to go."""
        return self._forced[0] if self._forced else None

    @property
    def is_complete(self) -> bool:
        """Whether the answer is whole and cannot go on."""
        return self._phase is _Phase.FORM and not self._forced and self._matcher.is_stopped()

    @property
    def is_free(self) -> bool:
        """Whether the answer may end where it stands, without ever having the form."""
        return bool(self._trigger) and self._phase is not _Phase.FORM

    def allows(self, token: TokenId) -> bool:
        """Whether a token may come next."""
        if self._phase is _Phase.FORM:
            return self._matcher.validate_tokens([token]) == 1
        if self._is_held_opening:
            return token == self._opening_token or self._matcher.validate_tokens([token]) == 1
        if token in self._vocabulary.eog_tokens:
            return self.is_free
        return token not in self._spoilers()

    def mask(self, logits: NDArray[np.float32]) -> None:
        """Set the scores of all tokens that may not come next to minus infinity.

        Raises:
            ConstraintFailed: Finding them is too costly, or there are none.
        """
        if self._phase is _Phase.FORM or self._is_held_opening:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            self._check()
            allowed = np.unpackbits(bits, count=self._vocabulary.size, bitorder="little").astype(np.bool_)
            if self._is_held_opening and self._opening_token is not None:
                allowed[self._opening_token] = True
            if not allowed.any():
                raise ConstraintFailed(
                    "No token of the model can go on with the answer in the form that was asked for."
                )
            logits[~allowed] = -np.inf
            return
        if not self.is_free:
            logits[list(self._vocabulary.eog_tokens)] = -np.inf
        if spoilers := self._spoilers():
            logits[list(spoilers)] = -np.inf

    def consume(self, token: TokenId) -> None:
        """Go on by the next token of the answer.

        Raises:
            ConstraintFailed: It may not come here, or following the grammar became too costly.
        """
        if self._forced:
            self._forced.popleft()
        elif self._phase is _Phase.FORM or (self._is_held_opening and token != self._opening_token):
            self._phase = _Phase.FORM
            self._matcher.consume_token(token)
            self._look_ahead()
        elif token not in self._vocabulary.eog_tokens:
            self._tail += self._vocabulary.spelling(token)
            while self._leave_phase():  # false in the form
                pass

    @property
    def _is_held_opening(self) -> bool:
        """Whether the form comes at once, unless the token comes that begins the free part."""
        return self._phase is _Phase.OPENING and not self._trigger

    @property
    def _opening_token(self) -> TokenId | None:
        return self._vocabulary.token_of(self._opens_with)

    def _leave_phase(self) -> bool:
        """Go on to the next phase where the tail says so."""
        if self._phase is _Phase.OPENING:
            said = self._tail.lstrip()
            if said.startswith(self._opens_with):
                self._phase, self._tail = _Phase.THINKING, said[len(self._opens_with) :]
                return True
            if self._opens_with.startswith(said):
                return False
            self._phase = _Phase.FREE
        if self._phase is _Phase.FREE and self._triggers_at_start:
            return self._leave_start()
        awaited = self._begins_after if self._phase is _Phase.THINKING else self._trigger
        _, found, rest = self._tail.partition(awaited)
        if not found:
            self._tail = self._tail[-len(awaited) :]
            return False
        if self._phase is _Phase.THINKING and self._trigger:
            self._phase, self._tail = _Phase.FREE, rest
            return True
        self._enter_form(rest.lstrip() if self._phase is _Phase.THINKING else rest)
        return False

    def _leave_start(self) -> bool:
        said = self._tail.lstrip()
        if said.startswith(self._trigger):
            self._enter_form(said[len(self._trigger) :])
        elif not self._trigger.startswith(said):
            self._trigger, self._triggers_at_start = _NEVER, False
        return False

    def _enter_form(self, rest: bytes) -> None:
        """Begin with what the last token brought beyond what was waited for."""
        self._phase = _Phase.FORM
        if rest:
            tokens = self._vocabulary.encode(rest)
            if self._matcher.validate_tokens(tokens) != len(tokens):
                raise ConstraintFailed("The answer does not go on in the form that was asked for.")
            self._matcher.consume_tokens(tokens)
        self._look_ahead()

    def _spoilers(self) -> Set[TokenId]:
        """Tokens that would complete what is waited for, and bring with it what the form does not begin with."""
        awaited = self._begins_after if self._phase is _Phase.THINKING else self._trigger
        if self._phase is _Phase.OPENING or (self._phase is _Phase.THINKING and self._trigger):
            return frozenset()
        begun = next((n for n in range(len(awaited) - 1, 0, -1) if self._tail.endswith(awaited[:n])), 0)
        if not begun:
            return frozenset()
        may_be_white = self._phase is _Phase.THINKING
        found = self._vocabulary.beyond(awaited[begun:])
        return {t for t, rest in found if not self._goes_on(rest.lstrip() if may_be_white else rest)}

    def _goes_on(self, rest: bytes) -> bool:
        tokens = self._vocabulary.encode(rest)
        return self._matcher.validate_tokens(tokens) == len(tokens)

    def _look_ahead(self) -> None:
        forced = self._matcher.compute_ff_tokens()
        if forced:
            self._matcher.consume_tokens(forced)
            self._forced.extend(forced)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintFailed(
                f"The answer cannot go on in the form that was asked for: {_reason(self._matcher.get_error())}.",
                hint="A simpler schema or grammar may do.",
            )


class Grammar:
    """A compiled constraint. Any number of answers may follow it at once."""

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary, constraint: Constraint) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._constraint = constraint

    def start(self) -> Guide:
        """A guide at the beginning of an answer.

        Raises:
            ConstraintFailed: Even its beginning is too costly.
        """
        return Guide(self._matcher.deep_copy(), self._vocabulary, self._constraint)


class Grammars:
    """Compiles constraints for one model and keeps those used last. One thread owns it.

    The vocabulary is prepared with the first constraint: 0.1 s for 49,000 tokens.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._tokens = Vocabulary(tokenizer, vocab_size)
        self._native: LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[str, Constraint], Grammar] = OrderedDict()

    def __len__(self) -> int:
        return len(self._compiled)

    def compile(self, constraint: Constraint, tenant: str = "") -> Grammar:
        """The grammar of a constraint.

        Args:
            tenant: Whose request it is. How long this takes tells whether somebody had the same; only one's own do.

        Raises:
            InvalidRequest: It does not parse, asks for what the decoder cannot hold, allows no answer, or is too large.
            UnsupportedFormat: The model's vocabulary does not allow for any.
        """
        key = tenant, constraint
        if (found := self._compiled.get(key)) is None:
            found = self._compile(constraint)
            self._compiled[key] = found
            while len(self._compiled) > MAX_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return found

    def check(self, constraint: Constraint) -> None:
        """See that a constraint compiles, of which nothing is kept.

        Raises:
            InvalidRequest, UnsupportedFormat: As `compile`.
        """
        self._compile(constraint)

    def _compile(self, constraint: Constraint) -> Grammar:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._vocabulary(), grammar_of(constraint), log_level=0, limits=_limits())
        probe = matcher.deep_copy()
        if not probe.is_error():
            probe.compute_bitmask()  # that it allows nothing at all shows in the first step
        if probe.is_error() or probe.is_stopped():
            raise _refused(constraint, _reason(probe.get_error()) or "it allows no answer")
        grammar = Grammar(matcher, self._tokens, constraint)
        try:
            grammar.start()
        except ConstraintFailed as e:  # such as by objects that have to hold themselves
            raise _refused(constraint, "what it forces at the beginning has no end, or costs too much") from e
        return grammar

    def _vocabulary(self) -> LLTokenizer:
        if self._native is None:
            from llguidance import LLTokenizer, TokenizerWrapper

            if not (ends := sorted(self._tokenizer.eog_tokens)):
                raise UnsupportedFormat("The model has no token that ends an answer, so no form of one can be held.")
            vocabulary = TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size))
            try:
                self._native = LLTokenizer(vocabulary, self._vocab_size, ends)
            except ValueError as e:
                raise UnsupportedFormat(f"No form can be held with the model's vocabulary: {_reason(str(e))}.") from e
        return self._native


def grammar_of(constraint: Constraint) -> str:
    """A constraint in llguidance's own form; what is wrong inside shows when it is compiled.

    Raises:
        InvalidRequest: It is too large, or no text of its kind.
    """
    from llguidance import LLMatcher

    text = constraint.text
    most = MAX_GRAMMAR_CHARS if constraint.kind in ("lark", "gbnf") else MAX_CONSTRAINT_CHARS
    if len(text) > most:
        raise _refused(constraint, f"it is longer than {most:,} characters")
    match constraint.kind:
        case "json_object":
            return _of_schema(constraint, '{"type":"object"}')
        case "json_schema":
            return _of_schema(constraint, text)
        case "regex":
            return LLMatcher.grammar_from_regex(text)
        case "choice":
            # A terminal, which becomes one automaton: rules would be followed side by side.
            return LLMatcher.grammar_from_lark(
                "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, json.loads(text)))
            )
        case "lark":
            return LLMatcher.grammar_from_lark(_bounded(constraint, text))
        case "gbnf":
            return LLMatcher.grammar_from_lark(_bounded(constraint, _lark_of(constraint)))
        case "calls":
            return LLMatcher.grammar_from_lark(text)
        case _:
            assert_never(constraint.kind)


def _of_schema(constraint: Constraint, schema: str) -> str:
    from llguidance import LLMatcher

    try:
        return LLMatcher.grammar_from_json_schema(schema, defaults=JSON_STYLE, overrides={"lenient": False})  # pyright: ignore[reportArgumentType]  # a dict of another value type
    except ValueError as e:
        raise _refused(constraint, _reason(str(e))) from e


def _lark_of(constraint: Constraint) -> str:
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(constraint.text)
    except Exception as e:  # its parser raises Exception itself, and RecursionError
        raise _refused(constraint, _reason(str(e))) from e


def _bounded(constraint: Constraint, lark: str) -> str:
    if "%json" in lark:
        raise _refused(constraint, "it has a schema inside", hint="Ask for a schema by json_schema.")
    if lark.count(":") > MAX_RULES or lark.count("&") > MAX_INTERSECTIONS:
        raise _refused(constraint, f"it has more than {MAX_RULES} rules or {MAX_INTERSECTIONS} intersections")
    return lark


def _reason(text: str) -> str:
    """The first line of what llguidance says, of a length that one reads."""
    return " ".join(text.removesuffix("<non-verbose/>").split())[:_MAX_REASON_CHARS]


_HINTS = {
    "json_object": None,
    "json_schema": "docs/api.md lists the keywords that are done.",
    "regex": "Expressions are those of Rust's regex crate: no look-around, no back-references.",
    "choice": "Send a list of different texts.",
    "lark": "See llguidance's syntax of Lark grammars.",
    "gbnf": "See the syntax of llama.cpp's grammars.",
    "calls": "docs/api.md lists the keywords of schemas that are done.",
}


def _refused(constraint: Constraint, reason: str, *, hint: str | None = None) -> InvalidRequest:
    return InvalidRequest(
        f"'{constraint.field or constraint.kind}' cannot be followed: {reason}.",
        field=constraint.field or None,
        hint=hint or _HINTS[constraint.kind],
    )
