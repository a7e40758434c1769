"""Record what PyTorch makes of the test texts, into tests/goldens/embeddings.npz.

Run by hand; the test run needs neither torch nor transformers:

    python -m venv oracle && oracle/bin/pip install torch==2.13.0 transformers==4.57.6
    python -m tests.runtime.make_embedding_goldens --python oracle/bin/python
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.quantize.checkpoints import make_cross_encoder
from tests.quantize.minilm import make_minilm

from .embedding_texts import DOCUMENTS, GOLDEN, QUERY, TEXTS

_RUNNER = """
import json, sys
import numpy as np, torch
from transformers import BertForSequenceClassification, BertModel, PreTrainedTokenizerFast
asked = json.load(sys.stdin)

def tokenizer(directory):
    made = PreTrainedTokenizerFast(tokenizer_file=directory + "/tokenizer.json")
    made.backend_tokenizer.no_padding(), made.backend_tokenizer.no_truncation()
    return made

def batch(encoded):
    names = ("input_ids", "attention_mask", "token_type_ids")
    return {name: torch.tensor([encoded[name]]) for name in names}

model, encode = BertModel.from_pretrained(asked["minilm"]).eval(), tokenizer(asked["minilm"])
vectors, counts, scores = [], [], []
with torch.no_grad():
    for text in asked["texts"]:
        encoded = encode(text)
        mean = model(**batch(encoded)).last_hidden_state[0].mean(0)
        vectors.append((mean / mean.norm()).numpy())
        counts.append(len(encoded["input_ids"]))
    model = BertForSequenceClassification.from_pretrained(asked["reranker"]).eval()
    encode = tokenizer(asked["reranker"])
    for document in asked["documents"]:
        scores.append(model(**batch(encode(asked["query"], document))).logits[0, 0].item())
np.savez(asked["target"], vectors=np.array(vectors, np.float32), counts=counts, scores=np.array(scores, np.float32))
"""


def main() -> int:
    """Write the golden."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="a Python with torch and transformers")
    python: str = parser.parse_args().python
    with tempfile.TemporaryDirectory() as work:
        asked = {
            "minilm": str(make_minilm(Path(work) / "all-MiniLM-L6-v2")),
            "reranker": str(make_cross_encoder(Path(work) / "tiny")),
            "texts": TEXTS,
            "query": QUERY,
            "documents": DOCUMENTS,
            "target": str(GOLDEN),
        }
        subprocess.run([python, "-c", _RUNNER], input=json.dumps(asked), text=True, check=True, timeout=600)
    print(GOLDEN)
    return 0


if __name__ == "__main__":
    sys.exit(main())
