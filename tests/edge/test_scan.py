"""What is refused on its way into the store, whichever way it comes."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec
import pytest

from edge.errors import EdgeError, InvalidModelFile
from edge.formats.gguf import read_gguf
from edge.formats.template import digest_of
from edge.store.derived import Changes, derive
from edge.store.details import TEMPLATE, TEMPLATE_DIGEST, ModelDetails, details_of
from edge.store.digest import Digest, digest_file
from edge.store.fetch import package_of, pull
from edge.store.manifest import WEIGHT_TYPE
from edge.store.models import ModelStore, PackageFile
from edge.store.scan import Part, scan, scan_package
from edge.store.uploads import receiving
from tests.edge.gguf_files import METADATA, gguf_bytes
from tests.edge.onnx_files import external, onnx_bytes, tensor
from tests.edge.store_support import NoSync, add_model, assert_sound, write_gguf
from tests.edge.test_safetensors import safetensors_bytes

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
HARMFUL = {
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "too much time"),
    "memory": ("{{ 'x' * 10000000000 }}", "MemoryError"),
    "memory while it compiles": ("{{ ('x' * 60000) * 60000 }}", "too much|MemoryError"),
    "doubling": (
        "{% set n = namespace(x='x' * 99999) %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "too much|MemoryError",
    ),
    "a huge number": ("{{ 9 ** (9 ** 9) }}", "too much"),
    "reaching for Python": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "reaching when there are tools": ("{% if tools %}{{ ''.__class__.__mro__[1] }}{% endif %}", "unsafe"),
    "no Jinja": ("{% for %}", "does not compile"),
    "blocks in blocks": ("{% if 1 %}" * 200 + "{% endif %}" * 200, "does not compile|too much"),
    "a long text": ("{{ 'x' * 2000000 }}", "2,000,0.. characters"),
    "long itself": ("x" * (1 << 21), "longer than"),
}  # fmt: skip


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("reached",)


def zipped() -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil()))
    return buffer.getvalue()


def with_template(template: str) -> bytes:
    return gguf_bytes({**METADATA, "tokenizer.chat_template": template})


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def refusal(parts: Mapping[str, bytes], tmp_path: Path, notes: Mapping[str, str] = MappingProxyType({})) -> str:
    found = [Part(name, write(tmp_path / "parts" / str(i), data)) for i, (name, data) in enumerate(parts.items())]
    with pytest.raises(InvalidModelFile) as caught:
        scan_package(found, notes)
    return caught.value.message


CODE = {
    "a pickle": ("model.bin", pickle.dumps(Evil())),
    "an old pickle": ("notes.txt", pickle.dumps(Evil(), protocol=0)),
    "an archive of one": ("model.bin", zipped()),
    "by name": ("model.pt", b""),
    "of numpy": ("weights", b"\x93NUMPY\x01\0"),
    "as a tokenizer": ("tokenizer.json", pickle.dumps({"a": 1}, protocol=2)),
}


@pytest.mark.parametrize("case", CODE)
def test_what_can_run_code_is_refused(case: str, tmp_path: Path) -> None:
    name, data = CODE[case]
    assert "can run code" in refusal({name: data}, tmp_path)


@pytest.mark.parametrize("text", ["", "cos\nsystem\n", "(c) 2026 The Authors\nAll rights reserved.\n", "{}", "I."])
def test_texts_are_no_pickles(text: str, tmp_path: Path) -> None:
    scan(write(tmp_path / "LICENSE", text.encode()), "LICENSE")


BROKEN = {
    "GGUF": ("a.gguf", gguf_bytes()[:-40]),
    "GGUF without a name": ("", gguf_bytes()[:-40]),
    "safetensors": ("a.safetensors", safetensors_bytes(data=bytes(27))),
    "ONNX": ("a.onnx", onnx_bytes()[:-5]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_weights_are_refused(case: str, tmp_path: Path) -> None:
    name, data = BROKEN[case]
    refusal({name: data}, tmp_path)


def test_sound_weights_are_taken(tmp_path: Path) -> None:
    for name, data in {"a.gguf": gguf_bytes(), "a.safetensors": safetensors_bytes(), "a.onnx": onnx_bytes()}.items():
        scan(write(tmp_path / name, data), name)


def test_weights_of_no_known_format_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "w", b"TFL3 weights")
    scan(path, "notes.bin")
    with pytest.raises(InvalidModelFile, match="no format that is read"):
        scan_package([Part("w.tflite", path, WEIGHT_TYPE)])


def split_onnx(location: str = "model.data", *, offset: int = 0) -> bytes:
    return onnx_bytes(tensor("w", [4, 2], 1, *external(location, offset=str(offset))))


def test_weights_beside_an_onnx_file_may_look_like_anything(tmp_path: Path) -> None:
    graph, data = write(tmp_path / "a", split_onnx()), write(tmp_path / "b", b"\x80\x02" + bytes(30))
    scan_package([Part("onnx/model.onnx", graph), Part("onnx/model.data", data, WEIGHT_TYPE)])
    assert "can run code" in refusal({"model.data": data.read_bytes()}, tmp_path)


def test_an_onnx_file_exempts_no_weights_from_their_readers(tmp_path: Path) -> None:
    for name, data in (("a.gguf", gguf_bytes()[:-40]), ("a.safetensors", bytes(60)), ("a", gguf_bytes()[:-40])):
        refusal({"a.onnx": split_onnx(name), name: data}, tmp_path)


def test_weights_beside_an_onnx_file_have_to_be_there(tmp_path: Path) -> None:
    assert "not in the package" in refusal({"onnx/model.onnx": split_onnx(), "model.data": bytes(32)}, tmp_path)
    assert "cut short" in refusal({"model.onnx": split_onnx(offset=1), "model.data": bytes(32)}, tmp_path)
    assert "said to lie in" in refusal({"onnx/model.onnx": split_onnx("../model.data"), "model.data": b""}, tmp_path)


@pytest.mark.parametrize("case", HARMFUL)
def test_templates_that_do_harm_are_refused(case: str, tmp_path: Path) -> None:
    template, reason = HARMFUL[case]
    with pytest.raises(InvalidModelFile, match=reason):
        scan(write(tmp_path / "a.gguf", with_template(PLAIN + template)), "a.gguf")


REFUSING = [PLAIN, "", "Hello.", "{{ raise_exception('begin with the system') }}", "{{ messages.append(1) }}"]


@pytest.mark.parametrize("template", REFUSING)
def test_templates_that_only_refuse_are_taken(template: str, tmp_path: Path) -> None:
    scan(write(tmp_path / "a.gguf", with_template(template)), "a.gguf")


def test_templates_are_looked_for_in_all_places(tmp_path: Path) -> None:
    bomb, _ = HARMFUL["memory"]
    places: Mapping[str, bytes] = {
        "chat_template.jinja": bomb.encode(),
        "a/tokenizer_config.json": b'{"chat_template":"{{ \'x\' * 10000000000 }}"}',
        "tokenizer_config.json": b'{"chat_template":[{"name":"b","template":"{{ \'x\' * 10000000000 }}"}]}',
    }
    for name, data in places.items():
        assert "MemoryError" in refusal({name: data}, tmp_path)
    assert "MemoryError" in refusal({"a.gguf": gguf_bytes()}, tmp_path, {TEMPLATE: bomb})
    assert "zero byte" in refusal({"a.gguf": with_template("a\0b")}, tmp_path)


def test_more_templates_than_any_model_has_are_refused_before_one_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(template: str) -> None:
        pytest.fail(f"{template} was tried")

    monkeypatch.setattr("edge.store.scan.check_harmless", fail)
    templates = [{"name": f"t{i}", "template": f"{i}"} for i in range(5000)]
    data = msgspec.json.encode({"chat_template": templates})
    assert "more than 16 chat templates" in refusal({"tokenizer_config.json": data}, tmp_path)


def test_the_digest_of_the_template_stands_in_the_manifest(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store", files=NoSync())
    model = add_model(store, "a", write(tmp_path / "a.gguf", with_template(PLAIN)))
    assert model.manifest.annotations[TEMPLATE_DIGEST] == model.details.template_digest == digest_of(PLAIN)
    assert TEMPLATE_DIGEST not in add_model(store, "b", write_gguf(tmp_path / "b.gguf")).manifest.annotations
    other = {"a.gguf": with_template(PLAIN + " "), "notes": b""}
    assert "another than the one" in refusal(other, tmp_path, {TEMPLATE_DIGEST: digest_of(PLAIN)})


def test_every_way_into_the_store_is_guarded(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "store", files=NoSync())
    bomb = write(tmp_path / "bomb.gguf", with_template(PLAIN + HARMFUL["memory"][0]))
    digest = digest_file(bomb)

    def by_upload() -> None:
        with receiving(store, digest) as upload:
            upload.write(bomb.read_bytes())
            upload.finish()
        file, details = package_of(store, digest, "bomb.gguf")
        derive(store, "bomb", [file], details, Changes())

    def by_changes() -> None:
        add_model(store, "sound", write_gguf(tmp_path / "sound.gguf"))
        file = PackageFile(tmp_path / "sound.gguf", "a.gguf")
        derive(store, "bomb", [file], ModelDetails(), Changes(template=HARMFUL["memory"][0]))

    def by_manifest() -> None:
        add_model(store, "sound", write_gguf(tmp_path / "sound.gguf"))
        with store.blobs.ingest("bomb") as partial:
            store.keep(store.blobs.copy_in(bomb, partial))
        manifest = store.get("sound").manifest
        layer = msgspec.structs.replace(manifest.layers[0], digest=digest, size=bomb.stat().st_size)
        store.add_manifest("bomb", msgspec.structs.replace(manifest, layers=[layer]).encode())

    ways = {
        "pull": lambda: pull(store, str(bomb), name="bomb"),
        "add": lambda: store.add("bomb", [PackageFile(bomb, "a.gguf")], details_of(read_gguf(bomb))),
        "upload": by_upload,
        "changes": by_changes,
        "manifest": by_manifest,
    }
    for name, way in ways.items():
        with pytest.raises(EdgeError, match="chat template"):
            way()
        assert "bomb:latest" not in map(str, store.refs()), name
    store.collect()
    assert [str(model.ref) for model in assert_sound(store.root)] == ["sound:latest"]
    assert not store.blobs.has(Digest(digest)), "what is refused leaves no bytes"
