"""Record what llama.cpp's own converter makes of the test checkpoints, into tests/goldens/convert-*.json.

Run by hand, when a checkpoint or the pinned llama-cpp-python changes; the test run needs none of this:

    python -m venv oracle && oracle/bin/pip install torch==2.13.0 transformers==4.57.6 sentencepiece protobuf
    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36    # and unpack vendor/llama.cpp from it
    python -m tests.quantize.make_converter_goldens --python oracle/bin/python --llama-cpp vendor/llama.cpp

The converter knows byte-level BPE pre-tokenizers by a hash of what the whole vocabulary makes of a test text, so it
refuses the tiny vocabularies made here. For those its one question is answered in its place (see `ANSWERS`); everything
else is its own work.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .checkpoints import make_bert, make_cross_encoder, make_llama3, make_mistral, make_peft, make_smollm
from .goldens import GOLDENS, describe_gguf
from .minilm import make_minilm
from .stories import make_stories

MAKERS: dict[str, Callable[[Path], Path]] = {
    "stories15M": make_stories,
    "Tiny-SmolLM-1M-Instruct": make_smollm,
    "tiny-llama3": make_llama3,
    "tiny-mistral": make_mistral,
    "tiny-bert": make_bert,
    "tiny-cross-encoder": make_cross_encoder,
    "all-MiniLM-L6-v2": make_minilm,
}
ANSWERS = {
    "Tiny-SmolLM-1M-Instruct": "smollm",
    "tiny-llama3": "llama-bpe",
    "tiny-bert": "jina-v2-en",
    "tiny-cross-encoder": "jina-v2-en",
}

_RUNNER = """
import runpy, sys
converter, answer, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, converter.rpartition("/")[0])
if answer:
    from conversion import base
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: answer
runpy.run_path(converter, run_name="__main__")
"""


def _convert(
    python: str, llama_cpp: Path, source: Path, target: Path, precision: str, *, base: Path | None = None
) -> None:
    converter = str(llama_cpp.absolute() / ("convert_lora_to_gguf.py" if base else "convert_hf_to_gguf.py"))
    command = [python, "-c", _RUNNER, converter, ANSWERS.get((base or source).name, ""), str(source)]
    command += ["--outfile", str(target), "--outtype", precision, *(["--base", str(base)] if base else [])]
    subprocess.run(
        command, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}, timeout=600
    )


def main() -> int:
    """Write one golden for each checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="a Python with torch and transformers")
    parser.add_argument("--llama-cpp", required=True, type=Path, help="vendor/llama.cpp of the sdist")
    parser.add_argument("names", nargs="*", help="the checkpoints; by default all")
    given = parser.parse_args()
    for name in given.names or [*MAKERS, "lora"]:
        with tempfile.TemporaryDirectory() as work:
            make = _lora_golden if name == "lora" else _golden
            golden = make(name, Path(work), given.python, given.llama_cpp)
        path = GOLDENS / f"convert-{name}.json"
        path.write_text(json.dumps(golden, indent=1, ensure_ascii=True, sort_keys=False) + "\n")
        print(path)
    return 0


def _golden(name: str, work: Path, python: str, llama_cpp: Path) -> dict[str, Any]:
    source, golden = MAKERS[name](work / name), dict[str, Any]()
    for precision in ("f16", "f32"):
        target = work / f"{name}-{precision}.gguf"
        _convert(python, llama_cpp, source, target, precision)
        golden[precision] = describe_gguf(target)
    return golden


def _lora_golden(name: str, work: Path, python: str, llama_cpp: Path) -> dict[str, Any]:
    base = make_smollm(work / "Tiny-SmolLM-1M-Instruct")
    _convert(python, llama_cpp, make_peft(work / name), work / "lora.gguf", "f32", base=base)
    return describe_gguf(work / "lora.gguf")


if __name__ == "__main__":
    sys.exit(main())
