"""Settings: defaults, then `edge.toml`, then the environment, then flags. Read once, passed by argument."""

from __future__ import annotations

import dataclasses
import ipaddress
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

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
    require_keys: str = "auto"
    """`auto` asks for API keys where others than this machine's programs can get through; `on` always, but on the Unix
    socket."""
    tls_cert: str = ""
    """PEM file with the certificate, and those between it and its issuer; read again when it changes."""
    tls_key: str = ""
    """PEM file with its private key."""
    tls_by_proxy: str = ""
    """Who ends TLS in front of this appliance, in words; empty is nobody."""
    cors_origins: str = ""
    """Web pages that may use the API besides those of this machine: ``https://panel.example``, separated by commas."""
    allowed_hosts: str = ""
    """Names of this device, separated by commas, that requests over TCP may ask for; empty is its own address, or any
    name where keys are required."""
    pull_hosts: str = ""
    """Hosts of private networks, separated by commas, that API keys may have models pulled from."""
    pull_rate: str = ""
    """Most bytes a second that models come and go with: ``500k``, ``2M``; empty is as fast as it goes."""
    pull_window: str = ""
    """When models may come and go: ``22:00-06:00`` by this machine's clock; empty is at any time."""
    pull_proxy: str = ""
    """Proxy towards the places that models come from; empty is as HTTPS_PROXY, HTTP_PROXY and NO_PROXY say."""
    pull_no_proxy: str = ""
    """Hosts that are reached without it, separated by commas; ``.lan`` is all that end so."""
    pull_ca: str = ""
    """PEM file with certificates to believe there, beside the usual ones."""
    pull_mirrors: str = ""
    """Places that have what a registry has, in the order of asking: ``registry.example.org=mirror.lan:5000``."""
    pull_http_hosts: str = ""
    """Registries without TLS beside those of this machine, separated by commas."""
    registry_auth_file: str = ""
    """Names and passwords for registries, in Docker's form; empty is ``registry-auth.json`` in EDGE_HOME."""
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
    strict: str = "off"
    """`on` refuses requests with fields that are unknown or have no effect, instead of listing these as warnings; a
    request may say it for itself by the header ``x-edge-strict``."""
    speculation: str = "auto"
    """`auto` guesses tokens that the text repeats where that is faster, `off` never does; answers are the same."""
    max_queue: int = 256
    """Requests that may wait for one model before others are refused."""
    request_timeout_s: float = 1800.0
    """A request that has no whole answer after this time ends with an error; it may ask for less by `timeout_s`."""
    max_body_bytes: int = 16 << 20
    max_file_bytes: int = 200 << 20
    """Largest file of requests that is taken for a batch."""
    moderation: str = ""
    """Name of the classifier behind /v1/moderations (entry point group ``slm_edge.moderation``); empty is none."""
    max_connections: int = 1024
    """Open at once; one address of another machine may have a quarter. Near it, those go that ask for nothing."""
    head_timeout_s: float = 10.0
    """A connection that has not said what it wants by then is closed."""
    stall_timeout_s: float = 30.0
    """A client that neither sends its body nor reads its answer for so long is cut off."""
    drain_timeout_s: float = 30.0
    """How long answers under way may take when the appliance is asked to stop."""
    keep_alive_s: float = 900.0
    """An unused model is unloaded after this time; a negative value keeps it."""
    gateway_url: str = ""
    """Where telemetry goes (OTLP/HTTP); empty means nowhere, and then nothing leaves the device."""
    outbox_bytes: int = 64 << 20
    responses_bytes: int = 128 << 20
    """Most of the responses that are kept to be gone on from; 0 keeps none."""
    peers: str = ""
    """Other appliances, separated by commas, that are asked for damaged parts of models: ``10.0.0.7:8080``."""
    scrub_days: float = 7.0
    """In how many days each byte of the store is read again; 0 is never."""
    repair: str = "auto"
    """`auto` fetches damaged parts of models from peers, and from where the models came; `off` leaves it to `edge
    verify --repair`."""
    metrics_interval_s: float = 10.0
    seed: Path = field(default_factory=lambda: Path(sys.prefix) / "share" / "slm-edge" / "seed")
    """OCI layout from which an empty store is filled."""
    trust: str = "warn"
    """What becomes of models that nobody trusted here signed: `enforce` refuses them, `warn` says so in the log where
    any key is trusted, `off` does not look."""
    trusted_keys: Path = field(default_factory=lambda: Path(sys.prefix) / "share" / "slm-edge" / "trust")
    """Directory with the keys and the revocation list that came with the installation."""
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
    def trust_dir(self) -> Path:
        """Keys that were trusted here by hand, who is revoked here, and the releases that proved themselves."""
        return self.home / "trust"

    @property
    def telemetry_db(self) -> Path:
        return self.home / "telemetry.db"

    @property
    def state_db(self) -> Path:
        """Keys, usage and the audit log."""
        return self.home / "state.db"

    @property
    def responses_db(self) -> Path:
        """What `/v1/responses` keeps."""
        return self.home / "responses.db"

    @property
    def batches_db(self) -> Path:
        """Files, batches, and the answers of their lines."""
        return self.home / "batches.db"

    @property
    def files_dir(self) -> Path:
        """What clients sent as files, and what batches made."""
        return self.home / "files"

    @property
    def registry_auth(self) -> Path:
        """Names and passwords for registries."""
        return Path(self.registry_auth_file) if self.registry_auth_file else self.home / "registry-auth.json"

    @property
    def needs_keys(self) -> bool:
        """Whether a request over TCP needs an API key."""
        return self.require_keys == "on" or bool(self.tls_by_proxy) or not is_loopback(self.host)

    @property
    def url(self) -> str:
        """Where this machine's programs reach the appliance."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104  # compared, not bound
        return f"http{'s' if self.tls_cert else ''}://{f'[{host}]' if ':' in host else host}:{self.port}"


def without_password(url: str) -> str:
    """The address with the user's part masked, fit to be shown."""
    scheme, found, rest = url.partition("://")
    user, at, host = rest.rpartition("@")
    return f"{scheme}{found}***@{host}" if found and at and user else url


@dataclass(frozen=True, slots=True)
class Shown:
    """A setting as it may be shown: what is secret in its value is masked."""

    name: str
    value: str | int | float
    origin: Origin


def shown(settings: Settings) -> list[Shown]:
    """Every setting and where its value came from."""
    return [
        Shown(f.name, _as_shown(getattr(settings, f.name)), settings.origins.get(f.name, "default"))
        for f in dataclasses.fields(settings)
        if f.name != "origins"
    ]


def _as_shown(value: str | int | float | Path) -> str | int | float:
    return without_password(str(value)) if isinstance(value, str | Path) else value


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach this address.

    Raises:
        ConfigError: It is no address.
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError as e:
        raise ConfigError(f"host must be an IP address or 'localhost', got {host!r}.") from e


def listed(text: str) -> frozenset[str]:
    """The members of a list that is separated by commas, in lower case."""
    return frozenset(part.strip().lower() for part in text.split(",")) - {""}


API_KEY, CA_FILE = "EDGE_API_KEY", "EDGE_CA_FILE"


def client_key(environ: Mapping[str, str]) -> str | None:
    """The API key that commands present to an appliance. No setting, so that nothing shows it.

    Raises:
        ConfigError: It cannot stand in a header.
    """
    key = environ.get(API_KEY, "").strip()
    if not all("!" <= c <= "~" for c in key):
        raise ConfigError(f"{API_KEY} is no API key: it has characters that no key has.")
    return key or None


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
    "max_queue": 1, "token_interval_ms": 0, "max_body_bytes": 1024, "max_file_bytes": 1024,
    "request_timeout_s": 1, "outbox_bytes": 1 << 16, "responses_bytes": 0,
    "max_connections": 16, "head_timeout_s": 1, "stall_timeout_s": 1, "drain_timeout_s": 0, "scrub_days": 0,
}  # fmt: skip


def _check(settings: Settings) -> Settings:
    if not 0 <= settings.port <= 65535:
        raise ConfigError(f"port must lie between 0 and 65535, got {settings.port}.")
    for name, low in _LEAST.items():
        if getattr(settings, name) < low:
            raise ConfigError(f"{name} must be at least {low}, got {getattr(settings, name)}.")
    for name, other in (("preload", "off"), ("speculation", "off"), ("require_keys", "on"), ("repair", "off")):
        if getattr(settings, name) not in ("auto", other):
            raise ConfigError(f"{name} must be auto or {other}, got {getattr(settings, name)!r}.")
    if settings.trust not in ("off", "warn", "enforce"):
        raise ConfigError(f"trust must be off, warn or enforce, got {settings.trust!r}.")
    if settings.strict not in ("on", "off"):
        raise ConfigError(f"strict must be on or off, got {settings.strict!r}.")
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise ConfigError("tls_cert and tls_key go together.", hint="Give the files of a certificate and of its key.")
    for origin in listed(settings.cors_origins):
        _check_origin(origin)
    if settings.gateway_url and not settings.gateway_url.startswith(("http://", "https://")):
        raise ConfigError(f"gateway_url must begin with http:// or https://, got {settings.gateway_url!r}.")
    return settings


def _check_origin(origin: str) -> None:
    """Pages are named as their browsers name them (RFC 6454, section 6.2): one of another form would never match."""
    try:
        parts = urlsplit(origin)
        is_page = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        is_good = is_page and origin == f"{parts.scheme}://{parts.netloc}" and "@" not in origin
    except ValueError:
        is_good = False
    if not is_good:
        raise ConfigError(
            f"cors_origins must be like https://panel.example or http://10.0.0.7:3000, got {origin!r}.",
            hint="'*' is not taken: any page that anybody shows could then use this appliance.",
        )


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
