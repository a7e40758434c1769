"""The real image, built and run: `make images-test`. Needs buildah, mmdebstrap and podman with runc, and root."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from edge.cli.main import cli
from edge.config import load_settings
from edge.store.models import ModelStore
from images.seed import write_seed
from images.target import get_target

pytestmark = [pytest.mark.images, pytest.mark.timeout(3600)]

CPU = get_target("cpu-x86_64")
TAG = "localhost/slm-edge:cpu-x86_64"
USER = 10001
HEALTHY_WITHIN_S = 90.0
QUESTION = "Write the numbers from one to five."
# A builder in a container lacks CAP_SYS_RESOURCE, and podman asks for more than its own limit by default.
CONTAINERS_CONF = '[containers]\ndefault_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]\n'
GLOBAL = ("--runtime", "runc", "--cgroup-manager", "cgroupfs", "--events-backend", "file")
HARDENED = ("--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges", "--network", "none")


@pytest.fixture(scope="module", autouse=True)
def tools() -> None:
    for name in ("buildah", "podman", "runc", "mmdebstrap"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed; see docs/targets.md")
    if os.geteuid():
        pytest.skip("the test gives directories to the image's user, which needs root")


@dataclass(frozen=True, slots=True)
class Podman:
    """podman with what it needs on a machine without systemd and CAP_SYS_RESOURCE."""

    conf: Path

    def __call__(self, *arguments: str, check: bool = True, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "CONTAINERS_CONF": str(self.conf)}
        done = subprocess.run(
            ["podman", *GLOBAL, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=environment,
        )
        assert not check or done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Podman:
    conf = tmp_path_factory.mktemp("conf") / "containers.conf"
    conf.write_text(CONTAINERS_CONF)
    return Podman(conf)


@pytest.fixture(scope="module")
def built() -> dict[str, object]:
    """The image as `edge image build` makes it, and what the command says of it."""
    done = CliRunner().invoke(cli, ["image", "build", "cpu-x86_64", "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["image"] == TAG
    return result


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = load_settings(os.environ)
    path = tmp_path_factory.mktemp("seed") / "seed"
    write_seed(ModelStore(tmp_path_factory.mktemp("store"), seed=settings.seed), CPU.smoke_model, path)
    # pytest's directories are private to the user that runs it.
    for parent in path.parents:
        if parent.stat().st_mode & 0o077 == 0:
            parent.chmod(0o711)
    return path


@dataclass(frozen=True, slots=True)
class Running:
    """A container that serves, and its Unix socket on this side."""

    name: str
    socket: Path
    started: float


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    os.chown(path, USER, USER)
    return path


def start(podman: Podman, image: str, run_dir: Path, *options: str) -> Running:
    name = f"slm-edge-test-{uuid.uuid4().hex[:8]}"
    started = time.monotonic()
    volume = f"{run_dir}:/var/lib/slm-edge/run"
    podman("run", "--detach", "--name", name, *HARDENED, "--volume", volume, *options, image)
    return Running(name, run_dir / "edge.sock", started)


def stop(podman: Podman, running: Running) -> None:
    podman("rm", "--force", "--volumes", "--time", "20", running.name)


@pytest.fixture
def running(podman: Podman, built: dict[str, object], seed: Path, run_dir: Path) -> Iterator[Running]:
    mounted = f"{seed}:/usr/share/slm-edge/seed:ro"
    container = start(podman, str(built["image"]), run_dir, "--volume", mounted)
    yield container
    stop(podman, container)


def wait_healthy(podman: Podman, running: Running) -> None:
    """Run the image's own health check until it passes."""
    while True:
        done = podman("healthcheck", "run", running.name, check=False)
        if done.returncode == 0:
            return
        if time.monotonic() - running.started > HEALTHY_WITHIN_S:
            logs = podman("logs", running.name, check=False)
            pytest.fail(f"not healthy after {HEALTHY_WITHIN_S} s: {done.stdout}{done.stderr}{logs.stdout}{logs.stderr}")
        time.sleep(0.2)


def ask(running: Running, prompt: str) -> str:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(running.socket)), timeout=120) as client:
        answer = client.post(
            "http://edge/v1/chat/completions",
            json={
                "model": CPU.smoke_model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": 32,
                "temperature": 0,
            },
        )
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def test_it_turns_healthy_and_answers_on_its_socket(podman: Podman, running: Running) -> None:
    wait_healthy(podman, running)
    print(f"healthy {time.monotonic() - running.started:.1f} s after podman run")
    assert "1, 2, 3, 4, 5" in ask(running, QUESTION)


def wait_listening(running: Running) -> None:
    while True:
        # Not by httpx, which leaves the socket of a refused connection to the garbage collector.
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(str(running.socket))
            return
        assert time.monotonic() - running.started < HEALTHY_WITHIN_S
        time.sleep(0.01)


def first_token_s(running: Running) -> float:
    """Seconds from `podman run` to the first token over the socket, with loading the model in between."""
    wait_listening(running)
    question = {"model": CPU.smoke_model, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    with (
        httpx.Client(transport=httpx.HTTPTransport(uds=str(running.socket)), timeout=120) as client,
        client.stream("POST", "http://edge/v1/chat/completions", json=question) as answer,
    ):
        next(line for line in answer.iter_lines() if '"content":"' in line and '"content":""' not in line)
        return time.monotonic() - running.started


@pytest.mark.parametrize("case", ["empty volume", "second start"])
def test_cold_start(podman: Podman, built: dict[str, object], seed: Path, run_dir: Path, case: str) -> None:
    volume = f"slm-edge-test-{uuid.uuid4().hex[:8]}"
    options = ("--volume", f"{seed}:/usr/share/slm-edge/seed:ro", "--volume", f"{volume}:/var/lib/slm-edge")
    taken: list[float] = []
    for _ in range(1 if case == "empty volume" else 4):
        container = start(podman, TAG, run_dir, *options)
        taken.append(first_token_s(container))
        stop(podman, container)
    podman("volume", "rm", volume)
    print(f"cold start to the first token, {case}: {', '.join(f'{s:.2f}' for s in taken[-3:])} s")
    assert taken[-1] < 30


def test_it_is_read_only_unprivileged_and_alone(podman: Podman, running: Running) -> None:
    wait_healthy(podman, running)
    script = "id -u; touch /opt/x 2>&1; grep CapEff /proc/self/status; ls /sys/class/net; cat /proc/1/status"
    said = podman("exec", running.name, "sh", "-c", script).stdout
    assert said.splitlines()[0] == str(USER)
    assert "Read-only file system" in said
    assert "CapEff:\t0000000000000000" in said
    assert "\nlo\n" in said
    assert "\neth0\n" not in said
    assert f"Uid:\t{USER}" in said


def test_it_stops_cleanly_when_told(podman: Podman, running: Running) -> None:
    wait_healthy(podman, running)
    podman("stop", "--time", "30", running.name)
    assert podman("inspect", "--format", "{{.State.ExitCode}}", running.name).stdout.strip() == "0"


def test_without_the_socket_it_is_ill(podman: Podman, running: Running) -> None:
    wait_healthy(podman, running)
    running.socket.unlink()
    done = podman("healthcheck", "run", running.name, check=False)
    assert done.returncode != 0


def test_a_baked_model_needs_no_mount(podman: Podman, built: dict[str, object], run_dir: Path) -> None:
    tag = "localhost/slm-edge:images-test-baked"
    command = ["image", "build", "cpu-x86_64", "--model", CPU.smoke_model, "--tag", tag, "--json"]
    done = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["model"] == CPU.smoke_model
    container = start(podman, tag, run_dir)
    try:
        wait_healthy(podman, container)
        assert "1, 2, 3, 4, 5" in ask(container, QUESTION)
    finally:
        stop(podman, container)
        podman("rmi", tag)


def in_image(podman: Podman, script: str) -> str:
    return podman(
        "run", "--rm", *HARDENED, "--user", "0", "--workdir", "/", "--entrypoint", "sh", TAG, "-c", script
    ).stdout


def test_nothing_that_builds_is_in_it(podman: Podman, built: dict[str, object]) -> None:
    absent = "gcc g++ cc c++ ld as make cmake ninja pip pip3 git curl wget"
    assert in_image(podman, f"for tool in {absent}; do command -v $tool; done; true") == ""
    assert in_image(podman, "find / -xdev '(' -name '*.a' -o -name pip -o -name torch ')'") == ""


def test_it_tells_nothing_of_the_machine_that_built_it(podman: Podman, built: dict[str, object]) -> None:
    left = "ls -A /mnt /var/lib/apt/lists; cat /etc/apt/sources.list.d/*; find / -xdev -name pip.conf"
    assert in_image(podman, left).split() == ["/mnt:", "/var/lib/apt/lists:"]
    history = podman("image", "inspect", TAG).stdout
    assert "://" not in history
    assert "slm-edge-build" not in history


def test_the_image_says_what_it_is(podman: Podman, built: dict[str, object]) -> None:
    (described,) = json.loads(podman("image", "inspect", TAG).stdout)
    labels = described["Labels"]
    assert labels["dev.slm-edge.target"] == "cpu-x86_64"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert described["User"] == "10001:10001"
    assert described["HealthCheck" if "HealthCheck" in described else "Healthcheck"]["Test"][0] == "CMD"
    assert list(described["Config"]["Volumes"]) == ["/var/lib/slm-edge"]


def test_the_best_variant_for_this_processor_runs(podman: Podman, built: dict[str, object]) -> None:
    check = "from edge.native.llama import build_info; print(build_info())"
    said = podman("run", "--rm", *HARDENED, "--entrypoint", "python", TAG, "-c", check).stdout
    flags = Path("/proc/cpuinfo").read_text().split()
    for flag, feature in (("avx2", "AVX2 = 1"), ("avx512_vnni", "AVX512_VNNI = 1"), ("avx512_bf16", "AVX512_BF16 = 1")):
        assert (flag in flags) == (feature in said), said


def test_it_is_within_its_size_budget(built: dict[str, object]) -> None:
    compressed = built["compressed_bytes"]
    assert isinstance(compressed, int)
    print(f"compressed {compressed / 1e6:.1f} MB, unpacked {built['size_bytes']} bytes, {built['seconds']}")
    assert compressed < CPU.max_compressed_mb * 1_000_000
