"""Adapters through HTTP, on the default model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.formats.gguf import GgufFile, read_gguf
from edge.store.fetch import pull
from edge.store.models import ModelStore
from runtime.backends.llama_cpp import LlamaBackend, LlamaOptions
from runtime.batch import Batch, Chunk, Truncate
from runtime.request import AdapterSet, Request, RequestId
from runtime.selection import Selector
from runtime.sequence import Sequence
from tests.adapters import make_lora
from tests.support import DEFAULT_MODEL, SEED, GreedyLaw, RunningAppliance, chat_body, run_edge, running_appliance

NAMES = [DEFAULT_MODEL, f"{DEFAULT_MODEL}+polite", f"{DEFAULT_MODEL}+rude"]
QUESTIONS = ["What is a lighthouse for?", "Name three fish.", "Why is the sea salt?", "Write one line about rain."]


def default_weights() -> Path:
    return ModelStore(SEED).get(DEFAULT_MODEL).weights


def without_a_column(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    return values[:, :-1] if name.endswith("lora_a") else values


@pytest.fixture(scope="module")
def base() -> GgufFile:
    return read_gguf(default_weights())


@pytest.fixture(scope="module")
def appliance(tmp_path_factory: pytest.TempPathFactory, base: GgufFile) -> Iterator[RunningAppliance]:
    home = tmp_path_factory.mktemp("home")
    store = ModelStore(home / "store", seed=SEED)
    files = {name: make_lora(home / f"{name}.gguf", base, seed=i) for i, name in enumerate(("polite", "rude"))}
    files["stranger"] = make_lora(home / "stranger.gguf", base, seed=9, change=without_a_column)
    files["other"] = make_lora(home / "other.gguf", base, seed=9, architecture="qwen2")
    for name, file in files.items():
        pull(store, str(file), name=name)
    with running_appliance(home) as running:
        yield running


@pytest.fixture(scope="module")
def law() -> Iterator[GreedyLaw]:
    judge = GreedyLaw(default_weights())
    yield judge
    judge.close()


@dataclass(frozen=True)
class Answer:
    """What came back."""

    prompt: list[int]
    tokens: list[int]
    text: str
    cached: int
    model: str


def ask(appliance: RunningAppliance, body: dict[str, Any]) -> Answer:
    with appliance.client() as client:
        response = client.post("/v1/chat/completions", json={**body, "return_token_ids": True})
    assert response.status_code == 200, response.text
    answer = response.json()
    choice = answer["choices"][0]
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return Answer(
        answer["prompt_token_ids"], choice["token_ids"], choice["message"]["content"], cached, answer["model"]
    )


def answers(appliance: RunningAppliance, bodies: list[dict[str, Any]], *, at_once: int) -> list[Answer]:
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(partial(ask, appliance), bodies))


def test_two_adapters_and_the_base_under_mixed_load_answer_as_each_does_alone(
    appliance: RunningAppliance, law: GreedyLaw
) -> None:
    bodies = [chat_body(q, model=name, max_tokens=16) for q in QUESTIONS for name in NAMES]
    alone = answers(appliance, bodies, at_once=1)
    for base, polite, rude in zip(*[iter(alone)] * 3, strict=True):
        assert len({base.text, polite.text, rude.text}) == 3, "each adapter changes the answer"
    mixed = answers(appliance, bodies, at_once=len(bodies))
    for i, name in enumerate(NAMES):
        check_law(law, appliance, name, alone[i::3], mixed[i::3])


def check_law(
    law: GreedyLaw, appliance: RunningAppliance, name: str, references: list[Answer], others: list[Answer]
) -> None:
    """The greedy law, scored with the adapters of `name`."""
    law.use(adapters_of(appliance, name))
    for reference, other in zip(references, others, strict=True):
        assert law.obeys(other.prompt, other.tokens, reference.tokens)


def adapters_of(appliance: RunningAppliance, name: str) -> AdapterSet:
    return Selector(ModelStore(appliance.home / "store")).select(name, []).adapters


def test_what_one_adapter_computed_is_no_prefix_of_another(appliance: RunningAppliance) -> None:
    question = "Say in a few words what it is that the keepers of lighthouses had to do in every night of the year."
    asked = [chat_body(question, model=name, max_tokens=4) for name in NAMES]
    # At most what all prompts of a set begin with, from the tests before.
    assert all(a.cached < len(a.prompt) / 2 for a in answers(appliance, asked, at_once=1))
    assert all(a.cached == len(a.prompt) - 1 for a in answers(appliance, asked, at_once=1))


def test_the_body_names_adapters_and_scales(appliance: RunningAppliance, law: GreedyLaw) -> None:
    plain, polite, stacked, off, named = answers(
        appliance,
        [
            chat_body(QUESTIONS[0]),
            chat_body(QUESTIONS[0], model=NAMES[1]),
            chat_body(QUESTIONS[0], model=NAMES[1], lora=[{"name": "rude", "scale": 0.5}]),
            chat_body(QUESTIONS[0], lora=[{"name": "polite", "scale": 0}]),
            chat_body(QUESTIONS[0], lora=[{"name": "polite:latest"}]),
        ],
        at_once=1,
    )
    assert len({plain.text, polite.text, stacked.text}) == 3
    check_law(law, appliance, NAMES[0], [plain], [off])
    check_law(law, appliance, NAMES[1], [polite], [named])
    assert (plain.model, named.model, stacked.model) == (NAMES[0], NAMES[1], f"{DEFAULT_MODEL}+rude+polite")


def test_a_change_of_adapters_leaves_the_cells_of_others_as_they_are(appliance: RunningAppliance) -> None:
    """The scores of the base go on bit for bit after another slot was computed with adapters and emptied again."""
    backend = LlamaBackend(default_weights(), LlamaOptions(1, 2, 512, 1024, 4 << 30, adapter_bytes=1 << 30))
    adapters = adapters_of(appliance, f"{DEFAULT_MODEL}+polite+rude")
    tokens = backend.tokenizer.encode("The keeper lit the lamp and", add_special=True, parse_special=False)

    def scores(*, interrupted: bool) -> NDArray[np.float32]:
        backend.clear()
        backend.decode(Batch((), (chunk(0, 0, tokens),)))
        if interrupted:
            backend.decode(Batch((), (chunk(1, 0, tokens[::-1]),), adapters))
        return backend.decode(Batch((Truncate(1, 0),), (chunk(0, len(tokens), tokens[:1]),))).copy()

    try:
        reference = scores(interrupted=False)
        for adapter in adapters:
            backend.load_adapter(adapter)
        assert np.array_equal(scores(interrupted=True), reference)
        for adapter in adapters:
            backend.free_adapter(adapter.digest)
        assert np.array_equal(scores(interrupted=False), reference)
    finally:
        backend.close()


def chunk(slot: int, start: int, tokens: list[int]) -> Chunk:
    sequence = Sequence(Request(RequestId(slot), tuple(tokens), 1), slot)
    return Chunk(sequence, slot, start, tokens, num_logits=1)


def test_models_are_listed_with_the_adapters_that_fit(appliance: RunningAppliance) -> None:
    with appliance.client() as client:
        listed = {m["id"]: m.get("parent") for m in client.get("/v1/models").json()["data"]}
        assert client.get(f"/v1/models/{NAMES[1]}").json()["parent"] == DEFAULT_MODEL
        assert client.get("/v1/models/polite").status_code == 400
        kinds = {m["ref"]: m["kind"] for m in client.get("/edge/v1/models").json()["models"]}
    assert {n: listed.get(n) for n in NAMES} == {NAMES[0]: None, NAMES[1]: DEFAULT_MODEL, NAMES[2]: DEFAULT_MODEL}
    assert not [name for name in listed if "stranger" in name or "other" in name or name.startswith("polite")]
    assert (kinds["polite:latest"], kinds[DEFAULT_MODEL]) == ("adapter", "text")


@pytest.mark.parametrize(
    ("asked", "status", "code", "says"),
    [
        ({"model": "polite"}, 400, "invalid_request", f"{DEFAULT_MODEL}+polite"),
        ({"model": f"{DEFAULT_MODEL}+nobody"}, 404, "model_not_found", "edge pull ./adapter.gguf"),
        ({"lora": [{"name": "nobody"}]}, 404, "model_not_found", "other, polite, rude, stranger"),
        ({"model": "nobody:1+polite"}, 404, "model_not_found", "nobody:1"),
        ({"lora": [{"name": DEFAULT_MODEL}]}, 400, "invalid_request", "is a model and no adapter"),
        ({"lora": [{"name": "stranger"}]}, 400, "adapter_mismatch", "in the adapter"),
        ({"lora": [{"name": "other"}]}, 400, "adapter_mismatch", "qwen2"),
        ({"model": "polite+rude"}, 400, "adapter_mismatch", "it is an adapter"),
        ({"model": NAMES[1], "lora": [{"name": "polite"}]}, 400, "invalid_request", "each once"),
        ({"lora": [{"id": 0}]}, 400, "invalid_request", "name"),
        ({"model": f"{DEFAULT_MODEL}+"}, 400, "invalid_reference", "not a model name"),
    ],
)
def test_what_cannot_be_is_refused(
    appliance: RunningAppliance, asked: dict[str, Any], status: int, code: str, says: str
) -> None:
    with appliance.client() as client:
        response = client.post("/v1/chat/completions", json=chat_body("Hello", **asked))
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), error
    assert says in error["message"]


def test_an_adapter_comes_and_goes_without_a_restart(appliance: RunningAppliance, base: GgufFile) -> None:
    ask(appliance, chat_body("Hello"))
    pids = appliance.worker_pids()
    late = make_lora(appliance.home / "late.gguf", base, seed=77)
    pulled = run_edge("pull", str(late), "--name", "late", "--json", home=appliance.home)
    assert json.loads(pulled.stdout)["adapter"] == {"type": "lora", "rank": 4, "base": None}
    body = chat_body(QUESTIONS[1], model=f"{DEFAULT_MODEL}+late")
    assert ask(appliance, body).text != ask(appliance, chat_body(QUESTIONS[1])).text
    run_edge("rm", "late", "--yes", home=appliance.home)
    with appliance.client() as client:
        assert client.post("/v1/chat/completions", json=body).status_code == 404
    assert appliance.worker_pids() == pids


def test_a_damaged_adapter_costs_its_request_and_not_the_worker(appliance: RunningAppliance, base: GgufFile) -> None:
    """The store's check at the pull is passed by: somebody wrote into the blob."""
    file = make_lora(appliance.home / "bad.gguf", base, seed=5)
    run_edge("pull", str(file), "--name", "bad", home=appliance.home)
    blob = weights_of(appliance, "bad")
    blob.chmod(0o600)
    header = read_gguf(blob)
    with blob.open("r+b") as opened:
        opened.seek(header.tensors[3].offset)
        opened.write(b"\x00\x00\xc0\x7f")  # NaN
    ask(appliance, chat_body("Hello"))
    pids = appliance.worker_pids()
    with appliance.client() as client:
        response = client.post("/v1/chat/completions", json=chat_body("Hello", model=f"{DEFAULT_MODEL}+bad"))
    assert response.status_code == 422, response.text
    assert "not finite" in response.json()["error"]["message"]
    ask(appliance, chat_body("Hello"))
    assert appliance.worker_pids() == pids


def weights_of(appliance: RunningAppliance, name: str) -> Path:
    return ModelStore(appliance.home / "store").get(name).weights
