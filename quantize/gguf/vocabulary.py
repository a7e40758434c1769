"""The tokenizer of a checkpoint, as llama.cpp wants it: tokens, types, scores or merges, special tokens.

Three kinds are read. Sentencepiece-style BPE with byte fallback (Llama 2, TinyLlama, Mistral) comes from
`tokenizer.model`, or from `tokenizer.json` where that is all there is. Byte-level BPE (SmolLM, Llama 3) comes from
`tokenizer.json`, and so does WordPiece (BERT).

Source: what `convert_hf_to_gguf.py` of llama.cpp (the revision inside llama-cpp-python 0.3.36) writes, which the tests
compare with, entry by entry. One thing differs on purpose: for `tokenizer.json` with byte fallback it gives every
token the score -1000, a placeholder by its own comment, and llama.cpp then merges from the left whatever the model
learned. Here a token's score is the rank of the merge that makes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, cast

import msgspec

from edge.errors import InvalidModelFile, UnsupportedFormat
from quantize.checkpoint import BertSettings, Checkpoint, TokenId

from .sentencepiece import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED, read_pieces

T = TypeVar("T")

_ADDED_SCORE = -1000.0
_SPECIAL_KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What a pre-tokenizer does, step by step -> llama.cpp's name for it (src/llama-vocab.cpp). The converter asks the
# tokenizers library to encode a test text and knows the hash of each answer; the structure says the same, for any
# vocabulary.
_PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    ("bytes, gpt-2 split",): "gpt-2",
    ("single digits", "bytes, gpt-2 split"): "smollm",
    (f"split {_LLAMA3_SPLIT}", "bytes"): "llama-bpe",
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer's data.

    Attributes:
        model: llama.cpp's kind: ``llama`` (sentencepiece BPE), ``gpt2`` (byte-level BPE) or ``bert`` (WordPiece).
        pre: Name of the pre-tokenizer.
        types: `llama_token_type` of each token.
        scores: Of ``llama`` only.
        merges: Of ``gpt2`` only.
        specials: Kind (``bos``, ``eos``, …) to token id.
        adds: Kind to whether the tokenizer puts it around a text by itself.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float] = ()
    merges: Sequence[str] = ()
    specials: Mapping[str, int] = field(default_factory=dict[str, int])
    adds: Mapping[str, bool] = field(default_factory=dict[str, bool])
    add_space_prefix: bool | None = None
    chat_template: str | list[dict[str, str]] | None = None
    normalizer: Mapping[str, bool] = field(default_factory=dict[str, bool])
    """Of ``bert`` only: whether texts are written small, whether they lose their accents."""


class _AddedToken(msgspec.Struct, frozen=True):
    content: str
    id: TokenId = 0
    special: bool = False
    normalized: bool = False


class _BpeModel(msgspec.Struct, frozen=True):
    type: str
    vocab: dict[str, TokenId]
    merges: list[str | list[str]]
    byte_fallback: bool = False


class _Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """What every `tokenizer.json` says about special tokens."""

    added_tokens: list[_AddedToken] = []
    post_processor: dict[str, Any] | None = None


class _Tokenizer(_Surroundings, frozen=True, kw_only=True):
    """`tokenizer.json` of the tokenizers library, as far as it is used; its model is a BPE."""

    model: _BpeModel
    pre_tokenizer: dict[str, Any] | None = None


class _WordPieceModel(msgspec.Struct, frozen=True):
    vocab: dict[str, TokenId]
    continuing_subword_prefix: Literal["##"]


class _BertNormalizer(msgspec.Struct, frozen=True):
    type: str
    lowercase: bool = False
    clean_text: bool = False
    handle_chinese_chars: bool = False
    strip_accents: bool | None = None


class _BertPreTokenizer(msgspec.Struct, frozen=True):
    type: str


class _WordPieceTokenizer(_Surroundings, frozen=True, kw_only=True):
    """The same of BERT; what llama.cpp does to a text is exactly this normalizer and pre-tokenizer."""

    model: _WordPieceModel
    normalizer: _BertNormalizer
    pre_tokenizer: _BertPreTokenizer


def _parse_tokenizer(checkpoint: Checkpoint, kind: type[T], *, model: str) -> T | None:
    """`tokenizer.json`, whose model must be of the type named; None where the checkpoint has none."""
    table = checkpoint.read_table("tokenizer.json")
    if not table:
        return None
    found = cast("dict[str, object]", table.get("model") or {}).get("type")
    if found != model:
        raise UnsupportedFormat(
            f"A tokenizer of type {found!r} cannot be converted for this model.",
            hint="Supported: BPE, with byte fallback or on the level of bytes; for BERT WordPiece.",
        )
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as e:
        raise InvalidModelFile("tokenizer.json", str(e)) from e


def _looks_special(token: str) -> bool:
    """Added tokens that are control tokens, though their file does not say so (command-r, deepseek-coder, gemma)."""
    return (
        token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (token.startswith("<|") and token.endswith("|>"))
        or (token.startswith("<｜") and token.endswith("｜>"))
        or (token.startswith("<unused") and token.endswith(">"))
    )


class _Table:
    """A vocabulary under construction: every id is a hole until it is filled."""

    def __init__(self, size: int) -> None:
        self.tokens = [f"[PAD{i}]" for i in range(size)]
        self.types = [UNUSED] * size
        self.scores = [-10000.0] * size

    def put(self, token_id: int, token: str, kind: int, score: float = 0.0) -> None:
        if not 0 <= token_id < len(self.tokens):
            raise InvalidModelFile(
                "the tokenizer", f"token {token!r} has id {token_id}, beyond the model's {len(self.tokens):,} tokens"
            )
        self.tokens[token_id], self.types[token_id], self.scores[token_id] = token, kind, score

    def put_added(self, token_id: int, token: str, *, special: bool) -> None:
        control = special or _looks_special(token)
        # llama.cpp takes user-defined tokens as already normalized.
        self.put(
            token_id,
            token if control else token.replace("\u2581", " "),
            CONTROL if control else USER_DEFINED,
            _ADDED_SCORE,
        )


def _from_pieces(checkpoint: Checkpoint, data: bytes, config: Mapping[str, Any]) -> Vocabulary:
    table = _Table(checkpoint.settings.vocab_size)
    for token_id, piece in enumerate(read_pieces(data)):
        table.put(token_id, piece.text, piece.kind, piece.score)
    for token, token_id in checkpoint.read_table("added_tokens.json").items():
        if not isinstance(token_id, int):
            raise InvalidModelFile("added_tokens.json", f"{token!r} has no number")
        table.put(token_id, token, USER_DEFINED, _ADDED_SCORE)
    try:
        added = msgspec.convert(config.get("added_tokens_decoder") or {}, dict[str, _AddedToken])
        for key, entry in added.items():
            table.put_added(int(key), entry.content, special=entry.special)
    except (msgspec.ValidationError, ValueError) as e:
        raise InvalidModelFile("tokenizer_config.json", f"added_tokens_decoder: {e}") from e
    return Vocabulary("llama", "default", table.tokens, table.types, scores=table.scores)


def _pairs(merges: Sequence[str | Sequence[str]]) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else list(merge)
        if len(parts) != 2:
            raise InvalidModelFile("tokenizer.json", f"the merge {merge!r} is not of two parts")
        pairs.append((parts[0], parts[1]))
    return pairs


def _from_byte_fallback(checkpoint: Checkpoint, tokenizer: _Tokenizer) -> Vocabulary:
    table = _Table(checkpoint.settings.vocab_size)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_pairs(tokenizer.model.merges)):
        ranks.setdefault(left + right, rank)
    special = {t.content for t in tokenizer.added_tokens if t.special}
    for token, token_id in tokenizer.model.vocab.items():
        kind = BYTE if _BYTE_TOKEN.fullmatch(token) else CONTROL if token in special else NORMAL
        table.put(token_id, token, kind, float(-ranks.get(token, len(ranks))))
    for entry in tokenizer.added_tokens:
        if entry.content not in tokenizer.model.vocab:
            table.put(entry.id, entry.content, CONTROL if entry.special else USER_DEFINED, _ADDED_SCORE)
    return Vocabulary("llama", "default", table.tokens, table.types, scores=table.scores)


def _step_of(step: Mapping[str, Any]) -> list[str]:
    match step:
        case {"type": "Sequence", "pretokenizers": [*inner]}:
            return [name for part in inner if isinstance(part, dict) for name in _step_of(cast("dict[str, Any]", part))]
        case {"type": "Digits", "individual_digits": True}:
            return ["single digits"]
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return ["bytes, gpt-2 split" if step.get("use_regex", True) else "bytes"]
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated"} if not step.get("invert"):
            return [f"split {pattern}"]
        case _:
            return [f"unknown: {json.dumps(step)[:200]}"]


def pre_tokenizer_name(step: Mapping[str, Any]) -> str:
    """llama.cpp's name for the `pre_tokenizer` of a `tokenizer.json`.

    Raises:
        UnsupportedFormat: It is none of those known; another split of the text would give tokens the model never saw.
    """
    name = _PRE_TOKENIZERS.get(tuple(_step_of(step)))
    if name is None:
        raise UnsupportedFormat(
            f"The pre-tokenizer of this checkpoint is unknown ({json.dumps(step)[:200]}).",
            hint=f"Known: {', '.join(_PRE_TOKENIZERS.values())}. A GGUF of the model can be quantized.",
        )
    return name


def _from_byte_level(checkpoint: Checkpoint, tokenizer: _Tokenizer) -> Vocabulary:
    pre = pre_tokenizer_name(tokenizer.pre_tokenizer or {})
    table = _Table(checkpoint.settings.vocab_size)
    for token, token_id in tokenizer.model.vocab.items():
        table.put(token_id, token, NORMAL)
    for entry in tokenizer.added_tokens:
        table.put_added(entry.id, entry.content, special=entry.special)
    # A space within a part would read as the boundary between the two: it is written as byte-level BPE writes it.
    merges = [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in _pairs(tokenizer.model.merges)]
    return Vocabulary("gpt2", pre, table.tokens, table.types, merges=merges)


def _phantom_space(token: str) -> str:
    """A WordPiece as llama.cpp has it: what begins a word is marked, not what goes on with one."""
    return token[2:] if token.startswith("##") else "\u2581" + token


def _from_wordpiece(checkpoint: Checkpoint, tokenizer: _WordPieceTokenizer) -> Vocabulary:
    normalizer = tokenizer.normalizer
    kinds = (normalizer.type, tokenizer.pre_tokenizer.type)
    is_berts_own = kinds == ("BertNormalizer", "BertPreTokenizer")
    if not (is_berts_own and normalizer.clean_text and normalizer.handle_chinese_chars):
        raise UnsupportedFormat(
            f"Texts prepared by {' and '.join(kinds)} as here cannot be converted.",
            hint="Supported: BertNormalizer, cleaning texts and parting Chinese characters, and BertPreTokenizer.",
        )
    table = _Table(checkpoint.settings.vocab_size)
    for token, token_id in tokenizer.model.vocab.items():
        table.put(token_id, _phantom_space(token), NORMAL)
    for entry in tokenizer.added_tokens:
        control = entry.special or _looks_special(entry.content)
        text = entry.content if control else _phantom_space(entry.content)
        table.put(entry.id, text, CONTROL if control else USER_DEFINED)
    flags = {"lowercase": normalizer.lowercase, "strip_accents": normalizer.strip_accents}
    # By this name the converter knows the tokenizer of bert-base-uncased; llama.cpp reads it for BPE only.
    return Vocabulary(
        "bert", "jina-v2-en", table.tokens, table.types,
        normalizer={name: flag for name, flag in flags.items() if flag is not None},
    )  # fmt: skip


def _special_name(entry: object) -> str | None:
    if isinstance(entry, dict):
        entry = cast("dict[str, object]", entry).get("content")
    return entry if isinstance(entry, str) else None


def _special_ids(template: object) -> list[str | None]:
    """For each place of a template its special token, or None where a text goes."""
    return [step.get("SpecialToken", {}).get("id") for step in cast("list[dict[str, Any]]", template or [])]


def _template_adds(processor: Mapping[str, Any], names: Mapping[str, str | None]) -> dict[str, bool]:
    single, pair = _special_ids(processor.get("single")), _special_ids(processor.get("pair"))
    adds: dict[str, bool] = {}
    first, last = (single[0], single[-1]) if len(single) > 1 else (None, None)
    if first is not None:
        adds["bos"] = first in (names.get("bos"), names.get("cls"))
    if last is not None:
        adds["eos"] = last in (names.get("eos"), names.get("sep"))
    between = pair[1 + (first is not None) : len(pair) - 1 - (last is not None)]
    if between:
        separators = {names.get("sep"), names.get("eos")} - {None}
        adds["sep"] = between[-1] in separators and (last is None or len(between) > 1)
    return adds


def _adds(
    tokenizer: _Surroundings | None, config: Mapping[str, Any], names: Mapping[str, str | None]
) -> dict[str, bool]:
    """Which tokens are put around a text; the post-processor has the last word over `tokenizer_config.json`."""
    adds: dict[str, bool] = {}
    processor = (tokenizer.post_processor if tokenizer else None) or {}
    for part in cast("list[dict[str, Any]]", processor.get("processors") or [processor]):
        if part.get("type") == "ByteLevel":
            adds = {"bos": False, "eos": False} | adds
        elif part.get("type") == "TemplateProcessing":
            adds |= _template_adds(part, names)
    for kind in _SPECIAL_KINDS:
        said = config.get(f"add_{kind}_token")
        if isinstance(said, bool):
            adds.setdefault(kind, said)
    return adds


def _specials(
    checkpoint: Checkpoint, tokenizer: _Surroundings | None, names: Mapping[str, str | None], num_tokens: int
) -> dict[str, int]:
    """Ids of the special tokens: by name through `tokenizer.json`, else from `config.json`."""
    ids = {t.content: t.id for t in reversed(tokenizer.added_tokens)} if tokenizer else {}
    found = {kind: ids[name] for kind, name in names.items() if name is not None and name in ids}
    for kind in _SPECIAL_KINDS:
        said = checkpoint.config.get(f"{kind}_token_id")
        if kind not in found and isinstance(said, int) and not isinstance(said, bool):
            found[kind] = said
    for kind, token_id in found.items():
        if not 0 <= token_id < num_tokens:
            raise InvalidModelFile(
                "the tokenizer", f"its {kind} token has id {token_id}, beyond its {num_tokens:,} tokens"
            )
    return found


def _chat_template(checkpoint: Checkpoint, config: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    template: object = config.get("chat_template")
    if template is None:
        template = checkpoint.read_text("chat_template.jinja") or checkpoint.read_table("chat_template.json").get(
            "chat_template"
        )
    if template is None:
        return None
    try:
        return msgspec.convert(template, str | list[dict[str, str]])
    except msgspec.ValidationError as e:
        raise InvalidModelFile("the chat template", str(e)) from e


def _read_tokens(checkpoint: Checkpoint, config: Mapping[str, Any]) -> tuple[Vocabulary, _Surroundings | None]:
    """The tokens, and what `tokenizer.json` says about the special ones."""
    if isinstance(checkpoint.settings, BertSettings):
        if (pieces := _parse_tokenizer(checkpoint, _WordPieceTokenizer, model="WordPiece")) is None:
            raise InvalidModelFile("tokenizer.json", "it is empty or absent, and BERT's words stand in no other file")
        return _from_wordpiece(checkpoint, pieces), pieces
    tokenizer = _parse_tokenizer(checkpoint, _Tokenizer, model="BPE")
    model = checkpoint.directory / "tokenizer.model"
    if model.is_file():
        return _from_pieces(checkpoint, model.read_bytes(), config), tokenizer
    if tokenizer is None:
        raise InvalidModelFile("tokenizer.json", "it is empty")
    if tokenizer.model.byte_fallback:
        return _from_byte_fallback(checkpoint, tokenizer), tokenizer
    return _from_byte_level(checkpoint, tokenizer), tokenizer


def read_vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    """The tokenizer of a checkpoint.

    Raises:
        UnsupportedFormat: Another kind of tokenizer, or a pre-tokenizer that llama.cpp has no name for here.
        InvalidModelFile: A tokenizer file breaks its format, or has more tokens than the model.
    """
    config = checkpoint.read_table("tokenizer_config.json")
    vocabulary, tokenizer = _read_tokens(checkpoint, config)
    names = {kind: _special_name(config.get(f"{kind}_token")) for kind in _SPECIAL_KINDS}
    names["bos"], names["eos"] = names["bos"] or names["cls"], names["eos"] or names["sep"]
    prefix = config.get("add_prefix_space")
    return replace(
        vocabulary,
        specials=_specials(checkpoint, tokenizer, names, len(vocabulary.tokens)),
        adds=_adds(tokenizer, config, names),
        add_space_prefix=prefix if isinstance(prefix, bool) else None,
        chat_template=_chat_template(checkpoint, config),
    )
