"""What `edge tune` found fastest for one model on this device, kept in `EDGE_HOME/tuning` and used by each load."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import msgspec

from edge.hardware.memory import usable_cores

log = logging.getLogger("edge.tuning")

MAX_BYTES = 1 << 16
_Threads = Annotated[int, msgspec.Meta(ge=0, le=1024)]


class Measure(msgspec.Struct, frozen=True, kw_only=True):
    """Speeds of one combination of settings, in tokens per second: of a prompt, and of an answer alone."""

    ubatch_tokens: int
    flash_attention: bool | None
    threads: int
    kv_type: str = "f16"
    prefill_tok_s: float
    decode_tok_s: float


class Tuning(msgspec.Struct, frozen=True, kw_only=True):
    """Settings for one model on one device; zeros and None leave the choice as it is without tuning."""

    version: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1
    prefill_threads: _Threads = 0
    decode_threads: _Threads = 0
    ubatch_tokens: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0
    flash_attention: bool | None = None
    measures: Annotated[tuple[Measure, ...], msgspec.Meta(max_length=256)] = ()
    """What was measured, the best of each first; only for people."""


def device_fingerprint() -> str:
    """Changes with what speeds depend on: processor, cores this process may use, the library's version."""
    try:
        library = version("llama-cpp-python")
    except PackageNotFoundError:
        library = ""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    telling = ("model name", "Model", "CPU part", "flags", "Features")
    names = sorted({line for line in lines if line.startswith(telling)})
    facts = [platform.machine(), *names, str(usable_cores()), library]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def tuning_path(directory: Path, digest: str) -> Path:
    """Where the tuning of a model for this device lies."""
    return directory / f"{digest.replace(':', '-')}-{device_fingerprint()}.json"


def load_tuning(directory: Path, digest: str) -> Tuning | None:
    """The tuning of a model for this device. None without one; a damaged file is named in the log and passed over."""
    path = tuning_path(directory, digest)
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(MAX_BYTES), type=Tuning)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as e:
        log.warning("%s is passed over: %s", path, e)
        return None


def save_tuning(directory: Path, digest: str, tuning: Tuning) -> Path:
    """Keep a tuning, whole or not at all; where it lies."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = tuning_path(directory, digest)
    new = path.with_suffix(f".{os.getpid()}.new")
    new.write_bytes(msgspec.json.encode(tuning))
    new.replace(path)
    return path
