"""What a package is made of, as a CycloneDX 1.6 bill of materials with the model card.

The same package gives the same bytes: nothing in it is random, and the only time in it is the report's.
Source: CycloneDX 1.6 JSON schema (bom-1.6.schema.json), which the tests validate against.
"""

from __future__ import annotations

import tempfile
import uuid
from pathlib import Path
from urllib.parse import quote

import msgspec

from edge import __version__
from edge.store.details import QUANTIZED_FROM, rfc3339
from edge.store.manifest import OURS, Descriptor
from edge.store.models import ModelStore, PackageFile, StoredModel
from edge.trust.policy import SBOM_TYPE, sbom_of

from .package import report_in, variant_in
from .report import Report, Variant

_NAMESPACE = uuid.UUID("6f2ac7d1-1b1f-5c2b-9a6e-2f7e7d0f9a53")
"""Ours, for the serial numbers, which are UUIDs of version 5 over the manifest's digest."""
_TASKS = {
    "text": "text-generation", "embeddings": "feature-extraction", "reranking": "text-ranking", "adapter": "adapter",
}  # fmt: skip
_SPDX = {
    name.lower(): name
    for name in (
        "Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0",
        "GPL-3.0-only", "LGPL-3.0-only", "AGPL-3.0-only", "MPL-2.0", "ISC", "Unlicense",
    )
}  # fmt: skip
"""Identifiers of SPDX under which models come; what is none of them is given as a name."""

_OF_URLS = ":/?#[]@!$&'()*+,;=%~"
Json = dict[str, object]


def attach_sbom(store: ModelStore, model: StoredModel) -> Descriptor:
    """Make a model's bill of materials and attach it; gives the document. One that is attached already stays.

    Raises:
        StoreError: The store cannot be read or written.
    """
    if (found := sbom_of(store, model.digest)) is not None:
        return found
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "sbom.cdx.json"
        path.write_bytes(msgspec.json.format(msgspec.json.encode(sbom(model)), indent=1) + b"\n")
        store.attach(model.digest, SBOM_TYPE, [PackageFile(path, path.name, SBOM_TYPE)])
    found = sbom_of(store, model.digest)
    assert found is not None
    return found


def sbom(model: StoredModel) -> Json:
    """The bill of materials of a model, ready to be written as JSON."""
    report = report_in(model)
    parts = [_file(file.name, str(file.digest), file.size_bytes, file.media_type) for file in model.files]
    base = _base(model)
    depends = [part["bom-ref"] for part in [*parts, *base]]
    metadata: Json = {"tools": {"components": _tools(report)}, "component": _subject(model, report)}
    if report is not None:
        metadata = {"timestamp": rfc3339(report.created), **metadata}
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, str(model.digest))}",
        "version": 1,
        "metadata": metadata,
        "components": [*parts, *base],
        "dependencies": [{"ref": str(model.digest), "dependsOn": depends}],
    }


def _subject(model: StoredModel, report: Report | None) -> Json:
    found: Json = {
        "type": "machine-learning-model",
        "bom-ref": str(model.digest),
        "name": model.ref.name,
        "version": model.ref.tag,
        "modelCard": _card(model, report),
        "properties": _properties(model),
    }
    if model.details.title:
        found["description"] = model.details.title
    if model.license:
        found["licenses"] = _licences(model.license)
    if model.source and "://" in model.source:
        found["externalReferences"] = [{"type": "distribution", "url": quote(model.source, safe=_OF_URLS)}]
    return found


def _licences(text: str) -> list[Json]:
    known = _SPDX.get(text.lower())
    return [{"license": {"id": known} if known else {"name": text}}]


def _properties(model: StoredModel) -> list[Json]:
    notes = {key: value for key, value in sorted(model.manifest.annotations.items()) if key.startswith(OURS)}
    facts = {"manifest": str(model.digest), "quantization": model.quantization or "unknown"}
    named = {f"{OURS}{key}": value for key, value in facts.items()} | notes
    return [{"name": name, "value": value[:2000]} for name, value in named.items()]


def _file(name: str, digest: str, size_bytes: int, media_type: str) -> Json:
    return {
        "type": "file",
        "bom-ref": f"{digest}#{name}",
        "name": name,
        "mime-type": media_type,
        "hashes": [{"alg": "SHA-256", "content": digest.removeprefix("sha256:")}],
        "properties": [{"name": f"{OURS}size-bytes", "value": str(size_bytes)}],
    }


def _base(model: StoredModel) -> list[Json]:
    """The model that this one was made from, as far as the package says."""
    label = model.manifest.annotations.get(QUANTIZED_FROM)
    digest = model.manifest.annotations.get(f"{OURS}quantized-from-digest", "")
    if not label:
        return []
    found: Json = {"type": "machine-learning-model", "bom-ref": f"made-from:{digest or label}", "name": label}
    if digest:
        found["hashes"] = [{"alg": "SHA-256", "content": digest.removeprefix("sha256:")}]
    return [found]


def _tools(report: Report | None) -> list[Json]:
    versions = {"slm-edge": __version__} | (report.tools if report is not None else {})
    return [{"type": "application", "name": name, "version": version} for name, version in sorted(versions.items())]


def _card(model: StoredModel, report: Report | None) -> Json:
    parameters: Json = {"task": _TASKS[model.kind], "architectureFamily": "transformer"}
    if model.architecture:
        parameters["modelArchitecture"] = model.architecture
    if model.kind != "adapter":
        sees = [{"format": "image"}] if model.projector else []
        parameters |= {"inputs": [{"format": "text"}, *sees], "outputs": [{"format": _MAKES[model.kind]}]}
    card: Json = {"modelParameters": parameters}
    variant = variant_in(model)
    if report is None or variant is None:
        return card
    judged = {"type": "dataset", "name": report.text.title, "contents": {"properties": [
        {"name": f"{OURS}sha256", "value": report.text.sha256},
    ]}}  # fmt: skip
    card["modelParameters"] = parameters | {"datasets": [judged]}
    card["quantitativeAnalysis"] = {"performanceMetrics": _metrics(variant, report)}
    if report.notes:
        card["considerations"] = {"technicalLimitations": list(report.notes)}
    return card


_MAKES = {"text": "text", "embeddings": "vector", "reranking": "score"}


def _metrics(variant: Variant, report: Report) -> list[Json]:
    quality, against = variant.quality, f"against {report.source.label} ({report.source.precision})"
    named = {
        "KL divergence, mean": quality.kld_mean,
        "same top token, share": quality.top1_agreement,
        "perplexity, ratio": quality.perplexity_ratio,
    }
    metrics: list[Json] = []
    for name, figure in named.items():
        metric: Json = {"type": name, "value": f"{figure.value:.6g}", "slice": against}
        if figure.error is not None:
            low, high = figure.value - figure.error, figure.value + figure.error
            metric["confidenceInterval"] = {"lowerBound": f"{low:.6g}", "upperBound": f"{high:.6g}"}
        metrics.append(metric)
    return metrics
