"""What the processes of an appliance have imported when they have answered: each module costs every start time and
memory, so what serves some requests only is imported with the first of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import chat_body, running_appliance, stop

ROOT = Path(__file__).parents[2]

NEITHER = {
    "attr", "huggingface_hub", "httpx", "jsonschema", "llguidance", "onnxruntime", "opentelemetry.proto", "pydantic",
    "requests", "rich", "textual", "tokenizers", "torch", "transformers", "quantize", "tui",
}  # fmt: skip
NOT_THE_FRONT = {"jinja2", "llama_cpp", "numpy", "runtime.api.openapi", "runtime.backends", "runtime.engine"}
NOT_THE_WORKER = {
    "asyncio", "click", "edge.cli", "edge.store", "edge.telemetry", "email", "http", "httptools", "litestar", "psutil",
    "runtime.api", "runtime.pool", "sqlite3", "ssl", "uvicorn", "uvloop", "runtime.backends.llama_encoder",
}  # fmt: skip


@pytest.fixture
def imported(tmp_path: Path) -> dict[str, set[str]]:
    """The modules of front and worker that have answered one chat."""
    modules = tmp_path / "modules"
    modules.mkdir()
    env = {
        "PYTHONPATH": f"{ROOT / 'tests' / 'modules'}:{ROOT}", "EDGE_TEST_MODULES": str(modules), "EDGE_PRELOAD": "auto",
    }  # fmt: skip
    with running_appliance(tmp_path / "home", "--context-tokens", "1024", **env) as appliance:
        with appliance.client() as http:
            assert http.post("/v1/chat/completions", json=chat_body("Hello", max_tokens=2)).status_code == 200
        (worker,) = appliance.worker_pids()
        stop(appliance.process)
    pids = {"front": appliance.process.pid, "worker": worker}
    return {name: set((modules / str(pid)).read_text("utf-8").splitlines()) for name, pid in pids.items()}


def test_an_answer_needs_few_modules(imported: dict[str, set[str]]) -> None:
    assert "litestar" in imported["front"]
    assert imported["front"] & (NEITHER | NOT_THE_FRONT) == set()
    assert "numpy" in imported["worker"]
    assert imported["worker"] & (NEITHER | NOT_THE_WORKER) == set()
