"""Registries that want to know who asks, with a private authority, behind a proxy."""

from __future__ import annotations

import base64
import datetime
import json
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from typing_extensions import override

from edge.errors import ConfigError, Forbidden, SourceUnavailable
from edge.formats.gguf import read_gguf
from edge.store import http
from edge.store.details import details_of
from edge.store.fetch import pull
from edge.store.models import ModelStore, PackageFile
from edge.store.network import Network
from edge.store.registry.auth import RegistryAuth, credentials_for
from edge.store.registry.push import push
from edge.store.sources import RegistrySource
from edge.store.transfer import Control
from tests.edge.gguf_files import sized_gguf
from tests.edge.registries import Registry, docker_registry
from tests.edge.store_support import assert_sound

MODEL = sized_gguf(400)
REPO = "models/tiny"
NAME, PASSWORD = "device-7", "hunter2"
IDLE = Control(lambda _: None, lambda: False)
SERVICE, ISSUER = "test registry", "test issuer"


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_BACKOFF_S", 0.001)


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    found, path = ModelStore(tmp_path / "store"), tmp_path / "tiny.gguf"
    path.write_bytes(MODEL)
    found.add("tiny:q8", [PackageFile(path, "tiny.gguf")], details_of(read_gguf(path)))
    return found


@dataclass(frozen=True)
class Identity:
    """A certificate and its key."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def write(self, directory: Path, name: str) -> tuple[Path, Path]:
        certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
        certificate.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
        key.write_bytes(
            self.key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return certificate, key


def identity(name: str, issuer: Identity | None = None) -> Identity:
    """A certificate of its own, or one that an authority gives to a host."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    )
    return Identity(key, builder.sign(issuer.key if issuer else key, hashes.SHA256()))


# ---------------------------------------------------------------------- tokens


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@dataclass
class TokenServer:
    """Gives tokens as docker-registry believes them: JSON Web Tokens, signed with ES256."""

    signer: Identity
    url: str = ""
    asked: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    lasts_s: int = 300

    def token(self, query: dict[str, str]) -> str:
        kind, name, actions = query["scope"].split(":")
        now = int(datetime.datetime.now(datetime.UTC).timestamp())
        der = self.signer.certificate.public_bytes(serialization.Encoding.DER)
        header = {"typ": "JWT", "alg": "ES256", "x5c": [base64.b64encode(der).decode()]}
        claims = {
            "iss": ISSUER, "sub": NAME, "aud": query["service"], "exp": now + self.lasts_s, "nbf": now - 60, "iat": now,
            "jti": "1", "access": [{"type": kind, "name": name, "actions": actions.split(",")}],
        }  # fmt: skip
        signed = ".".join(encoded(json.dumps(part).encode()) for part in (header, claims))
        r, s = decode_dss_signature(self.signer.key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{encoded(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


@contextmanager
def token_server(signer: Identity) -> Generator[TokenServer]:
    found = TokenServer(signer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
            found.asked.append(query)
            wanted = "Basic " + base64.b64encode(f"{NAME}:{PASSWORD}".encode()).decode()
            is_known = self.headers.get("Authorization") == wanted
            body = json.dumps({"token": found.token(query), "expires_in": found.lasts_s}).encode() if is_known else b""
            self.send_response(200 if is_known else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        @override
        def log_message(self, format: str, *args: object) -> None:
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.url = f"http://127.0.0.1:{server.server_port}/token"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield found
        server.shutdown()
        thread.join()


@pytest.fixture
def tokens() -> Generator[TokenServer]:
    with token_server(identity("signer")) as found:
        yield found


@pytest.fixture
def guarded(tokens: TokenServer, tmp_path: Path) -> Generator[Registry]:
    """A registry that believes the token server only."""
    bundle, _ = tokens.signer.write(tmp_path, "signer")
    token = {"realm": tokens.url, "service": SERVICE, "issuer": ISSUER, "rootcertbundle": str(bundle)}
    with docker_registry(tmp_path / "guarded", {"auth": {"token": token}}) as found:
        yield found


def auth_file(path: Path, host: str, password: str = PASSWORD) -> Path:
    auth = base64.b64encode(f"{NAME}:{password}".encode()).decode()
    path.write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    path.chmod(0o600)
    return path


def test_tokens_are_fetched_with_name_and_password_and_used_again(
    store: ModelStore, guarded: Registry, tokens: TokenServer, tmp_path: Path
) -> None:
    network = Network(auth_file=auth_file(tmp_path / "auth.json", guarded.host))
    push(store, "tiny:q8", RegistrySource(guarded.host, REPO), network=network, control=IDLE)
    scopes = [query["scope"] for query in tokens.asked]
    assert len(scopes) == 2, "one to look, one to write"
    assert {scope.rpartition(":")[0] for scope in scopes} == {f"repository:{REPO}"}
    other = ModelStore(tmp_path / "other")
    pull(other, f"oci://{guarded.host}/{REPO}:q8", network=network)
    assert len(tokens.asked) == 3
    assert_sound(other.root)


@pytest.mark.parametrize("password", ["", "wrong"])
def test_who_is_not_known_is_told_where_the_password_goes(
    store: ModelStore, guarded: Registry, tmp_path: Path, password: str
) -> None:
    path = auth_file(tmp_path / "auth.json", guarded.host, password) if password else tmp_path / "none.json"
    with pytest.raises(SourceUnavailable) as caught:
        push(store, "tiny:q8", RegistrySource(guarded.host, REPO), network=Network(auth_file=path), control=IDLE)
    assert "registry-auth.json" in str(caught.value)
    assert "wrong" not in str(caught.value)


def test_a_token_that_has_run_out_is_replaced(
    store: ModelStore, guarded: Registry, tokens: TokenServer, tmp_path: Path
) -> None:
    tokens.lasts_s = 1
    network = Network(auth_file=auth_file(tmp_path / "auth.json", guarded.host))
    push(store, "tiny:q8", RegistrySource(guarded.host, REPO), network=network, control=IDLE)
    pull(ModelStore(tmp_path / "other"), f"oci://{guarded.host}/{REPO}:q8", network=network)


def test_passwords_that_others_can_read_are_refused(tmp_path: Path) -> None:
    path = auth_file(tmp_path / "auth.json", "registry.example.org")
    assert credentials_for(path, "registry.example.org") == (NAME, PASSWORD)
    assert credentials_for(path, "other.example.org") is None
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="others can read it"):
        credentials_for(path, "registry.example.org")


def answering(*answers: httpx.Response) -> tuple[httpx.Client, list[tuple[str, str]]]:
    """A client of a registry that answers so, and what it is asked: the host, and who one says to be."""
    seen: list[tuple[str, str]] = []
    left = list(answers)

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.host, request.headers.get("Authorization", "").partition(" ")[0]))
        return left.pop(0)

    auth = RegistryAuth("https://registry.example.org", (NAME, PASSWORD))
    return httpx.Client(transport=httpx.MockTransport(handle), auth=auth, follow_redirects=True), seen


CHALLENGE = {"WWW-Authenticate": 'Bearer realm="https://auth.example.org/token",service="x",scope="repository:a:pull"'}


def test_a_password_is_sent_to_the_place_that_gives_tokens_only() -> None:
    client, seen = answering(
        httpx.Response(401, headers=CHALLENGE),
        httpx.Response(200, json={"access_token": "abc"}),
        httpx.Response(307, headers={"Location": "https://cdn.example.net/blob"}),
        httpx.Response(401, headers={"WWW-Authenticate": 'Bearer realm="https://evil.example.net/token"'}),
    )
    assert client.get("https://registry.example.org/v2/a/blobs/x").status_code == 401
    assert seen == [
        ("registry.example.org", ""), ("auth.example.org", "Basic"), ("registry.example.org", "Bearer"),
        ("cdn.example.net", ""),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(401, headers={"WWW-Authenticate": 'Bearer realm="http://auth.example.org/token"'}),
        httpx.Response(401, headers={"WWW-Authenticate": 'Bearer service="x"'}),
        httpx.Response(401, headers={"WWW-Authenticate": "Negotiate"}),
        httpx.Response(401),
    ],
)
def test_a_challenge_that_leads_astray_is_not_answered(answer: httpx.Response) -> None:
    client, seen = answering(answer)
    with pytest.raises(SourceUnavailable):
        client.get("https://registry.example.org/v2/")
    assert len(seen) == 1


@pytest.mark.parametrize("body", [b"", b"[]", b'{"token": "a\\nb"}', b'{"token": ""}', b"x" * (1 << 20)])
def test_a_token_that_is_none_is_not_used(body: bytes) -> None:
    client, _ = answering(httpx.Response(401, headers=CHALLENGE), httpx.Response(200, content=body))
    with pytest.raises(SourceUnavailable):
        client.get("https://registry.example.org/v2/")


# ---------------------------------------------------------------------- proxy and authority


@dataclass
class Proxy:
    """Leads every CONNECT to one port of loopback, whatever it was asked for."""

    target: int
    url: str = ""
    asked: list[str] = field(default_factory=list[str])


def _pipe(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@contextmanager
def proxy_to(port: int) -> Generator[Proxy]:
    found = Proxy(port)

    class Handler(BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            found.asked.append(self.path)
            with socket.create_connection(("127.0.0.1", found.target)) as target:
                self.send_response(200)
                self.end_headers()
                back = threading.Thread(target=_pipe, args=(target, self.connection))
                back.start()
                _pipe(self.connection, target)
                back.join()

        @override
        def log_message(self, format: str, *args: object) -> None:
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield found
        server.shutdown()
        thread.join()


def test_a_private_authority_behind_a_proxy(store: ModelStore, tmp_path: Path) -> None:
    authority = identity("authority")
    ca_file, _ = authority.write(tmp_path, "ca")
    certificate, key = identity("registry.example.org", authority).write(tmp_path, "registry")
    tls = {"tls": {"certificate": str(certificate), "key": str(key)}}
    with docker_registry(tmp_path / "registry", {"http": tls}) as registry, proxy_to(registry.port) as proxy:
        network = Network(proxy=proxy.url, ca_file=str(ca_file))
        target = RegistrySource("registry.example.org", REPO)
        push(store, "tiny:q8", target, network=network, control=IDLE)
        assert set(proxy.asked) == {"registry.example.org:443"}
        other = ModelStore(tmp_path / "other")
        pull(other, f"{target}:q8", network=network)
        assert_sound(other.root)
        with pytest.raises(SourceUnavailable, match="certificate"):
            pull(ModelStore(tmp_path / "third"), f"{target}:q8", network=replace(network, ca_file=""))


def test_a_file_of_certificates_that_is_none_is_named(store: ModelStore, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    with pytest.raises(ConfigError, match=r"ca\.pem"):
        pull(store, "oci://registry.example.org/a/b", network=Network(ca_file=str(tmp_path / "ca.pem")))


def test_strangers_reach_no_registry_of_this_network(store: ModelStore, tmp_path: Path) -> None:
    with docker_registry(tmp_path / "registry") as registry:
        push(store, "tiny:q8", RegistrySource(registry.host, REPO), network=Network(), control=IDLE)
        source = f"oci://{registry.host}/{REPO}:q8"
        with pytest.raises(Forbidden):
            pull(ModelStore(tmp_path / "other"), source, network=Network(private_hosts=frozenset()))
        pull(ModelStore(tmp_path / "other"), source, network=Network(private_hosts=frozenset({"127.0.0.1"})))
