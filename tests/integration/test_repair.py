"""A flipped bit in the stored default model: found, quarantined, mended by fetching what is wrong and no more, from
another appliance, a web server and memory; and an engine never goes on with wrong weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge.access.audit import read_lines
from edge.access.keys import Keys, Limits
from edge.config import Settings
from edge.errors import Quarantined
from edge.store.chunks import CHUNK_BYTES
from edge.store.models import ModelStore, StoredModel
from edge.store.repair import MemorySource
from edge.store.scrub import Piece
from edge.store.transfer import Control
from runtime.pool import Pool
from runtime.upkeep import Upkeep
from tests.edge.file_server import ServedFile, serve
from tests.support import (
    DEFAULT_MODEL,
    SEED,
    RunningAppliance,
    chat_body,
    run_edge,
    running_appliance,
    wait_until,
)

AT = 50_000_001
MOST_BYTES = 8 << 20


def own_store(home: Path) -> ModelStore:
    """A store with a file of its own: those of the seed are shared by hard links, and damage would be too."""
    store = ModelStore(home / "store", seed=SEED)
    for ref in store.refs():
        if str(ref) != DEFAULT_MODEL:
            store.remove(ref)
    store.collect()
    weights = store.get(DEFAULT_MODEL).weights
    shutil.copyfile(weights, weights.with_suffix(".own")).replace(weights)
    return store


def flip(model: StoredModel, at: int = AT) -> None:
    with model.weights.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


@pytest.fixture
def store(home: Path) -> ModelStore:
    return own_store(home)


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAppliance]:
    """Another appliance that has the model, and asks for keys."""
    with running_appliance(tmp_path_factory.mktemp("peer"), "--require-keys", "on") as running:
        yield running


@pytest.fixture(scope="module")
def key(peer: RunningAppliance) -> str:
    _, key = Keys(peer.home / "state.db", actor="test").create(Limits(scopes=frozenset({"fetch"})))
    return key


@pytest.fixture
def known_peer(home: Path, peer: RunningAppliance, key: str) -> str:
    """The peer, with its key where registries' passwords are kept."""
    host = f"127.0.0.1:{peer.port}"
    home.mkdir(exist_ok=True)
    path = home / "registry-auth.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps({"auths": {host: {"username": "edge", "password": key}}}))
    return host


def sent_bytes(peer: RunningAppliance) -> int:
    """What the peer says that it sent."""
    _, key = Keys(peer.home / "state.db", actor="test").create(Limits(scopes=frozenset({"view"})))
    with peer.client(headers={"authorization": f"Bearer {key}"}) as http:
        (line,) = re.findall(r"^edge_store_sent\S* (\S+)$", http.get("/metrics").text, re.MULTILINE)
    return int(float(line))


def verified(home: Path, *args: str, peers: str = "") -> tuple[int, list[dict[str, Any]]]:
    """`edge verify` without a seed to mend from."""
    ran = run_edge("verify", DEFAULT_MODEL, "--json", *args, home=home, EDGE_SEED=str(home / "none"), EDGE_PEERS=peers)
    return ran.returncode, json.loads(ran.stdout)


def acts(home: Path) -> list[tuple[str, str]]:
    return [(line.act.act, line.act.target) for line in read_lines(home / "state.db")]


def test_a_flipped_bit_is_mended_from_a_peer(
    home: Path, store: ModelStore, peer: RunningAppliance, known_peer: str
) -> None:
    model = store.get(DEFAULT_MODEL)
    flip(model)
    code, [found] = verified(home)
    start = AT // CHUNK_BYTES * CHUNK_BYTES
    assert (code, found["is_good"]) == (1, False)
    (bad,) = [file for file in found["files"] if not file["is_good"]]
    assert bad["damaged"] == [{"start": start, "stop": start + CHUNK_BYTES}]
    with pytest.raises(Quarantined):
        store.get(DEFAULT_MODEL)
    before = sent_bytes(peer)
    nowhere = run_edge("verify", DEFAULT_MODEL, "--repair", home=home, EDGE_SEED=str(home / "none"))
    assert (nowhere.returncode, "cannot be had" in nowhere.stdout) == (1, False)
    assert "not repaired: its bytes" in nowhere.stdout
    code, [found] = verified(home, "--repair", peers=known_peer)
    assert (code, found["is_good"]) == (0, True)
    sent = sent_bytes(peer) - before
    assert 0 < sent <= MOST_BYTES
    repaired = [file["repaired"] for file in found["files"] if file["repaired"]]
    assert repaired == [{"bytes": sent, "from": [f"oci://{known_peer}/smollm2"]}]
    assert store.get(DEFAULT_MODEL).digest == model.digest
    assert [act for act, _ in acts(home)] == ["model.damage", "model.repair"]


def test_a_flipped_bit_is_mended_from_a_web_server(home: Path, store: ModelStore) -> None:
    model = store.get(DEFAULT_MODEL)
    data = model.weights.read_bytes()
    flip(model)
    with serve({"/m.gguf": ServedFile(data)}) as server:
        code, [found] = verified(home, "--repair", "--from", f"{server.url}/m.gguf")
        assert (code, found["is_good"]) == (0, True)
        assert 0 < server.total_sent() <= MOST_BYTES
    assert model.weights.read_bytes() == data


def test_a_flipped_bit_is_mended_from_another_directory_of_the_machine(home: Path, store: ModelStore) -> None:
    flip(store.get(DEFAULT_MODEL))
    ran = run_edge("verify", DEFAULT_MODEL, "--repair", home=home)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"repaired: 4.2 MB from {SEED}" in ran.stdout


def test_help_and_wrong_use(home: Path) -> None:
    assert "--from" in run_edge("verify", "--help", home=home).stdout
    assert run_edge("verify", "--from", "oci://a", home=home).returncode == 2


# ---------------------------------------------------------------- while it serves


def answer_of(http: httpx.Client) -> str:
    reply = http.post("/v1/chat/completions", json=chat_body("Name three colours."))
    reply.raise_for_status()
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text


def metric(http: httpx.Client, name: str) -> float:
    (line,) = re.findall(rf"^{name}\S* (\S+)$", http.get("/metrics").text, re.MULTILINE)
    return float(line)


def test_an_appliance_finds_and_mends_it_by_itself(
    home: Path, store: ModelStore, peer: RunningAppliance, known_peer: str
) -> None:
    model, before = store.get(DEFAULT_MODEL), sent_bytes(peer)
    data = model.weights.read_bytes()
    quick = {"EDGE_SCRUB_DAYS": "0.000001", "EDGE_SEED": str(home / "none"), "EDGE_PEERS": known_peer}
    with running_appliance(home, **quick) as appliance, appliance.client() as http:
        expected = answer_of(http)
        (worker,) = appliance.worker_pids()
        flip(model)
        wait_until(lambda: "model.repair" in [act for act, _ in acts(home)], what="the repair")
        assert answer_of(http) == expected
        assert worker not in appliance.worker_pids(), "the engine had the wrong bytes in memory, so it had to go"
        assert model.weights.read_bytes() == data
        assert not store.quarantined()
        assert metric(http, "edge_store_damaged") == 0
        assert metric(http, "edge_store_checked") > 0
    assert 0 < sent_bytes(peer) - before <= MOST_BYTES
    (damage, mended) = [(act, target) for act, target in acts(home) if act.startswith("model.")]
    assert (damage[0], mended[0]) == ("model.damage", "model.repair")
    assert f"oci://{known_peer}" in mended[1]


def test_what_cannot_be_mended_is_refused_and_said(home: Path, store: ModelStore) -> None:
    model = store.get(DEFAULT_MODEL)
    none = str(home / "none")
    with running_appliance(home, EDGE_SCRUB_DAYS="0", EDGE_SEED=none) as appliance, appliance.client() as http:
        answer_of(http)
        flip(model)
        assert run_edge("verify", DEFAULT_MODEL, home=home, EDGE_SEED=none).returncode == 1
        wait_until(lambda: not appliance.worker_pids(), what="the end of the engine")
        reply = http.post("/v1/chat/completions", json=chat_body("Hi"))
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "quarantined")
        assert not list((home / "states").glob(f"{model.weights.name[:16]}-*"))
        alerts = http.get("/edge/v1/status").json()["alerts"]
        (alert,) = [a for a in alerts if DEFAULT_MODEL in a["what"]]
        assert (alert["level"], alert["fix"]) == ("critical", f"edge verify {DEFAULT_MODEL} --repair")
        flip(model)
        assert run_edge("verify", "--repair", home=home, EDGE_SEED=none).returncode == 0
        assert answer_of(http)


async def test_where_memory_is_right_it_is_written_back_and_the_engine_stays(
    home: Path, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = store.get(DEFAULT_MODEL)
    data = model.weights.read_bytes()

    def remembered(self: MemorySource, piece: Piece, control: Control) -> bytes:
        return data[piece.start : piece.stop]  # no test can change a disk under what the kernel holds of it

    settings = Settings(home=home, seed=home / "none", scrub_days=0.0, context_tokens=1024)
    pool = Pool(settings, store)
    told: list[str] = []

    async def tell(act: str, target: str, outcome: str) -> None:
        told.append(f"{act} {target}")

    upkeep = Upkeep(settings, store, pool, tell)
    try:
        host = await pool.ready(DEFAULT_MODEL)
        pid = host.pid
        flip(model)
        monkeypatch.setattr(MemorySource, "fetch", remembered)
        store.quarantine(model.files[0].digest, "its bytes are not those that came")
        await upkeep.tend()
        assert told == [f"model.repair {DEFAULT_MODEL} from memory"]
        assert (host.state, host.pid) == ("ready", pid)
        assert model.weights.read_bytes() == data
        assert not store.quarantined()
        assert upkeep.alerts() == []
    finally:
        await upkeep.close()
        await pool.close()
