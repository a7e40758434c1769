"""The table of targets: strict, and wrong in words."""

from __future__ import annotations

import pytest

from edge.errors import ConfigError, RecipeError
from images.target import get_target, load_targets, parse_targets

ROW = """
[box]
summary = "A box"
containerfile = "images/box/Containerfile"
base = "debian:bookworm-slim"
suite = "bookworm"
architecture = "amd64"
accelerator = "cpu"
cmake_args = ["-DGGML_NATIVE=OFF"]
smoke_model = "smollm2:135m-instruct"
max_compressed_mb = 200
"""


def test_the_table_that_ships_is_good() -> None:
    assert "cpu-x86_64" in load_targets()
    assert get_target("cpu-x86_64").architecture == "amd64"
    assert "-DGGML_NATIVE=OFF" in get_target("cpu-x86_64").cmake_args


def test_a_row_is_read() -> None:
    target = parse_targets(ROW)["box"]
    assert target.cmake_args == ("-DGGML_NATIVE=OFF",)
    assert target.max_compressed_mb == 200


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("[box]", "[box", "line"),
        ("[box]", '["Box/.."]', "Box/.."),
        ('base = "debian:bookworm-slim"', "", "base"),
        ('base = "debian:bookworm-slim"', 'base = "--root=/etc"', "base"),
        ("amd64", "x86", "architecture"),
        ('accelerator = "cpu"', 'accelerator = "cpu"\ncolour = "red"', "colour"),
        ("images/box/", "../../etc/", "containerfile"),
        ("-DGGML_NATIVE=OFF", "-DX=$(id)", "cmake_args"),
        ("-DGGML_NATIVE=OFF", "-DX=a b", "cmake_args"),
        ("-DGGML_NATIVE=OFF", "-DX=a\\n", "cmake_args"),
        ("200", '"200"', "max_compressed_mb"),
        ("200", "0", "max_compressed_mb"),
        ("[box]", "box = 3\n[other]", "box"),
    ],
)
def test_a_bad_table_is_refused_by_name(old: str, new: str, named: str) -> None:
    with pytest.raises(ConfigError, match=r"targets\.toml") as refused:
        parse_targets(ROW.replace(old, new))
    assert named in str(refused.value)


def test_an_unknown_target_lists_the_known() -> None:
    with pytest.raises(RecipeError) as refused:
        get_target("toaster")
    assert "cpu-x86_64" in str(refused.value)
