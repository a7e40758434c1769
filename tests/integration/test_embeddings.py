"""Embeddings and reranking over HTTP: real weights, real processes."""

from __future__ import annotations

import base64
import concurrent.futures
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from numpy.typing import NDArray

from edge.store.fetch import pull
from edge.store.models import ModelStore
from tests.runtime.embedding_texts import DOCUMENTS, GOLDEN, QUERY, TEXTS
from tests.support import DEFAULT_MODEL, SEED, RunningAppliance, run_edge, running_appliance

MODEL, RANKER = "minilm:test", "ranker:test"


@pytest.fixture(scope="module")
def encoders(
    minilm_gguf: Path, reranker_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningAppliance]:
    """An appliance with an embedding model and a reranker beside the default model."""
    home = tmp_path_factory.mktemp("home")
    store = ModelStore(home / "store", seed=SEED)
    pull(store, str(minilm_gguf), name=MODEL)
    pull(store, str(reranker_gguf), name=RANKER)
    with running_appliance(home) as running:
        yield running


def embed(appliance: RunningAppliance, texts: Any, **more: Any) -> dict[str, Any]:
    with appliance.client() as client:
        response = client.post("/v1/embeddings", json={"model": MODEL, "input": texts, **more})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def vectors(body: dict[str, Any]) -> NDArray[np.float32]:
    assert [item["index"] for item in body["data"]] == list(range(len(body["data"])))
    return np.array([item["embedding"] for item in body["data"]], np.float32)


def refused(appliance: RunningAppliance, path: str, **body: Any) -> dict[str, Any]:
    with appliance.client() as client:
        response = client.post(path, json=body)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def test_vectors_come_in_order_and_match_pytorch(encoders: RunningAppliance) -> None:
    body = embed(encoders, TEXTS)
    with np.load(GOLDEN) as golden:
        assert (vectors(body) * golden["vectors"]).sum(axis=1).min() > 0.999
        assert body["usage"] == {"prompt_tokens": golden["counts"].sum(), "total_tokens": golden["counts"].sum()}
    assert body["model"] == MODEL
    assert "truncated" not in body


def test_base64_is_the_same_numbers(encoders: RunningAppliance) -> None:
    plain, coded = embed(encoders, TEXTS[:5]), embed(encoders, TEXTS[:5], encoding_format="base64")
    decoded = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in coded["data"]]
    assert np.array_equal(vectors(plain), np.array(decoded))


def test_openais_client_reads_them(encoders: RunningAppliance) -> None:
    """It asks for base64 by itself."""
    with openai.OpenAI(base_url=f"{encoders.url}/v1", api_key="none") as client:
        answer = client.embeddings.create(model=MODEL, input=TEXTS[:3], dimensions=32)
    assert [len(item.embedding) for item in answer.data] == [32, 32, 32]
    assert abs(np.linalg.norm(answer.data[0].embedding) - 1) < 1e-5


def test_texts_tokens_and_lists_of_them(encoders: RunningAppliance) -> None:
    tokens = [101, 1037, 4049, 102]
    single, listed, pair = (vectors(embed(encoders, given)) for given in (tokens, [tokens], ["a boat", "a boat"]))
    assert single.shape == listed.shape == (1, 384)
    assert min(single[0] @ listed[0], single[0] @ pair[0], single[0] @ pair[1]) > 0.9999


def test_a_long_text_is_an_error_unless_it_may_be_cut(encoders: RunningAppliance) -> None:
    long = "word " * 600
    error = refused(encoders, "/v1/embeddings", model=MODEL, input=["short", long])
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input[1]")
    body = embed(encoders, ["short", long], truncate=True)
    assert (body["truncated"], body["usage"]["prompt_tokens"]) == ([1], 3 + 512)
    body = embed(encoders, ["short", long], truncate_prompt_tokens=10)
    assert (body["truncated"], body["usage"]["prompt_tokens"]) == ([1], 3 + 10)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input", []), ("input", ["a", [1]]), ("input", 7), ("input", ["a"] * 2049), ("input[0]", []),
        ("dimensions", 385), ("dimensions", 0), ("encoding_format", "hex"), ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", 2),
    ],
)  # fmt: skip
def test_bad_requests_name_their_field(encoders: RunningAppliance, field: str, value: Any) -> None:
    name, is_item, _ = field.partition("[")
    body = {"model": MODEL, "input": "a", name: [value] if is_item else value}
    assert refused(encoders, "/v1/embeddings", **body)["param"].startswith(name)


def test_null_is_as_if_left_out(encoders: RunningAppliance) -> None:
    """Some clients send every field that they know."""
    nulls = dict.fromkeys(("encoding_format", "dimensions", "truncate", "truncate_prompt_tokens", "user", "timeout_s"))
    assert np.array_equal(vectors(embed(encoders, "a boat", **nulls)), vectors(embed(encoders, "a boat")))
    body = {"model": RANKER, "query": "a", "documents": ["b"]}
    nulls = dict.fromkeys(("top_n", "return_documents", "raw_scores", "truncate", "truncate_prompt_tokens"))
    with encoders.client() as client:
        plain, null = (client.post("/v1/rerank", json=sent).json()["results"] for sent in (body, {**body, **nulls}))
    assert plain == null


def test_a_vector_is_the_same_alone_and_among_thousands(encoders: RunningAppliance) -> None:
    texts = [" ".join(TEXTS[i % 5 : i % 5 + 1 + i % 2]) + f" {i}" for i in range(2048)]
    body = embed(encoders, texts, encoding_format="base64")
    batch = np.array([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in body["data"]])
    assert abs(np.linalg.norm(batch, axis=1) - 1).max() < 1e-5
    for i in (0, 777, 2047):
        assert vectors(embed(encoders, texts[i]))[0] @ batch[i] > 0.99999


def test_a_query_is_never_cut(encoders: RunningAppliance) -> None:
    error = refused(encoders, "/v1/rerank", model=RANKER, query="w " * 600, documents=["a"], truncate=True)
    assert error["param"] == "query"
    assert "truncate" not in error["message"]


def test_a_model_is_asked_for_what_it_makes(encoders: RunningAppliance) -> None:
    error = refused(encoders, "/v1/embeddings", model=DEFAULT_MODEL, input="a")
    assert error["param"] == "model"
    assert MODEL in error["message"]
    error = refused(encoders, "/v1/chat/completions", model=MODEL, messages=[{"role": "user", "content": "hi"}])
    assert DEFAULT_MODEL in error["message"]
    assert RANKER in refused(encoders, "/v1/rerank", model=MODEL, query="a", documents=["b"])["message"]


def test_documents_are_sorted_by_their_scores(encoders: RunningAppliance) -> None:
    with np.load(GOLDEN) as golden:
        expected = golden["scores"]
    body = {"model": RANKER, "query": QUERY, "documents": [*DOCUMENTS[:-1], {"text": DOCUMENTS[-1]}]}
    with encoders.client() as client:
        raw = client.post("/v1/rerank", json={**body, "raw_scores": True}).json()
        best = client.post("/v1/rerank", json={**body, "top_n": 2, "return_documents": True}).json()
    assert [r["index"] for r in raw["results"]] == np.argsort(-expected).tolist()
    np.testing.assert_allclose([r["relevance_score"] for r in raw["results"]], -np.sort(-expected), rtol=0.01)
    assert [r["index"] for r in best["results"]] == np.argsort(-expected)[:2].tolist()
    assert best["results"][0]["document"] == {"text": DOCUMENTS[best["results"][0]["index"]]}
    assert all(0 < r["relevance_score"] <= 1 for r in best["results"])
    assert best["usage"]["total_tokens"] > 0


def test_many_clients_get_their_own(encoders: RunningAppliance) -> None:
    alone = vectors(embed(encoders, TEXTS))

    def asked(part: list[int]) -> NDArray[np.float32]:
        return vectors(embed(encoders, [TEXTS[i] for i in part]))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        parts = [[(k + i) % len(TEXTS) for i in range(1 + 3 * k)] for k in range(8)]
        answers = list(pool.map(asked, parts))
    for part, answer in zip(parts, answers, strict=True):
        assert (answer * alone[part]).sum(axis=1).min() > 0.9999


def test_a_client_that_leaves_takes_its_work_along(encoders: RunningAppliance) -> None:
    with encoders.client() as client, pytest.raises(Exception, match="timed out"):
        client.post("/v1/embeddings", json={"model": MODEL, "input": [TEXTS[-1]] * 2000}, timeout=0.5)
    assert vectors(embed(encoders, "still here")).shape == (1, 384)
    with encoders.client() as client:
        (info,) = [m for m in client.get("/edge/v1/models").json()["models"] if m["ref"] == MODEL]
    assert info["requests_active"] == 0


def test_commands_know_such_models(encoders: RunningAppliance) -> None:
    embed(encoders, "load it")
    listed = run_edge("list", home=encoders.home)
    assert MODEL in listed.stdout
    shown = run_edge("show", MODEL, home=encoders.home).stdout
    assert "embeddings, pooled by mean (/v1/embeddings)" in shown
    assert "scores of pairs" in run_edge("show", RANKER, home=encoders.home).stdout
    loaded = run_edge("ps", "--url", encoders.url, home=encoders.home)
    assert (loaded.returncode, MODEL in loaded.stdout) == (0, True)
