"""What the appliance does with models that it should not have been given."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest

from edge.config import Settings
from edge.errors import EdgeError
from edge.formats.gguf import read_gguf
from edge.store.details import details_of
from edge.store.models import ModelStore, PackageFile
from runtime.pool import Pool
from tests.runtime.tiny_models import make_tiny
from tests.support import DEFAULT_MODEL, SEED, chat_body, run_edge, running_appliance


async def test_a_template_that_was_swapped_on_the_disk_is_not_rendered(home: Path, tmp_path: Path) -> None:
    store = ModelStore(home / "store", seed=SEED)
    copy = Path(shutil.copy(store.get(DEFAULT_MODEL).weights, tmp_path / "copy.gguf"))  # the seed shares its bytes
    with copy.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    model = store.add("swapped", [PackageFile(copy, "model.gguf", move=True)], details_of(read_gguf(copy)))
    at = model.weights.read_bytes()[: 4 << 20].index(b"{% for message in messages %}")
    with model.weights.open("r+b") as file:
        file.seek(at)
        file.write(b"{% for message in messages-%}")
    pool = Pool(Settings(home=home, context_tokens=1024), store)
    try:
        with pytest.raises(EdgeError, match="chat template is not the one that the manifest names"):
            await pool.ready("swapped")
    finally:
        await pool.close()


def test_a_model_that_native_code_aborts_at_costs_its_worker(home: Path, tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "odd.gguf", "qwen2")
    data = path.read_bytes()
    key = b"qwen2.block_count"
    at = data.index(key) + len(key) + 4
    path.write_bytes(data[:at] + struct.pack("<I", 0) + data[at + 4 :])  # llama.cpp asserts that there is a layer
    assert run_edge("pull", str(path), "--name", "odd", home=home).returncode == 0, "the scan lets it pass"
    with running_appliance(home) as appliance, appliance.client() as http:
        assert http.post("/v1/chat/completions", json=chat_body("Hi", max_tokens=2)).status_code == 200
        workers = appliance.worker_pids()
        reply = http.post("/v1/chat/completions", json=chat_body("Hi", model="odd", max_tokens=2))
        assert reply.status_code >= 500, reply.text
        assert http.get("/livez").status_code == 200
        assert http.post("/v1/chat/completions", json=chat_body("Hi", max_tokens=2)).status_code == 200
        assert set(workers) <= set(appliance.worker_pids()), "the other model's worker goes on"
