"""What a build borrows from the host, for its own time only: pip's configuration, the CA bundle, the apt sources.

Each is mounted, never copied, so that no layer tells where the builder gets its packages from.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge.errors import RecipeError

COMMON = Path(__file__).with_name("common")
MOUNT = "/mnt"
"""Where a build sees these inputs: a directory that every Debian base has. A mount point made for the occasion would
stay in the layer."""
APT_SOURCES = "/etc/apt/sources.list.d/debian.sources"
_CA_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
_INDEXES = ("index-url", "extra-index-url")
_PIP_OPTIONS = (*_INDEXES, "find-links", "no-index", "trusted-host", "proxy", "timeout", "default-timeout", "retries")


@dataclass(frozen=True, slots=True)
class Mount:
    """A file or directory of the host, read-only inside the build."""

    source: Path
    target: str

    @property
    def argument(self) -> str:
        return f"{self.source}:{self.target}:ro"


def parse_pip_config(listing: str) -> dict[str, str]:
    """The options that choose where packages come from, out of ``pip config list``; the environment wins."""
    found: dict[str, str] = {}
    lines = sorted(listing.splitlines(), key=lambda line: line.startswith(":env:"))
    for line in lines:
        key, equals, literal = line.partition("=")
        option = key.rpartition(".")[2]
        if equals and option in _PIP_OPTIONS:
            found[option] = str(ast.literal_eval(literal))
    return found


def read_pip_config() -> dict[str, str]:
    """The host's pip configuration; empty where there is no pip."""
    own = [sys.executable, "-m", "pip"]
    for pip in (own, ["pip3"]):
        if shutil.which(pip[0]) is None:
            continue
        done = subprocess.run([*pip, "config", "list"], capture_output=True, text=True, timeout=60, check=False)
        if done.returncode == 0:
            return parse_pip_config(done.stdout)
    return {}


def localise(options: Mapping[str, str]) -> tuple[dict[str, str], list[Mount]]:
    """The options as the build sees them, and the mounts for the directories of the host that they name.

    An index on disk links to files beside it, so its parent is mounted. Directories that do not exist are left out.
    """
    mounts: list[Mount] = []
    changed: dict[str, str] = {}
    for option, value in options.items():
        words: list[str] = []
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if not path.is_absolute():
                words.append(word)
            elif path.is_dir():
                root, tail = (path.parent, f"/{path.name}") if option in _INDEXES else (path, "")
                mounts.append(Mount(root, f"{MOUNT}/local{len(mounts)}"))
                words.append(f"file://{mounts[-1].target}{tail}")
        if words:
            changed[option] = " ".join(words)
    return changed, mounts


def format_pip_config(options: Mapping[str, str], *, ca_bundle: str | None) -> str:
    """A ``pip.conf``."""
    lines = [f"{option} = {value}" for option, value in options.items()]
    if ca_bundle:
        lines.append(f"cert = {ca_bundle}")
    return "\n".join(["[global]", *lines, ""])


def read_debian_sources(suite: str) -> str:
    """The host's apt sources for `suite`, deb822.

    Raises:
        RecipeError: The host knows no Debian mirror of it.
    """
    script = [str(COMMON / "debian-sources.sh"), suite]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode or not done.stdout.strip():
        raise RecipeError(
            f"apt knows no Debian mirror of {suite}.",
            hint="Run apt-get update, or set EDGE_DEBIAN_MIRROR=URL, or give a base image that has its own sources.",
        )
    return done.stdout


def write_inputs(directory: Path, *, debian_suite: str | None) -> list[Mount]:
    """Write what the build may see into an empty private directory; the mounts that show it.

    `debian_suite` is given for a base without apt sources of its own.
    """
    options, local = localise(read_pip_config())
    ca_bundle = next((Path(p) for p in _CA_BUNDLES if Path(p).is_file()), None)
    if ca_bundle:
        shutil.copyfile(ca_bundle, directory / "ca.crt")
    config = format_pip_config(options, ca_bundle=f"{MOUNT}/ca.crt" if ca_bundle else None)
    (directory / "pip.conf").write_text(config, "utf-8")
    for mount in local:
        (directory / Path(mount.target).name).mkdir()
    return [Mount(directory, MOUNT), *local, *_apt_mounts(directory, debian_suite)]


def _apt_mounts(directory: Path, suite: str | None) -> Sequence[Mount]:
    if suite is None:
        return ()
    sources = directory / "debian.sources"
    sources.write_text(read_debian_sources(suite), "utf-8")
    return (Mount(sources, APT_SOURCES),)
