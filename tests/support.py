"""Fakes that are real subclasses, and the real appliance as a process."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Backend, Capabilities, ModelFacts, StateRefused, Vision
from runtime.batch import Batch, CacheOp, Chunk, CopyPrefix, DropState, RestoreState, SaveState, Truncate
from runtime.engine import Delta, Disk, Failure, Sink
from runtime.images import passes, rows_of
from runtime.request import Adapter, AdapterSet, Request, RequestId, TokenId
from runtime.sequence import Sequence
from runtime.states import SavedState, Scope, StateId
from runtime.tokenizer import Tokenizer

SEED = Path(sys.prefix) / "share" / "slm-edge" / "seed"
DEFAULT_MODEL = "smollm2:135m-instruct"


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 30.0, what: str = "the condition") -> None:
    """Return as soon as `condition` holds; fail after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come to hold in {timeout_s} s")
        time.sleep(0.02)


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


# ---------------------------------------------------------------- a backend whose answer shows what it could read


class LetterTokenizer(Tokenizer):
    """A token is one Chinese character, three bytes; token 0 ends an answer."""

    @property
    def eog_tokens(self) -> frozenset[TokenId]:
        return frozenset({0})

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[TokenId]:
        return [ord(c) - 0x4E00 for c in text]

    def piece(self, token: TokenId) -> bytes:
        return chr(0x4E00 + token).encode() if token else b""

    def text(self, token: TokenId) -> str:
        return chr(0x4E00 + token) if token else "<end>"


def salt(adapters: AdapterSet) -> int:
    """What an adapter set adds to each token's cell, so that cells show what they were computed with."""
    return zlib.crc32(repr([(a.digest, a.scale) for a in adapters]).encode()) << 20 if adapters else 0


class ScriptedBackend(Backend):
    """The next token is a hash of the cells that the sequence may read, and of the adapters it is computed with.

    It keeps cells as llama.cpp does, one list per slot, and checks what the real one would punish: positions that do
    not go on where the slot ends, more tokens than a step may have, more cells than there are.
    """

    def __init__(self, capabilities: Capabilities, *, vocab_size: int = 97, has_room: Iterable[bool] = ()) -> None:
        self._capabilities = capabilities
        self._has_room = iter(has_room)
        self._unsaved: list[StateId] = []
        self._vocab_size = vocab_size
        self.cells: dict[int, list[TokenId]] = {i: [] for i in range(capabilities.num_slots)}
        self.lacking: dict[int, int] = dict.fromkeys(self.cells, 0)
        """By slot: the length below which tokens before a sliding window lack."""
        self.states: dict[int, list[TokenId]] = {}
        self._tokenizer = LetterTokenizer()
        self.num_steps = 0
        self.threads = 0
        self.num_computed = 0
        self.loaded: set[str] = set()
        self.sets: list[AdapterSet] = []
        """The adapter set of each step."""

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def vision(self) -> Vision | None:
        return None

    @property
    def facts(self) -> ModelFacts:
        size = self._vocab_size
        return ModelFacts("scripted", "scripted", 0, 0, size, self._capabilities.context_tokens, None, "", "", ())

    def clock(self) -> float:
        """Seconds as they would pass on a small machine: 20 ms a step and 5 a token."""
        return 0.02 * self.num_steps + 0.005 * self.num_computed

    def next_token(self, cells: list[TokenId]) -> TokenId:
        """The token after these cells."""
        digest = hashlib.blake2b(repr(cells).encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little") % self._vocab_size

    def scores(self, cells: list[TokenId]) -> NDArray[np.float32]:
        """The scores after these cells."""
        row = np.zeros(self._vocab_size, np.float32)
        row[self.next_token(cells)] = 1.0
        return row

    def expected(self, prompt: list[TokenId], *, max_tokens: int, adapters: AdapterSet = ()) -> list[TokenId]:
        """What a request gets when nothing else happens, the final token 0 left out."""
        cells, out = [t + salt(adapters) for t in prompt], list[TokenId]()
        while len(out) < max_tokens and (token := self.next_token(cells)) != 0:
            out.append(token)
            cells.append(token + salt(adapters))
        return out

    def load_adapter(self, adapter: Adapter) -> None:
        assert adapter.digest not in self.loaded, "loaded once"
        self.loaded.add(adapter.digest)

    def free_adapter(self, digest: str) -> None:
        self.loaded.remove(digest)

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        self.num_steps += 1
        self.sets.append(batch.adapters)
        assert {a.digest for a in batch.adapters} <= self.loaded, "a step names what is loaded"
        assert all(c.sequence.request.adapters == batch.adapters for c in batch.chunks), "a step holds one set"
        for op in batch.cache_ops:
            self._apply(op)
        return self._compute(batch) if batch.chunks else np.empty((0, self._vocab_size), np.float32)

    def _apply(self, op: CacheOp) -> None:
        match op:
            case CopyPrefix():
                assert not self.cells[op.target], "a copy goes to an empty slot"
                assert self.lacking[op.source] <= op.length <= len(self.cells[op.source]), "a copy takes what is there"
                self.cells[op.target] = self.cells[op.source][: op.length]
                self.lacking[op.target] = self.lacking[op.source]
            case Truncate():
                assert op.length == 0 or op.length >= self.lacking[op.slot], "what a window needs is there"
                del self.cells[op.slot][op.length :]
                self.lacking[op.slot] = self.lacking[op.slot] if op.length else 0
            case SaveState() if not self.has_room(len(self.cells[op.slot])):
                self._unsaved.append(op.state)
            case SaveState():
                self.states[op.state] = list(self.cells[op.slot])
                held = sum(map(len, self.states.values()))
                assert held <= self._capabilities.states.memory_bytes, "the states' budget"
            case RestoreState():
                assert not self.cells[op.slot], "a state goes to an empty slot"
                if op.state not in self.states:
                    raise StateRefused(op.state)
                self.cells[op.slot] = list(self.states[op.state])
                assert sum(map(len, self.cells.values())) <= self._capabilities.num_cells, "more cells than there are"
                if not self._capabilities.states.may_cut(len(self.cells[op.slot])):
                    assert op.length == len(self.cells[op.slot]), "what cannot be cut is put back whole"
                    self.lacking[op.slot] = op.length if self._capabilities.states.window_tokens else 0
                del self.cells[op.slot][op.length :]
            case DropState():
                self.states.pop(op.state, None)

    def _compute(self, batch: Batch) -> NDArray[np.float32]:
        assert 0 < batch.num_tokens <= self._capabilities.max_step_tokens
        slots = [c.slot for c in batch.chunks]
        assert slots == sorted(set(slots)), "slots are ordered, each at most once"
        rows: list[NDArray[np.float32]] = []
        for chunk in batch.chunks:
            cells = self.cells[chunk.slot]
            assert chunk.start == len(cells), "a chunk goes on where its slot ends"
            for part in (p for layer in passes((chunk,)) for p in layer if p.tokens[0] < 0):
                assert len(rows_of(part)) == len(part.tokens), "what a step computes is encoded"
            for i, token in enumerate(chunk.tokens, 1):
                cells.append(token + salt(batch.adapters))
                if i > len(chunk.tokens) - chunk.num_logits:
                    rows.append(self.scores(cells))
            self.num_computed += len(chunk.tokens)
        assert sum(map(len, self.cells.values())) <= self._capabilities.num_cells, "more cells than there are"
        return np.stack(rows) if rows else np.empty((0, self._vocab_size), np.float32)

    def state(self, state: StateId) -> memoryview:
        return np.array(self.states[state], np.int64).data.cast("B")

    def has_room(self, size_bytes: int) -> bool:
        return next(self._has_room, True)

    def take_unsaved(self) -> list[StateId]:
        unsaved, self._unsaved = self._unsaved, []
        return unsaved

    def put_state(self, state: StateId, data: memoryview) -> None:
        self.states[state] = np.frombuffer(data, np.int64).tolist()

    def settle(self) -> Iterator[object]:
        return iter(())

    def set_threads(self, threads: int) -> None:
        self.threads = threads

    def clear(self) -> None:
        for cells in self.cells.values():
            cells.clear()
        self.lacking = dict.fromkeys(self.cells, 0)
        self.states.clear()
        self._unsaved.clear()

    def close(self) -> None:
        self.clear()


class ScriptedDisk(Disk):
    """Does what it is told when `work` is called, and fails where the plan says so."""

    def __init__(self, plan: list[bool]) -> None:
        self._plan = plan
        self._jobs: list[Callable[[], None]] = []
        self._num_jobs = 0
        self.files: dict[tuple[Scope, tuple[TokenId, ...]], tuple[memoryview, str]] = {}

    def write(self, state: SavedState, data: memoryview, done: Callable[[bool], None]) -> None:
        def job() -> None:
            if good := self._is_good():
                self.files[state.scope, tuple(state.tokens)] = data, state.pin
            done(good)

        self._jobs.append(job)

    def read(self, state: SavedState, done: Callable[[memoryview | None], None]) -> None:
        def job() -> None:
            found = self.files.get((state.scope, tuple(state.tokens)))
            done(found[0] if found is not None and self._is_good() else None)

        self._jobs.append(job)

    def remove(self, scope: Scope, tokens: list[TokenId]) -> None:
        self._jobs.append(lambda: void(self.files.pop((scope, tuple(tokens)), None)))

    def _is_good(self) -> bool:
        self._num_jobs += 1
        return self._plan[self._num_jobs % len(self._plan)] if self._plan else True

    def work(self) -> bool:
        """Do what was asked; whether there was anything."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job()
        return bool(jobs)


def void(_: object) -> None:
    """Drop a value."""


class CollectingSink(Sink):
    """Keeps every answer."""

    def __init__(self) -> None:
        self.texts: dict[RequestId, str] = {}
        self.last: dict[RequestId, Delta] = {}
        self.failures: dict[RequestId, Failure] = {}

    def deliver(self, deltas: list[Delta], failures: list[Failure]) -> None:
        for d in deltas:
            self.texts[d.request_id] = self.texts.get(d.request_id, "") + d.text
            self.last[d.request_id] = d
        for f in failures:
            self.failures[f.request_id] = f

    @property
    def num_finished(self) -> int:
        """Requests that ended, well or badly."""
        return len(self.failures) + sum(d.finish_reason is not None for d in self.last.values())


# ---------------------------------------------------------------- the real appliance


@dataclass(slots=True)
class RunningAppliance:
    """`edge serve` in a process of its own."""

    process: subprocess.Popen[bytes]
    home: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def socket(self) -> Path:
        return self.home / "run" / "edge.sock"

    def client(self, **kwargs: Any) -> httpx.Client:
        """A plain HTTP client of it."""
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, **kwargs)

    def worker_pids(self) -> list[int]:
        """Process ids of the engines."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text("ascii")
        return [int(pid) for pid in children.split()]

    def log(self) -> str:
        """What it wrote to its log file."""
        return (self.home / "logs" / "edge.log").read_text("utf-8")


def edge_env(home: Path, **more: str) -> dict[str, str]:
    """The environment of an `edge` process with that home and nothing of the caller's settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("EDGE_", "OTEL_")) and "proxy" not in k.lower()}
    return {**kept, "EDGE_HOME": str(home), "EDGE_PRELOAD": "off", "PYTHONUNBUFFERED": "1", **more}


def run_edge(*args: str, home: Path, timeout_s: float = 120, **more: str) -> subprocess.CompletedProcess[str]:
    """`edge` with these arguments, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "edge.cli", *args],
        env=edge_env(home, **more), capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL,
        check=False,
    )  # fmt: skip


def start_appliance(
    home: Path, *args: str, port: int | None = None, env: Mapping[str, str] | None = None
) -> RunningAppliance:
    """Start `edge serve` and wait until it answers."""
    port = port or free_port()
    home.mkdir(parents=True, exist_ok=True)
    with (home / "serve.out").open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "edge.cli", "serve", "--port", str(port), "--verbose", *args],
            env=edge_env(home, **(env or {})), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
        )  # fmt: skip
    appliance = RunningAppliance(process, home, port)

    def answers() -> bool:
        if process.poll() is not None:
            raise AssertionError(f"edge serve ended: {(home / 'serve.out').read_text()}")
        try:
            return httpx.get(f"{appliance.url}/livez", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(answers, what="edge serve to answer")
    except BaseException:
        process.kill()
        process.wait()
        raise
    return appliance


def stop(process: subprocess.Popen[bytes], *, timeout_s: float = 30) -> int:
    """Ask a process to end, and make it."""
    if process.poll() is None:
        process.terminate()
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


@contextmanager
def running_appliance(home: Path, *args: str, **env: str) -> Generator[RunningAppliance]:
    """`edge serve` for the length of a block."""
    appliance = start_appliance(home, *args, env=env)
    try:
        yield appliance
    finally:
        stop(appliance.process)


def model_info(http: httpx.Client, ref: str = DEFAULT_MODEL) -> dict[str, Any]:
    """What the appliance says of one model."""
    return next(m for m in http.get("/edge/v1/models").json()["models"] if m["ref"] == ref)


def chat_body(prompt: str, **more: Any) -> dict[str, Any]:
    """A chat completion request for the default model, greedy unless told otherwise."""
    return {
        "model": DEFAULT_MODEL,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 24,
        **more,
    }


def sse_events(lines: Iterator[str]) -> Iterator[Mapping[str, Any]]:
    """The JSON events of a stream, up to ``[DONE]``."""
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


# ---------------------------------------------------------------- the greedy law


ROUNDING_TEXT = (
    "The appliance answers questions where there is no network, and keeps its data when the power is cut. It was made "
    "for boats, mines and farms, where nobody can drive out to mend what breaks, and where the link is bad or dear."
)


class GreedyLaw:
    """Judges greedy answers that should be the same (docs/architecture.md, "The greedy law").

    Rounding follows the shape of a batch, so two right answers may part after a near tie. Every token of an answer,
    scored alone after the same prefix, has to be within `epsilon` of the best score. `epsilon` is measured for the
    model: twice the largest change of a likely token's score that a used cache makes.
    """

    def __init__(self, weights: Path) -> None:
        from runtime.backends.llama_cpp import LlamaBackend, LlamaOptions

        self.weights = weights
        self.backend = LlamaBackend(weights, LlamaOptions(1, 8, 512, 4096, 4 << 30))
        self.adapters: AdapterSet = ()
        self._loaded: set[str] = set()

    @cached_property
    def epsilon(self) -> float:
        """Measured when first asked for: where other processes want the cores, its two threads take half a minute."""
        return 2 * self._rounding()

    def use(self, adapters: AdapterSet) -> None:
        """Judge answers with these adapters from now on."""
        for adapter in adapters:
            if adapter.digest not in self._loaded:
                self.backend.load_adapter(adapter)
                self._loaded.add(adapter.digest)
        self.adapters = adapters

    def close(self) -> None:
        """Free the model."""
        self.backend.close()

    def scores(self, tokens: list[TokenId]) -> NDArray[np.float32]:
        """Scores after each token, computed alone, shape ``(len(tokens), vocab)``."""
        self.backend.clear()
        chunks = [self._chunk(0, i, tokens[i : i + 1]) for i in range(len(tokens))]
        return np.concatenate([self._decode(c) for c in chunks])

    @staticmethod
    def _chunk(slot: int, start: int, tokens: list[TokenId]) -> Chunk:
        sequence = Sequence(Request(RequestId(slot), tuple(tokens), 1), slot)
        return Chunk(sequence, slot, start, tokens, num_logits=1)

    def _rounding(self) -> float:
        """Largest change of a likely token's score between a text alone and the same text in a used cache, where its
        cells lie on both sides of the border at which attention is split between threads (256 cells): a quarter, half
        and three quarters of them before it."""
        encode = self.backend.tokenizer.encode
        text = encode(ROUNDING_TEXT, add_special=True, parse_special=False)
        alone = self.scores(text)
        likely = np.argsort(-alone, axis=1)[:, :5]
        filler = encode("lorem ipsum dolor sit amet " * 60, add_special=False, parse_special=False)
        changes: list[float] = []
        for num_before in (len(text) // 4, len(text) // 2, len(text) * 3 // 4):
            self.backend.clear()
            self.backend.set_threads(2)
            self._decode(self._chunk(1, 0, filler[: 256 - num_before]))
            beside = np.concatenate([self._step(text, i) for i in range(len(text))])
            self.backend.set_threads(1)
            changes.append(float(np.abs(np.take_along_axis(beside - alone, likely, axis=1)).max()))
        return max(changes)

    def _step(self, text: list[TokenId], i: int) -> NDArray[np.float32]:
        return self._decode(self._chunk(0, i, text[i : i + 1]))

    def _decode(self, chunk: Chunk) -> NDArray[np.float32]:
        return self.backend.decode(Batch((), (chunk,), self.adapters)).copy()

    def gap(self, prompt: list[TokenId], answer: list[TokenId]) -> float:
        """How far the worst token of a greedy answer is from the best score."""
        scores = self.scores([*prompt, *answer])[len(prompt) - 1 : -1]
        chosen = scores[np.arange(len(answer)), answer]
        return float((scores.max(axis=1) - chosen).max())

    def obeys(self, prompt: list[TokenId], answer: list[TokenId], reference: list[TokenId]) -> bool:
        """Whether `answer` equals the reference, or parts from it only after near ties."""
        if answer == reference:
            return True
        gap = self.gap(prompt, answer)
        return gap == 0 or gap <= self.epsilon
