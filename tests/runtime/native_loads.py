"""Small real models with changes that the scan lets pass, given to llama.cpp: what is the worst that they do?

``python -m tests.runtime.native_loads FIRST COUNT``, in an empty working directory, tries the changed models of these
numbers, each in a process of its own, and prints a `Tally` as JSON.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import msgspec

from edge.errors import EdgeError
from edge.formats.gguf import GgufFile, read_gguf
from edge.native.llama import bindings
from edge.store.scan import scan
from runtime.backends.llama_cpp import LlamaBackend, LlamaOptions
from runtime.batch import Batch, Chunk
from runtime.request import Request, RequestId
from runtime.sequence import Sequence as Answer
from tests.edge.mutators import NUMBERS, mutate_bytes
from tests.runtime.tiny_models import TINY, make_tiny

_REFUSED, _FAILED = 3, 4
_HANG_S = 30
_MEMORY_BYTES = 8 << 30


class Tally(msgspec.Struct):
    """What became of the models, by number of models."""

    tried: int = 0
    let_pass: int = 0
    """By the scan; only these were loaded."""
    answered: int = 0
    refused: int = 0
    """By llama.cpp or our backend, with an error."""
    ended: dict[str, list[int]] = {}
    """The numbers of the models whose processes ended otherwise, by signal or exit code."""
    peak_bytes: int = 0
    """Of any process."""


def run(first: int, count: int, folder: Path) -> Tally:
    """Try the models from `first` on."""
    bindings()  # forked processes then need not load it
    bases = [read_gguf(make_tiny(folder / f"{name}.gguf", name)) for name in TINY]
    tally, path = Tally(), folder / "input.gguf"
    for number in range(first, first + count):
        rng = random.Random(f"native {number}")
        path.write_bytes(_mutated(rng, rng.choice(bases)))
        tally.tried += 1
        try:
            scan(path, path.name)
        except EdgeError:
            continue
        tally.let_pass += 1
        _load(path, tally, number)
    return tally


def _mutated(rng: random.Random, base: GgufFile) -> bytes:
    data = base.path.read_bytes()
    for _ in range(rng.randint(1, 3)):
        data = _with_other_number(rng, base, data)
    if rng.random() < 0.3:
        data = mutate_bytes(rng, data, [data], within=base.data_offset)
    return data


def _with_other_number(rng: random.Random, base: GgufFile, data: bytes) -> bytes:
    """The file with another value of a key, or other weights."""
    numbers = [key for key, value in base.metadata.items() if type(value) in (int, float)]
    if rng.random() < 0.2:
        at = rng.randrange(base.data_offset, len(data) - 8)
        return data[:at] + struct.pack("<Q", rng.choice(NUMBERS)) + data[at + 8 :]
    key = rng.choice(numbers).encode()
    at = data.index(key) + len(key) + 4
    changed = rng.choice([rng.choice(NUMBERS) & 0xFFFFFFFF, rng.randrange(600), rng.randrange(1 << 32)])
    return data[:at] + struct.pack("<I", changed) + data[at + 4 :]


def _load(path: Path, tally: Tally, number: int) -> None:
    child = os.fork()
    if not child:
        _become_worker(path)
    _, status, used = os.wait4(child, 0)
    tally.peak_bytes = max(tally.peak_bytes, used.ru_maxrss << 10)
    match os.waitstatus_to_exitcode(status):
        case 0:
            tally.answered += 1
        case code if code == _REFUSED:
            tally.refused += 1
        case code:
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            tally.ended.setdefault(name, []).append(number)


def _become_worker(path: Path) -> NoReturn:
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    signal.alarm(_HANG_S)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code = _FAILED
    try:
        _answer(path)
        code = 0
    except EdgeError:
        code = _REFUSED
    finally:
        os._exit(code)


def _answer(path: Path) -> None:
    """What a worker does of a model, as far as the first token."""
    backend = LlamaBackend(path, LlamaOptions(1, 2, 64, 256, 1 << 30))
    tokens: Sequence[int] = backend.tokenizer.encode("the water", add_special=True, parse_special=True) or [0]
    _ = (backend.facts, [backend.tokenizer.piece(token) for token in tokens])
    answer = Answer(Request(RequestId(0), tuple(tokens), 1), 0)
    backend.decode(Batch((), (Chunk(answer, 0, 0, list(tokens), num_logits=1),)))


if __name__ == "__main__":
    print(msgspec.json.encode(run(int(sys.argv[1]), int(sys.argv[2]), Path.cwd())).decode())
