"""Settings: defaults, then `edge.toml`, then the environment, then flags. Read once, passed by argument."""

from __future__ import annotations

import dataclasses
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edge.errors import ConfigError

Origin = Literal["default", "file", "environment", "flag"]
ENV_PREFIX = "EDGE_"


def default_home(environ: Mapping[str, str]) -> Path:
    """The one writable directory: `EDGE_HOME`, else the user's data directory (XDG base directory specification)."""
    if home := environ.get("EDGE_HOME"):
        return Path(home)
    data = environ.get("XDG_DATA_HOME") or f"{environ.get('HOME', '/var/lib')}/.local/share"
    return Path(data) / "slm-edge"


@dataclass(frozen=True, slots=True)
class Settings:
    """What the appliance was told. Every field but `home` and `origins` can stand in `edge.toml`, as `EDGE_<NAME>`
    in the environment, or as a flag of the command that uses it."""

    home: Path
    host: str = "127.0.0.1"
    port: int = 8080
    default_model: str = "smollm2:135m-instruct"
    threads: int = 0
    """Threads of one engine; 0 means every core this process may run on."""
    context_tokens: int = 0
    """KV cells of one model, shared by its sequences; 0 means chosen from the model and the memory."""
    max_sequences: int = 16
    """Sequences that one engine computes at once."""
    step_tokens: int = 512
    """Most tokens of one engine step."""
    state_bytes: int = 0
    """Memory for computed prompts that left a model's cache; 0 means a sixteenth of what is available."""
    preload: str = "auto"
    """`auto` loads the default model at the start; `off` loads each model when it is first asked for."""
    state_disk_bytes: int = -1
    """Most of them, for each model, on the disk, where they outlive a restart; 0 writes none, -1 means a twentieth of
    what is free, at most 1 GiB."""
    token_interval_ms: int = 0
    """Longest wanted time between two tokens while other prompts are read; 0 means chosen from what a step costs."""
    speculation: str = "auto"
    """`auto` guesses tokens that the text repeats where that is faster, `off` never does; answers are the same."""
    max_queue: int = 256
    """Requests that may wait for one model before others are refused."""
    request_timeout_s: float = 1800.0
    """A request that has no whole answer after this time ends with an error; it may ask for less by `timeout_s`."""
    max_body_bytes: int = 16 << 20
    keep_alive_s: float = 900.0
    """An unused model is unloaded after this time; a negative value keeps it."""
    gateway_url: str = ""
    """Where telemetry goes (OTLP/HTTP); empty means nowhere, and then nothing leaves the device."""
    outbox_bytes: int = 64 << 20
    metrics_interval_s: float = 10.0
    seed: Path = field(default_factory=lambda: Path(sys.prefix) / "share" / "slm-edge" / "seed")
    """OCI layout from which an empty store is filled."""
    origins: Mapping[str, Origin] = field(default_factory=dict[str, Origin], compare=False)

    @property
    def store_dir(self) -> Path:
        return self.home / "store"

    @property
    def run_dir(self) -> Path:
        return self.home / "run"

    @property
    def socket_path(self) -> Path:
        return self.run_dir / "edge.sock"

    @property
    def tuning_dir(self) -> Path:
        return self.home / "tuning"

    @property
    def logs_dir(self) -> Path:
        return self.home / "logs"

    @property
    def poison_dir(self) -> Path:
        """Requests that ended an engine twice."""
        return self.home / "poison"

    @property
    def telemetry_db(self) -> Path:
        return self.home / "telemetry.db"


_SETTABLE = {f.name: f for f in dataclasses.fields(Settings) if f.name not in ("home", "origins")}


def _convert(name: str, value: object, where: str) -> object:
    kind = str(_SETTABLE[name].type)
    try:
        if kind == "int" and isinstance(value, int | str) and not isinstance(value, bool):
            return int(value)
        if kind == "float" and isinstance(value, int | float | str) and not isinstance(value, bool):
            return float(value)
        if kind == "Path" and isinstance(value, str | Path):
            return Path(value)
        if kind == "str" and isinstance(value, str):
            return value
    except ValueError:
        pass
    label = ENV_PREFIX + name.upper() if where == "environment" else f"{where}: '{name}'"
    words = {"int": "a whole number", "float": "a number", "Path": "a path", "str": "a text"}[kind]
    raise ConfigError(f"{label} must be {words}, got {value!r}.", hint="See the settings with: edge config.")


_LEAST = {
    "threads": 0, "context_tokens": 0, "state_bytes": 0, "state_disk_bytes": -1, "max_sequences": 1, "step_tokens": 1,
    "max_queue": 1, "token_interval_ms": 0, "max_body_bytes": 1024, "request_timeout_s": 1, "outbox_bytes": 1 << 16,
}  # fmt: skip


def _check(settings: Settings) -> Settings:
    if not 0 <= settings.port <= 65535:
        raise ConfigError(f"port must lie between 0 and 65535, got {settings.port}.")
    for name, low in _LEAST.items():
        if getattr(settings, name) < low:
            raise ConfigError(f"{name} must be at least {low}, got {getattr(settings, name)}.")
    for name in ("preload", "speculation"):
        if getattr(settings, name) not in ("auto", "off"):
            raise ConfigError(f"{name} must be auto or off, got {getattr(settings, name)!r}.")
    if settings.gateway_url and not settings.gateway_url.startswith(("http://", "https://")):
        raise ConfigError(f"gateway_url must begin with http:// or https://, got {settings.gateway_url!r}.")
    return settings


def read_config_file(path: Path) -> dict[str, object]:
    """The table of `edge.toml`; an absent file is an empty one.

    Raises:
        ConfigError: The file is not TOML, or names a setting that does not exist.
    """
    try:
        table: dict[str, object] = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise ConfigError(f"{path} cannot be read: {e}.") from e
    for name in table:
        if name not in _SETTABLE:
            raise ConfigError(f"{path}: there is no setting '{name}'.", hint=f"Settings: {', '.join(_SETTABLE)}.")
    return table


def load_settings(environ: Mapping[str, str], flags: Mapping[str, object] | None = None) -> Settings:
    """The settings in force. A flag that is None was not given.

    Raises:
        ConfigError: A value of the wrong type or outside its range, or an unknown name in the file.
    """
    flags = {k: v for k, v in (flags or {}).items() if v is not None}
    home = Path(str(flags.pop("home", None) or default_home(environ))).absolute()
    path = Path(environ.get("EDGE_CONFIG") or home / "edge.toml")
    if environ.get("EDGE_CONFIG") and not path.is_file():
        raise ConfigError(f"EDGE_CONFIG names {path}, which is not a file.", hint="Correct it, or unset it.")
    values: dict[str, object] = {}
    origins: dict[str, Origin] = {}
    if "EDGE_HOME" in environ:
        origins["home"] = "environment"
    layers: list[tuple[Origin, str, Mapping[str, object]]] = [
        ("file", str(path), read_config_file(path)),
        (
            "environment",
            "environment",
            {n: environ[k] for n in _SETTABLE if (k := ENV_PREFIX + n.upper()) in environ},
        ),
        ("flag", "command line", {n: v for n, v in flags.items() if n in _SETTABLE}),
    ]
    for origin, where, table in layers:
        for name, value in table.items():
            values[name] = _convert(name, value, where)
            origins[name] = origin
    return _check(Settings(home=home, origins=origins, **values))  # pyright: ignore[reportArgumentType]  # _convert checked each
