"""Who this device is to a registry: names and passwords from a file, tokens from where the registry says.

Sources: the distribution project's token authentication (docs/spec/auth/token.md) and Docker's ``config.json``, which
docker, podman, skopeo and oras write as well.
"""

from __future__ import annotations

import base64
import binascii
import re
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
from typing_extensions import override

from edge.errors import ConfigError, SourceUnavailable

_MAX_FILE_BYTES = 1 << 20
_MAX_TOKEN_BYTES = 256 << 10
_DEFAULT_TOKEN_S = 60.0
"""What a token is good for that does not say (token.md, "Token Response Fields")."""
_PARAMETER = re.compile(r'([A-Za-z_]{1,32})="([^"\\]{0,2048})"')
_DOCKER_HUB = ("docker.io", "registry-1.docker.io")
_DOCKER_HUB_KEY = "https://index.docker.io/v1/"
HINT = "Name and password stand in registry-auth.json of EDGE_HOME, as docker, podman and oras login write them."


class _Entry(msgspec.Struct, frozen=True):
    auth: str = ""
    """``NAME:PASSWORD`` in base64."""
    username: str = ""
    password: str = ""


class _AuthFile(msgspec.Struct, frozen=True):
    auths: dict[str, _Entry] = {}


def credentials_for(path: Path | None, host: str) -> tuple[str, str] | None:
    """Name and password for a registry; None where the file has none, or there is no file.

    Raises:
        ConfigError: The file cannot be read, or others than its owner can read it.
    """
    if path is None or not path.exists():
        return None
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} holds passwords and others can read it.", hint=f"chmod 600 {path}")
        with path.open("rb") as file:
            found = msgspec.json.decode(file.read(_MAX_FILE_BYTES), type=_AuthFile)
    except (OSError, msgspec.MsgspecError) as e:
        raise ConfigError(f"{path} cannot be read: {e}.", hint='It is JSON: {"auths": {"HOST": {"auth": …}}}.') from e
    for name in (host, f"https://{host}", f"https://{host}/v2/", *((_DOCKER_HUB_KEY,) if host in _DOCKER_HUB else ())):
        if entry := found.auths.get(name):
            return _decoded(entry, path)
    return None


def _decoded(entry: _Entry, path: Path) -> tuple[str, str]:
    if entry.username:
        return entry.username, entry.password
    try:
        name, colon, password = base64.b64decode(entry.auth, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: an 'auth' is not NAME:PASSWORD in base64.") from e
    if not colon:
        raise ConfigError(f"{path}: an 'auth' has no password.", hint="Helpers of Docker are not asked.")
    return name, password


class _Token(msgspec.Struct, frozen=True):
    token: str = ""
    access_token: str = ""
    expires_in: float = _DEFAULT_TOKEN_S


class RegistryAuth(httpx.Auth):
    """Answers a registry's challenge, and remembers the answer for as long as it holds.

    Args:
        url: Where the registry's API begins. What another place asks for is not answered.
    """

    def __init__(
        self, url: str, credentials: tuple[str, str] | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._url = httpx.URL(url)
        self._credentials = credentials
        self._clock = clock
        self._header = ""
        self._until = 0.0

    @override
    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if not self._is_own(request.url):
            yield request
            return
        if self._header and self._clock() < self._until:
            request.headers["Authorization"] = self._header
        response = yield request
        if response.status_code == 401 and self._is_own(response.url):
            _bound(response)
            yield from self._answer(request, response)

    def _is_own(self, url: httpx.URL) -> bool:
        return (url.scheme, url.host, url.port) == (self._url.scheme, self._url.host, self._url.port)

    def _answer(
        self, request: httpx.Request, response: httpx.Response
    ) -> Generator[httpx.Request, httpx.Response, None]:
        challenge = response.headers.get("WWW-Authenticate", "")
        scheme, _, rest = challenge[:8192].partition(" ")
        if scheme.lower() == "basic" and self._credentials:
            self._keep(f"Basic {_basic(self._credentials)}", float("inf"))
        elif scheme.lower() == "bearer":
            asked = self._token_request({k.lower(): v for k, v in _PARAMETER.findall(rest)})
            asked.extensions = request.extensions  # its timeouts
            token = _read_token((yield asked))
            self._keep(f"Bearer {token.token or token.access_token}", max(1.0, token.expires_in - 5.0))
        else:
            raise SourceUnavailable(f"{self._url.host} wants to know who asks.", hint=HINT)
        request.headers["Authorization"] = self._header
        yield request

    def _keep(self, header: str, good_for_s: float) -> None:
        self._header, self._until = header, self._clock() + good_for_s

    def _token_request(self, parameters: dict[str, str]) -> httpx.Request:
        realm = httpx.URL(parameters.get("realm", ""))
        if not realm.host or (self._url.scheme == "https" and realm.scheme != "https"):
            raise SourceUnavailable(f"{self._url.host} names no place with TLS that gives tokens.")
        asked: Any = {name: parameters[name] for name in ("service", "scope") if parameters.get(name)}
        headers = {"Authorization": f"Basic {_basic(self._credentials)}"} if self._credentials else {}
        return httpx.Request("GET", realm.copy_merge_params(asked), headers=headers)


def _basic(credentials: tuple[str, str]) -> str:
    return base64.b64encode(":".join(credentials).encode()).decode()


def _read_token(response: httpx.Response) -> _Token:
    host = response.url.host
    _bound(response)
    if response.status_code != 200:
        raise SourceUnavailable(f"{host} gives no token ({response.status_code}).", hint=HINT)
    try:
        token = msgspec.json.decode(response.read(), type=_Token)
    except msgspec.MsgspecError as e:
        raise SourceUnavailable(f"{host} gives something else than a token: {e}.") from e
    text = token.token or token.access_token
    if not text or not all("!" <= c <= "~" for c in text):
        raise SourceUnavailable(f"{host} gives a token that is none.")
    return token


class _Bounded(httpx.SyncByteStream):
    """The body of an answer, up to a limit."""

    def __init__(self, body: httpx.SyncByteStream, host: str) -> None:
        self._body = body
        self._host = host

    @override
    def __iter__(self) -> Iterator[bytes]:
        left = _MAX_TOKEN_BYTES
        for chunk in self._body:
            left -= len(chunk)
            if left < 0:
                raise SourceUnavailable(f"{self._host} answers a question of who asks with more than it needs.")
            yield chunk

    @override
    def close(self) -> None:
        self._body.close()


def _bound(response: httpx.Response) -> None:
    """The library reads answers to a challenge by itself, and whole."""
    if isinstance(response.stream, httpx.SyncByteStream):
        response.stream = _Bounded(response.stream, response.url.host)


def read_bounded(response: httpx.Response, limit: int) -> bytes:
    """The body of an answer whose body was not read yet.

    Raises:
        SourceUnavailable: It is longer than `limit`.
    """
    data = b""
    for chunk in response.iter_bytes():
        data += chunk
        if len(data) > limit:
            response.close()
            raise SourceUnavailable(f"{response.url.host} answers with more than {limit:,} bytes.")
    return data
