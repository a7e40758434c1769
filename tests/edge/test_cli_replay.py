"""`edge replay` runs a request as the appliance would."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from edge.cli import replay
from edge.cli.main import cli
from edge.config import Settings
from edge.store.models import ModelStore, StoredModel
from runtime import wire
from runtime.poison import Case, PoisonCabinet, case_of
from runtime.request import SamplingParams
from runtime.tuning import Tuning, load_tuning, save_tuning
from tests.support import DEFAULT_MODEL, SEED


def test_a_replay_has_what_tuning_found_and_leaves_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, model = Settings(home=tmp_path), ModelStore(SEED).get(DEFAULT_MODEL)
    tuning = Tuning(prefill_threads=1, ubatch_tokens=128, flash_attention=False)
    save_tuning(settings.tuning_dir, str(model.digest), tuning)
    message = wire.Generate(0, None, "Hi", SamplingParams(), 1, [])
    case = case_of("0" * 16, message, model=DEFAULT_MODEL, digest=str(model.digest), reasons=["signal 6"], time=0.0)
    PoisonCabinet(settings.poison_dir).keep(case)
    seen: list[tuple[Path, Tuning | None]] = []

    async def look(alone: Settings, model: StoredModel, case: Case, *, timeout_s: float) -> replay.Outcome:
        seen.append((alone.home, load_tuning(alone.tuning_dir, str(model.digest))))
        return replay.Outcome(case.id, "answered", "", 1, timeout_s)

    monkeypatch.setattr(replay, "_outcome", look)
    done = CliRunner().invoke(cli, ["replay", case.id], env={"EDGE_HOME": str(tmp_path)})
    assert done.exit_code == 0, done.output
    ((home, found),) = seen
    assert home != tmp_path
    assert found == tuning
