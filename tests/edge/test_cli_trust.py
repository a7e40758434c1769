"""`edge sign`, `edge trust`, and what `edge show` tells of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from edge.cli.main import main
from edge.store.models import ModelStore, PackageFile
from edge.trust.policy import SBOM_TYPE
from tests.edge.store_support import add_model, write_gguf
from tests.edge.trust_support import Pair, make_holder, make_pair


class Ran:
    """What a command did."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *args: str) -> None:
        with pytest.raises(SystemExit) as ended:
            main(args)
        self.code = ended.value.code
        self.out, self.err = capsys.readouterr()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EDGE_SEED", str(tmp_path / "no-seed"))
    monkeypatch.setenv("EDGE_TRUSTED_KEYS", str(tmp_path / "installed"))
    add_model(ModelStore(tmp_path / "home" / "store"), "tiny:f32", write_gguf(tmp_path / "tiny.gguf"))
    return tmp_path / "home"


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return make_pair(tmp_path, "plant")


def test_sign_trust_show_revoke(home: Path, pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    assert "signature    none" in Ran(capsys, "show", "tiny").out
    signed = json.loads(Ran(capsys, "sign", "tiny", "--key", str(pair.private), "--json").out)
    assert (signed["ref"], signed["release"]) == ("tiny:f32", 1)
    assert "NOT TRUSTED: nobody here trusts the key" in Ran(capsys, "show", "tiny").out
    added = Ran(capsys, "trust", "add", str(pair.public))
    assert added.out.startswith("plant is trusted: key ")
    assert "good, release 1, by plant" in Ran(capsys, "show", "tiny").out
    assert Ran(capsys, "sign", "tiny", "--key", str(pair.private)).out == "tiny:f32 is signed as release 2\n"
    shown = json.loads(Ran(capsys, "show", "tiny", "--json").out)["signature"]
    assert (shown["state"], shown["release"], shown["key_name"]) == ("trusted", 2, "plant")
    assert shown["sbom"] == signed["sbom"]
    assert "plant" in Ran(capsys, "trust", "list").out
    revoked = Ran(capsys, "trust", "revoke", "plant", "--reason", "stolen")
    assert revoked.out == f"revoked {shown['key_id']}\n"
    assert "is revoked (stolen)" in Ran(capsys, "show", "tiny").out
    listed = json.loads(Ran(capsys, "trust", "list", "--json").out)
    assert [(key["name"], key["is_revoked"]) for key in listed["keys"]] == [("plant", True)]
    assert listed["revoked"] == [{"subject": shown["key_id"], "reason": "stolen"}]
    assert Ran(capsys, "trust", "remove", "plant").code == 0
    assert Ran(capsys, "trust", "remove", "plant").code == 3
    acts = [line["act"] for line in json.loads(Ran(capsys, "audit", "show", "--json").out)["lines"]]
    assert acts == ["model.sign", "trust.add", "model.sign", "trust.revoke", "trust.remove"]


def test_show_prints_the_bill_of_materials(home: Path, pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    missing = Ran(capsys, "show", "tiny", "--sbom")
    assert (missing.code, missing.out) == (3, "")
    assert "edge sign" in missing.err
    Ran(capsys, "sign", "tiny", "--key", str(pair.private))
    assert json.loads(Ran(capsys, "show", "tiny", "--sbom").out)["bomFormat"] == "CycloneDX"


def test_only_the_signed_bill_of_materials_is_shown(
    home: Path, tmp_path: Path, pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ModelStore(home / "store")
    other = tmp_path / "other.json"
    other.write_text('{"bomFormat": "other"}')
    Ran(capsys, "sign", "tiny", "--key", str(pair.private))
    unknown = Ran(capsys, "show", "tiny", "--sbom")
    assert "not one that a trusted key signed" in unknown.err
    Ran(capsys, "trust", "add", str(pair.public))
    shown = Ran(capsys, "show", "tiny", "--sbom")
    assert (json.loads(shown.out)["bomFormat"], shown.err) == ("CycloneDX", "")
    model = store.get("tiny")
    [signed] = store.referrers(model.digest, SBOM_TYPE)
    layer = store.read_referrer(signed).layers[0]
    store.attach(model.digest, SBOM_TYPE, [PackageFile(other, "sbom.cdx.json", SBOM_TYPE)])
    assert json.loads(Ran(capsys, "show", "tiny", "--sbom").out)["bomFormat"] == "CycloneDX"
    path = store.blobs.path(layer.digest)
    path.chmod(0o644)
    path.write_bytes(b" " * layer.size)
    damaged = Ran(capsys, "show", "tiny", "--sbom")
    assert (damaged.out, "is damaged" in damaged.err) == ("", True)


def test_a_pull_that_cannot_be_signed_is_refused_under_enforce(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGE_TRUST", "enforce")
    ran = Ran(capsys, "pull", str(tmp_path / "tiny.gguf"), "--name", "other")
    assert ran.code == 1
    assert "only packages carry signatures" in ran.err
    assert "edge import" in ran.err
    monkeypatch.setenv("EDGE_TRUST", "sometimes")
    assert "trust must be off, warn or enforce" in Ran(capsys, "list").err


def test_signing_with_a_certificate(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_holder(tmp_path, "root", is_authority=True)
    leaf = make_holder(tmp_path, "leaf", by=root)
    args = ["sign", "tiny", "--key", str(leaf.pair.private), "--certificate", str(leaf.path)]
    assert Ran(capsys, *args, "--chain", str(root.path), "--release", "9").code == 0
    assert "is trusted: authority" in Ran(capsys, "trust", "add", str(root.path), "--name", "plant-ca").out
    assert "good, release 9, by plant-ca" in Ran(capsys, "show", "tiny").out
    assert Ran(capsys, "sign", "tiny", "--key", str(leaf.pair.private), "--chain", str(root.path)).code == 2


def test_a_key_that_needs_a_password_asks_or_says_so(
    home: Path, pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    locked = BestAvailableEncryption(b"secret")
    pair.private.write_bytes(pair.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked))
    ran = Ran(capsys, "sign", "tiny", "--key", str(pair.private))
    assert (ran.code, ran.out) == (2, "")
    assert "is encrypted, and nobody is at a terminal" in ran.err
    assert "no key is trusted" in Ran(capsys, "trust", "list").err
