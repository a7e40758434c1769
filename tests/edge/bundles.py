"""Bundles for tests, good ones and others: an OCI layout as a dictionary of its files, and that as a tar archive."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from edge.store.models import ModelStore

Files = dict[str, bytes]


def tar_bytes(files: Mapping[str, bytes], *, tar_format: int = tarfile.PAX_FORMAT, **facts: object) -> bytes:
    """An archive as Python writes it; `facts` are set in each entry."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tar_format) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            for fact, value in facts.items():
                setattr(entry, fact, value)
            archive.addfile(entry, io.BytesIO(data))
    return made.getvalue()


def layout_of(store: ModelStore) -> Files:
    """The files of a store that make an OCI layout."""
    blobs = {f"blobs/sha256/{digest.hex}": store.blobs.path(digest).read_bytes() for digest in store.blobs.digests()}
    return {name: (store.root / name).read_bytes() for name in ("oci-layout", "index.json")} | blobs


def write_bundle(path: Path, files: Mapping[str, bytes]) -> Path:
    """A bundle of these files."""
    path.write_bytes(tar_bytes(files))
    return path


def with_document(files: Files, old: str, change: Mapping[str, Any]) -> Files:
    """The layout with members of one document changed, and all that leads to it led to the new one."""
    data = json.dumps(json.loads(files[f"blobs/sha256/{old}"]) | change).encode()
    return with_blob(files, old, data)


def with_blob(files: Files, old: str, data: bytes) -> Files:
    """The layout with another blob in the place of one, and documents that fit."""
    new, size = hashlib.sha256(data).hexdigest(), len(files[f"blobs/sha256/{old}"])
    changed = {name: content for name, content in files.items() if name != f"blobs/sha256/{old}"}
    changed[f"blobs/sha256/{new}"] = data
    for name, content in files.items():
        if name.endswith(old) or old.encode() not in content:
            continue
        document = json.loads(content)
        for descriptor in _descriptors(document):
            if descriptor["digest"] == f"sha256:{old}" and descriptor["size"] == size:
                descriptor |= {"digest": f"sha256:{new}", "size": len(data)}
        if name == "index.json":
            changed[name] = json.dumps(document).encode()
        else:
            changed = with_blob(changed, name.rpartition("/")[2], json.dumps(document).encode())
    return changed


def _descriptors(document: object) -> list[dict[str, Any]]:
    if isinstance(document, list):
        return [found for item in cast("list[object]", document) for found in _descriptors(item)]
    if not isinstance(document, dict):
        return []
    members = cast("dict[str, Any]", document)
    return ([members] if "digest" in members else []) + [f for item in members.values() for f in _descriptors(item)]
