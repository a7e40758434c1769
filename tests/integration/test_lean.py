"""What the processes of an appliance have imported when they have answered: each module costs every start time and
memory, so what serves some requests only is imported with the first of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import chat_body, running_appliance, stop, wait_until

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
def modules(tmp_path: Path) -> Path:
    """Where processes write what they imported."""
    found = tmp_path / "modules"
    found.mkdir()
    return found


def environment(modules: Path) -> dict[str, str]:
    return {"PYTHONPATH": f"{ROOT / 'tests' / 'modules'}:{ROOT}", "EDGE_TEST_MODULES": str(modules)}


@pytest.fixture
def imported(tmp_path: Path, modules: Path) -> dict[str, set[str]]:
    """The modules of front and worker that have answered one chat."""
    env = {**environment(modules), "EDGE_PRELOAD": "auto"}
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


def test_telemetry_is_sent_without_what_httpx_takes_for_its_own_command(tmp_path: Path, modules: Path) -> None:
    env = {**environment(modules), "EDGE_GATEWAY_URL": "http://127.0.0.1:9"}
    with running_appliance(tmp_path / "home", **env) as appliance, appliance.client() as http:
        assert http.post("/v1/chat/completions", json=chat_body("Hello", max_tokens=1)).status_code == 200
        wait_until(lambda: http.post("/edge/v1/telemetry/flush").json()["last_error"], what="an attempt to send")
        stop(appliance.process)
    imported = set((modules / str(appliance.process.pid)).read_text("utf-8").splitlines())
    assert "httpx" in imported
    assert imported & {"pygments", "rich"} == set()
