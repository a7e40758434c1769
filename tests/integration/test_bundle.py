"""A model on a stick, for a machine without a network: exported, everything wiped, imported, serving again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.support import DEFAULT_MODEL, run_edge

ISLAND = """
import fcntl, json, socket, struct, sys
from pathlib import Path
from tests.support import chat_body, run_edge, start_appliance, stop
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    fcntl.ioctl(s, 0x8914, struct.pack("16sH14x", b"lo", 0x41))  # SIOCSIFFLAGS: up, running
    try:
        s.connect(("192.0.2.1", 9))
        said = {"route": "there is one"}
    except OSError as e:
        said = {"route": e.strerror}
home, environ = Path(sys.argv[1]), {"EDGE_SEED": str(Path(sys.argv[1]) / "none"), "EDGE_TRUST": "enforce"}
for stick in sys.argv[2:]:
    done = run_edge("import", stick, "--yes", "--json", home=home, **environ)
    said[Path(stick).name] = (done.returncode, done.stdout, done.stderr)
appliance = start_appliance(home, env=environ)
try:
    with appliance.client() as http:
        said["models"] = [model["id"] for model in http.get("/v1/models").json()["data"]]
        answer = http.post("/v1/chat/completions", json=chat_body("What is the capital of France?"))
        said["answer"] = answer.json()["choices"][0]["message"]["content"]
finally:
    stop(appliance.process)
print(json.dumps(said))
"""


def in_an_empty_network() -> Sequence[str]:
    """The command that runs another one in a network namespace with nothing in it: as root, else as root of a user
    namespace. Nothing where neither may be made."""
    for command in (["unshare", "--net"], ["unshare", "--map-root-user", "--net"]):
        if (
            shutil.which("unshare")
            and not subprocess.run([*command, "true"], capture_output=True, check=False).returncode
        ):
            return command
    return []


def write_keys(directory: Path) -> tuple[Path, Path]:
    """A private key, and its public one."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = directory / "key.pem", directory / "plant.pem"
    plain = serialization.NoEncryption()
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, plain)
    )
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))
    return private, public


def edge(*args: str | Path, home: Path) -> str:
    done = run_edge(*map(str, args), home=home)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_was_exported_serves_again_on_a_machine_without_a_network(tmp_path: Path) -> None:
    island = in_an_empty_network()
    private, public = write_keys(tmp_path)
    builder, device = tmp_path / "builder", tmp_path / "device"
    edge("export", DEFAULT_MODEL, "-o", tmp_path / "unsigned.tar", home=builder)
    edge("sign", DEFAULT_MODEL, "--key", private, home=builder)
    edge("export", DEFAULT_MODEL, "-o", tmp_path / "signed.tar", home=builder)
    shutil.rmtree(builder)
    edge("trust", "add", public, home=device)

    command = [*island, sys.executable, "-c", ISLAND, device, tmp_path / "unsigned.tar", tmp_path / "signed.tar"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    code, _, error = said["unsigned.tar"]
    assert (code, "it has no signature" in error) == (1, True)
    code, out, error = said["signed.tar"]
    assert code == 0, error
    assert [model["ref"] for model in json.loads(out)["models"]] == [DEFAULT_MODEL]
    assert said["models"] == [DEFAULT_MODEL]
    assert said["answer"].strip()
    if not island:
        pytest.skip("it serves, but that it needs no network takes unshare and the right to make a network namespace")
    assert said["route"] == "Network is unreachable"
