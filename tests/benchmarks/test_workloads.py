"""The prompts: the same from the same seed, of the lengths they say, bounded."""

from __future__ import annotations

import json
import random

import pytest

from benchmarks.measure import Place, judged
from benchmarks.plan import MAX_CLIENTS, MAX_REQUESTS, Answer, Outcome
from benchmarks.workloads import WORKLOADS, Clients, Workload

LOADS = list(WORKLOADS.values())


def texts_of(clients: Clients) -> list[str]:
    return [ask.text for asks in clients for ask in asks]


@pytest.mark.parametrize("workload", LOADS, ids=lambda w: w.name)
def test_same_place_same_prompts(workload: Workload) -> None:
    clients = workload.clients[-1]
    place = Place(workload, clients, 1, 0)
    assert place.asks(7) == place.asks(7)
    others = [place.asks(8), Place(workload, clients, 2, 0).asks(7), Place(workload, clients, 1, 1).asks(7)]
    assert not set(texts_of(place.asks(7))) & {t for o in others for t in texts_of(o)}


@pytest.mark.parametrize("workload", LOADS, ids=lambda w: w.name)
def test_no_plan_is_larger_than_the_generator_takes(workload: Workload) -> None:
    for number in workload.clients:
        clients = workload.make(number, random.Random(0))
        assert len(clients) == number <= MAX_CLIENTS
        assert sum(map(len, clients)) <= MAX_REQUESTS


def test_prompts_are_about_as_long_as_they_say() -> None:
    def words(name: str) -> float:
        texts = texts_of(WORKLOADS[name].make(1, random.Random(0)))
        return sum(len(t.split()) for t in texts) / len(texts)

    assert 1500 / 1.5 < words("long") < 1500
    assert 800 / 1.5 < words("prefix") < 900
    assert 25 < words("short") < 45


def test_prefix_shares_its_document_and_nothing_else() -> None:
    texts = texts_of(WORKLOADS["prefix"].make(8, random.Random(0)))
    documents = {t.split("\nQuestion:")[0] for t in texts}
    assert len(documents) == 1
    assert len(set(texts)) > 12


def test_restart_asks_twice_about_one_document() -> None:
    (asks,) = WORKLOADS["restart"].make(1, random.Random(0))
    before, after = (a.text for a in asks)
    assert before != after
    assert before.split("\nQuestion:")[0] == after.split("\nQuestion:")[0]


def test_chat_is_made_of_turns() -> None:
    clients = WORKLOADS["chat"].make(4, random.Random(0))
    assert [len(c) for c in clients] == [5] * 4
    assert all(ask.is_turn for c in clients for ask in c)


def test_json_answers_are_judged() -> None:
    clients = WORKLOADS["json-ticket"].make(1, random.Random(0))
    good = {"category": "bug", "priority": "low", "needs_human_review": True, "estimated_resolution_hours": 3,
            "assigned_department": "finance"}  # fmt: skip
    texts = [json.dumps(good), json.dumps({**good, "priority": "none"}), json.dumps(good)[:-1]]
    answers = [Answer(0, 0.0, [1.0], text, 1, 0, 5) for text in texts]
    errors = [a.error for a in judged(Outcome(answers, 1.0, 0.1), clients).answers]
    assert [bool(e) for e in errors] == [False, True, True]
