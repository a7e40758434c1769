"""docs/compatibility.md says what the appliance does with each field."""

from __future__ import annotations

from tests.compatibility import BASES, TABLE, table
from tests.support import RunningAppliance


def test_the_table_is_what_the_appliance_does(appliance: RunningAppliance) -> None:
    with appliance.client() as http:
        assert table(http) == TABLE.read_text("utf-8"), "docs/compatibility.md is stale: make compatibility"


def test_every_operation_that_asks_a_model_is_in_the_table(appliance: RunningAppliance) -> None:
    with appliance.client() as http:
        paths = http.get("/docs/openapi.json").json()["paths"]
    asked: set[str] = set()
    for path, item in paths.items():
        content = item.get("post", {}).get("requestBody", {}).get("content", {})
        if path.startswith(("/v1/", "/api/")) and "application/json" in content:
            asked.add(f"POST {path}")
    assert asked - set(BASES) == {"POST /api/pull", "POST /api/push"}
