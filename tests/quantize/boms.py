"""Bills of materials, held against CycloneDX's own schema."""

from __future__ import annotations

import json
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from edge.store.models import ModelStore, StoredModel
from edge.trust.policy import sbom_of


def checked_sbom(store: ModelStore, model: StoredModel) -> dict[str, Any]:
    """What is attached to a model; valid, or the test fails."""
    attached = sbom_of(store, model.digest)
    assert attached is not None
    text = store.blobs.path(attached.digest).read_text()
    wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    assert wrong is None, str(wrong)[:2000]
    found: dict[str, Any] = json.loads(text)
    return found
