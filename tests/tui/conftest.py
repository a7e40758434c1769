"""Fixtures of the terminal's tests."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator

import pytest

from tests.tui.appliance import ScriptedAppliance
from tui.client import Address, RuntimeClient


@pytest.fixture
def scripted() -> Generator[ScriptedAppliance]:
    """A scripted appliance that answers on a free port."""
    with ScriptedAppliance().running() as appliance:
        yield appliance


@pytest.fixture
async def client(scripted: ScriptedAppliance) -> AsyncGenerator[RuntimeClient]:
    """A client of the scripted appliance."""
    async with RuntimeClient(Address(scripted.url)) as client:
        yield client
