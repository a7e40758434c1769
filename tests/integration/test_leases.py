"""A loaded model keeps its bytes, whatever becomes of its name."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from edge.store.models import ModelStore
from tests.support import DEFAULT_MODEL, chat_body, run_edge, running_appliance, wait_until


def test_a_loaded_model_is_not_collected(home: Path) -> None:
    store = ModelStore(home / "store")
    with running_appliance(home) as running, running.client() as http:
        assert http.post("/v1/chat/completions", json=chat_body("Hello", max_tokens=2)).status_code == 200
        model = store.get(DEFAULT_MODEL)
        assert store.leased() == {model.digest}
        removed = run_edge("rm", DEFAULT_MODEL, "--yes", home=home)
        assert (removed.returncode, removed.stderr.splitlines()[-1]) == (0, "freed 0 B")
        assert all(store.blobs.has_sound(file.digest) for file in model.files)
        (before,) = running.worker_pids()
        os.kill(before, signal.SIGKILL)
        wait_until(lambda: running.worker_pids() not in ([], [before]), what="the worker to come again")
        assert store.leased() == {model.digest}
    assert store.leased() == frozenset()
    assert store.collect().num_blobs >= 3
    assert not store.blobs.has(model.digest)
