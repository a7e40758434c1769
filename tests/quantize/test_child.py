"""Native work in a child process: its failures become ours, with the library's reason."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from edge.errors import BackendError, RecipeError
from quantize.checkpoint import open_checkpoint
from quantize.child import QualityJob, QuantizeJob, SpeedJob, run_job
from quantize.evaluate import Quality, Speed
from quantize.gguf.convert import convert
from quantize.recipe import QUANT_TYPES
from tests.quantize.checkpoints import make_llama3, make_smollm

TEXT = "There was a little girl and a happy dog. " * 200


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("child")
    convert(open_checkpoint(make_smollm(directory / "tiny")), directory / "tiny.gguf", use_f16=True)
    return directory / "tiny.gguf"


def quantize_job(source: Path, target: Path, kind: str) -> QuantizeJob:
    return QuantizeJob(str(source), str(target), QUANT_TYPES[kind].ftype, 1)


def test_a_file_that_is_no_model_fails_with_the_librarys_reason(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(RecipeError, match=r"could not quantize bad\.gguf: .*fail"):
        run_job(quantize_job(tmp_path / "bad.gguf", tmp_path / "out.gguf", "Q8_0"), type(None))
    with pytest.raises(BackendError, match=r"cannot load bad\.gguf"):
        run_job(SpeedJob(str(tmp_path / "bad.gguf"), TEXT, 1), Speed)


def test_a_type_that_needs_more_fails_with_the_librarys_reason(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="invalid output file type"):
        run_job(quantize_job(tiny, tmp_path / "out.gguf", "NVFP4"), type(None))


def test_damaged_weights_fail_with_the_librarys_reason(tiny: Path, tmp_path: Path) -> None:
    data = bytearray(tiny.read_bytes())
    data[-64:] = b"\xff\x7f" * 32  # float16 NaN
    (tmp_path / "nan.gguf").write_bytes(data)
    with pytest.raises(RecipeError, match="invalid data"):
        run_job(quantize_job(tmp_path / "nan.gguf", tmp_path / "out.gguf", "Q8_0"), type(None))


def test_an_abort_costs_only_the_job(tiny: Path) -> None:
    def abort(_: float) -> None:
        for child in psutil.Process().children():
            os.kill(child.pid, signal.SIGABRT)

    job = QualityJob(str(tiny), str(tiny), TEXT * 10, 100_000, 1)
    with pytest.raises(BackendError, match="SIGABRT"):
        run_job(job, Quality, on_progress=abort)


def test_silence_is_taken_for_hanging(tiny: Path) -> None:
    before = psutil.Process().children()  # of other tests
    with pytest.raises(RecipeError, match="no sign of life"):
        run_job(SpeedJob(str(tiny), TEXT, 1), Speed, stall_s=0.001)
    assert psutil.Process().children() == before


def test_models_of_two_vocabularies_are_not_compared(tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    convert(open_checkpoint(make_llama3(tmp_path / "llama3")), other, use_f16=True)
    with pytest.raises(RecipeError, match="vocabulary"):
        run_job(QualityJob(str(tiny), str(other), TEXT, 1024, 1), Quality)
