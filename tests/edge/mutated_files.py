"""Files of models that are mutated, and chat templates."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from edge.store.scan import scan
from tests.edge.gguf_files import METADATA, TENSORS, Raw, Tensor, array, gguf_bytes, string, strings
from tests.edge.mutators import (
    MAX_CPU_S,
    NUMBERS,
    OUTSIDE,
    TEXTS,
    Kind,
    dumped,
    mutate_bytes,
    mutate_json,
    mutate_message,
)
from tests.edge.onnx_files import encode, external, model, small_graph, tensor, varint

_HANG_S = 30


def _scanning(name: str) -> Callable[[bytes, Path], bool]:
    def feed(data: bytes, path: Path) -> bool:
        scan(path, name)
        return True

    return feed


def gguf() -> Kind:
    blocks = [(12, 288), (30, 1024)]
    many = [Tensor(f"blk.{i}.weight", (256, 2), code, size) for i, (code, size) in enumerate(blocks)]
    more = {"llama.block_count": 2, "llama.rope": 0.5, "split.count": 1, "a": strings(["a", "bc"] * 20)}
    adapter = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    query = "blk.0.attn_q.weight"
    pair = [Tensor(f"{query}.lora_a", (64, 2), 0, 512), Tensor(f"{query}.lora_b", (2, 64), 0, 512)]
    sound = [
        gguf_bytes(),
        gguf_bytes({**METADATA, **more}, [*TENSORS, *many]),
        gguf_bytes({**adapter, "adapter.lora.alpha": 8.0}, pair, fill=b"\0"),
    ]

    def mutate(rng: random.Random) -> bytes:
        return _odd_gguf(rng) if rng.random() < 0.4 else mutate_bytes(rng, rng.choice(sound), sound, within=600)

    return Kind(sound, mutate, _scanning("a.gguf"))


def _odd_gguf(rng: random.Random) -> bytes:
    """A file whose header is well formed, of values that no writer would give it."""
    metadata = dict(METADATA)
    for _ in range(rng.randint(0, 2)):
        keys = [*metadata, "general.alignment", "llama.block_count", "llama.vocab_size", "llama.pooling_type", "x"]
        metadata[rng.choice(keys)] = rng.choice(_odd_values(rng))
    tensors = [*TENSORS]
    for _ in range(rng.randint(0, 2)):
        tensors.insert(rng.randrange(len(tensors) + 1), _odd_tensor(rng))
    return gguf_bytes(metadata, tensors, version=rng.choice([2, 3, 3, 3, 4]), alignment=rng.choice([32, 32, 8, 64]))


def _odd_values(rng: random.Random) -> Sequence[object]:
    number = rng.choice(NUMBERS)
    return [
        rng.choice(TEXTS).encode("utf-8", "replace").decode(), 0.5, True, Raw(10, struct.pack("<Q", number)),
        Raw(rng.randrange(16), rng.randbytes(rng.choice([1, 4, 8]))), Raw(8, struct.pack("<Q", number)),
        Raw(9, struct.pack("<IQ", rng.randrange(14), number)), Raw(8, string("general")),
        array(rng.randrange(13), [rng.randbytes(4)] * rng.choice([0, 3, 1000])),
        strings([b"\xff" * rng.choice([1, 100])] * 3),
    ]  # fmt: skip


def _odd_tensor(rng: random.Random) -> Tensor:
    shape = tuple(rng.choice([1, 2, 32, 256, *NUMBERS]) for _ in range(rng.choice([0, 1, 2, 4, 5])))
    name = rng.choice(["x", "token_embd.weight", "a" * 64, ""])
    offset = rng.choice([None, None, *NUMBERS])
    return Tensor(name, shape, rng.randrange(50), rng.choice([0, 4, 36, 4096]), offset)


def safetensors() -> Kind:
    sizes = {"BF16": 2, "F32": 4, "I64": 8, "U8": 1, "F16": 2}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for i, (dtype, size) in enumerate([*sizes.items()] * 3):
        header[f"layer.{i}"] = {"dtype": dtype, "shape": [2, 3], "data_offsets": [at, at + 6 * size]}
        at += 6 * size

    def whole(encoded: bytes, length: int) -> bytes:
        return length.to_bytes(8, "little") + encoded + bytes(at)

    encoded = json.dumps(header).encode()
    sound = whole(encoded, len(encoded))

    def mutate(rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return mutate_bytes(rng, sound, [sound], within=len(sound) - at)
        changed = dumped(rng, mutate_json(rng, header))
        return whole(changed, len(changed) if rng.random() < 0.9 else rng.choice(NUMBERS))

    return Kind([sound], mutate, _scanning("a.safetensors"))


def onnx() -> Kind:
    numbers, texts = tensor("w", [3], 7, (7, varint(5) * 3)), tensor("q", [2], 8, (6, "a"), (6, "b"))
    trees = [model(small_graph()), model(small_graph(numbers, texts), (14, [(1, "a"), (2, "b")]))]
    sound = [encode(tree) for tree in trees]
    elsewhere = model(small_graph(tensor("w", [4, 2], 1, *external("weights.data", offset="0", length="32"))))

    def mutate(rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return mutate_bytes(rng, rng.choice(sound), sound)
        changed = rng.choice([*trees, elsewhere])
        for _ in range(rng.randint(1, 3)):
            changed = mutate_message(rng, changed)
        return encode(changed)

    return Kind(sound, mutate, _scanning("a.onnx"))


# Templates are tried each in a process of its own, as the appliance does it, but forked: thirty times as fast.

_SNIPPETS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ 'x' * 10 ** 9 }}",
    "{{ 9 ** (9 ** 9) }}", "{{ ''.__class__ }}", "{%", "%}", "{{", "}}", "{% include 'x' %}", "{{ messages|tojson }}",
    "{% set x = namespace(y='a' * 999) %}{% for i in range(99) %}{% set x.y = x.y ~ x.y %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ messages.__init__.__globals__ }}",
    "{{ (messages|string) * 100000 }}", "{% for a in messages %}{% for b in messages recursive %}",
    "{{ '%s' % messages }}", "{{ '{0.__class__}'.format(messages) }}", "{{ '%999999999d' % 1 }}",
    "{{ raise_exception('a') }}", "{{ cycler(1, 2).next.__func__ }}", "{{ lipsum(n=9999) }}",
    "{{ range(10 ** 18)|list }}", "{{ ['a'] * 10 ** 8 }}", "{{ messages|map(attribute='__class__')|list }}",
    "{% if 1 %}" * 30, "{{ " + "(" * 300, "-" * 3000, "{{ 1" + "+1" * 3000, "{{ 'a'|center(10 ** 9) }}",
    "{{ 'a'|indent(10 ** 8) }}", "{{ strftime_now('%' * 9999) }}", "{{ 'a'|replace('', 'b' * 9999) }}",
]  # fmt: skip


def template() -> Kind:
    from runtime.template_check import UNFIT, main

    folder = Path(__file__).parent.parent / "goldens" / "templates"
    sound = [path.read_bytes() for path in sorted(folder.glob("*.jinja"))]

    def mutate(rng: random.Random) -> bytes:
        text = rng.choice(sound)
        if rng.random() < 0.7:
            text = mutate_bytes(rng, text, sound)
        for _ in range(rng.randint(1, 2) if rng.random() < 0.1 else 0):
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice(_SNIPPETS).encode() + text[at:]
        return text

    def feed(data: bytes, path: Path) -> bool:
        child = os.fork()
        if not child:
            _become_trial(main, path)
        _, status, used = os.wait4(child, 0)
        cpu_s = used.ru_utime + used.ru_stime
        assert cpu_s <= MAX_CPU_S, f"the template took {cpu_s:.2f} s"
        code = os.waitstatus_to_exitcode(status)
        assert code not in (OUTSIDE, -signal.SIGALRM), "the template wrote a file, or hung"
        return code in (0, UNFIT)

    return Kind(sound, mutate, feed, forks=True)


def _become_trial(main: Callable[[], None], path: Path) -> NoReturn:
    os.dup2(os.open(path, os.O_RDONLY), 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    signal.alarm(_HANG_S)
    code = 1
    try:
        main()
        code = 0
    except SystemExit as e:
        code = int(e.code or 0)
    finally:
        os._exit(code)
