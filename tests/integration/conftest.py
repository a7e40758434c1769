"""The appliance that the integration tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.store.models import ModelStore
from tests.support import DEFAULT_MODEL, SEED, GreedyLaw, RunningAppliance, running_appliance


@pytest.fixture(scope="session")
def appliance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAppliance]:
    """One running appliance with the default model; tests that break it start their own."""
    assert (SEED / "index.json").exists(), "no seed models: run `make setup`"
    with running_appliance(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture(scope="session")
def law() -> Iterator[GreedyLaw]:
    """The judge of greedy answers of the default model."""
    law = GreedyLaw(ModelStore(SEED).get(DEFAULT_MODEL).weights)
    yield law
    law.close()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty EDGE_HOME."""
    return tmp_path / "home"
