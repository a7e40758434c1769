"""Start-up tuning: the choice on scripted machines, the file, and one short run on the real model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge.store.models import ModelStore
from runtime.backends.llama_cpp import LlamaBackend
from runtime.batch import Batch
from runtime.tuner import Bench, Setting, measure
from runtime.tuning import Measure, Tuning, load_tuning, save_tuning, tuning_path
from tests.support import DEFAULT_MODEL, SEED, run_edge


def tune(speeds: Callable[[Setting], tuple[float, float]], *, cores: int, seconds: float) -> tuple[Tuning, float]:
    """The choice on a machine with these speeds, whose pace changes from round to round; and the time it took."""
    rng, now = random.Random(7), 0.0

    def measure(setting: Setting) -> Measure:
        nonlocal now
        prefill, decode = speeds(setting)
        now += 512 / prefill + 24 / decode
        noise = rng.uniform(0.98, 1.02)
        return Measure(
            ubatch_tokens=setting.ubatch_tokens, flash_attention=setting.flash_attention, threads=setting.threads,
            prefill_tok_s=prefill * noise, decode_tok_s=decode * noise,
        )  # fmt: skip

    found = Bench(measure, clock=lambda: now, deadline=seconds, report=lambda m: None).tune(cores)
    return found, now


def test_threads_and_shape_that_are_clearly_faster_are_taken() -> None:
    def speeds(s: Setting) -> tuple[float, float]:
        prefill = 100.0 * s.threads * (1.3 if s.ubatch_tokens == 256 else 1) * (0.8 if s.flash_attention else 1)
        return prefill, 40.0 - abs(s.threads - 4)

    found, took = tune(speeds, cores=8, seconds=120)
    assert (found.prefill_threads, found.decode_threads) == (8, 4)
    assert (found.ubatch_tokens, found.flash_attention) == (256, None)
    assert took <= 121


def test_noise_changes_nothing_and_little_time_is_kept_to() -> None:
    found, took = tune(lambda s: (200.0, 50.0), cores=2, seconds=60)
    assert (found.prefill_threads, found.decode_threads, found.ubatch_tokens, found.flash_attention) == (
        2,
        2,
        512,
        None,
    )
    assert took <= 63
    assert tune(lambda s: (200.0, 50.0), cores=2, seconds=1)[0].prefill_threads == 2


@pytest.mark.parametrize(
    "damage", [b"", b"{", b'{"version": 2}', b'{"prefill_threads": -1}', b'{"ubatch_tokens": 1e9}']
)
def test_a_damaged_file_is_passed_over(tmp_path: Path, damage: bytes) -> None:
    tuning = Tuning(prefill_threads=2, ubatch_tokens=256, flash_attention=False)
    save_tuning(tmp_path, "sha256:ab", tuning)
    assert load_tuning(tmp_path, "sha256:ab") == tuning
    assert load_tuning(tmp_path, "sha256:cd") is None
    tuning_path(tmp_path, "sha256:ab").write_bytes(damage)
    assert load_tuning(tmp_path, "sha256:ab") is None


def test_a_model_is_measured_as_it_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    decode = LlamaBackend.decode

    def settle(_: LlamaBackend) -> Iterator[object]:
        for part in ("one part", "another"):
            events.append(part)
            yield part

    def note(backend: LlamaBackend, batch: Batch) -> object:
        events.append(f"{batch.num_tokens} tokens")
        return decode(backend, batch)

    monkeypatch.setattr(LlamaBackend, "settle", settle)
    monkeypatch.setattr(LlamaBackend, "decode", note)
    monkeypatch.setattr("runtime.tuner.PROMPT_TOKENS", 32)
    found = measure(ModelStore(SEED).get(DEFAULT_MODEL).weights, Setting(128, None, 1))
    assert events[:2] == ["one part", "another"], "on huge pages, before anything is computed"
    assert set(events[2:]) == {"16 tokens", "32 tokens", "1 tokens"}
    assert min(found.prefill_tok_s, found.decode_tok_s) > 0


def test_the_command_measures_keeps_shows_and_forgets(tmp_path: Path) -> None:
    done = run_edge("tune", DEFAULT_MODEL, "--seconds", "5", "--json", home=tmp_path)
    found = json.loads(done.stdout)
    assert Path(found["path"]).is_file()
    assert all(m["prefill_tok_s"] > 0 for m in found["measures"])
    assert "tok/s" in run_edge("tune", DEFAULT_MODEL, "--show", home=tmp_path).stdout
    assert run_edge("tune", DEFAULT_MODEL, "--reset", home=tmp_path).returncode == 0
    assert not Path(found["path"]).exists()
