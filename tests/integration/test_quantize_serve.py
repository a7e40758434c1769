"""From a checkpoint to models that answer: `edge quantize`, then `edge serve`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.quantize.stories import make_stories
from tests.support import run_edge, running_appliance


def test_a_checkpoint_becomes_two_models_that_answer(tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    checkpoint = make_stories(tmp_path / "stories15m")
    types = ("--type", "Q8_0", "--type", "Q4_K_M")
    done = run_edge("quantize", str(checkpoint), *types, "--tokens", "512", "--out", str(out), "--json", home=home)
    assert done.returncode == 0, done.stderr
    refs = [v["ref"] for v in json.loads(done.stdout)["report"]["variants"]]
    assert len(refs) == 2
    assert (out / "report.json").exists()
    assert list(out.glob("*.svg"))
    shown = run_edge("show", refs[1], home=home)
    assert "KL divergence" in shown.stdout
    with running_appliance(home) as appliance, appliance.client() as http:
        for ref in refs:
            body = {"model": ref, "prompt": "Once upon a time, there was a little", "max_tokens": 12, "temperature": 0}
            text = http.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"]
            assert "girl" in text
