"""The trust policy: what was tampered with is refused, each with its own message."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from edge.config import Settings
from edge.errors import (
    ConfigError,
    DigestMismatch,
    EdgeError,
    KeyNotFound,
    KeyNotTrusted,
    KeyRevoked,
    ReleaseRevoked,
    ReleaseTooOld,
    SignatureInvalid,
    SignatureMismatch,
    SignedForOtherName,
    Unsigned,
    Untrusted,
)
from edge.formats.gguf import read_gguf
from edge.store.details import details_of
from edge.store.digest import Digest
from edge.store.models import ModelStore, PackageFile, StoredModel
from edge.trust.gate import LoadGate
from edge.trust.keys import TrustFiles
from edge.trust.policy import SIGNATURE_TYPE, admit, check_source, confirm, insist
from quantize.signing import SigningKey, sign_model
from tests.edge.store_support import write_gguf
from tests.edge.trust_support import Pair, make_holder, make_pair, settings_at

NAME = "tiny:q8"


class Plant:
    """A builder's store, the keys, and a device that trusts one of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = ModelStore(root / "store")
        self.pair = make_pair(root, "plant")
        self.settings = settings_at(root / "home")
        self.trust = TrustFiles.of(self.settings)
        self.trust.add(self.pair.public)

    def add(self, name: str = NAME, *, fill: bytes = b"\x01", more: Mapping[str, str] | None = None) -> StoredModel:
        gguf = write_gguf(self.root / "model.gguf", fill=fill)
        files = [PackageFile(gguf, "model.gguf")]
        for file_name, text in (more or {}).items():
            path = self.root / file_name
            path.write_text(text)
            files.append(PackageFile(path, file_name))
        return self.store.add(name, files, details_of(read_gguf(gguf)))

    def sign(self, name: str = NAME, *, release: int = 1, pair: Pair | None = None) -> StoredModel:
        return sign_model(self.store, name, SigningKey((pair or self.pair).private), release=release)

    def signature_of(self, model: StoredModel) -> bytes:
        found = self.store.read_referrer(self.store.referrers(model.digest, SIGNATURE_TYPE)[0])
        return self.store.blobs.path(found.layers[0].digest).read_bytes()

    def attach(self, model: StoredModel, signature: bytes) -> StoredModel:
        """Attach somebody's signature, as who serves packages can."""
        path = self.root / "model.sig"
        path.write_bytes(signature)
        self.store.attach(model.digest, SIGNATURE_TYPE, [PackageFile(path, "model.sig", SIGNATURE_TYPE)])
        return model

    def admit(self, model: StoredModel, *, force: bool = False, trust: str = "enforce") -> object:
        return admit(self.store, model.digest, model.ref, replace(self.settings, trust=trust), force=force)

    def refusal(self, model: StoredModel) -> Untrusted:
        with pytest.raises(Untrusted) as caught:
            self.admit(model)
        return caught.value


@pytest.fixture
def plant(tmp_path: Path) -> Plant:
    return Plant(tmp_path)


def test_a_signed_model_is_admitted_with_its_release_and_key(plant: Plant) -> None:
    plant.add(more={"LICENSE": "MIT"})
    model = plant.sign(release=7)
    verdict = admit(plant.store, model.digest, model.ref, plant.settings)
    [key] = plant.trust.load().keys
    assert (verdict.state, verdict.reason, verdict.release) == ("trusted", "", 7)
    assert (verdict.key_id, verdict.key_name, verdict.name) == (key.id, "plant", NAME)


# ---------------------------------------------------------------- tampering


def a_byte_of_the_weights(plant: Plant) -> StoredModel:
    signature = plant.signature_of(signed(plant))
    return plant.attach(plant.add(fill=b"\x02"), signature)


def an_extra_file(plant: Plant) -> StoredModel:
    signature = plant.signature_of(signed(plant))
    return plant.attach(plant.add(more={"evil.jinja": "{{ 1 }}"}), signature)


def a_missing_file(plant: Plant) -> StoredModel:
    plant.add(more={"LICENSE": "MIT"})
    signature = plant.signature_of(plant.sign())
    return plant.attach(plant.add(), signature)


def the_manifest(plant: Plant) -> StoredModel:
    """Its files stay, and it answers otherwise: another system prompt."""
    signature = plant.signature_of(signed(plant))
    gguf = plant.root / "model.gguf"
    details = replace(details_of(read_gguf(gguf)), system="Say that all is well.")
    return plant.attach(plant.store.add(NAME, [PackageFile(gguf, "model.gguf")], details), signature)


def a_swapped_tag(plant: Plant) -> StoredModel:
    plant.add("tiny:old", fill=b"\x03")
    plant.sign("tiny:old", release=9)
    return plant.store.copy("tiny:old", NAME)


def an_old_release(plant: Plant) -> StoredModel:
    plant.trust.confirm(NAME, 8)
    plant.add()
    return plant.sign(release=7)


def a_wrong_key(plant: Plant) -> StoredModel:
    plant.add()
    return plant.sign(pair=make_pair(plant.root, "stranger"))


def a_revoked_key(plant: Plant) -> StoredModel:
    plant.trust.revoke("plant", reason="the laptop was stolen")
    return signed(plant)


def a_revoked_key_that_was_removed(plant: Plant) -> StoredModel:
    plant.trust.revoke("plant")
    plant.trust.remove("plant")
    return signed(plant)


def a_revoked_release(plant: Plant) -> StoredModel:
    model = signed(plant)
    plant.trust.revoke(str(model.digest), reason="it lies")
    return model


def no_signature(plant: Plant) -> StoredModel:
    return plant.add()


def a_signature_that_is_none(plant: Plant) -> StoredModel:
    return plant.attach(plant.add(), b"{}")


def a_signature_with_a_changed_byte(plant: Plant) -> StoredModel:
    bundle = json.loads(plant.signature_of(signed(plant)))
    payload: str = bundle["dsseEnvelope"]["payload"]
    bundle["dsseEnvelope"]["payload"] = payload[:100] + chr(ord(payload[100]) ^ 1) + payload[101:]
    return plant.attach(plant.add(fill=b"\x04"), json.dumps(bundle).encode())


def a_signature_of_the_files_only(plant: Plant) -> StoredModel:
    """As model-signing makes it by itself: it says nothing of manifest, name and release."""
    model = plant.add()
    directory = plant.store.named_directory(model)
    signature = plant.root / "plain.sig"
    command = [sys.executable, "-m", "model_signing", "sign", "key", str(directory)]
    command += ["--private_key", str(plant.pair.private), "--signature", str(signature)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return plant.attach(model, signature.read_bytes())


def signed(plant: Plant) -> StoredModel:
    plant.add()
    return plant.sign()


TAMPERED: Mapping[Callable[[Plant], StoredModel], tuple[type[Untrusted], str]] = {
    a_byte_of_the_weights: (SignatureMismatch, "the file 'model.gguf' is not the one that was signed"),
    an_extra_file: (SignatureMismatch, "the file 'evil.jinja' was added after it was signed"),
    a_missing_file: (SignatureMismatch, "the file 'LICENSE' was signed and is missing"),
    the_manifest: (SignatureMismatch, "its files are those that were signed, and its manifest is another"),
    a_signature_of_the_files_only: (SignatureMismatch, "the signature is for its files only"),
    a_swapped_tag: (SignedForOtherName, "it was signed as 'tiny:old'"),
    an_old_release: (ReleaseTooOld, "it is release 7, and release 8 of it was confirmed here"),
    a_wrong_key: (KeyNotTrusted, "nobody here trusts the key"),
    a_revoked_key: (KeyRevoked, "that signed it is revoked (the laptop was stolen)"),
    a_revoked_key_that_was_removed: (KeyRevoked, "that signed it is revoked"),
    a_revoked_release: (ReleaseRevoked, "this release of it is revoked (it lies)"),
    no_signature: (Unsigned, "it has no signature"),
    a_signature_that_is_none: (SignatureInvalid, "its signature cannot be read"),
    a_signature_with_a_changed_byte: (SignatureInvalid, "its signature is not good"),
}


@pytest.mark.parametrize("tamper", TAMPERED, ids=lambda f: f.__name__)
def test_under_enforce_each_tampering_is_refused_with_its_own_message(
    plant: Plant, tamper: Callable[[Plant], StoredModel]
) -> None:
    model = tamper(plant)
    error = plant.refusal(model)
    kind, words = TAMPERED[tamper]
    assert type(error) is kind
    assert words in error.message
    assert NAME in error.message
    assert error.hint
    with pytest.raises(Untrusted):  # and nothing loads it either
        LoadGate(plant.store, plant.settings).check(model)


def test_no_two_kinds_of_tampering_read_alike() -> None:
    assert len({words for _, words in TAMPERED.values()}) == len(TAMPERED)


@pytest.mark.parametrize("tamper", TAMPERED, ids=lambda f: f.__name__)
def test_warn_lets_it_in_and_says_so_and_off_does_not_look(
    plant: Plant, tamper: Callable[[Plant], StoredModel], caplog: pytest.LogCaptureFixture
) -> None:
    model = tamper(plant)
    has_keys = bool(plant.trust.load().keys)
    with caplog.at_level(logging.WARNING, "edge.trust"):
        verdict = admit(plant.store, model.digest, model.ref, replace(plant.settings, trust="warn"))
        assert verdict.state in ("unsigned", "untrusted")
        assert (TAMPERED[tamper][1] in caplog.text) == has_keys
        caplog.clear()
        assert admit(plant.store, model.digest, model.ref, replace(plant.settings, trust="off")).state == "off"
        assert not caplog.records


def test_without_any_key_nothing_is_said_about_models_that_nobody_signed(
    plant: Plant, caplog: pytest.LogCaptureFixture
) -> None:
    plant.trust.remove("plant")
    model = plant.add()
    assert admit(plant.store, model.digest, model.ref, replace(plant.settings, trust="warn")).state == "unsigned"
    assert not caplog.records


def test_a_byte_that_changed_on_the_disk_is_found_before_the_load(plant: Plant) -> None:
    model = signed(plant)
    gate = LoadGate(plant.store, plant.settings)
    assert gate.check(model).state == "trusted"
    data = bytearray(model.weights.read_bytes())
    data[-1] ^= 1
    model.weights.chmod(0o644)
    model.weights.write_bytes(data)
    with pytest.raises(DigestMismatch, match=r"model\.gguf of tiny:q8"):
        gate.check(model)
    with pytest.raises(DigestMismatch):
        LoadGate(plant.store, plant.settings).check(model)
    assert LoadGate(plant.store, replace(plant.settings, trust="warn")).check(model).state == "trusted"


def test_a_key_that_is_revoked_holds_for_the_next_load_of_a_running_appliance(plant: Plant) -> None:
    model = signed(plant)
    gate = LoadGate(plant.store, plant.settings)
    gate.check(model)
    plant.trust.revoke("plant")
    with pytest.raises(KeyRevoked):
        gate.check(model)


# ---------------------------------------------------------------- several signatures


def test_one_good_signature_among_others_is_enough(plant: Plant) -> None:
    plant.add()
    plant.sign(pair=make_pair(plant.root, "stranger"))
    revoked = make_pair(plant.root, "revoked")
    plant.trust.add(revoked.public)
    plant.trust.revoke("revoked")
    plant.sign(pair=revoked, release=3)
    model = plant.attach(plant.store.get(NAME), b"junk")
    assert isinstance(plant.refusal(model), KeyRevoked)
    plant.sign(release=2)
    assert plant.admit(model) == replace_release(plant, model, 2)


def replace_release(plant: Plant, model: StoredModel, release: int) -> object:
    verdict = admit(plant.store, model.digest, model.ref, plant.settings)
    assert verdict.release == release
    return verdict


def test_a_model_that_was_signed_again_has_the_higher_release(plant: Plant) -> None:
    plant.add()
    plant.sign(release=2)
    model = plant.sign(release=5)
    plant.sign(release=4)
    plant.trust.confirm(NAME, 5)
    replace_release(plant, model, 5)


# ---------------------------------------------------------------- releases


def test_what_served_sets_the_least_release_and_force_lowers_it(plant: Plant) -> None:
    plant.add(fill=b"\x01")
    old = plant.sign(release=3)
    kept = plant.store.copy(NAME, "keeps:it")
    plant.add(fill=b"\x02")
    new = plant.sign(release=4)
    assert kept.digest == old.digest
    confirm(plant.store, new.digest, plant.settings)
    confirm(plant.store, old.digest, plant.settings)  # untrusted now, so it lowers nothing
    assert isinstance(plant.refusal(old), ReleaseTooOld)
    plant.admit(new)
    plant.admit(old, force=True)
    assert isinstance(plant.refusal(old), ReleaseTooOld), "it has not come yet"
    insist(plant.store, old.digest, old.ref, plant.settings)
    plant.admit(old)
    confirm(plant.store, new.digest, plant.settings)
    assert isinstance(plant.refusal(old), ReleaseTooOld)


def test_force_helps_against_an_old_release_only(plant: Plant) -> None:
    plant.trust.confirm(NAME, 8)
    plant.add()
    plant.sign(release=7, pair=make_pair(plant.root, "stranger"))
    model = plant.store.get(NAME)
    for _ in range(2):
        with pytest.raises(KeyNotTrusted):
            plant.admit(model, force=True)
    assert plant.trust.load().releases == {NAME: 8}


def test_what_nobody_trusted_signed_confirms_nothing(plant: Plant) -> None:
    plant.add()
    model = plant.sign(release=9, pair=make_pair(plant.root, "stranger"))
    confirm(plant.store, model.digest, plant.settings)
    confirm(plant.store, model.digest, replace(plant.settings, trust="off"))
    assert plant.trust.load().releases == {}


def test_a_registry_may_put_something_before_the_name(plant: Plant) -> None:
    model = signed(plant)
    assert admit(plant.store, model.digest, f"plant-7/models/{NAME}", plant.settings).state == "trusted"
    assert admit(plant.store, model.digest, None, plant.settings).state == "trusted"
    for other in ("plant/other:q8", "xtiny:q8", "tiny:q4"):
        with pytest.raises(SignedForOtherName):
            admit(plant.store, model.digest, other, plant.settings)


def test_under_enforce_sources_that_carry_no_signature_are_refused_before_anything_is_fetched(plant: Plant) -> None:
    with pytest.raises(Unsigned, match="only packages carry signatures"):
        check_source("hf://a/b", plant.settings)
    check_source("oci://registry.plant/tiny:q8", plant.settings)
    check_source("hf://a/b", replace(plant.settings, trust="warn"))


# ---------------------------------------------------------------- certificates


def test_an_authority_vouches_for_its_signers_until_one_is_revoked(plant: Plant) -> None:
    root = make_holder(plant.root, "root", is_authority=True)
    anna, ben = (make_holder(plant.root, name, by=root) for name in ("anna", "ben"))
    plant.add()
    key = SigningKey(anna.pair.private, certificate=anna.path, chain=(root.path,))
    model = sign_model(plant.store, NAME, key, release=1)
    assert isinstance(plant.refusal(model), KeyNotTrusted)
    added = plant.trust.add(root.path, name="authority")
    verdict = admit(plant.store, model.digest, model.ref, plant.settings)
    assert (verdict.state, verdict.key_name, verdict.key_id) == ("trusted", "authority", added.id)
    plant.trust.revoke(str(ben.pair.public))
    plant.admit(model)
    plant.trust.revoke(str(anna.path), reason="she left")
    assert "(she left)" in plant.refusal(model).message
    assert isinstance(plant.refusal(model), KeyRevoked)


# ---------------------------------------------------------------- what is trusted, on the disk


def test_keys_come_with_the_installation_and_by_hand(plant: Plant) -> None:
    installed = plant.settings.trusted_keys
    installed.mkdir(parents=True)
    vendor = make_pair(plant.root, "vendor")
    shutil.copy(vendor.public, installed / "vendor.pem")
    assert [(k.name, k.is_installed) for k in plant.trust.load().keys] == [("vendor", True), ("plant", False)]
    plant.add()
    plant.admit(plant.sign(pair=vendor))
    with pytest.raises(ConfigError, match="came with the installation") as caught:
        plant.trust.remove("vendor")
    assert "edge trust revoke vendor" in str(caught.value.hint)
    plant.trust.revoke("vendor")
    assert isinstance(plant.refusal(plant.store.get(NAME)), KeyRevoked)
    assert plant.trust.remove("plant").name == "plant"
    with pytest.raises(KeyNotFound):
        plant.trust.remove("plant")


def test_a_removed_key_is_trusted_under_no_other_name(plant: Plant) -> None:
    model = signed(plant)
    plant.trust.add(plant.pair.public, name="second")
    installed = plant.settings.trusted_keys
    installed.mkdir(parents=True)
    shutil.copy(plant.pair.public, installed / "vendor.pem")
    for name in ("plant", "second", "vendor"):
        with pytest.raises(ConfigError, match="'vendor' came with the installation"):
            plant.trust.remove(name)
    (installed / "vendor.pem").unlink()
    assert plant.trust.remove("plant").name == "plant"
    assert plant.trust.load().keys == ()
    assert isinstance(plant.refusal(model), KeyNotTrusted)


def test_an_authority_and_its_bare_key_are_both_trusted(plant: Plant) -> None:
    root = make_holder(plant.root, "root", is_authority=True)
    leaf = make_holder(plant.root, "leaf", by=root)
    plant.trust.add(root.path, name="a-authority")
    plant.trust.add(root.pair.public, name="b-key")
    plant.add()
    plant.admit(plant.sign(pair=root.pair))
    plant.add(fill=b"\x05")
    key = SigningKey(leaf.pair.private, certificate=leaf.path, chain=(root.path,))
    plant.admit(sign_model(plant.store, NAME, key, release=2))


def test_a_confirmation_that_failed_is_tried_again_after_a_while(plant: Plant) -> None:
    now = [0.0]
    model, gate = signed(plant), LoadGate(plant.store, plant.settings, clock=lambda: now[0])
    broken = plant.settings.trust_dir / "releases.json"
    broken.write_text("{")
    with pytest.raises(ConfigError):
        gate.confirm(model)
    assert gate.is_confirmed(model), "not at each request"
    broken.unlink()
    now[0] = 61.0
    assert not gate.is_confirmed(model)
    gate.confirm(model)
    now[0] = 1e9
    assert gate.is_confirmed(model)
    assert plant.trust.load().releases == {NAME: 1}


def test_the_revocation_list_of_the_installation_holds_too(plant: Plant) -> None:
    model = signed(plant)
    plant.settings.trusted_keys.mkdir(parents=True)
    lines = f"# revoked in 2026\n\n{model.digest}   wrong   # ticket 7\n"
    (plant.settings.trusted_keys / "revoked.txt").write_text(lines)
    assert "this release of it is revoked (wrong)" in plant.refusal(model).message


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("revoked.txt", b"not-an-id why\n", "line 1: 'not-an-id' is neither"),
        ("revoked.txt", b"\xff\n", "is no text"),
        ("other.pem", b"-----BEGIN PUBLIC KEY-----\n", "is no key that can be trusted"),
        ("releases.json", b"{", "is damaged"),
        ("releases.json", b'{"version": 2, "releases": {}}', "a newer slm-edge"),
    ],
)
def test_what_is_trusted_fails_closed_when_it_cannot_be_read(
    plant: Plant, name: str, data: bytes, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = signed(plant)
    (plant.settings.trust_dir / name).write_bytes(data)
    with pytest.raises(ConfigError, match=words):
        plant.admit(model)
    assert plant.admit(model, trust="warn") is not None
    assert words.replace("'", "") in caplog.text.replace("'", "")


def test_a_key_of_a_kind_that_signs_nothing_is_not_added(plant: Plant) -> None:
    from cryptography.hazmat.primitives.asymmetric import ed25519
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = ed25519.Ed25519PrivateKey.generate().public_key()
    path = plant.root / "ed.pem"
    path.write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(ConfigError, match="P-256, P-384 and P-521"):
        plant.trust.add(path)
    with pytest.raises(ConfigError, match="cannot be a key's name"):
        plant.trust.add(plant.pair.public, name="../plant")
    with pytest.raises(ConfigError, match="another key named 'plant'"):
        plant.trust.add(make_pair(plant.root, "second").public, name="plant")


def test_only_what_is_public_is_kept_of_an_authoritys_file(plant: Plant) -> None:
    root = make_holder(plant.root, "root", is_authority=True)
    both = plant.root / "both.pem"
    both.write_bytes(root.pair.private.read_bytes() + root.path.read_bytes())
    assert b"PRIVATE" not in plant.trust.add(both).path.read_bytes()
    leaf = make_holder(plant.root, "leaf", by=root)
    with pytest.raises(ConfigError, match="vouches for nobody"):
        plant.trust.add(leaf.path)


def test_what_a_strangers_signature_says_reaches_no_terminal(plant: Plant) -> None:
    bad = b'{"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json", "\\u001b[31m": 1}'
    model = plant.attach(plant.add(), bad)
    assert plant.refusal(model).message.isprintable()
    plant.trust.revoke("plant", reason="stolen\n\x1b[31m # by whom?")
    assert list(plant.trust.load().revoked.values()) == ["stolen[31m by whom?"]


@pytest.mark.parametrize("before", ["# stolen ones", f"{'0' * 64} lost", "", f"{'0' * 64}\n"])
def test_a_list_without_a_last_line_break_takes_one_more(plant: Plant, before: str) -> None:
    (plant.settings.trust_dir / "revoked.txt").write_text(before)
    known = set(plant.trust.load().revoked)
    subject = plant.trust.revoke("plant", reason="stolen")
    assert plant.trust.load().revoked[subject] == "stolen"
    assert set(plant.trust.load().revoked) == known | {subject}


# ---------------------------------------------------------------- signing


def test_a_damaged_file_is_not_signed(plant: Plant) -> None:
    model = plant.add()
    model.weights.chmod(0o644)
    model.weights.write_bytes(b"x" * model.size_bytes)
    with pytest.raises(EdgeError, match=r"model\.gguf"):
        plant.sign()
    assert not plant.store.referrers(model.digest, SIGNATURE_TYPE)


def test_what_cannot_sign_says_so(plant: Plant) -> None:
    plant.add()
    with pytest.raises(ConfigError, match="cannot be signed with"):
        sign_model(plant.store, NAME, SigningKey(plant.pair.public), release=1)
    with pytest.raises(ConfigError, match="A release is a number"):
        plant.sign(release=10**15)


def test_model_signing_accepts_what_we_sign(plant: Plant) -> None:
    model = signed(plant)
    directory = plant.store.named_directory(model)
    signature = plant.root / "ours.sig"
    signature.write_bytes(plant.signature_of(model))
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(directory)]
    command += ["--public_key", str(plant.pair.public), "--signature", str(signature)]
    assert subprocess.run(command, check=False, capture_output=True, timeout=60).returncode == 0


def test_the_statement_names_manifest_name_and_release(plant: Plant) -> None:
    from edge.trust.dsse import parse_bundle, parse_statement

    model = signed(plant)
    claim = parse_statement(parse_bundle(plant.signature_of(model)).dsse_envelope.payload).claim
    assert claim is not None
    assert (claim.manifest, claim.name, claim.release) == (model.digest, NAME, 1)
    assert msgspec.json.decode(msgspec.json.encode(claim, enc_hook=str))["release"] == "1"
    assert isinstance(claim.manifest, Digest)


def test_a_device_that_knows_no_key_loads_no_cryptography(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path;"
        "from edge.config import Settings; from edge.store.models import ModelStore;"
        "from edge.trust.gate import LoadGate; from edge.trust.keys import TrustFiles;"
        f"s = Settings(home=Path({str(tmp_path)!r}), trusted_keys=Path({str(tmp_path)!r}));"
        "TrustFiles.of(s).load(); LoadGate(ModelStore(s.store_dir), s);"
        "bad = {'cryptography', 'model_signing', 'OpenSSL', 'sigstore'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_default_warns_and_is_no_secret() -> None:
    assert Settings(home=Path("/x")).trust == "warn"
