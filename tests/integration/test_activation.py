"""A sick version put into a slot: the one that serves goes on, and no request is lost that it could answer."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import pytest

from edge.formats.gguf import read_gguf
from edge.store.details import details_of
from edge.store.goldens import GOLDEN_NAME, Goldens, GoldenText
from edge.store.models import ModelStore, PackageFile, StoredModel
from tests.support import DEFAULT_MODEL, SEED, RunningAppliance, chat_body, running_appliance, sse_events, wait_until

ROOT = Path(__file__).parents[2]
BOMBS = f"{ROOT / 'tests' / 'bombs'}:{ROOT}"
CHAT, ACTIVATE = "/v1/chat/completions", "/edge/v1/slots/chat/activate"
GAP_S = 30.0
"""For so long nobody is without an answer, also beside other work; docs/reliability.md has the figures."""


def put(store: ModelStore, name: str, weights: Path, goldens: Goldens | None = None) -> StoredModel:
    """A version in the store; another file of its package makes it another one."""
    note = store.root.parent / f"{name.replace(':', '-')}.txt"
    note.write_text(name)
    files = [PackageFile(weights, "model.gguf"), PackageFile(note, "note.txt")]
    if goldens is not None:
        path = note.with_suffix(".json")
        path.write_bytes(goldens.encode())
        files.append(PackageFile(path, GOLDEN_NAME))
    return store.add(name, files, details_of(read_gguf(weights)))


def perturbed(weights: Path, target: Path) -> Path:
    """The same model with noise in its weights: it still answers, and wrongly."""
    data = bytearray(weights.read_bytes())
    start = len(data) // 2
    for at in range(start, start + (16 << 20), 16):
        data[at] ^= 0x55
    target.write_bytes(data)
    return target


@dataclass
class Clients:
    """Ask the slot all the time, whole answers and streams, and note each that failed and the longest silence."""

    appliance: RunningAppliance
    num: int = 3
    answered: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    failed: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,), daemon=True) for i in range(self.num)]

    def __enter__(self) -> Self:
        self.began = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        self.ended = time.monotonic()

    def _ask(self, number: int) -> None:
        with self.appliance.client() as http:
            while not self._stop.is_set():
                body = chat_body(f"Say the number {number}.", model="chat", max_tokens=4)
                reply = http.post(CHAT, json=body)
                if reply.status_code == 200:
                    self.answered.append((time.monotonic(), reply.json()["model"]))
                else:
                    self.failed.append(reply.text)

    def longest_gap_s(self) -> float:
        """In which nobody had an answer."""
        times = [self.began, *(at for at, _ in self.answered), self.ended]
        return max(b - a for a, b in pairwise(times))

    def models(self) -> set[str]:
        """Who answered."""
        return {model for _, model in self.answered}


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAppliance]:
    """An appliance with the default model in its slot, and sick versions in its store."""
    home = tmp_path_factory.mktemp("home")
    store = ModelStore(home / "store", seed=SEED)
    weights = store.get(DEFAULT_MODEL).weights
    for harm in ("load-abort", "load-hang", "slow", "abort", "hang", "nan"):
        put(store, f"sick:{harm}", weights)
    put(store, "good:v2", weights)
    with running_appliance(home, EDGE_CONTEXT_TOKENS="1024", PYTHONPATH=BOMBS) as appliance:
        golden = golden_of(appliance, "The capital of France is Paris, and that of Italy is Rome.")
        put(store, "good:v3", weights, Goldens(texts=[golden]))
        put(store, "wrong:x", perturbed(weights, home / "wrong.gguf"), Goldens(texts=[golden]))
        put(store, "big:x", weights, Goldens(texts=[golden], max_memory_bytes=1 << 20))
        with appliance.client() as http:
            activate(http, DEFAULT_MODEL).raise_for_status()
        yield appliance


def golden_of(appliance: RunningAppliance, text: str) -> GoldenText:
    """What the default model thinks of a text."""
    with appliance.client() as http:
        tokens = http.post("/tokenize", json={"content": text, "model": DEFAULT_MODEL}).json()["tokens"]
        body = {"model": DEFAULT_MODEL, "prompt": tokens, "echo": True, "logprobs": 0, "max_tokens": 0}
        logprobs = http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]["token_logprobs"]
    return GoldenText(tokens=tokens, logprobs=logprobs[1:])


def activate(http: httpx.Client, model: str, **more: Any) -> httpx.Response:
    return http.post(ACTIVATE, json={"model": model, "trial_s": 600, **more})


def slot(http: httpx.Client) -> dict[str, Any]:
    return next(s for s in http.get("/edge/v1/slots").json()["slots"] if s["name"] == "chat")


def back(http: httpx.Client) -> dict[str, Any]:
    """The slot once the default model alone is in it again."""
    wait_until(lambda: slot(http)["state"] == "serving", what="the slot to settle")
    found = slot(http)
    assert found["serves"] == found["current"]["ref"] == DEFAULT_MODEL
    assert found["candidate"] is None
    return found


@pytest.mark.parametrize(
    ("model", "more", "reason"),
    [
        ("wrong:x", {}, "its answers are wrong"),
        ("sick:load-abort", {}, "signal 6"),
        ("sick:slow", {"within_s": 2}, "too slow"),
        ("big:x", {}, "MiB of memory"),
        pytest.param("sick:load-hang", {}, "no progress of the load", marks=pytest.mark.soak),
    ],
)
def test_a_version_that_does_not_prove_itself_never_serves(
    sick: RunningAppliance, model: str, more: dict[str, Any], reason: str
) -> None:
    with Clients(sick) as clients, sick.client() as http:
        reply = activate(http, model, **more)
        assert reply.status_code == 422, reply.text
        assert reply.json()["code"] == "activation_failed"
        assert reason in reply.json()["detail"]
        found = back(http)
        assert (found["last"]["outcome"], found["last"]["ref"]) == ("rolled_back", model)
        assert reason in found["last"]["reason"]
        assert any(model in a["what"] for a in http.get("/edge/v1/status").json()["alerts"])
    assert clients.failed == []
    assert clients.models() == {DEFAULT_MODEL}
    assert clients.longest_gap_s() < GAP_S


@pytest.mark.parametrize("harm", ["abort", "hang", pytest.param("nan", marks=pytest.mark.soak)])
def test_a_version_that_fails_on_trial_is_replaced_and_its_requests_are_answered(
    sick: RunningAppliance, harm: str
) -> None:
    with Clients(sick) as clients, sick.client() as http:
        reply = activate(http, f"sick:{harm}")
        assert reply.status_code == 200, reply.text
        found = back(http)
        assert (found["last"]["outcome"], found["last"]["ref"]) == ("rolled_back", f"sick:{harm}")
    assert clients.failed == []
    assert clients.longest_gap_s() < GAP_S


def test_a_version_that_is_stopped_on_trial_is_replaced(sick: RunningAppliance) -> None:
    with Clients(sick) as clients, sick.client() as http:
        before = set(sick.worker_pids())
        activate(http, "good:v2").raise_for_status()
        (worker,) = set(sick.worker_pids()) - before
        wait_until(lambda: "good:v2" in clients.models(), what="the new version to answer")
        os.kill(worker, signal.SIGSTOP)
        found = back(http)
        assert "no sign of life" in found["last"]["reason"]
    assert clients.failed == []
    assert clients.longest_gap_s() < GAP_S


def test_a_version_that_proves_itself_stays_and_the_one_before_can_be_had_back(sick: RunningAppliance) -> None:
    with sick.client() as http:
        on_trial = activate(http, "good:v3", trial_s=600).json()
        assert (on_trial["state"], on_trial["serves"]) == ("trial", "good:v3")
        assert on_trial["current"]["ref"] == DEFAULT_MODEL
        assert http.post(CHAT, json=chat_body("Hi", model="chat", max_tokens=1)).json()["model"] == "good:v3"
        withdrawn = http.post("/edge/v1/slots/chat/rollback").json()
        assert (withdrawn["serves"], withdrawn["last"]["outcome"]) == (DEFAULT_MODEL, "withdrawn")
        stays = activate(http, "good:v3", trial_s=0).json()
        assert (stays["state"], stays["serves"], stays["previous"]["ref"]) == ("serving", "good:v3", DEFAULT_MODEL)
        assert stays["last"]["outcome"] == "confirmed"
        undone = http.post("/edge/v1/slots/chat/rollback").json()
        assert (undone["serves"], undone["previous"]["ref"]) == (DEFAULT_MODEL, "good:v3")
        listed = {m["id"]: m for m in http.get("/v1/models").json()["data"]}
        assert listed["chat"]["parent"] == http.get("/v1/models/chat").json()["parent"] == DEFAULT_MODEL


@pytest.mark.soak
def test_a_stream_that_had_begun_on_trial_ends_with_an_error_and_is_no_lie(sick: RunningAppliance) -> None:
    with sick.client() as http:
        before = set(sick.worker_pids())
        activate(http, "good:v2").raise_for_status()
        (worker,) = set(sick.worker_pids()) - before
        body = chat_body("Tell me everything.", model="chat", max_tokens=200, ignore_eos=True, stream=True)
        with http.stream("POST", CHAT, json=body) as reply:
            events = sse_events(reply.iter_lines())
            for _ in range(3):
                next(events)
            os.kill(worker, signal.SIGKILL)
            *_, last = events
        assert last["error"]["code"] == "worker_died"
        assert back(http)["last"]["outcome"] == "rolled_back"
