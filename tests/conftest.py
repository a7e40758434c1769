"""Rules that hold for every test."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.quantize.minilm import make_minilm
from tests.quantize.stories import Unavailable
from tests.vision import VisionFiles, make_vision_model

ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.txt")


def _allowed() -> set[str]:
    lines = ALLOWED_SKIPS.read_text("utf-8").splitlines()
    return {line.split("#")[0].strip() for line in lines} - {""}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In the gate a skip is a failure: the gate installs what tests need. `allowed_skips.txt` names the exceptions."""
    report = yield
    if report.skipped and os.environ.get("CI") and item.nodeid not in _allowed():
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped in the gate: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint directory of all-MiniLM-L6-v2, original fp32."""
    try:
        return make_minilm(tmp_path_factory.mktemp("checkpoints") / "all-MiniLM-L6-v2")
    except Unavailable as e:
        pytest.skip(f"all-MiniLM-L6-v2: {e}")


@pytest.fixture(scope="session")
def minilm_gguf(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a GGUF in float16, as the catalog has it."""
    from quantize.checkpoint import open_checkpoint
    from quantize.gguf.convert import convert

    target = tmp_path_factory.mktemp("models") / "all-MiniLM-L6-v2.gguf"
    convert(open_checkpoint(minilm), target, use_f16=True)
    return target


@pytest.fixture(scope="session")
def reranker_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny cross-encoder with random weights, in float32."""
    from quantize.checkpoint import open_checkpoint
    from quantize.gguf.convert import convert
    from tests.quantize.checkpoints import make_cross_encoder

    directory = tmp_path_factory.mktemp("reranker")
    convert(open_checkpoint(make_cross_encoder(directory / "tiny")), directory / "tiny.gguf", use_f16=False)
    return directory / "tiny.gguf"


@pytest.fixture(scope="session")
def vision_files(tmp_path_factory: pytest.TempPathFactory) -> VisionFiles:
    """A tiny model that sees, with random weights."""
    return make_vision_model(tmp_path_factory.mktemp("vision"))
