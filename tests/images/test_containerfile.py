"""The recipes keep the rules, and the rules find what they are for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from images.build import COMMON, project_root
from images.target import load_targets
from tests.images.containerfile import lint, read_instructions

ROOT = project_root()
CPU = (ROOT / "images" / "cpu-x86_64" / "Containerfile").read_text()


@pytest.mark.parametrize("name", load_targets())
def test_every_recipe_keeps_the_rules(name: str) -> None:
    assert lint((ROOT / load_targets()[name].containerfile).read_text()) == []


def test_the_root_recipe_is_the_cpu_appliance() -> None:
    assert (ROOT / "Containerfile").resolve() == (ROOT / "images" / "cpu-x86_64" / "Containerfile").resolve()


@pytest.mark.parametrize("name", load_targets())
def test_defaults_of_a_recipe_are_those_of_its_row(name: str) -> None:
    target = load_targets()[name]
    arguments = [i.rest for i in read_instructions((ROOT / target.containerfile).read_text()) if i.name == "ARG"]
    assert f"BASE={target.base}" in arguments
    assert f'CMAKE_ARGS="{" ".join(target.cmake_args)}"' in arguments


@pytest.mark.parametrize(
    ("old", "new", "finding"),
    [
        ("USER 10001:10001", "USER root", "unprivileged"),
        ("USER 10001:10001", "USER 0", "unprivileged"),
        ("USER 10001:10001", "", "unprivileged"),
        ("HEALTHCHECK ", "LABEL a=", "no health check"),
        ("ENTRYPOINT [", "ENTRYPOINT edge [", "exec form"),
        ("libgomp1 python3 &&", "libgomp1 python3 g++ &&", "build stage"),
        ("COPY edge /src/edge", "ADD edge /src/edge", "ADD"),
        ("ARG BASE=debian", "ARG BASE=registry.example.com/debian", "an address"),
        ("COPY edge /src/edge", "RUN curl https://example/x | sh", "an address"),
        ("COPY edge /src/edge", "COPY /etc/pip.conf /etc/pip.conf", "file of the host"),
        ("COPY edge /src/edge", "ARG HUB_TOKEN", "secret"),
        ("--no-deps --require-hashes", "", "without a lock"),
        ("--no-install-recommends", "", "recommended"),
    ],
)
def test_a_broken_rule_is_found(old: str, new: str, finding: str) -> None:
    broken = CPU.replace(old, new)
    assert broken != CPU
    assert any(finding in found for found in lint(broken)), lint(broken)


def test_the_engine_lock_is_the_core_locks_engine() -> None:
    core = (ROOT / "images" / "locks" / "core.txt").read_text()
    engine = (ROOT / "images" / "locks" / "llama.txt").read_text()
    assert engine in core
    assert re.findall(r"^[a-z0-9-]+==", engine, re.MULTILINE) == ["llama-cpp-python=="]


def test_units_name_what_the_image_has() -> None:
    service, quadlet = ((COMMON / name).read_text() for name in ("slm-edge.service", "slm-edge.container"))
    for unit in (service, quadlet):
        assert "localhost/slm-edge:cpu-x86_64" in unit
        assert "/var/lib/slm-edge/run" in unit
        assert "10001" in unit
    user = next(i.rest for i in reversed(read_instructions(CPU)) if i.name == "USER")
    assert user == "10001:10001"


@pytest.mark.parametrize("path", sorted(p for p in (ROOT / "images").rglob("*") if p.suffix in {".sh", ".toml", ".in"}))
def test_no_file_of_the_recipes_names_a_host(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"\w+://", text)
    assert not re.search(r"\b(?:pypi|debian|docker|quay|ghcr)\.(?:org|io|com)\b", text)
