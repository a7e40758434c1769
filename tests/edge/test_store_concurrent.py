"""Several processes at one store: no reader sees half a state, no writer undoes another's work."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from edge.errors import ModelNotFound
from edge.store.manifest import Index, decode
from edge.store.models import ModelStore
from tests.edge.store_support import add_model, assert_sound, write_gguf

_WRITER = """
import random, sys
from pathlib import Path
from edge.errors import ModelNotFound
from edge.store.models import ModelStore
from tests.edge.store_support import add_model
root, gguf, number, rounds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
rng, store = random.Random(number), ModelStore(root)
for turn in range(rounds):
    name = f"shared:{rng.randrange(3)}"
    if rng.random() < 0.6:
        add_model(store, name, gguf)
    else:
        try:
            store.remove(name)
        except ModelNotFound:
            pass
        store.collect()
    add_model(store, f"own-{number}:{turn}", gguf)
"""


def test_writers_and_readers_at_once(tmp_path: Path) -> None:
    root, rounds = tmp_path / "store", 25
    ggufs = [write_gguf(tmp_path / f"{number}.gguf", fill=bytes([number + 1])) for number in range(2)]
    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITER, root, gguf, str(number), str(rounds)])
        for number, gguf in enumerate(ggufs)
    ]
    reads = 0
    deadline = time.monotonic() + 60
    try:
        while any(writer.poll() is None for writer in writers):
            assert time.monotonic() < deadline
            store = ModelStore(root)
            assert store.damaged() == []
            for model in store.list():
                try:
                    assert all(check.is_good for check in store.verify(model.ref))
                except ModelNotFound:
                    continue  # removed since
            if (root / "index.json").exists():
                decode((root / "index.json").read_bytes(), Index, what="index")
                reads += 1
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert [writer.returncode for writer in writers] == [0, 0]
    assert reads > 5
    names = {str(model.ref) for model in assert_sound(root)}
    assert {f"own-{number}:{turn}" for number in range(2) for turn in range(rounds)} <= names


PLAYERS = 2


@pytest.mark.parametrize("seconds", [6, pytest.param(300, marks=[pytest.mark.soak, pytest.mark.timeout(500)])])
def test_processes_that_pull_remove_collect_and_load_at_random(tmp_path: Path, seconds: int) -> None:
    root = tmp_path / "store"
    rows = {b"\x01": 4, b"\x02": 400, b"\x03": 20_000}  # the last has more than one piece
    files = [write_gguf(tmp_path / f"{fill.hex()}.gguf", num_rows=num, fill=fill) for fill, num in rows.items()]
    command = [sys.executable, "-m", "tests.edge.store_player", str(root)]
    players = [
        subprocess.Popen([*command, str(number), str(seconds), *map(str, files)], stdout=subprocess.PIPE)
        for number in range(PLAYERS)
    ]
    try:
        outputs = [player.communicate(timeout=seconds + 60)[0] for player in players]
    finally:
        for player in players:
            player.kill()
            player.wait()
    assert [player.returncode for player in players] == [0] * PLAYERS
    done = sum((Counter(msgspec.json.decode(output, type=dict[str, int])) for output in outputs), Counter[str]())
    print(dict(done))
    assert all(done[act] >= 5 for act in ("pull", "remove", "collect", "load", "unload", "activate", "attach", "read"))
    assert_sound(root)
    store = ModelStore(root)
    store.write_slots(lambda _: {})
    for ref in store.refs():
        store.remove(ref)
    store.collect(partial_age_s=0)
    assert list(store.blobs.digests()) == []
    left = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert left == {"oci-layout", "index.json", "lock", "room.lock", "reserve", "slots.json"}


def test_two_that_seed_at_once_agree(tmp_path: Path) -> None:
    seed = ModelStore(tmp_path / "seed")
    add_model(seed, "tiny", write_gguf(tmp_path / "a.gguf"))
    code = "import sys; from pathlib import Path; from edge.store.models import ModelStore\n"
    code += "print(len(ModelStore(Path(sys.argv[1]), seed=Path(sys.argv[2])).list()))"
    command = [sys.executable, "-c", code, str(tmp_path / "store"), str(seed.root)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate(timeout=60)[0] for process in started] == [b"1\n"] * 3
    assert_sound(tmp_path / "store")
