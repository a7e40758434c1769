"""A tiny model that sees, with random weights: a Llama and a projector as SmolVLM's (idefics3); and pictures for it.

Written with `gguf`, since llama.cpp's own converter needs torch and transformers. Its tensors' names and keys are those
of tools/mtmd/clip-impl.h.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from quantize.checkpoint import open_checkpoint
from quantize.gguf.convert import convert
from runtime.backends.llama_cpp import LlamaBackend
from runtime.batch import Batch, Chunk
from runtime.request import Request
from runtime.sequence import Sequence
from tests.quantize.checkpoints import byte_level_tokenizer, config, weights, write_json, write_safetensors

TILE = 32
"""Side of the square that the encoder sees at once."""
TILE_TOKENS = 4
LONGEST_EDGE = 64
"""To which pictures are resized, then cut in tiles: a square has four, and one of the whole."""
EPSILON = 0.05
"""How far from the best score, of 5 or so, a greedy token may be: rounding follows the shape of a step and the place of
the cells, and with weights so large it was seen to turn a tie of 0.013."""
_PATCH, _MERGE, _WIDE, _DEEP = 8, 2, 32, 2
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class VisionFiles:
    """Where the two files lie."""

    model: Path
    projector: Path


def make_vision_model(directory: Path, *, seed: int = 1, wide: int = 64) -> VisionFiles:
    """The two files, the same bytes every time."""
    directory.mkdir(parents=True, exist_ok=True)
    model, projector = directory / "tiny-vision.gguf", directory / "mmproj-tiny-vision.gguf"
    convert(open_checkpoint(_checkpoint(directory / "checkpoint", seed=seed, wide=wide)), model, use_f16=False)
    write_projector(projector, wide=wide)
    return VisionFiles(model, projector)


def _checkpoint(directory: Path, *, seed: int, wide: int) -> Path:
    directory.mkdir(parents=True)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<global-img>"]
    specials += [f"<row_{y}_col_{x}>" for y in (1, 2) for x in (1, 2)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = byte_level_tokenizer([{"type": "Digits", "individual_digits": True}, byte_level], specials)
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    vocabulary["ĊĊ"] = len(vocabulary)  # two line ends, which idefics3 puts before a picture
    merges.append(["Ċ", "Ċ"])
    settings = config(
        vocab_size=len(vocabulary), hidden_size=wide, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
        pad_token_id=2,
    )  # fmt: skip
    write_json(directory / "config.json", settings)
    write_json(directory / "tokenizer.json", tokenizer)
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    write_json(
        directory / "tokenizer_config.json",
        {"add_prefix_space": False, "tokenizer_class": "GPT2Tokenizer", "chat_template": _TEMPLATE, **names},
    )
    # Larger than a trained model's: what is seen shall change what is said.
    scaled = {n: t if t.ndim == 1 else t * np.float32(4) for n, t in weights(settings, seed).items()}
    write_safetensors(directory / "model.safetensors", scaled)
    return directory


def write_projector(path: Path, *, wide: int = 64, seed: int = 2, **changes: Any) -> None:
    """A projector for a model so wide. `changes` replace metadata: keys without ``clip.``, with ``__`` for dots."""
    rng = np.random.Generator(np.random.PCG64(seed))

    def random(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, np.float32) * np.float32(0.3)

    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_name("Tiny vision")
    facts: dict[str, Any] = {
        "projector_type": "idefics3", "has_vision_encoder": True, "use_gelu": True, "vision.image_size": TILE,
        "vision.patch_size": _PATCH, "vision.embedding_length": _WIDE, "vision.feed_forward_length": 2 * _WIDE,
        "vision.block_count": _DEEP, "vision.attention.head_count": 4, "vision.projection_dim": wide,
        "vision.attention.layer_norm_epsilon": 1e-6, "vision.projector.scale_factor": _MERGE,
        "vision.preproc_image_size": LONGEST_EDGE, "vision.image_mean": [0.5, 0.5, 0.5], "vision.image_std": [0.5] * 3,
    }  # fmt: skip
    for key, value in (facts | {k.replace("__", "."): v for k, v in changes.items()}).items():
        match value:
            case bool():
                writer.add_bool(f"clip.{key}", value)
            case str():
                writer.add_string(f"clip.{key}", value)
            case int():
                writer.add_uint32(f"clip.{key}", value)
            case float():
                writer.add_float32(f"clip.{key}", value)
            case _:
                writer.add_array(f"clip.{key}", value)
    patches = (TILE // _PATCH) ** 2
    writer.add_tensor("v.patch_embd.weight", random(_WIDE, 3, _PATCH, _PATCH))
    writer.add_tensor("v.patch_embd.bias", random(_WIDE))
    writer.add_tensor("v.position_embd.weight", random(patches, _WIDE))
    for layer in range(_DEEP):
        at = f"v.blk.{layer}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            writer.add_tensor(f"{at}{name}.weight", random(_WIDE, _WIDE))
            writer.add_tensor(f"{at}{name}.bias", random(_WIDE))
        for name, shape in (("ffn_up", (2 * _WIDE, _WIDE)), ("ffn_down", (_WIDE, 2 * _WIDE))):
            writer.add_tensor(f"{at}{name}.weight", random(*shape))
            writer.add_tensor(f"{at}{name}.bias", random(shape[0]))
        for name in ("ln1", "ln2"):
            writer.add_tensor(f"{at}{name}.weight", np.ones(_WIDE, np.float32))
            writer.add_tensor(f"{at}{name}.bias", np.zeros(_WIDE, np.float32))
    for name, values in (("weight", np.ones(_WIDE, np.float32)), ("bias", np.zeros(_WIDE, np.float32))):
        writer.add_tensor(f"v.post_ln.{name}", values)
    writer.add_tensor("mm.model.fc.weight", random(wide, _WIDE * _MERGE**2))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def picture(seed: int, *, size: tuple[int, int] = (64, 64), kind: str = "PNG") -> bytes:
    """The bytes of a picture of random blocks."""
    rng = np.random.Generator(np.random.PCG64(seed))
    blocks = rng.integers(0, 256, (4, 4, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(out, kind)
    return out.getvalue()


def data_url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes, mime: str = "image/png") -> dict[str, Any]:
    """OpenAI's content part."""
    return {"type": "image_url", "image_url": {"url": data_url(data, mime)}}


def scores(backend: LlamaBackend, asked: Request, answer: list[int], *, step: int) -> NDArray[np.float32]:
    """Scores before each token of the answer and after the last, computed alone in steps so long."""
    backend.clear()
    assert backend.vision is not None
    for placed in asked.tiles:
        if placed.tile.rows is None:
            backend.vision.encode(placed.tile)
    tokens = [*asked.prompt, *answer]
    sequence, found = Sequence(asked, 0), list[NDArray[np.float32]]()
    for at in range(0, len(tokens), step):
        part = tokens[at : at + step]
        wanted = min(len(part), max(0, at + len(part) - len(asked.prompt) + 1))
        found.append(backend.decode(Batch((), (Chunk(sequence, 0, at, part, num_logits=wanted),))).copy())
    return np.concatenate(found)


def gap(backend: LlamaBackend, asked: Request, answer: list[int]) -> float:
    """How far the worst token of a greedy answer is from the best score."""
    rows = scores(backend, asked, answer, step=64)[:-1]
    return float((rows.max(axis=1) - rows[np.arange(len(answer)), answer]).max())
