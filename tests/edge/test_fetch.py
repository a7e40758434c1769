"""Pulling from web servers and files: resumed, checked, and nothing left of what proved wrong."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from typing_extensions import override

from edge.errors import (
    Cancelled,
    DigestMismatch,
    DiskFull,
    InvalidModelFile,
    InvalidReference,
    ModelNotFound,
    SourceUnavailable,
    StoreError,
)
from edge.store import http
from edge.store.fetch import Progress, derived_ref, plan, pull
from edge.store.files import FileOps
from edge.store.models import ModelStore
from tests.edge.file_server import FileServer, ServedFile, serve
from tests.edge.gguf_files import gguf_bytes, sized_gguf
from tests.edge.store_support import Killed, KillingFileOps, NoSync, assert_sound, write_gguf

MODEL = sized_gguf(12_000)
"""3 MB."""
SHA256 = hashlib.sha256(MODEL).hexdigest()
PATH = "/models/Tiny-Q8_0.gguf"


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_BACKOFF_S", 0.001)


@pytest.fixture
def file() -> ServedFile:
    return ServedFile(MODEL)


@pytest.fixture
def server(file: ServedFile) -> Generator[FileServer]:
    with serve({PATH: file}) as served:
        yield served


def left_over(store: ModelStore) -> list[str]:
    return [path.name for path in (store.root / "ingest").iterdir()]


def kept_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.glob("ingest/*.partial"))


def test_a_file_is_pulled_and_named_after_itself(store: ModelStore, server: FileServer) -> None:
    seen: list[Progress] = []
    model = pull(store, f"{server.url}{PATH}?signature=secret#x", progress=seen.append)
    assert str(model.ref) == "tiny:q8_0"
    assert model.weights.read_bytes() == MODEL
    assert (model.architecture, model.quantization, model.context_tokens) == ("llama", "F32", 128)
    assert model.source == f"{server.url}{PATH}", "a signature has no place in a manifest"
    assert [file.name for file in model.files] == ["Tiny-Q8_0.gguf"]
    assert left_over(store) == []
    fetching = [at for at in seen if at.message == "fetching Tiny-Q8_0.gguf"]
    assert {at.total_bytes for at in fetching} == {len(MODEL)}
    assert [at.done_bytes for at in fetching] == sorted(at.done_bytes for at in fetching)
    assert fetching[-1].done_bytes == len(MODEL)
    assert server.total_sent() == len(MODEL)


def test_what_is_there_already_is_not_fetched(store: ModelStore, server: FileServer) -> None:
    pull(store, server.url + PATH, sha256=SHA256)
    server.asked.clear()
    assert str(pull(store, server.url + PATH, name="other", sha256=SHA256).ref) == "other:latest"
    assert server.asked == []


def test_a_damaged_file_is_fetched_again(store: ModelStore, server: FileServer) -> None:
    model = pull(store, server.url + PATH, sha256=SHA256)
    model.weights.write_bytes(MODEL[:-1] + b"\0")
    pull(store, server.url + PATH, sha256=SHA256)
    assert_sound(store.root)
    assert server.total_sent() == 2 * len(MODEL)


def test_a_connection_that_drops_is_taken_up_again(store: ModelStore, file: ServedFile, server: FileServer) -> None:
    file.drop_after = [1_500_000, 0, 0, 700_000]
    pull(store, server.url + PATH)
    assert_sound(store.root)
    ranges = [request.headers["Range"] for request in server.requests("GET")[1:]]
    assert len(ranges) == 4
    assert all(request.headers["If-Range"] == '"1"' for request in server.requests("GET")[1:])
    assert server.total_sent() == len(MODEL)


def test_a_server_that_gives_nothing_is_given_up(store: ModelStore, file: ServedFile, server: FileServer) -> None:
    file.drop_after = [1_500_000, *[0] * 10]
    with pytest.raises(SourceUnavailable, match="stopped answering"):
        pull(store, server.url + PATH)
    assert_sound(store.root)
    file.drop_after = []
    before, kept = server.total_sent(), kept_bytes(store.root)
    pull(store, server.url + PATH)
    assert kept == 1_500_000
    assert server.total_sent() - before == len(MODEL) - kept
    assert left_over(store) == []


def test_a_file_that_changed_is_fetched_anew(store: ModelStore, file: ServedFile, server: FileServer) -> None:
    file.drop_after = [1_500_000, *[0] * 10]
    with pytest.raises(SourceUnavailable):
        pull(store, server.url + PATH)
    changed = sized_gguf(12_000, fill=b"\x05")
    server.files[PATH] = ServedFile(changed, etag='"2"')
    assert pull(store, server.url + PATH).weights.read_bytes() == changed


@pytest.mark.parametrize(
    "odd",
    [
        ServedFile(MODEL, has_ranges=False, drop_after=[1_500_000]),
        ServedFile(MODEL, etag="", drop_after=[1_500_000]),
        ServedFile(MODEL, etag='W/"weak"', drop_after=[1_500_000]),
        ServedFile(MODEL, etag="", last_modified="Fri, 20 Nov 2026 06:00:00 GMT", drop_after=[1_500_000]),
        ServedFile(MODEL, lie_about_range=True, drop_after=[1_500_000]),
        ServedFile(MODEL, has_head=False),
        ServedFile(MODEL, has_length=False),
        ServedFile(MODEL, failures=[503, 429, 500]),
    ],
    ids=["no ranges", "no validator", "weak etag", "date", "wrong range", "no HEAD", "no length", "busy"],
)
def test_odd_servers_give_the_right_bytes(store: ModelStore, odd: ServedFile) -> None:
    with serve({PATH: odd}) as server:
        pull(store, server.url + PATH)
    assert_sound(store.root)


def test_without_a_validator_the_digest_allows_to_resume(store: ModelStore) -> None:
    with serve({PATH: ServedFile(MODEL, etag="", drop_after=[2_200_000])}) as server:
        pull(store, server.url + PATH, sha256=SHA256)
        assert server.total_sent() == len(MODEL)


def test_wrong_bytes_that_were_resumed_are_fetched_once_more(store: ModelStore) -> None:
    other = sized_gguf(12_000, fill=b"\x09")
    with serve({PATH: ServedFile(other, etag="", drop_after=[1_500_000, *[0] * 9])}) as server:
        with pytest.raises(SourceUnavailable):
            pull(store, server.url + PATH, sha256=SHA256)
        server.files[PATH] = ServedFile(MODEL, etag="")
        pull(store, server.url + PATH, sha256=SHA256)
    assert_sound(store.root)


def test_the_wrong_file_is_refused_and_thrown_away(store: ModelStore, server: FileServer) -> None:
    with pytest.raises(DigestMismatch) as caught:
        pull(store, server.url + PATH, sha256="0" * 64)
    assert caught.value.actual == f"sha256:{SHA256}"
    assert store.list() == []
    assert left_over(store) == []


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (MODEL[:-1], "cut short"),
        (b"<html>Please log in</html>", "web page"),
        (b"PK\x03\x04" + bytes(100), "pickle"),
        (b"", "wants 4 bytes"),
        (gguf_bytes(tensors=()), "no tensors"),
    ],
    ids=["cut short", "web page", "pickle", "empty", "vocabulary"],
)
def test_what_is_no_model_is_refused_with_the_reason(store: ModelStore, data: bytes, reason: str) -> None:
    with serve({PATH: ServedFile(data)}) as server, pytest.raises(InvalidModelFile, match=reason) as caught:
        pull(store, server.url + PATH)
    assert caught.value.what == "Tiny-Q8_0.gguf"
    assert store.list() == []
    assert left_over(store) == []
    assert list(store.blobs.digests()) == []


@pytest.mark.parametrize(
    ("status", "message"), [(404, "404"), (410, "410"), (403, "not allowed"), (401, "not allowed")]
)
def test_a_refusing_server_is_named(store: ModelStore, status: int, message: str) -> None:
    with serve({PATH: ServedFile(MODEL, failures=[status] * 9)}) as server:
        with pytest.raises(SourceUnavailable, match=message):
            pull(store, server.url + PATH)
        assert len(server.asked) <= 2


def test_a_host_out_of_reach_is_named(store: ModelStore) -> None:
    with serve() as gone:
        pass
    with pytest.raises(SourceUnavailable, match=f"{urlsplit(gone.url).netloc} cannot be reached: Connection refused"):
        pull(store, f"{gone.url}/x.gguf")


def test_redirects_are_followed(store: ModelStore, server: FileServer) -> None:
    server.files["/latest"] = ServedFile(b"", redirect=f"{server.url}{PATH}")
    server.files["/loop"] = ServedFile(b"", redirect=f"{server.url}/loop")
    assert str(pull(store, f"{server.url}/latest").ref) == "latest:f32"
    with pytest.raises(SourceUnavailable):
        pull(store, f"{server.url}/loop")


class SmallDisk(FileOps):
    """Room for a megabyte beyond the reserve."""

    @override
    def free_bytes(self, path: Path) -> int:
        return 33 << 20


def test_what_does_not_fit_is_refused_before_it_is_fetched(tmp_path: Path, server: FileServer) -> None:
    store = ModelStore(tmp_path / "small", files=SmallDisk())
    with pytest.raises(DiskFull, match="Not enough disk space") as caught:
        pull(store, server.url + PATH)
    assert caught.value.required_bytes == len(MODEL) + (32 << 20)
    assert server.requests("GET") == []
    with pytest.raises(DiskFull):
        pull(store, str(write_gguf(tmp_path / "large.gguf", num_rows=12_000)))


class FillingDisk(FileOps):
    """Room for 80 MiB of what is fetched, beyond the reserve."""

    root = Path()

    @override
    def free_bytes(self, path: Path) -> int:
        return (112 << 20) - kept_bytes(self.root)


def test_a_file_that_gives_more_than_its_size_does_not_fill_the_disk(tmp_path: Path) -> None:
    disk = FillingDisk()
    disk.root = tmp_path / "store"
    asked = itertools.count()
    with pytest.raises(DiskFull):
        pull(ModelStore(disk.root, files=disk), "/proc/self/pagemap", cancelled=lambda: next(asked) > 200)
    assert kept_bytes(disk.root) == 0, "nothing goes on from there"


def test_a_cancelled_copy_leaves_nothing(store: ModelStore, tmp_path: Path) -> None:
    path, asked = write_gguf(tmp_path / "large.gguf", num_rows=12_000), itertools.count()
    with pytest.raises(Cancelled):
        pull(store, str(path), cancelled=lambda: next(asked) > 3)
    assert kept_bytes(store.root) == 0


def test_a_signature_stands_in_no_error_and_no_manifest(store: ModelStore, server: FileServer) -> None:
    query = "?X-Amz-Signature=5ecret#5ecret"
    with pytest.raises(SourceUnavailable, match="404") as caught:
        pull(store, f"{server.url}/absent.gguf{query}")
    with pytest.raises(InvalidReference) as refused:
        pull(store, f"ftp://host/x.gguf{query}")
    model = pull(store, f"{server.url}{PATH}{query}")
    (digest,) = (file.digest for file in model.files)
    again = pull(store, f"{server.url}{PATH}{query}", sha256=str(digest))
    for text in (str(caught.value), str(refused.value), model.source, again.source):
        assert text is not None
        assert "5ecret" not in text


def test_a_cancelled_pull_stops_and_can_go_on(store: ModelStore, server: FileServer) -> None:
    asked = itertools.count()
    with pytest.raises(Cancelled):
        pull(store, server.url + PATH, cancelled=lambda: next(asked) > 5)
    assert store.list() == []
    before, kept = server.total_sent(), kept_bytes(store.root)
    assert kept > 0
    pull(store, server.url + PATH)
    assert server.total_sent() - before == len(MODEL) - kept


def test_death_between_any_two_operations_of_a_pull(tmp_path: Path, server: FileServer) -> None:
    server.files[PATH].data = data = sized_gguf(1000)
    complete = KillingFileOps()
    pull(ModelStore(tmp_path / "complete", files=complete), server.url + PATH)
    num_survived = 0
    for number in range(len(complete.performed)):
        root = tmp_path / f"store-{number}"
        try:
            pull(ModelStore(root, files=KillingFileOps(number)), server.url + PATH)
        except Killed:
            pass
        else:  # how the bytes arrive decides how many writes a pull takes; a run may need one fewer than the first
            num_survived += 1
        visible = assert_sound(root)
        kept = kept_bytes(root)
        published = any(path.stat().st_size == len(data) for path in root.glob("blobs/sha256/*"))
        before = server.total_sent()
        pull(ModelStore(root, files=NoSync()), server.url + PATH)
        if not visible:
            missing = 0 if published else len(data) - kept
            assert server.total_sent() - before == missing, complete.performed[number]
        assert len(assert_sound(root)) == 1
    assert num_survived <= 2


def test_files_are_copied(store: ModelStore, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "My Model (v2).IQ4_NL.gguf")
    model = pull(store, str(path))
    assert str(model.ref) == "my-model-v2:iq4_nl"
    assert [file.name for file in model.files] == ["My_Model_v2_.IQ4_NL.gguf"]
    assert model.source == str(path)
    assert path.exists()
    assert str(pull(store, path.as_uri(), name="again:v1").ref) == "again:v1"
    for missing in (str(tmp_path / "missing.gguf"), str(tmp_path), f"file://{tmp_path}/missing.gguf"):
        with pytest.raises(SourceUnavailable):
            pull(store, missing)


def test_a_name_that_nobody_knows_is_explained(store: ModelStore) -> None:
    with pytest.raises(ModelNotFound, match="no model or file 'smollm3'") as caught:
        pull(store, "smollm3")
    assert "smollm2:135m-instruct" in str(caught.value.hint)


def test_a_store_that_cannot_take_the_model_says_so_before_it_is_fetched(
    store: ModelStore, file: ServedFile, server: FileServer
) -> None:
    store.root.mkdir(exist_ok=True)
    (store.root / "index.json").write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        pull(store, server.url + PATH)
    assert (server.asked, file.failures) == ([], [])


def test_the_catalog_insists_on_its_digest(store: ModelStore) -> None:
    with pytest.raises(DigestMismatch, match="catalog's smollm2:135m-instruct is another file") as caught:
        pull(store, "smollm2", sha256="0" * 64)
    assert "Leave the digest out" in str(caught.value.hint)


def test_a_plan_fetches_nothing(store: ModelStore, server: FileServer, tmp_path: Path) -> None:
    found = plan(store, server.url + PATH, name="a", sha256=SHA256)
    assert (str(found.ref), found.size_bytes, found.is_present) == ("a:latest", len(MODEL), False)
    assert found.digest == f"sha256:{SHA256}"
    assert found.free_bytes > 0
    assert not store.root.exists()
    assert server.requests("GET") == []
    pull(store, server.url + PATH)
    assert plan(store, server.url + PATH, sha256=SHA256).is_present
    known = plan(store, "smollm2:135m-instruct")
    assert (known.size_bytes, known.license) == (98_362_432, "Apache-2.0")


@pytest.mark.parametrize(
    ("file_name", "quantization", "ref"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1", "smollm2-135m-instruct:q4_1"),
        ("qwen2.5-0.5b-instruct-q4_k_m.gguf", "Q4_K_M", "qwen2-5-0-5b-instruct:q4_k_m"),
        ("model.gguf", "F16", "model:f16"),
        ("___.gguf", None, "model:latest"),
        ("x" * 300 + ".gguf", "Q8_0", "x" * 120 + ":q8_0"),
    ],
)
def test_names_are_made_of_files(file_name: str, quantization: str | None, ref: str) -> None:
    assert str(derived_ref(file_name, quantization)) == ref


def test_two_pulls_of_one_file_wait_for_each_other(store: ModelStore, server: FileServer) -> None:
    waiting, go_on = threading.Event(), threading.Event()

    def report(at: Progress) -> None:
        if at.message.startswith("waiting"):
            waiting.set()

    def first(at: Progress) -> None:
        if at.message.startswith("fetching"):
            go_on.set()
            assert waiting.wait(30)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(pull, store, server.url + PATH, name="one", progress=first)
        assert go_on.wait(30)
        other = pool.submit(pull, store, server.url + PATH, name="other", progress=report)
        assert one.result(60).digest != other.result(60).digest, "the config holds the name"
    assert len(assert_sound(store.root)) == 2
    assert left_over(store) == []
