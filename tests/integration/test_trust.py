"""An appliance that insists on signatures."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from edge.errors import Unsigned
from edge.formats.gguf import read_gguf
from edge.store.details import ModelDetails
from edge.store.fetch import pull
from edge.store.models import ModelStore, PackageFile
from edge.trust.keys import TrustFiles
from quantize.signing import SigningKey, sign_model
from runtime.pool import Pool
from tests.adapters import make_lora
from tests.edge.trust_support import make_pair, settings_at
from tests.support import DEFAULT_MODEL, SEED, chat_body, run_edge, running_appliance


def edge(home: Path, *args: str) -> str:
    ran = run_edge(*args, home=home)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_an_appliance_serves_what_is_signed_and_nothing_else(tmp_path: Path) -> None:
    home, pair = tmp_path / "home", make_pair(tmp_path, "plant")
    with running_appliance(home, EDGE_TRUST="enforce", EDGE_PRELOAD="auto") as appliance:
        url = f"{appliance.url}/v1/chat/completions"

        def ask() -> httpx.Response:
            return httpx.post(url, json=chat_body("Hi", max_tokens=2), timeout=60, trust_env=False)

        for _ in range(2):  # the worker that waited for the load is let go of once
            refused = ask()
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "unsigned")
        edge(home, "trust", "add", str(pair.public))
        edge(home, "sign", DEFAULT_MODEL, "--key", str(pair.private), "--release", "3")
        assert ask().status_code == 200
        listed = json.loads(edge(home, "trust", "list", "--json"))
        assert listed["releases"] == {DEFAULT_MODEL: 3}
        assert ask().status_code == 200

        edge(home, "trust", "revoke", "plant", "--reason", "stolen")
        assert ask().status_code == 200, "what runs goes on"
        edge(home, "unload", DEFAULT_MODEL, "--url", appliance.url)
        refused = ask()
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "key_revoked")
        assert "stolen" in refused.json()["error"]["message"]


def test_a_byte_changed_on_the_disk_is_not_loaded(tmp_path: Path) -> None:
    home, pair = tmp_path / "home", make_pair(tmp_path, "plant")
    edge(home, "trust", "add", str(pair.public))
    edge(home, "sign", DEFAULT_MODEL, "--key", str(pair.private))
    model = ModelStore(home / "store").get(DEFAULT_MODEL)
    data = bytearray(model.weights.read_bytes())
    data[50_000_000] ^= 1
    model.weights.unlink()  # it may be a hard link to the seed's
    model.weights.write_bytes(data)
    with running_appliance(home, EDGE_TRUST="enforce") as appliance:
        url = f"{appliance.url}/v1/chat/completions"
        refused = httpx.post(url, json=chat_body("Hi", max_tokens=2), timeout=60, trust_env=False)
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "digest_mismatch")


async def test_neither_a_draft_nor_an_adapter_comes_in_behind_a_signed_model(tmp_path: Path) -> None:
    settings = settings_at(tmp_path / "home")
    store, pair = ModelStore(settings.store_dir, seed=SEED), make_pair(tmp_path, "plant")
    weights = store.get(DEFAULT_MODEL).weights
    store.add("guess:x", [PackageFile(weights, "model.gguf")], ModelDetails())
    store.set_draft(DEFAULT_MODEL, "guess:x")
    pull(store, str(make_lora(tmp_path / "polite.gguf", read_gguf(weights), seed=1)), name="polite")
    TrustFiles.of(settings).add(pair.public)
    sign_model(store, DEFAULT_MODEL, SigningKey(pair.private), release=1)
    pool = Pool(settings, store)
    try:
        load = await (await pool.host(DEFAULT_MODEL)).plan()
        assert load.draft_path == ""
        assert "it has no signature" in load.draft_problem
        with pytest.raises(Unsigned, match="polite"):
            await pool.select(f"{DEFAULT_MODEL}+polite", ())
        sign_model(store, "guess:x", SigningKey(pair.private), release=1)
        sign_model(store, "polite", SigningKey(pair.private), release=1)
        assert (await (await pool.host(DEFAULT_MODEL)).plan()).draft_path
        assert (await pool.select(f"{DEFAULT_MODEL}+polite", ())).adapters
    finally:
        await pool.close()
