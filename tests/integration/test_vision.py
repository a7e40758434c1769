"""Images through HTTP: a tiny model that sees, and the default one, which does not."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from edge.store.fetch import pull
from edge.store.models import ModelStore
from runtime import wire
from runtime.api.images import conversation_of
from runtime.api.openai_schema import ChatMessage
from runtime.backends.llama_cpp import LlamaBackend, LlamaOptions
from runtime.request import SamplingParams
from runtime.worker import PromptMaker
from tests.support import DEFAULT_MODEL, SEED, RunningAppliance, run_edge, running_appliance, sse_events
from tests.vision import EPSILON, VisionFiles, data_url, gap, image_part, picture

SEEING = "tiny:vision"
CHAT = "/v1/chat/completions"
BOMBS = f"{Path(__file__).parents[2] / 'tests' / 'bombs'}:{Path(__file__).parents[2]}"


@pytest.fixture(scope="module")
def appliance(tmp_path_factory: pytest.TempPathFactory, vision_files: VisionFiles) -> Iterator[RunningAppliance]:
    home = tmp_path_factory.mktemp("home")
    store = ModelStore(home / "store", seed=SEED)
    pull(store, str(vision_files.model), name=SEEING, projector=str(vision_files.projector))
    with running_appliance(home, EDGE_THREADS="1", PYTHONPATH=BOMBS) as running:
        yield running


@pytest.fixture
def http(appliance: RunningAppliance) -> Iterator[httpx.Client]:
    with appliance.client() as client:
        yield client


def body(*parts: dict[str, Any] | str, **more: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    return {
        "model": SEEING,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 12,
        "return_token_ids": True,
        **more,
    }


def answer(http: httpx.Client, asked: dict[str, Any]) -> dict[str, Any]:
    response = http.post(CHAT, json=asked)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def tokens(found: dict[str, Any]) -> list[int]:
    ids: list[int] = found["choices"][0]["token_ids"]
    return ids


def cached(found: dict[str, Any]) -> int:
    count: int = found["usage"]["prompt_tokens_details"]["cached_tokens"]
    return count


def test_pictures_are_seen_told_apart_and_remembered(http: httpx.Client) -> None:
    first, other, again, jpeg = (
        answer(http, body("What is in ", image_part(data), "?"))
        for data in (picture(1), picture(2), picture(1), picture(3, kind="JPEG"))
    )
    assert tokens(first) == tokens(again) != tokens(other) != tokens(jpeg)
    assert cached(again) == first["usage"]["prompt_tokens"] - 1
    assert cached(other) < first["prompt_token_ids"].index(-1) + 1
    assert first["prompt_token_ids"].count(-1) == 20


def test_forms_of_a_request(http: httpx.Client) -> None:
    plain = answer(http, body("See ", image_part(picture(4)), " now"))
    url = data_url(picture(4), "application/octet-stream")
    bare = answer(http, body("See ", {"type": "image_url", "image_url": url}, " now"))
    detailed = {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
    assert tokens(plain) == tokens(bare) == tokens(answer(http, body("See ", detailed, " now")))
    several = answer(http, body("See ", detailed, " now", n=2))
    assert [c["token_ids"] for c in several["choices"]] == [tokens(plain)] * 2
    asked = body("See ", detailed, " now", stream=True, return_token_ids=False)
    with http.stream("POST", CHAT, json=asked) as stream:
        text = "".join(c["delta"].get("content", "") for e in sse_events(stream.iter_lines()) for c in e["choices"])
    assert text == plain["choices"][0]["message"]["content"]
    two_turns = body(image_part(picture(4)), "so")
    two_turns["messages"] += [{"role": "assistant", "content": "yes"}, *body("and", image_part(picture(5)))["messages"]]
    assert answer(http, two_turns)["prompt_token_ids"].count(-1) == 40


def test_texts_and_images_at_once_are_answered_as_alone(http: httpx.Client, vision_files: VisionFiles) -> None:
    asked = [body(f"Number {i}: ", image_part(picture(10 + i % 4)), " and so on") for i in range(8)]
    asked += [body(f"Only a text, number {i}, and nothing to be seen", max_tokens=40) for i in range(8)]
    alone = [tokens(answer(http, a)) for a in asked]
    with ThreadPoolExecutor(16) as pool:
        together = [tokens(found) for found in pool.map(partial(answer, http), asked)]
    backend = LlamaBackend(vision_files.model, LlamaOptions(1, 1, 64, 512, 4 << 30, projector=vision_files.projector))
    maker = PromptMaker(backend, image_bytes=1 << 30)
    for a, one, other in zip(asked, alone, together, strict=True):
        found = conversation_of(msgspec.convert(a["messages"], list[ChatMessage]))
        message = wire.Generate(1, found.messages, None, SamplingParams(), 12, [], images=tuple(found.images))
        assert one == other or gap(backend, maker.request(message)[0], other) < EPSILON, "the greedy law"
    backend.close()


def test_a_model_says_whether_it_sees(http: httpx.Client, appliance: RunningAppliance) -> None:
    listed = {m["id"]: m["capabilities"] for m in http.get("/v1/models").json()["data"]}
    assert listed[SEEING] == ["completion", "tools", "vision"]
    assert listed[DEFAULT_MODEL] == ["completion", "tools"]
    infos = {m["ref"]: m["capabilities"] for m in http.get("/edge/v1/models").json()["models"]}
    assert infos[SEEING] == ["completion", "tools", "vision"]
    shown = run_edge("show", SEEING, home=appliance.home)
    assert "text, also about images" in shown.stdout
    assert "mmproj-tiny-vision.gguf" in shown.stdout


def test_images_as_ollamas_clients_send_them(http: httpx.Client) -> None:
    expected = answer(http, body(image_part(picture(4)), "See"))
    image = data_url(picture(4), "image/png").partition(",")[2]
    options = {"temperature": 0, "num_predict": 12}
    chat = {"model": SEEING, "messages": [{"role": "user", "content": "See", "images": [image]}], "options": options}
    generate = {"model": SEEING, "prompt": "See", "images": [image], "options": options}
    texts = [http.post(f"/api/{kind}", json={**asked, "stream": False}).json()
             for kind, asked in (("chat", chat), ("generate", generate))]  # fmt: skip
    assert texts[0]["message"]["content"] == texts[1]["response"] == expected["choices"][0]["message"]["content"]
    assert http.post("/api/show", json={"model": SEEING}).json()["capabilities"] == ["completion", "tools", "vision"]


def test_a_model_without_a_projector_refuses_and_is_not_loaded_for_it(http: httpx.Client) -> None:
    response = http.post(CHAT, json=body("See", image_part(picture(1)), model=DEFAULT_MODEL))
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "vision_unsupported")
    assert error["param"] == "messages[0].content[1].image_url"
    assert "no projector" in error["message"]
    assert SEEING in error["message"]
    assert "--projector" in error["message"]
    states = {m["ref"]: m["state"] for m in http.get("/edge/v1/models").json()["models"]}
    assert states[DEFAULT_MODEL] == "unloaded"


def bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(64 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def huge() -> bytes:
    data = bytearray(picture(1))
    data[16:24] = struct.pack(">II", 100_000, 100_000)
    return bytes(data)


def sent(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.parametrize(
    ("parts", "status", "message"),
    [
        pytest.param([image_part(picture(1)[:-30])], 400, "cut short", id="a truncated png"),
        pytest.param([image_part(picture(1, kind="JPEG")[:-300])], 400, "cut short", id="a truncated jpeg"),
        pytest.param([image_part(huge())], 400, "100,000 by 100,000", id="a header that lies"),
        pytest.param([image_part(bomb())], 400, "inflate", id="a zip bomb"),
        pytest.param([image_part(b"I am a text, trust me")], 400, "neither a PNG nor a JPEG", id="a text as png"),
        pytest.param([image_part(picture(1, kind="GIF"))], 400, "GIF", id="a gif"),
        pytest.param([image_part(b"")], 400, "empty", id="nothing"),
        pytest.param([sent("https://example.org/a.png")], 400, "fetches nothing", id="a remote url"),
        pytest.param([sent("file:///etc/passwd")], 400, "fetches nothing", id="a file"),
        pytest.param([sent("data:image/png,abc")], 400, "base64", id="not base64"),
        pytest.param([sent("data:image/png;base64,a*c=")], 400, "base64 is damaged", id="damaged base64"),
        pytest.param([sent("data:image/png;base64," + "A" * (14 << 20))], 400, "more than", id="a long data url"),
        pytest.param([sent("data:image/png;base64," + "A" * (17 << 20))], 413, "", id="a longer data url"),
        pytest.param([image_part(picture(1))] * 1000, 400, "more than 16 images", id="a thousand images"),
        pytest.param([{"type": "image_url"}], 400, "image_url", id="no url"),
        pytest.param([{"type": "input_audio", "input_audio": "x"}], 400, "input_audio", id="sound"),
        pytest.param([image_part(picture(1)), "\ufdd10\ufdd1"], 200, "", id="what looks like an image's place"),
    ],
)  # fmt: skip
def test_hostile_images_are_refused_and_the_server_goes_on(
    http: httpx.Client, parts: list[dict[str, Any] | str], status: int, message: str
) -> None:
    response = http.post(CHAT, json=body("See", *parts))
    assert response.status_code == status, response.text[:300]
    assert message in response.text
    assert answer(http, body("See ", image_part(picture(1)), " now"))
    infos = {m["ref"]: m for m in http.get("/edge/v1/models").json()["models"]}
    assert infos[SEEING]["num_restarts"] == 0


def test_a_worker_that_dies_of_an_image_blames_its_request(http: httpx.Client) -> None:
    for size in ((13, 17), (13, 19)):  # see tests/bombs
        refused = http.post(CHAT, json=body("See", image_part(picture(6, size=size))))
        assert refused.status_code == 422, refused.text
        assert refused.json()["error"]["code"] == "request_poisoned"
        assert answer(http, body("See ", image_part(picture(1)), " now"))


def test_what_was_seen_is_remembered_over_a_restart(tmp_path: Path, vision_files: VisionFiles) -> None:
    store = ModelStore(tmp_path / "store", seed=SEED)
    pull(store, str(vision_files.model), name=SEEING, projector=str(vision_files.projector))
    asked = body("What do you see here? " * 4, image_part(picture(1)), " Say it in a few words, and no more than that.")
    found: list[dict[str, Any]] = []
    for _ in range(2):
        with running_appliance(tmp_path, EDGE_THREADS="1") as appliance, appliance.client() as client:
            found += [answer(client, asked), answer(client, asked)]
    assert {tuple(tokens(f)) for f in found} == {tuple(tokens(found[0]))}
    assert cached(found[0]) == 0
    assert cached(found[2]) > found[0]["prompt_token_ids"].index(-1)


def test_a_directory_with_both_files_is_pulled_as_one_model(tmp_path: Path, vision_files: VisionFiles) -> None:
    for file in (vision_files.model, vision_files.projector):
        (tmp_path / "both" / file.name).parent.mkdir(exist_ok=True)
        (tmp_path / "both" / file.name).write_bytes(file.read_bytes())
    done = run_edge("pull", str(tmp_path / "both"), "--name", "both", home=tmp_path)
    assert done.returncode == 0, done.stderr
    model = ModelStore(tmp_path / "store").get("both")
    assert model.weights.read_bytes() == vision_files.model.read_bytes()
    assert model.projector is not None
    assert model.projector.read_bytes() == vision_files.projector.read_bytes()
    wrong = run_edge("pull", str(vision_files.projector), home=tmp_path)
    assert wrong.returncode != 0
    assert "--projector" in wrong.stderr
    swapped = run_edge(
        "pull", str(vision_files.model), "--projector", str(vision_files.model), "--name", "x", home=tmp_path
    )
    assert swapped.returncode != 0
    assert "no projector" in swapped.stderr
