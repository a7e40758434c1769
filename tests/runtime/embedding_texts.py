"""Texts whose vectors and scores PyTorch computed once; see tests/runtime/make_embedding_goldens.py."""

from __future__ import annotations

from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "goldens" / "embeddings.npz"

TEXTS = [
    "A boat on the sea.",
    "a BOAT on THE sea",
    "The pump of the island failed at sunrise.",
    "What is a lighthouse for?",
    "x",
    " ",
    "",
    ".",
    "!?!?…—«»",
    "12345 67.89 0x1F 1e-9",
    "Größe, naïve, œuvre, Ångström, İstanbul, straße",
    "Съешь ещё этих мягких французских булок",
    "北京是中国的首都。東京は日本の首都です",
    "안녕하세요 세계",
    "مرحبا بالعالم",
    "🚢 ahoy 🌊🌊",
    "e\u0301 \u00e9 \ufb01 \u200bzero\u00adwidth\ttab\nline",
    "def main(argv: list[str]) -> int:\n    return len(argv) # comment",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    " ".join(["The old engine of the harbour was repaired before winter, and nobody noticed."] * 4),
    " ".join(f"Line {i}: the valve of station {i * 7 % 13} was opened {i} times." for i in range(28)),
]
"""Plain, small and capital, one letter, none, marks, numbers, accents, other scripts, no spaces, long."""

QUERY = "does the engine fail in the rain?"
DOCUMENTS = [
    "the boat engine is working",
    "sun and water",
    "Ünknown pumps!",
    "rain rain rain rain rain rain",
    "the engine was not working in the rain. the pump failed.",
    "a",
]
