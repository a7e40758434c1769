"""Real weights for the toolchain's tests: fetched once, verified, kept in a cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.quantize.stories import Unavailable, make_stories


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint directory of stories15M, original fp32."""
    try:
        return make_stories(tmp_path_factory.mktemp("checkpoints") / "stories15M")
    except Unavailable as e:
        pytest.skip(f"stories15M: {e}")
