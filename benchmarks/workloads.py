"""What is asked of the servers. Deterministic: the same seed makes the same texts on every machine."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .plan import Ask

Kind = Literal["load", "start", "restart"]
Clients = list[list[Ask]]

_ADJECTIVES = [
    "old",
    "small",
    "quiet",
    "heavy",
    "green",
    "broken",
    "distant",
    "careful",
    "narrow",
    "bright",
    "wooden",
    "empty",
    "early",
    "northern",
]
_NOUNS = [
    "pump",
    "bridge",
    "harbour",
    "valve",
    "engine",
    "letter",
    "garden",
    "river",
    "motor",
    "signal",
    "farmer",
    "captain",
    "teacher",
    "market",
]
_PLACES = [
    "island",
    "mill",
    "valley",
    "station",
    "village",
    "mine",
    "coast",
    "factory",
    "school",
    "lighthouse",
    "forest",
    "dock",
]
_VERBS = [
    "repaired",
    "counted",
    "painted",
    "carried",
    "measured",
    "opened",
    "moved",
    "collected",
    "tested",
    "sold",
    "lost",
    "found",
]
_TIMES = [
    "sunrise",
    "noon",
    "winter",
    "the",
    "storm",
    "the",
    "harvest",
    "midnight",
    "the",
    "summer",
    "lunch",
    "the",
    "first",
    "train",
]
_NAMES = ["Anna", "Peter", "Maria", "John", "Lucy", "Omar", "Irene", "Paul", "Sara", "Victor"]
_ENDINGS = (
    "and {name} wrote it down.",
    "so the {noun} had to wait.",
    "but nobody at the {place} noticed.",
    "because the {noun} was {adjective}.",
    "while {name} looked after the {noun}.",
)
_QUESTIONS = (
    "Why did {name} think that the {adjective} {noun} of the {place} mattered so much to the others?",
    "What should {name} do next with the {adjective} {noun}, and what would happen to the {place} then?",
    "How would you explain to {name}, in plain words, what the {adjective} {noun} of the {place} is for?",
)
_TOKENS_PER_WORD = 1.2
"""Of such sentences, with the default model's vocabulary; answers tell how many there were."""
_QUESTION_TOKENS = 28


def _fill(template: str, rng: random.Random) -> str:
    return template.format(
        name=rng.choice(_NAMES), noun=rng.choice(_NOUNS), place=rng.choice(_PLACES), adjective=rng.choice(_ADJECTIVES)
    )


def sentence(rng: random.Random) -> str:
    """One sentence of plain English."""
    start = f"The {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)} of the {rng.choice(_PLACES)}"
    act = f"{rng.choice(_VERBS)} {rng.randint(2, 99)} {rng.choice(_NOUNS)}s before {rng.choice(_TIMES)}"
    return f"{start} {act}, {_fill(rng.choice(_ENDINGS), rng)}"


def passage(rng: random.Random, num_tokens: int) -> str:
    """Sentences of about `num_tokens` tokens in all."""
    words: list[str] = []
    while len(words) * _TOKENS_PER_WORD < num_tokens:
        words += sentence(rng).split()
    return " ".join(words[: max(1, round(num_tokens / _TOKENS_PER_WORD))])


def question(rng: random.Random) -> str:
    """A question of about 25 tokens."""
    return _fill(rng.choice(_QUESTIONS), rng)


def _prompt(rng: random.Random, num_tokens: int) -> str:
    """Something to read, and a question about it."""
    return f"{passage(rng, num_tokens - _QUESTION_TOKENS)}\nQuestion: {question(rng)}\nAnswer: The"


def _each(clients: int, requests: int, make: Callable[[], Ask]) -> Clients:
    return [[make() for _ in range(requests)] for _ in range(clients)]


def short(clients: int, rng: random.Random) -> Clients:
    """About 40 tokens in, 64 out."""
    return _each(clients, 6 if clients == 1 else 2, lambda: Ask(_prompt(rng, 40), 64))


def long(clients: int, rng: random.Random) -> Clients:
    """1,500 tokens in, 64 out."""
    return _each(clients, 2 if clients == 1 else 1, lambda: Ask(_prompt(rng, 1500), 64))


def prefix(clients: int, rng: random.Random) -> Clients:
    """One document of 800 tokens that nobody has seen, and a question of its own in each request; 32 out."""
    shared = passage(rng, 800)
    return _each(clients, 2, lambda: Ask(f"{shared}\nQuestion: {question(rng)}\nAnswer: The", 32))


def repeat(clients: int, rng: random.Random) -> Clients:
    """24 prompts of 120 tokens one after the other, more than there are slots; 32 out."""
    return _each(clients, 24 // clients, lambda: Ask(_prompt(rng, 120), 32))


def chat(clients: int, rng: random.Random) -> Clients:
    """Five turns of about 230 new tokens each, 64 out."""
    return _each(clients, 5, lambda: Ask(f"{passage(rng, 200)} {question(rng)}", 64, is_turn=True))


def copy(clients: int, rng: random.Random) -> Clients:
    """A text of about 130 tokens, and as many out: the text again."""

    def ask() -> Ask:
        text = " ".join(sentence(rng) for _ in range(6))
        return Ask(f"Original:\n{text}\n\nExact copy:\n", 130)

    return _each(clients, 4 if clients == 1 else 2, ask)


def edit(clients: int, rng: random.Random) -> Clients:
    """Seven records, and about as many tokens out: the records with one field changed."""

    def ask() -> Ask:
        rows = [_record(rng) for _ in range(7)]
        first = json.dumps(rows[0] | {"count": 0})
        text = "\n".join(json.dumps(row) for row in rows)
        return Ask(f"Rows:\n{text}\n\nThe same rows with every count set to 0:\n{first}\n", 130)

    return _each(clients, 4 if clients == 1 else 2, ask)


def _record(rng: random.Random) -> dict[str, str | int]:
    return {
        "id": rng.randint(100, 999),
        "name": rng.choice(_NAMES),
        "place": rng.choice(_PLACES),
        "count": rng.randint(2, 99),
    }


def one_document(clients: int, rng: random.Random) -> Clients:
    """Two questions on a document of 800 tokens, to be asked before and after a restart; two tokens out."""
    shared = passage(rng, 800)
    return _each(clients, 2, lambda: Ask(f"{shared}\nQuestion: {question(rng)}\nAnswer: The", 2))


def one_word(clients: int, rng: random.Random) -> Clients:
    """A single short prompt, two tokens out."""
    return _each(clients, 1, lambda: Ask(_prompt(rng, 40), 2))


_NAME: dict[str, object] = {"type": "string", "maxLength": 24}
_WORD: dict[str, object] = {"type": "string", "maxLength": 16}


def _count(most: int) -> dict[str, object]:
    return {"type": "integer", "minimum": 0, "maximum": most}


def _object(**properties: dict[str, object]) -> dict[str, object]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


PERSON = _object(
    name=_NAME,
    age=_count(150),
    occupation=_NAME,
    is_active={"type": "boolean"},
    address=_object(street=_NAME, city=_WORD, country={"enum": ["France", "Spain", "Italy"]}),
)
TICKET = _object(
    category={"enum": ["billing", "bug", "feature_request", "account"]},
    priority={"enum": ["low", "medium", "high", "urgent"]},
    needs_human_review={"type": "boolean"},
    estimated_resolution_hours=_count(72),
    assigned_department={"enum": ["engineering", "customer_success", "finance"]},
)
_ITEM = _object(product_name=_WORD, quantity_in_stock=_count(999), warehouse_location={"enum": ["north", "south"]})
ITEMS = _object(inventory_items={"type": "array", "minItems": 3, "maxItems": 3, "items": _ITEM})


def _json(clients: int, rng: random.Random, what: str, schema: dict[str, object]) -> Clients:
    """Answers of a schema, with bounded texts so that the model ends them; the tokens are as many as it takes."""

    def ask() -> Ask:
        wish = f"Write {what} as JSON. Use the name {rng.choice(_NAMES)} and the number {rng.randrange(10**5)}."
        return Ask(f"{sentence(rng)} {wish}", 256, may_end=True, schema=json.dumps(schema))

    return _each(clients, 6 if clients == 1 else 3, ask)


def json_person(clients: int, rng: random.Random) -> Clients:
    """A person with an address inside."""
    return _json(clients, rng, "a person", PERSON)


def json_ticket(clients: int, rng: random.Random) -> Clients:
    """A support ticket, mostly choices of a few words."""
    return _json(clients, rng, "a support ticket", TICKET)


def json_items(clients: int, rng: random.Random) -> Clients:
    """A list of three things."""
    return _json(clients, rng, "three items of an inventory", ITEMS)


@dataclass(frozen=True, slots=True)
class Workload:
    """One row group of the report.

    Attributes:
        kind: `load` measures running servers; `start` and `restart` start one for each measure.
        make: The requests of some clients from random numbers.
        clients: How many at once, each a row.
        rounds: A B B A rounds unless told otherwise.
        context_tokens: KV cells of both servers.
        primed: Whether the same requests are sent once before, unmeasured.
        busy_cores: Cores that something else takes.
        peer_threads: Threads of the peer, where they are not ours.
        limit_s: What is not answered after this is cut off, and counts as it is.
    """

    name: str
    summary: str
    make: Callable[[int, random.Random], Clients]
    kind: Kind = "load"
    clients: tuple[int, ...] = (1,)
    rounds: int = 5
    context_tokens: int = 32768
    primed: bool = False
    busy_cores: int = 0
    peer_threads: int | None = None
    limit_s: float = 120.0


WORKLOADS = {
    w.name: w
    for w in (
        Workload("short", "40 tokens in, 64 out", short, clients=(1, 8, 16), limit_s=40.0),
        Workload("long", "1,500 in, 64 out", long, clients=(1, 4), rounds=3),
        Workload("prefix", "800 shared, cold, 25 own in, 32 out", prefix, clients=(8,), rounds=3),
        Workload("repeat", "24 prompts of 120 seen before, 32 out", repeat, primed=True, rounds=3),
        Workload("chat", "5 turns, 230 new in each, 64 out", chat, clients=(4,), rounds=3),
        Workload("json-person", "JSON: a person, nested", json_person, clients=(1, 4), rounds=3),
        Workload("json-ticket", "JSON: a ticket of choices", json_ticket, clients=(1, 4), rounds=3),
        Workload("json-items", "JSON: a list of three", json_items, clients=(1, 4), rounds=3),
        Workload("copy", "a text of 130 tokens, and the same text out", copy, clients=(1, 4), rounds=3),
        Workload("edit", "seven records, and the same with a change out", edit, clients=(1, 4), rounds=3),
        Workload("restart", "800-token prefix asked before a restart", one_document, kind="restart", rounds=3),
        Workload("start", "exec to the first token", one_word, kind="start", context_tokens=8192),
        Workload("busy", "short; one core taken", short, clients=(1, 8), rounds=1, busy_cores=1, limit_s=20.0),
        Workload(
            "busy-t1", "short; one core taken, the peer told so (-t 1)", short,
            clients=(1, 8), rounds=3, busy_cores=1, peer_threads=1,
        ),
    )
}  # fmt: skip
