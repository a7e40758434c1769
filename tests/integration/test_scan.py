"""What the appliance does with models that changed on the disk after they were let in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edge.config import Settings
from edge.errors import EdgeError
from edge.formats.gguf import read_gguf
from edge.store.details import details_of
from edge.store.models import ModelStore, PackageFile
from runtime.pool import Pool
from tests.support import DEFAULT_MODEL, SEED


async def test_a_template_that_was_swapped_on_the_disk_is_not_rendered(home: Path, tmp_path: Path) -> None:
    store = ModelStore(home / "store", seed=SEED)
    copy = Path(shutil.copy(store.get(DEFAULT_MODEL).weights, tmp_path / "copy.gguf"))  # the seed shares its bytes
    with copy.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    model = store.add("swapped", [PackageFile(copy, "model.gguf", move=True)], details_of(read_gguf(copy)))
    at = model.weights.read_bytes()[: 4 << 20].index(b"{% for message in messages %}")
    with model.weights.open("r+b") as file:
        file.seek(at)
        file.write(b"{% for message in messages-%}")
    pool = Pool(Settings(home=home, context_tokens=1024), store)
    try:
        with pytest.raises(EdgeError, match="chat template is not the one that the manifest names"):
            await pool.ready("swapped")
    finally:
        await pool.close()
