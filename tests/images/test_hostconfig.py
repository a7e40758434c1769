"""What a build borrows from the host."""

from __future__ import annotations

import configparser
import os
from pathlib import Path

import pytest

from edge.errors import RecipeError
from images import hostconfig
from images.hostconfig import format_pip_config, localise, parse_pip_config, read_debian_sources, write_inputs

LISTING = """\
:env:.find-links='/srv/wheels'
:env:.cert='/etc/ssl/own.pem'
global.find-links='/elsewhere'
global.index-url='https://user:pw@index.example/simple'
global.trusted-host='index.example\\nother.example'
install.user='true'
"""


def test_the_environment_wins_and_only_sources_are_taken() -> None:
    assert parse_pip_config(LISTING) == {
        "find-links": "/srv/wheels",
        "index-url": "https://user:pw@index.example/simple",
        "trusted-host": "index.example\nother.example",
    }


def test_directories_of_the_host_are_mounted_under_neutral_names(tmp_path: Path) -> None:
    (tmp_path / "index" / "simple").mkdir(parents=True)
    (tmp_path / "wheels").mkdir()
    options = {
        "extra-index-url": f"file://{tmp_path}/index/simple https://index.example/simple",
        "find-links": f"{tmp_path}/wheels {tmp_path}/missing",
    }
    changed, mounts = localise(options)
    assert changed == {
        "extra-index-url": "file:///mnt/local0/simple https://index.example/simple",
        "find-links": "file:///mnt/local1",
    }
    assert [m.argument for m in mounts] == [f"{tmp_path}/index:/mnt/local0:ro", f"{tmp_path}/wheels:/mnt/local1:ro"]


def test_an_option_whose_directories_are_all_gone_is_left_out(tmp_path: Path) -> None:
    assert localise({"find-links": f"{tmp_path}/missing"}) == ({}, [])


def test_the_configuration_is_one_that_pip_reads() -> None:
    parser = configparser.ConfigParser()
    parser.read_string(format_pip_config({"index-url": "https://i/simple"}, ca_bundle="/mnt/ca.crt"))
    assert dict(parser["global"]) == {"index-url": "https://i/simple", "cert": "/mnt/ca.crt"}


def test_inputs_are_private_files_and_mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_DEBIAN_MIRROR", "http://mirror.example/debian")
    mounts = write_inputs(tmp_path, debian_suite="bookworm")
    assert mounts[0].argument == f"{tmp_path}:/mnt:ro"
    assert mounts[-1].argument == f"{tmp_path}/debian.sources:{hostconfig.APT_SOURCES}:ro"
    assert "http://mirror.example/debian" in (tmp_path / "debian.sources").read_text()
    assert (tmp_path / "pip.conf").read_text().startswith("[global]\n")
    assert all((tmp_path / Path(m.target).name).is_dir() for m in mounts if "local" in m.target)
    assert write_inputs(_made(tmp_path / "other"), debian_suite=None)[-1].target != hostconfig.APT_SOURCES


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def test_a_host_without_a_mirror_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apt = tmp_path / "apt-get"
    apt.write_text("#!/bin/sh\necho 'Ubuntu|jammy|http://archive.example/ubuntu/'\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("EDGE_DEBIAN_MIRROR", raising=False)
    with pytest.raises(RecipeError, match="EDGE_DEBIAN_MIRROR"):
        read_debian_sources("bookworm")


def test_only_debians_own_sources_of_the_suite_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["Debian|bookworm|http://m/debian/", "Debian|trixie|http://m/debian/", "Other|bookworm|http://o/"]
    apt = tmp_path / "apt-get"
    apt.write_text(
        "#!/bin/sh\n" + "".join(f"echo '{row}'\n" for row in [*rows, "Debian|bookworm-security|http://m/s/"])
    )
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("EDGE_DEBIAN_MIRROR", raising=False)
    text = read_debian_sources("bookworm")
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("URIs")] == ["URIs: http://m/s/", "URIs: http://m/debian/"]
    assert [line for line in lines if line.startswith("Suites")] == ["Suites: bookworm-security", "Suites: bookworm"]
