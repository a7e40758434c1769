"""Checkpoint directories made on the spot, without torch, transformers or tokenizers; the same bytes every time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Stored = NDArray[Any] | tuple[str, NDArray[Any]]
"""An array stored as it is, or a type's name and the bits."""

_NAMES = {"float32": "F32", "float16": "F16"}


def write_safetensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """A safetensors file; the header is padded to 8 bytes with spaces, as the library does."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs: list[bytes] = []
    at = 0
    for name, given in tensors.items():
        dtype, array = given if isinstance(given, tuple) else (_NAMES[given.dtype.name], given)
        blob = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def bfloat16(values: NDArray[np.float32]) -> tuple[str, NDArray[np.uint16]]:
    """Values cut to bfloat16's bits."""
    return "BF16", (values.view(np.uint32) >> 16).astype(np.uint16)


def write_json(path: Path, table: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(table, ensure_ascii=False, indent=1), "utf-8")


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    """Changes fields of a JSON file; "absent" removes one."""

    def write(directory: Path) -> None:
        table = json.loads((directory / name).read_text())
        write_json(directory / name, {k: v for k, v in (table | changes).items() if v != "absent"})

    return write


def special_tokens(names: list[str]) -> list[dict[str, Any]]:
    """`added_tokens` of `tokenizer.json` for special tokens with the first ids."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": i, "content": name} | flags for i, name in enumerate(names)]


def byte_letters() -> list[str]:
    """The character that byte-level BPE writes for each byte (GPT-2's `bytes_to_unicode`)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in plain}
    return [letters.get(b) or chr(256 + sum(c not in plain for c in range(b))) for b in range(256)]


def config(**changes: Any) -> dict[str, Any]:
    """`config.json` of a Llama of 64 wide, two layers, four heads of which two are K and V."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
    } | changes


def weights(settings: Mapping[str, Any], seed: int) -> dict[str, NDArray[np.float32]]:
    """Random float32 tensors of the shapes a configuration gives, named as Hugging Face names them."""
    rng = np.random.Generator(np.random.PCG64(seed))
    wide, hidden, heads = settings["hidden_size"], settings["intermediate_size"], settings["num_attention_heads"]
    head = settings.get("head_dim") or wide // heads
    kv = settings["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (settings["vocab_size"], wide)}
    for layer in range(settings["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {
            f"{at}input_layernorm.weight": (wide,),
            f"{at}mlp.down_proj.weight": (wide, hidden),
            f"{at}mlp.gate_proj.weight": (hidden, wide),
            f"{at}mlp.up_proj.weight": (hidden, wide),
            f"{at}post_attention_layernorm.weight": (wide,),
            f"{at}self_attn.k_proj.weight": (kv, wide),
            f"{at}self_attn.o_proj.weight": (wide, heads * head),
            f"{at}self_attn.q_proj.weight": (heads * head, wide),
            f"{at}self_attn.v_proj.weight": (kv, wide),
        }
    shapes["model.norm.weight"] = (wide,)
    if not settings["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (settings["vocab_size"], wide)
    return {
        name: (rng.standard_normal(shape, np.float32) * np.float32(0.05) + np.float32(len(shape) == 1))
        for name, shape in shapes.items()
    }


_WORDS = " the, and, there, was, little, girl, boy, name, dog, play, happy, hacker, machine, system, file,ing,ed,er,'s"


def _byte_level_merges(letters: list[str]) -> list[tuple[str, str]]:
    """Merges that build a few words from the left, each pair once."""
    merges: dict[tuple[str, str], None] = {}
    for word in _WORDS.split(","):
        parts = [letters[b] for b in word.encode()]
        for end in range(1, len(parts)):
            merges["".join(parts[:end]), parts[end]] = None
    return list(merges)


def byte_level_tokenizer(split: list[dict[str, Any]], specials: list[str], **model: Any) -> dict[str, Any]:
    """`tokenizer.json` of a byte-level BPE: special tokens, then bytes, then merges."""
    letters = byte_letters()
    merges = _byte_level_merges(letters)
    tokens = [*specials, *letters, *dict.fromkeys("".join(pair) for pair in merges)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special_tokens(specials),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": split} if len(split) > 1 else split[0],
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        }
        | model,
    }


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def make_smollm(directory: Path) -> Path:
    """SmolLM-like: byte-level BPE with single digits, tied embeddings, grouped heads, a chat template, one F32 file."""
    directory.mkdir(parents=True)
    digits = {"type": "Digits", "individual_digits": True}
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_level_tokenizer([digits, _byte_level(use_regex=True)], specials)
    # Three more rows than tokens, as a padded vocabulary has them.
    settings = config(vocab_size=len(tokenizer["model"]["vocab"]) + 3, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    write_json(directory / "config.json", settings)
    write_json(directory / "tokenizer.json", tokenizer)
    write_json(
        directory / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "tokenizer_class": "GPT2Tokenizer",
            "chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        },
    )
    write_json(directory / "generation_config.json", {"temperature": 0.2, "repetition_penalty": 1.1, "top_k": 40})
    facts = "license: apache-2.0\nlanguage:\n- en\npipeline_tag: text-generation\nbase_model: acme/Tiny-1M\n"
    (directory / "README.md").write_text(f"---\n{facts}---\n# Tiny\n")
    write_safetensors(directory / "model.safetensors", weights(settings, 1))
    return directory


def make_llama3(directory: Path) -> Path:
    """Llama-3-like: byte-level BPE behind a split, scaled RoPE, BOS by template, F16."""
    from quantize.gguf import vocabulary

    directory.mkdir(parents=True)
    split = {
        "type": "Split",
        "pattern": {"Regex": vocabulary._LLAMA3_SPLIT},  # pyright: ignore[reportPrivateUsage]  # the very text it knows
        "behavior": "Isolated",
        "invert": False,
    }
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokenizer = byte_level_tokenizer([split, _byte_level(use_regex=False)], specials, ignore_merges=True)
    tokenizer["post_processor"] = {
        "type": "Sequence",
        "processors": [
            _byte_level(use_regex=True),
            {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": specials[0], "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [
                    {"SpecialToken": {"id": specials[0], "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                    {"SpecialToken": {"id": specials[0], "type_id": 1}},
                    {"Sequence": {"id": "B", "type_id": 1}},
                ],
                "special_tokens": {specials[0]: {"id": specials[0], "ids": [0], "tokens": [specials[0]]}},
            },
        ],
    }
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    settings = config(
        vocab_size=len(tokenizer["model"]["vocab"]),
        rope_theta=500000.0,
        rope_scaling=scaling,
        bos_token_id=0,
        eos_token_id=2,
        head_dim=16,
    )
    write_json(directory / "config.json", settings)
    write_json(directory / "tokenizer.json", tokenizer)
    write_json(
        directory / "tokenizer_config.json",
        {"bos_token": specials[0], "eos_token": specials[2], "tokenizer_class": "PreTrainedTokenizerFast"},
    )
    half = {name: values.astype(np.float16) for name, values in weights(settings, 3).items()}
    write_safetensors(directory / "model.safetensors", half)
    return directory


def make_mistral(directory: Path) -> Path:
    """Mistral-like: `tokenizer.json` with byte fallback and nothing else, untied head, wide heads, two BF16 parts."""
    directory.mkdir(parents=True)
    words = ["the", "and", "there", "was", "little", "girl", "play"]
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        for at, end in enumerate(range(1, len(word) + 1)):
            left = "▁" + word[:at]
            merges[left, word[end - 1]] = None
    letters = sorted({c for word in words for c in word} | {"▁"})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters]
    tokens += list(dict.fromkeys("".join(pair) for pair in merges))
    added = special_tokens(tokens[:3])
    write_json(directory / "tokenizer.json", sentencepiece_like_tokenizer(tokens, list(merges), added))
    settings = config(
        architectures=["MistralForCausalLM"],
        model_type="mistral",
        vocab_size=len(tokens),
        tie_word_embeddings=False,
        head_dim=32,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    write_json(directory / "config.json", settings)
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
    tensors = list(weights(settings, 2).items())
    parts = {"model-00001-of-00002.safetensors": tensors[:9], "model-00002-of-00002.safetensors": tensors[9:]}
    for name, part in parts.items():
        write_safetensors(directory / name, {k: bfloat16(v) for k, v in part})
    index = {k: name for name, part in parts.items() for k, _ in part}
    write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": 0}, "weight_map": index})
    return directory


def sentencepiece_like_tokenizer(
    tokens: list[str], merges: list[tuple[str, str]], added: list[dict[str, Any]]
) -> dict[str, Any]:
    """`tokenizer.json` of a sentencepiece BPE with byte fallback, as transformers' own conversion writes it."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<s>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }


_PIECES = "the,a,sun,rain,boat,engine,water,pump,is,was,not,in,on,how,does,work,fail,##s,##ing,##ed,##er,.,?,!,ü"


def wordpiece_tokenizer() -> dict[str, Any]:
    """`tokenizer.json` of an uncased BERT: special tokens, words, and every small letter alone and within a word."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = [*specials, *_PIECES.split(","), *letters, *(f"##{c}" for c in letters)]
    cls, sep = ({"SpecialToken": {"id": name, "type_id": 0}} for name in ("[CLS]", "[SEP]"))
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    last = {"SpecialToken": {"id": "[SEP]", "type_id": 1}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special_tokens(specials),
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [cls, first, sep],
            "pair": [cls, first, sep, second, last],
            "special_tokens": {
                name: {"id": name, "ids": [specials.index(name)], "tokens": [name]} for name in ("[CLS]", "[SEP]")
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {token: i for i, token in enumerate(dict.fromkeys(tokens))},
        },
    }


def bert_weights(settings: Mapping[str, Any], seed: int, *, prefix: str = "") -> dict[str, NDArray[np.float32]]:
    """Random float32 tensors of a BERT encoder with its pooler, named as Hugging Face names them."""
    rng = np.random.Generator(np.random.PCG64(seed))
    wide, hidden = settings["hidden_size"], settings["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        f"embeddings.{name}_embeddings.weight": (settings[rows], wide)
        for name, rows in (
            ("word", "vocab_size"),
            ("position", "max_position_embeddings"),
            ("token_type", "type_vocab_size"),
        )
    }
    modules = {"embeddings.LayerNorm": (wide,), "pooler.dense": (wide, wide)}
    for layer in range(settings["num_hidden_layers"]):
        at = f"encoder.layer.{layer}"
        modules |= {f"{at}.attention.self.{name}": (wide, wide) for name in ("query", "key", "value")}
        modules |= {f"{at}.{name}.LayerNorm": (wide,) for name in ("attention.output", "output")}
        modules |= {
            f"{at}.attention.output.dense": (wide, wide),
            f"{at}.intermediate.dense": (hidden, wide),
            f"{at}.output.dense": (wide, hidden),
        }
    for module, shape in modules.items():
        shapes |= {f"{module}.weight": shape, f"{module}.bias": shape[:1]}
    return {
        prefix + name: rng.standard_normal(shape, np.float32) * np.float32(0.3) + np.float32("Norm.weight" in name)
        for name, shape in shapes.items()
    }


def make_bert(directory: Path, *, reranker: bool = False) -> Path:
    """BERT-like: an encoder whose vector is that of [CLS]; or a cross-encoder that judges a pair by one number."""
    directory.mkdir(parents=True)
    tokenizer = wordpiece_tokenizer()
    settings: dict[str, Any] = {
        "architectures": ["BertForSequenceClassification" if reranker else "BertModel"],
        "model_type": "bert",
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
        "max_position_embeddings": 96,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        "vocab_size": len(tokenizer["model"]["vocab"]),
    }
    tensors = bert_weights(settings, 5, prefix="bert." if reranker else "")
    if reranker:
        settings |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        rng = np.random.Generator(np.random.PCG64(6))
        tensors["classifier.weight"] = rng.standard_normal((1, 64), np.float32)
        tensors["classifier.bias"] = np.array([0.25], np.float32)
    else:
        write_json(directory / "1_Pooling" / "config.json", {"word_embedding_dimension": 64, "pooling_mode": "cls"})
        kinds = ("Transformer", "Pooling", "Normalize")
        paths = ("", "1_Pooling", "2_Normalize")
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(zip(paths, kinds, strict=True))
        ]
        (directory / "modules.json").write_text(json.dumps(modules))
    write_json(directory / "config.json", settings)
    write_json(directory / "tokenizer.json", tokenizer)
    names = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("unk", "sep", "pad", "cls", "mask")}
    write_json(
        directory / "tokenizer_config.json", {**names, "do_lower_case": True, "tokenizer_class": "BertTokenizer"}
    )
    write_safetensors(directory / "model.safetensors", tensors)
    return directory


def make_cross_encoder(directory: Path) -> Path:
    """A cross-encoder with random weights."""
    return make_bert(directory, reranker=True)


PEFT_CONFIG: Mapping[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "acme/Tiny-SmolLM-1M-Instruct",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def make_peft(directory: Path, *, changes: Mapping[str, Any] = MappingProxyType({}), seed: int = 5) -> Path:
    """An adapter of `make_smollm`'s model as PEFT saves it: every projection, A in float32 and B in bfloat16."""
    directory.mkdir(parents=True)
    rank = {**PEFT_CONFIG, **changes}["r"]
    rng = np.random.Generator(np.random.PCG64(seed))
    tensors: dict[str, Stored] = {}
    for name, values in weights(config(vocab_size=8), 1).items():
        if "_proj" in name:
            at = f"base_model.model.{name.removesuffix('.weight')}"
            rows, columns = values.shape
            tensors[f"{at}.lora_A.weight"] = rng.standard_normal((rank, columns), np.float32)
            tensors[f"{at}.lora_B.weight"] = bfloat16(rng.standard_normal((rows, rank), np.float32))
    write_json(directory / "adapter_config.json", {**PEFT_CONFIG, **changes})
    write_safetensors(directory / "adapter_model.safetensors", tensors)
    return directory
