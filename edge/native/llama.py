"""The C side of llama.cpp: its bindings, loaded lazily and without the package around them.

Everything native stops here and in the adapters that call :func:`bindings`; no other module sees a pointer.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import sys
import threading
import types
from functools import cache
from pathlib import Path
from typing import Any

from edge.errors import BackendError

log = logging.getLogger("edge.llama")

EXPECTED_VERSION = "0.3.36"
_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}  # ggml_log_level of ggml.h
_CONTINUATION = 5
_lock = threading.Lock()
_keep_alive: list[object] = []  # ctypes callbacks the library still holds; a collected one is a segmentation fault
_last_errors: list[str] = []


def _package_without_init() -> None:
    """Put an empty `llama_cpp` package in place, so that its submodule loads without `__init__` (which imports the
    high-level API, jinja2, diskcache and a server: 108 ms and 32 MB more)."""
    if "llama_cpp" in sys.modules:
        return
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.submodule_search_locations is None:
        raise BackendError(
            "llama-cpp-python is not installed.", hint=f"pip install llama-cpp-python=={EXPECTED_VERSION}"
        )
    package = types.ModuleType("llama_cpp")
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    sys.modules["llama_cpp"] = package


def _on_log(level: int, text: bytes, _user: object) -> None:
    line = text.decode("utf-8", "replace").rstrip()
    if not line or line == ".":
        return
    if level == 4:
        _last_errors[:] = [*_last_errors[-4:], line]
    log.log(_LEVELS.get(level, logging.DEBUG if level == _CONTINUATION else logging.INFO), "%s", line)


def last_error() -> str:
    """What the library last logged as an error; empty if nothing."""
    return _last_errors[-1] if _last_errors else ""


def _load_backends(library: Any) -> None:
    """Load the backends that lie beside the library, of each the variant that is best on this CPU.

    A portable build (GGML_BACKEND_DL, GGML_CPU_ALL_VARIANTS) has none linked in. The directory is named because ggml
    would otherwise look beside the Python executable and in the current directory (ggml-backend-reg.cpp).
    """
    if library.ggml_backend_reg_count() == 0:
        directory = Path(library._name).parent
        library.ggml_backend_load_all_from_path(ctypes.c_char_p(str(directory).encode()))


@cache
def _load() -> Any:
    _package_without_init()
    try:
        lib = importlib.import_module("llama_cpp.llama_cpp")
    except (ImportError, OSError, RuntimeError) as e:
        raise BackendError(f"The llama.cpp library cannot be loaded: {e}.", hint="Reinstall llama-cpp-python.") from e
    callback = lib.llama_log_callback(_on_log)
    _keep_alive.append(callback)
    lib.llama_log_set(callback, ctypes.c_void_p(0))
    _load_backends(lib._lib)
    lib.llama_backend_init()
    return lib


def bindings() -> Any:
    """The module `llama_cpp.llama_cpp`, its log going to the logger ``edge.llama``, its backend initialised.

    Safe to call from any thread; later calls are free.

    Raises:
        BackendError: The library is absent or does not load.
    """
    with _lock:
        return _load()


@cache
def _load_vision() -> Any:
    llama = _load()
    try:
        lib = importlib.import_module("llama_cpp.mtmd_cpp")
    except (ImportError, OSError, RuntimeError) as e:
        raise BackendError(
            f"The library for images (libmtmd) cannot be loaded: {e}.", hint="Reinstall llama-cpp-python."
        ) from e
    callback = llama.llama_log_callback(_on_log)
    _keep_alive.append(callback)
    lib.mtmd_helper_log_set(callback, ctypes.c_void_p(0))
    return lib


def vision_bindings() -> Any:
    """The module `llama_cpp.mtmd_cpp`; asked for only by models that have a projector.

    Raises:
        BackendError: The library is absent or does not load.
    """
    with _lock:
        return _load_vision()


def build_info() -> str:
    """Version and CPU features of the library, as it states them itself."""
    return f"llama-cpp-python {EXPECTED_VERSION}; {bindings().llama_print_system_info().decode()}"
