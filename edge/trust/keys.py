"""What this device trusts, on the disk: keys and authorities, who is revoked, which releases proved themselves.

Two directories of the same shape. One came with the installation and is only read; the other, ``EDGE_HOME/trust``, is
the device's own:

    *.pem            a public key (EC, as model-signing takes it) or the certificate of an authority, named by its file
    revoked.txt      a line for each key id or manifest digest that is good no longer, then perhaps why
    releases.json    of the device's own: by name, the highest release that was confirmed
    signed.json      of a builder's own: by name, the last release that was signed

Nothing of this is set by the fleet, and nothing of it depends on a clock.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from edge.config import Settings
from edge.errors import ConfigError, InvalidModelFile, KeyNotFound, StoreError
from edge.store.digest import Digest
from edge.store.files import FileOps, translated, wait_for_lock, write_file
from edge.store.manifest import decode

if TYPE_CHECKING:  # costs 60 ms that a device without any key need not spend
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

REVOKED_NAME = "revoked.txt"
RELEASES_NAME = "releases.json"
SIGNED_NAME = "signed.json"
MAX_KEYS = 256
_MAX_FILE_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", re.ASCII)
_KEY_ID = re.compile(r"[0-9a-f]{64}")
_LOCK_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class TrustedKey:
    """A key, or an authority whose signers are trusted."""

    id: str
    """64 hexadecimal digits, the SHA-256 of the key's PEM."""
    name: str
    path: Path
    is_installed: bool
    """It came with the installation."""
    key: ec.EllipticCurvePublicKey | None = None
    authority: x509.Certificate | None = None
    """The certificate of one who vouches for others; then there is no `key`."""


@dataclass(frozen=True, slots=True)
class Trust:
    """All of it, as it was when it was read."""

    keys: tuple[TrustedKey, ...] = ()
    revoked: Mapping[str, str] = field(default_factory=dict[str, str])
    """Key ids and manifest digests, and why."""
    releases: Mapping[str, int] = field(default_factory=dict[str, int])
    """The highest confirmed release of each signed name."""


class _Releases(msgspec.Struct, frozen=True, kw_only=True):
    version: Annotated[int, msgspec.Meta(ge=1)]
    releases: dict[str, Annotated[int, msgspec.Meta(ge=0)]]


class TrustFiles:
    """The two directories. Any number of processes may use them; those that change something wait for each other."""

    def __init__(self, installed: Path, own: Path, *, files: FileOps | None = None) -> None:
        self._installed, self._own = installed, own
        self._files = files or FileOps()

    @classmethod
    def of(cls, settings: Settings) -> TrustFiles:
        """Those of an appliance."""
        return cls(settings.trusted_keys, settings.trust_dir)

    def stamp(self) -> tuple[object, ...]:
        """Changes when anything does that `load` reads."""
        paths = (path for directory in (self._installed, self._own) for path in sorted(directory.glob("*")))
        return tuple((path, stamp_of(path)) for path in paths)

    def load(self) -> Trust:
        """Read everything.

        Raises:
            ConfigError: A file is none of what may lie there. Nothing is passed over: it may be what revokes a key.
            StoreError: A file cannot be read.
        """
        keys = [*self._keys(self._installed, is_installed=True), *self._keys(self._own, is_installed=False)]
        revoked = _revoked_in(self._installed / REVOKED_NAME) | _revoked_in(self._own / REVOKED_NAME)
        return Trust(tuple(keys), revoked, self._releases())

    def _keys(self, directory: Path, *, is_installed: bool) -> list[TrustedKey]:
        with translated(directory, "Reading"):
            paths = sorted(directory.glob("*.pem")) if directory.is_dir() else []
        if len(paths) > MAX_KEYS:
            raise ConfigError(f"{directory} has more than {MAX_KEYS} keys.", hint="One authority can vouch for many.")
        return [_key_in(path, is_installed=is_installed) for path in paths]

    def _releases(self, file_name: str = RELEASES_NAME) -> dict[str, int]:
        path = self._own / file_name
        if not path.exists():
            return {}
        try:
            found = decode(_read(path), _Releases, what=str(path))
        except InvalidModelFile as e:
            raise ConfigError(
                f"{path} is damaged: {e.reason}.",
                hint="Put a copy of it back; or take it away, and older releases are no longer refused.",
            ) from e
        if found.version > 1:
            raise ConfigError(f"{path} was written by a newer slm-edge.", hint="Install that version again.")
        return found.releases

    def find(self, name: str) -> TrustedKey:
        """A key by its name, its id or the beginning of it.

        Raises:
            KeyNotFound: There is none, or several begin so.
        """
        found = [key for key in self.load().keys if key.name == name or (len(name) >= 8 and key.id.startswith(name))]
        if len({key.id for key in found}) != 1:
            raise KeyNotFound(name, hint="See what is trusted: edge trust list.")
        return found[0]

    def add(self, source: Path, *, name: str = "") -> TrustedKey:
        """Trust a key or an authority from now on.

        Raises:
            ConfigError: The file holds neither, or the name cannot be one, or is another key's.
            StoreError: It cannot be read or written.
        """
        read = _key_in(source, is_installed=False)
        if read.authority is not None and not _vouches(read.authority):
            raise ConfigError(
                f"{source} is the certificate of one who vouches for nobody.",
                hint="Add the certificate of its authority.",
            )
        name = name or source.stem
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{name[:80]!r} cannot be a key's name.", hint="Letters, digits and . _ @ -, at most 64: --name plant."
            )
        path = self._own / f"{name}.pem"
        with self._changing():
            if path.exists() and _key_in(path, is_installed=False).id != read.id:
                hint = f"Take --name, or first: edge trust remove {name}."
                raise ConfigError(f"There is another key named {name!r}.", hint=hint)
            write_file(self._files, path, _pem_of(read))  # not the file, which may hold more, such as a private key
        return _key_in(path, is_installed=False)

    def remove(self, name: str) -> TrustedKey:
        """Trust a key no longer, under whatever names it is here; gives the one that was meant.

        Raises:
            KeyNotFound: There is none.
            ConfigError: It came with the installation.
        """
        with self._changing():
            found = self.find(name)
            same = [key for key in self.load().keys if key.id == found.id]
            for key in same:
                if key.is_installed:
                    raise ConfigError(
                        f"The key '{key.name}' came with the installation ({key.path}) and cannot be removed here.",
                        hint=f"Revoke it on this device: edge trust revoke {found.name}.",
                    )
            for key in same:
                self._files.remove(key.path)
            self._files.sync_dir(self._own)
        return found

    def revoke(self, what: str, *, reason: str = "") -> str:
        """Refuse from now on what a key signed, or one manifest; gives the id or digest.

        Args:
            what: A trusted key's name, any key's id, a PEM file, or a manifest's digest.

        Raises:
            KeyNotFound: It is none of these.
        """
        subject = what if _is_subject(what) else self._id_of(what)
        words = " ".join("".join(c for c in reason if c.isprintable() and c != "#").split())[:200]
        with self._changing():
            path = self._own / REVOKED_NAME
            lines = _read(path).decode("utf-8") if path.exists() else ""
            if subject not in _revoked_in(path):
                end = "" if lines.endswith("\n") or not lines else "\n"  # people edit it, with editors that add none
                write_file(self._files, path, f"{lines}{end}{subject} {words}".rstrip().encode() + b"\n")
            if subject not in _revoked_in(path):
                raise StoreError(f"{path} does not revoke {subject} after it was written.", hint="Look into the file.")
        return subject

    def _id_of(self, what: str) -> str:
        path = Path(what)
        return _key_in(path, is_installed=False).id if path.is_file() else self.find(what).id

    def confirm(self, name: str, release: int) -> None:
        """Refuse older releases of a name from now on: this one proved itself."""
        self._set(RELEASES_NAME, name, release, lambda before: before < release)

    def lower(self, name: str, release: int) -> None:
        """Take an older release of a name again: somebody insisted."""
        self._set(RELEASES_NAME, name, release, lambda before: before > release)

    def last_signed(self, name: str) -> int:
        """The last release of a name that was signed here; 0 where none was."""
        return self._releases(SIGNED_NAME).get(name, 0)

    def note_signed(self, name: str, release: int) -> None:
        """Remember which release of a name was signed here."""
        self._set(SIGNED_NAME, name, release, lambda before: before < release)

    def _set(self, file_name: str, name: str, release: int, is_due: Callable[[int], bool]) -> None:
        if not is_due(self._releases(file_name).get(name, 0)):
            return
        with self._changing():
            releases = self._releases(file_name)
            if is_due(releases.get(name, 0)):
                document = _Releases(version=1, releases=dict(sorted((releases | {name: release}).items())))
                write_file(self._files, self._own / file_name, msgspec.json.encode(document))

    @contextmanager
    def _changing(self) -> Generator[None]:
        self._files.make_dir(self._own)
        self._files.sync_dir(self._own.parent)
        with self._files.open_append(self._own / "lock") as file:
            wait_for_lock(file, timeout_s=_LOCK_TIMEOUT_S, busy=f"{self._own} is in use by another process.")
            yield


def stamp_of(path: Path) -> tuple[int, ...] | None:
    """Changes when the file does: `ctime` also where somebody set the other times back. None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read(path: Path) -> bytes:
    with translated(path, "Reading"), path.open("rb") as file:
        data = file.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        hint = "It is none of the files that belong there."
        raise StoreError(f"{path} is longer than {_MAX_FILE_BYTES:,} bytes.", hint=hint)
    return data


def _key_in(path: Path, *, is_installed: bool) -> TrustedKey:
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    from .verify import BadSignature, certificate_id, check_curve, key_id

    data = _read(path)
    try:
        if b"BEGIN CERTIFICATE" in data:
            certificate = x509.load_pem_x509_certificate(data)
            return TrustedKey(certificate_id(certificate), path.stem, path, is_installed, authority=certificate)
        key = check_curve(load_pem_public_key(data))
    except (ValueError, UnsupportedAlgorithm, BadSignature) as e:
        raise ConfigError(
            f"{path} is no key that can be trusted: {_first_line(e)}.",
            hint="It takes the PEM file of a public key on P-256, P-384 or P-521, or of an authority's certificate.",
        ) from e
    return TrustedKey(key_id(key), path.stem, path, is_installed, key=key)


def _vouches(certificate: x509.Certificate) -> bool:
    from cryptography import x509

    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def _pem_of(key: TrustedKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    if key.authority is not None:
        return key.authority.public_bytes(Encoding.PEM)
    assert key.key is not None
    return key.key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "").rstrip(".") or "it cannot be read"


def _is_subject(text: str) -> bool:
    return bool(_KEY_ID.fullmatch(text.removeprefix("sha256:")))


def _revoked_in(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    found: dict[str, str] = {}
    try:
        lines = _read(path).decode("utf-8").splitlines()
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is no text.", hint="Put a copy of it back.") from e
    for number, line in enumerate(lines, start=1):
        subject, _, reason = line.split("#")[0].strip().partition(" ")
        if not subject:
            continue
        if not _is_subject(subject):
            raise ConfigError(
                f"{path}, line {number}: {subject[:80]!r} is neither a key's id nor a manifest's digest.",
                hint="Both are 64 hexadecimal digits, a digest with sha256: before them.",
            )
        found[Digest(subject) if ":" in subject else subject] = reason.strip()
    return found
