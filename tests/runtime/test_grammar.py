"""Answers that keep to a form: on a backend that writes nonsense unless it is held, under any schedule."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from typing_extensions import override

from edge.errors import ConstraintFailed, InvalidRequest, UnsupportedFormat
from runtime.backends.base import Capabilities
from runtime.batch import Batch
from runtime.engine import Engine
from runtime.grammar import MAX_GRAMMARS, Grammar, Grammars
from runtime.request import Constraint, FinishReason, Request, RequestId, SamplingParams, TokenId
from runtime.sampler import Sampler
from runtime.sequence import Sequence
from runtime.speculate import SpeculationStats, Speculator
from runtime.states import StateLimits
from runtime.step_cost import StepCosts
from runtime.tokenizer import Tokenizer
from tests.support import CollectingSink, ScriptedBackend

WORDS = [
    '{"',
    '":',
    '", "',
    '"}',
    "{",
    "}",
    '"',
    ", ",
    ": ",
    "true",
    "false",
    "null",
    "name",
    "na",
    "me",
    " ",
    "[",
    "]",
    "12",
]


class WordTokenizer(Tokenizer):
    """Token 0 ends an answer; then words, which overlap as those of a real vocabulary do; then single bytes."""

    def __init__(self) -> None:
        self.pieces = [b"", *(w.encode() for w in WORDS), *(bytes([b]) for b in range(256))]
        self._ids = {p: i for i, p in reversed(list(enumerate(self.pieces)))}
        self._longest = max(map(len, self.pieces))

    @property
    @override
    def eog_tokens(self) -> frozenset[TokenId]:
        return frozenset({0})

    @override
    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[TokenId]:
        data, at, out = text.encode(), 0, list[TokenId]()
        while at < len(data):
            length = next(
                n for n in range(self._longest, 0, -1) if data[at : at + n] in self._ids and at + n <= len(data)
            )
            out.append(self._ids[data[at : at + length]])
            at += length
        return out

    @override
    def piece(self, token: TokenId) -> bytes:
        return self.pieces[token]


TOKENIZER = WordTokenizer()
VOCAB = len(TOKENIZER.pieces)


class BabblingBackend(ScriptedBackend):
    """The scores are random numbers, seeded by the cells that the sequence may read."""

    def __init__(self, capabilities: Capabilities) -> None:
        super().__init__(capabilities, vocab_size=VOCAB)
        self._tokenizer = TOKENIZER

    @override
    def scores(self, cells: list[TokenId]) -> NDArray[np.float32]:
        rng = np.random.default_rng([len(cells), *cells[-40:]])
        return rng.standard_normal(VOCAB).astype(np.float32) * 3


def compiled(kind: Any, text: str = "", **more: Any) -> Grammar:
    return Grammars(TOKENIZER, VOCAB).compile(Constraint(kind, text, **more))


Schema = dict[str, Any]
NAMES = ["name", "age", "x y", 'na"me', "ü"]
VALUES = st.sampled_from(["red", "green", "é\n", 7, None])
FIXED: list[Schema] = [
    {"type": "boolean"},
    {"type": "null"},
    {"const": "name"},
    {"const": {"name": [1, None, "é"]}},
    {"type": "string", "pattern": "^[a-f]{2,5}-[0-9]+$", "maxLength": 12},
]


@st.composite
def scalars(draw: st.DrawFn) -> Schema:
    low = draw(st.integers(-50, 50))
    kind = draw(st.sampled_from(["string", "integer", "enum", "fixed"]))
    if kind == "string":
        return {"type": "string", "minLength": abs(low) % 4, "maxLength": abs(low) % 4 + draw(st.integers(0, 6))}
    if kind == "integer":
        return {"type": "integer", "minimum": low, "maximum": low + draw(st.integers(0, 900))}
    if kind == "enum":
        return {"enum": draw(st.lists(VALUES, min_size=1, max_size=4, unique=True))}
    return draw(st.sampled_from(FIXED))


@st.composite
def compounds(draw: st.DrawFn, inner: st.SearchStrategy[Schema]) -> Schema:
    kind = draw(st.sampled_from(["object", "array", "anyOf"]))
    if kind == "object":
        properties = draw(st.dictionaries(st.sampled_from(NAMES), inner, min_size=1, max_size=3))
        required = [p for p in properties if draw(st.booleans())]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "array":
        most = draw(st.integers(0, 3))
        return {"type": "array", "items": draw(inner), "minItems": min(most, 1), "maxItems": most}
    return {"anyOf": draw(st.lists(inner, min_size=1, max_size=3))}


@st.composite
def references(draw: st.DrawFn, inner: st.SearchStrategy[Schema]) -> Schema:
    return {"$defs": {"a": draw(inner)}, "type": "array", "items": {"$ref": "#/$defs/a"}, "maxItems": 2}


NESTED = st.recursive(scalars(), compounds, max_leaves=5)
SCHEMAS = NESTED | references(NESTED)


@dataclass(frozen=True)
class Asked:
    at: int
    prompt: tuple[int, ...]
    max_tokens: int
    params: SamplingParams
    schema: dict[str, Any] | None
    ignore_eos: bool

    def request(self, number: int) -> Request:
        grammar = compiled("json_schema", json.dumps(self.schema)) if self.schema is not None else None
        return Request(
            RequestId(number), self.prompt, self.max_tokens, self.params, ignore_eos=self.ignore_eos,
            return_tokens=True, grammar=grammar,
        )  # fmt: skip


PARAMS = st.one_of(
    st.just(SamplingParams(temperature=0)),
    st.builds(
        SamplingParams, temperature=st.sampled_from([0.5, 1.5]), top_k=st.sampled_from([0, 5]),
        top_p=st.sampled_from([1.0, 0.8]), frequency_penalty=st.sampled_from([0.0, 1.0]), seed=st.integers(0, 9),
    ),
)  # fmt: skip
ASKED = st.builds(
    Asked, at=st.integers(0, 30), prompt=st.lists(st.integers(1, 250), min_size=1, max_size=80).map(tuple),
    max_tokens=st.sampled_from([3, 40, 200]), params=PARAMS, schema=st.one_of(SCHEMAS, SCHEMAS, st.none()),
    ignore_eos=st.booleans(),
)  # fmt: skip


class Foreteller(Speculator):
    """Guesses what the answers alone were, often with something wrong behind it."""

    def __init__(self, answers: dict[int, tuple[int, ...]]) -> None:
        self._answers = answers
        self.sequences = set[Sequence]()
        self.num_drawn = 0

    @override
    def plan(self, decoding: list[Sequence], *, costs: StepCosts, threads: int) -> None:
        self.sequences |= set(decoding)
        for sequence in decoding:
            at = len(sequence.tokens)
            sequence.draft = [*self._answers[sequence.request.id][at : at + at % 4], *([5] * (at % 3))]

    @override
    def learn(self, batch: Batch, gained: list[int], *, seconds: float, costs: StepCosts, threads: int) -> None:
        self.sequences |= {c.sequence for c in batch.chunks}
        self.num_drawn += sum(1 + g for c, g in zip(batch.chunks, gained, strict=True) if c.num_logits)

    @override
    def stats(self) -> SpeculationStats:
        return SpeculationStats()


def answers_of(plan: list[Asked], can: Capabilities, speculator: Speculator | None = None) -> CollectingSink:
    sink = CollectingSink()
    engine = Engine(BabblingBackend(can), sink, max_queue=100, speculator=speculator)
    for now in range(6000):
        for number, asked in enumerate(plan):
            if asked.at == now:
                engine.submit(asked.request(number))
        if not engine.advance() and now > 31:
            break
    assert sink.num_finished == len(plan)
    return sink


@given(
    plan=st.lists(ASKED, min_size=1, max_size=6), slots=st.integers(1, 4), cells=st.sampled_from([300, 450, 3000]),
    step=st.sampled_from([8, 64]), states=st.sampled_from([0, 500]), drafts=st.booleans(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_answers_match_their_schema_under_any_schedule(
    plan: list[Asked], slots: int, cells: int, step: int, states: int, drafts: bool
) -> None:
    roomy = Capabilities(1, 3000, 3000, 512)
    alone = [answers_of([a], roomy) for a in plan]
    known = {i: s.last[RequestId(0)].tokens or () for i, s in enumerate(alone)}
    can = Capabilities(slots, cells, cells, max(step, slots), StateLimits(states))
    foreteller = Foreteller(known) if drafts else None
    sink = answers_of(plan, can, foreteller)
    assert not sink.failures
    if foreteller is not None:
        asked_for = sum(s.num_output - len(s.forced) for s in foreteller.sequences)
        assert foreteller.num_drawn == asked_for, "what the grammar forces is no guess's merit"
    for number, asked in enumerate(plan):
        text, last = sink.texts.get(RequestId(number), ""), sink.last[RequestId(number)]
        assert last.tokens == known[number]
        assert text == alone[number].texts[RequestId(0)]
        assert last.num_output <= asked.max_tokens
        if asked.schema is not None and last.finish_reason is FinishReason.STOP:
            jsonschema.validate(json.loads(text), asked.schema)


def run_one(grammar: Grammar, *, max_tokens: int = 50, **more: Any) -> tuple[str, Any, BabblingBackend]:
    backend, sink = BabblingBackend(Capabilities(2, 500, 500, 64)), CollectingSink()
    engine = Engine(backend, sink, max_queue=10)
    params = more.pop("params", SamplingParams(temperature=0))
    engine.submit(Request(RequestId(1), (7, 8, 9), max_tokens, params, grammar=grammar, **more))
    while engine.advance():
        pass
    return sink.texts.get(RequestId(1), ""), sink.failures.get(RequestId(1)) or sink.last[RequestId(1)], backend


def test_what_leaves_no_choice_is_never_computed() -> None:
    text, last, backend = run_one(compiled("json_schema", '{"const":{"name":[true,null,12]}}'))
    assert (json.loads(text), last.finish_reason, backend.num_steps) == ({"name": [True, None, 12]}, "stop", 0)


def test_forced_tokens_cost_no_steps() -> None:
    schema = {"type": "object", "properties": {"name": {"type": "boolean"}, "na": {"type": "boolean"}},
              "required": ["name", "na"], "additionalProperties": False}  # fmt: skip
    text, last, backend = run_one(compiled("json_schema", json.dumps(schema)))
    assert set(json.loads(text)) == {"name", "na"}
    assert backend.num_steps <= 4 < last.num_output


def test_forced_tokens_count_and_stop_like_others() -> None:
    grammar = compiled("regex", "true, null, [0-9]{5,9}")
    assert run_one(grammar, max_tokens=2)[:2][0] == "true, "
    assert run_one(grammar, max_tokens=2)[1].finish_reason == "length"
    text, last, _ = run_one(grammar, stop=(", nu",))
    assert (text, last.finish_reason) == ("true", "stop")


@pytest.mark.parametrize(("kind", "text", "pattern"), [
    ("regex", "[a-c]{2,4}x?", "[a-c]{2,4}x?"),
    ("choice", '["true","tr\\"ue\\n","false é"]', 'true|tr"ue\n|false é'),
    ("lark", 'start: "no" | name\nname: /[x-z]+/ "12"', "no|[x-z]+12"),
    ("gbnf", 'root ::= "no" | [x-z]+ "12"', "no|[x-z]+12"),
    ("json_object", "", r"\{.*\}"),
])  # fmt: skip
def test_each_kind_of_constraint_holds_and_ends_the_answer(kind: Any, text: str, pattern: str) -> None:
    grammar = compiled(kind, text)
    for seed in range(5):
        answer, last, _ = run_one(grammar, ignore_eos=True, params=SamplingParams(seed=seed), max_tokens=400)
        if last.finish_reason == "stop":
            assert re.fullmatch(pattern, answer, re.DOTALL), answer
        assert last.finish_reason == "stop" or kind in ("json_object", "lark", "gbnf")


def test_a_constraint_may_begin_behind_a_marker() -> None:
    grammar = compiled("regex", "[0-9]{3}", begins_after="true")
    answer, last, _ = run_one(grammar, params=SamplingParams(logit_bias=((10, 8.0),), seed=1), max_tokens=400)
    assert last.finish_reason == "stop"
    assert re.fullmatch(r".*true[0-9]{3}", answer, re.DOTALL)


def test_masked_sampling_draws_from_the_models_own_distribution_of_what_is_allowed() -> None:
    guide = compiled("regex", "[a-e]").start()
    logits = np.random.default_rng(3).standard_normal(VOCAB).astype(np.float32)
    ids = [TOKENIZER.pieces.index(c.encode()) for c in "abcde"]
    weights = np.exp(logits[ids] / 0.8)
    draws, sampler = 4000, Sampler(SamplingParams(temperature=0.8, seed=1), num_prompt=0)
    guide.mask(logits)
    got = [sampler.draw(logits, []) for _ in range(draws)]
    counts = np.array([got.count(i) for i in ids])
    expected = draws * weights / weights.sum()
    assert counts.sum() == draws
    assert float(((counts - expected) ** 2 / expected).sum()) < 18.5  # chi-square, 4 degrees of freedom, p = 0.001


def test_a_grammar_that_becomes_too_costly_ends_its_own_request() -> None:
    costly = compiled("lark", 'start: first x{250,5000}\nfirst: "a" | "b" | "c"\nx: "a"{1,5000}')
    backend, sink = BabblingBackend(Capabilities(2, 900, 900, 64)), CollectingSink()
    engine = Engine(backend, sink, max_queue=10)
    greedy = SamplingParams(temperature=0)
    engine.submit(Request(RequestId(1), (7, 8, 9), 300, greedy, grammar=costly))
    engine.submit(Request(RequestId(2), (7, 8, 9, 10), 300, greedy, grammar=compiled("regex", "[a-c]{250}")))
    while engine.advance():
        pass
    assert isinstance(sink.failures[RequestId(1)].error, ConstraintFailed)
    assert re.fullmatch("[a-c]{250}", sink.texts[RequestId(2)])


@pytest.mark.parametrize(("kind", "text", "reason"), [
    ("json_schema", '{"type":"strin"}', "strin"),
    ("json_schema", "true", "object"),
    ("json_schema", '{"type":"array","items":' * 5000 + "{}" + "}" * 5000, "recursion"),
    ("json_schema", '{"not":{}}', "not"),
    ("json_schema", '{"$ref":"#"}', ""),
    ("json_schema", '{"allOf":[{"type":"string"},{"type":"integer"}]}', "Unsatisfiable"),
    ("json_schema", '{"type":"string","pattern":"(?=a)b"}', "look-around"),
    ("regex", "(", ""),
    ("regex", "(" * 5000 + "a" + ")" * 5000, ""),
    ("regex", "a" * 200_000, "longer"),
    ("lark", "start: nothing", "nothing"),
    ("lark", 'start: %json {"type":"object"}', "schema"),
    ("lark", "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(2500)), "rules"),
    ("lark", "start: T\nT: " + " & ".join(f"/(.*a){{9}}.{{{i}}}/" for i in range(30)), "intersections"),
    ("gbnf", "root ::= " + "a " * 20_000, "longer"),
    ("gbnf", "root ::= " + "(" * 5000, ""),
    ("gbnf", 'root := "a"', ""),
], ids=range(17))  # fmt: skip
def test_what_cannot_be_followed_is_refused(kind: Any, text: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        compiled(kind, text, field="response_format")
    assert reason in caught.value.message
    assert caught.value.field == "response_format"
    assert len(caught.value.message) < 500


def test_compiled_grammars_are_kept_within_bounds() -> None:
    grammars = Grammars(TOKENIZER, VOCAB)
    first = grammars.compile(Constraint("regex", "a0"))
    assert grammars.compile(Constraint("regex", "a0"), "another key") is not first, "time would tell what others ask"
    for i in range(MAX_GRAMMARS + 5):
        grammars.compile(Constraint("regex", f"a{i}"))
        assert grammars.compile(Constraint("regex", "a0")) is first
    assert len(grammars) == MAX_GRAMMARS


def test_what_is_only_checked_is_not_kept() -> None:
    grammars = Grammars(TOKENIZER, VOCAB)
    grammars.check(Constraint("regex", "a"))
    with pytest.raises(InvalidRequest):
        grammars.check(Constraint("regex", "("))
    assert len(grammars) == 0


def test_a_model_without_an_end_token_refuses_forms() -> None:
    class Endless(WordTokenizer):
        @property
        @override
        def eog_tokens(self) -> frozenset[TokenId]:
            return frozenset()

    with pytest.raises(UnsupportedFormat, match="ends an answer"):
        Grammars(Endless(), VOCAB).compile(Constraint("regex", "a"))


# ---------------------------------------------------------------- forms that begin later, or never


def babble(constraint: Constraint, seed: int) -> tuple[bytes, bool]:
    """An answer of random tokens under a constraint, and whether it is over."""
    guide, rng = Grammars(TOKENIZER, VOCAB).compile(constraint).start(), np.random.default_rng(seed)
    text = b""
    for _ in range(80):
        logits = rng.standard_normal(VOCAB).astype(np.float32)
        logits[1 : len(WORDS) + 1] += 3  # words rather than bytes
        token = guide.forced
        if token is None:
            guide.mask(logits)
            token = int(logits.argmax())
            assert guide.allows(token)
        guide.consume(token)
        if token in TOKENIZER.eog_tokens:
            return text, True
        text += TOKENIZER.piece(token)
        if guide.is_complete:
            return text, True
    return text, False


CALL = 'start: "name" /[0-9]{2}/ "]"\n'


@pytest.mark.parametrize("trigger", ["[", '":', "na[", ', "'])
def test_an_answer_is_free_until_it_writes_the_trigger(trigger: str) -> None:
    sign = re.escape(trigger.encode())
    pattern = re.compile(rb"((?!" + sign + rb").)*" + sign + rb"name[0-9]{2}\]", re.DOTALL)
    num_held = 0
    for seed in range(60):
        text, is_over = babble(Constraint("calls", CALL, trigger=trigger), seed)
        if trigger.encode() in text and is_over:
            num_held += 1
            assert pattern.fullmatch(text)
    assert num_held


def test_what_is_thought_before_holds_no_trigger() -> None:
    constraint = Constraint("calls", CALL, begins_after="}", opens_with="{", trigger="[")
    kinds = set[str]()
    for seed in range(200):
        text, is_over = babble(constraint, seed)
        said = text.lstrip()
        if is_over and said.startswith(b"{") and b"}" in said:
            said = said.partition(b"}")[2]
            kinds.add("thought")
        elif said.startswith(b"{"):
            continue
        if is_over and b"[" in said:
            kinds.add("called")
            assert re.fullmatch(rb"[^\[]*\[name[0-9]{2}\]", said, re.DOTALL)
    assert kinds == {"thought", "called"}


def test_a_form_may_wait_for_a_thought_that_the_answer_opens_with() -> None:
    constraint = Constraint("calls", CALL, begins_after="}", opens_with="{")
    kinds = set[bool]()
    for seed in range(60):
        text, is_over = babble(constraint, seed)
        if is_over:
            kinds.add(text.startswith(b"{"))
            assert re.fullmatch(rb"(\{[^}]*\}\s*)?name[0-9]{2}\]", text, re.DOTALL)
    assert kinds == {True, False}
