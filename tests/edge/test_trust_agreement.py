"""Our small verifier and OpenSSF model-signing, side by side: what one accepts the other accepts."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from edge.errors import InvalidModelFile
from edge.store.digest import Digest
from edge.trust.dsse import Statement, parse_bundle
from edge.trust.verify import BadSignature, UnknownSigner, difference, verify_with_authorities, verify_with_key
from tests.edge.trust_support import Holder, Pair, make_holder, make_pair

signing: Any = import_module("model_signing.signing")
verifying: Any = import_module("model_signing.verifying")


@dataclass(frozen=True)
class Case:
    """A directory that was signed."""

    directory: Path
    bundle: Path
    pair: Pair

    def with_bundle(self, data: bytes) -> Case:
        path = self.bundle.with_name("changed.sig")
        path.write_bytes(data)
        return Case(self.directory, path, self.pair)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    (directory / "model.gguf").write_bytes(bytes(range(256)) * 8)
    (directory / "config.json").write_text('{"a": 1}')
    (directory / "sub" / "empty.txt").touch()
    return signed(directory, make_pair(tmp_path, "plant"))


def signed(directory: Path, pair: Pair) -> Case:
    bundle = directory.with_suffix(".sig")
    signing.Config().use_elliptic_key_signer(private_key=pair.private).sign(directory, bundle)
    return Case(directory, bundle, pair)


def files_in(directory: Path) -> Mapping[str, Digest]:
    found: dict[str, Digest] = {}
    for path in directory.rglob("*"):
        assert not path.is_symlink(), "no package can hold one"
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[path.relative_to(directory).as_posix()] = Digest(f"sha256:{digest}")
    return found


def ours(case: Case, verify: Callable[[bytes], Statement]) -> bool:
    try:
        statement = verify(case.bundle.read_bytes())
    except (BadSignature, UnknownSigner, InvalidModelFile):
        return False
    return not difference(statement.files, files_in(case.directory))


def ours_by_key(case: Case, public: Path) -> bool:
    key = load_pem_public_key(public.read_bytes())
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return ours(case, lambda data: verify_with_key(parse_bundle(data), key).statement)


def theirs_by_key(case: Case, public: Path) -> bool:
    return theirs(case, verifying.Config().use_elliptic_key_verifier(public_key=public))


def theirs(case: Case, config: Any) -> bool:
    try:
        config.verify(case.directory, case.bundle)
    except Exception:
        return False
    return True


def both_by_key(case: Case, public: Path | None = None) -> bool:
    public = public or case.pair.public
    one, other = ours_by_key(case, public), theirs_by_key(case, public)
    assert one == other
    return one


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda c: c.name)
def test_both_take_each_curve_and_refuse_another_key(case: Case, tmp_path: Path, curve: ec.EllipticCurve) -> None:
    made = signed(case.directory, make_pair(tmp_path, "curve", curve))
    assert both_by_key(made)
    assert not both_by_key(made, make_pair(tmp_path, "other", curve).public)
    assert not both_by_key(made, make_pair(tmp_path, "smaller").public)


def _flip(directory: Path) -> None:
    path = directory / "model.gguf"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)


OLD_TYPE = "application/vnd.dev.sigstore.bundle+json;version=0.1"
FILES: Mapping[str, Callable[[Path], object]] = {
    "a byte": _flip,
    "a byte more": lambda d: (d / "config.json").write_text('{"a": 1} '),
    "an extra file": lambda d: (d / "evil.py").write_text("import os"),
    "an extra file in a directory": lambda d: (d / "sub" / "more.txt").touch(),
    "a missing file": lambda d: (d / "sub" / "empty.txt").unlink(),
    "another name": lambda d: (d / "config.json").rename(d / "Config.json"),
    "two files swapped": lambda d: _swap(d / "config.json", d / "model.gguf"),
}


def _swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


@pytest.mark.parametrize("change", FILES.values(), ids=FILES.keys())
def test_both_refuse_changed_files(case: Case, change: Callable[[Path], object]) -> None:
    assert both_by_key(case)
    change(case.directory)
    assert not both_by_key(case)


def _statement(bundle: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> None:
    envelope = bundle["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    change(statement)
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()


BUNDLES: Mapping[str, tuple[Callable[[dict[str, Any]], object], bool]] = {
    "as it is": (lambda b: None, True),
    "without a hint": (lambda b: b["verificationMaterial"]["publicKey"].pop("hint"), True),
    "another hint": (lambda b: b["verificationMaterial"]["publicKey"].update(hint="00" * 32), False),
    "without key and certificate": (lambda b: b["verificationMaterial"].pop("publicKey"), False),
    "without an envelope": (lambda b: b.pop("dsseEnvelope"), False),
    "without a signature": (lambda b: b["dsseEnvelope"].update(signatures=[]), False),
    "an empty signature": (lambda b: b["dsseEnvelope"]["signatures"][0].update(sig=""), False),
    "another type of bundle": (lambda b: b.update(mediaType=OLD_TYPE), False),
    "another type of payload": (lambda b: b["dsseEnvelope"].update(payloadType="text/plain"), False),
    "a member that nobody knows": (lambda b: b.update(more=1), False),
    "a member of a signature that nobody knows": (lambda b: b["dsseEnvelope"]["signatures"][0].update(x=1), False),
    "a file taken out of the statement": (lambda b: _statement(b, lambda s: s["predicate"]["resources"].pop()), False),
    "another file's digest": (
        lambda b: _statement(b, lambda s: s["predicate"]["resources"][0].update(digest="11" * 32)), False,
    ),
    "the same statement, spelled otherwise": (lambda b: _statement(b, lambda s: None), False),
}  # fmt: skip


@pytest.mark.parametrize(("change", "is_good"), BUNDLES.values(), ids=BUNDLES.keys())
def test_both_judge_a_changed_bundle_alike(
    case: Case, change: Callable[[dict[str, Any]], object], is_good: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = json.loads(case.bundle.read_bytes())
    change(bundle)
    assert both_by_key(case.with_bundle(json.dumps(bundle).encode())) == is_good


def _substance(data: bytes) -> object:
    """What a bundle is about, as a lax reader of Base64 takes it: the statement, the signature, the signer."""
    bundle = json.loads(data)
    envelope, material = bundle["dsseEnvelope"], bundle["verificationMaterial"]
    texts = [envelope["payload"], envelope["signatures"][0]["sig"]]
    if chain := material.get("x509CertificateChain"):
        texts.append(chain["certificates"][0]["rawBytes"])
    return [base64.b64decode(text) for text in texts]


def check_flips(case: Case, mine: Callable[[Case], bool], other: Callable[[Case], bool], *, count: int) -> None:
    """Bits of a bundle flipped, one at a time. Where the two judge differently, nothing of substance was changed: ours
    reads Base64 strictly, and does without a certificate that it does not need."""
    data = case.bundle.read_bytes()
    dice = random.Random(5)
    different = 0
    for _ in range(count):
        changed = bytearray(data)
        at = dice.randrange(len(data))
        changed[at] ^= 1 << dice.randrange(8)
        one = case.with_bundle(bytes(changed))
        if mine(one) != other(one):
            assert _substance(bytes(changed)) == _substance(data)
            different += 1
    assert different < count / 10


FLIPS = [300, pytest.param(20_000, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])]


@pytest.mark.parametrize("count", FLIPS)
def test_both_judge_flipped_bits_of_a_keys_bundle_alike(case: Case, count: int) -> None:
    public = case.pair.public
    check_flips(case, lambda c: ours_by_key(c, public), lambda c: theirs_by_key(c, public), count=count)


# ---------------------------------------------------------------- certificates


def signed_by_holder(directory: Path, holder: Holder, chain: Sequence[Holder]) -> Case:
    bundle = directory.with_suffix(".sig")
    config = signing.Config().use_certificate_signer(
        private_key=holder.pair.private, signing_certificate=holder.path, certificate_chain=[h.path for h in chain]
    )
    config.sign(directory, bundle)
    return Case(directory, bundle, holder.pair)


def ours_by_authority(case: Case, *authorities: Holder) -> bool:
    certificates = [a.certificate for a in authorities]
    return ours(case, lambda data: verify_with_authorities(parse_bundle(data), certificates).statement)


def theirs_by_authority(case: Case, *authorities: Holder) -> bool:
    config = verifying.Config().use_certificate_verifier(certificate_chain=[a.path for a in authorities])
    return theirs(case, config)


def both_by_authority(case: Case, *authorities: Holder) -> bool:
    one, other = ours_by_authority(case, *authorities), theirs_by_authority(case, *authorities)
    assert one == other
    return one


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")  # of odd serial numbers
@pytest.mark.parametrize("count", FLIPS)
def test_both_judge_flipped_bits_of_a_certificates_bundle_alike(case: Case, tmp_path: Path, count: int) -> None:
    root = make_holder(tmp_path, "root", is_authority=True)
    made = signed_by_holder(case.directory, make_holder(tmp_path, "leaf", by=root), [root])
    check_flips(made, lambda c: ours_by_authority(c, root), lambda c: theirs_by_authority(c, root), count=count)


def test_both_follow_a_certificate_to_its_authority(case: Case, tmp_path: Path) -> None:
    root = make_holder(tmp_path, "root", is_authority=True)
    middle = make_holder(tmp_path, "middle", by=root, is_authority=True)
    direct, below = make_holder(tmp_path, "direct", by=root), make_holder(tmp_path, "below", by=middle)
    stranger = make_holder(tmp_path, "stranger", is_authority=True)
    by_direct = signed_by_holder(case.directory, direct, [root])
    assert both_by_authority(by_direct, root)
    assert both_by_authority(by_direct, stranger, root)
    assert not both_by_authority(by_direct, stranger)
    by_below = signed_by_holder(case.directory, below, [middle])
    assert both_by_authority(by_below, root)
    assert not both_by_authority(signed_by_holder(case.directory, below, [root]), root)  # what is between lacks
    assert not both_by_authority(signed_by_holder(case.directory, make_holder(tmp_path, "self"), [root]), root)


def test_both_want_a_certificate_that_is_for_signing(case: Case, tmp_path: Path) -> None:
    root = make_holder(tmp_path, "root", is_authority=True)
    other = make_holder(tmp_path, "other", by=root, can_sign=False)
    assert not both_by_authority(signed_by_holder(case.directory, other, [root]), root)


def test_a_holder_who_is_no_authority_vouches_for_nobody(case: Case, tmp_path: Path) -> None:
    root = make_holder(tmp_path, "root", is_authority=True)
    middle = make_holder(tmp_path, "middle", by=root)
    below = make_holder(tmp_path, "below", by=middle)
    assert not both_by_authority(signed_by_holder(case.directory, below, [middle]), root)


@pytest.mark.parametrize("year", [1971, 2090])
def test_no_clock_decides_about_a_certificate(case: Case, tmp_path: Path, year: int) -> None:
    root = make_holder(
        tmp_path, "root", is_authority=True, start=datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC), years=150
    )
    start = datetime.datetime(year, 6, 1, tzinfo=datetime.UTC)
    leaf = make_holder(tmp_path, "leaf", by=root, start=start, years=1)
    assert both_by_authority(signed_by_holder(case.directory, leaf, [root]), root)


def test_both_refuse_a_signer_from_after_the_authority_ended(case: Case, tmp_path: Path) -> None:
    root = make_holder(tmp_path, "root", is_authority=True, years=10)
    leaf = make_holder(tmp_path, "leaf", by=root, start=datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
    assert not both_by_authority(signed_by_holder(case.directory, leaf, [root]), root)


def test_both_refuse_changed_files_of_a_certificate(case: Case, tmp_path: Path) -> None:
    root = make_holder(tmp_path, "root", is_authority=True)
    made = signed_by_holder(case.directory, make_holder(tmp_path, "leaf", by=root), [root])
    shutil.copy(case.directory / "config.json", case.directory / "more.json")
    assert not both_by_authority(made, root)
