"""What a stranger names leads to the internet, or to a host that is listed."""

from __future__ import annotations

import socket
from collections.abc import Generator
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest
from psutil._ntuples import snicaddr

from edge.errors import Forbidden
from edge.store.fetch import pull
from edge.store.internet import is_public, public_addresses
from edge.store.models import ModelStore
from edge.store.network import Network
from tests.edge.file_server import FileServer, ServedFile, serve
from tests.edge.gguf_files import sized_gguf

PATH = "/Tiny-Q8_0.gguf"


@pytest.fixture
def server() -> Generator[FileServer]:
    with serve({PATH: ServedFile(sized_gguf(1000))}) as served:
        yield served


@pytest.mark.parametrize(
    "address",
    [
        "93.184.216.34", "2606:4700::1111", "::ffff:93.184.216.34", "2002:5db8:d822::1", "64:ff9b::5db8:d822",
    ],
)  # fmt: skip
def test_addresses_of_the_internet(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.7", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "224.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fd00::1", "ff02::1", "::ffff:127.0.0.1",
        "::ffff:10.0.0.7", "2002:7f00:1::", "2002:a00:7::1", "64:ff9b::7f00:1", "64:ff9b:1::a00:1", "fec0::1",
        "::ffff:0:127.0.0.1", "::7f00:1", "5f00::1", "2606:4700::5efe:10.0.0.7", "2606:4700::200:5efe:10.0.0.7",
        "2001:0:4136:e378:8000:63bf:f5ff:fff8", "2001:db8::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0x7f.1", "2130706433", "[::1]"])
def test_this_machine_is_not_asked_whatever_it_is_called(tmp_path: Path, server: FileServer, host: str) -> None:
    port = server.url.rpartition(":")[2]
    with pytest.raises(Forbidden, match="no address of the internet"):
        pull(ModelStore(tmp_path / "store"), f"http://{host}:{port}{PATH}", network=Network(private_hosts=frozenset()))
    assert server.asked == []


def test_a_host_that_is_listed_is_asked_and_leads_to_no_other(tmp_path: Path, server: FileServer) -> None:
    store, hosts = ModelStore(tmp_path / "store"), frozenset({"127.0.0.1"})
    assert str(pull(store, f"{server.url}{PATH}", network=Network(private_hosts=hosts)).ref) == "tiny:q8_0"
    elsewhere = server.url.replace("127.0.0.1", "localhost")
    server.files["/moved"] = ServedFile(b"", redirect=f"{elsewhere}/secret")
    with pytest.raises(Forbidden, match="localhost is at"):
        pull(store, f"{server.url}/moved", network=Network(private_hosts=hosts))
    assert "/secret" not in [asked.path for asked in server.asked]


def test_a_name_with_one_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(host: str, port: int | None) -> list[object]:
        return [(2, 1, 6, "", (address, 0)) for address in ("93.184.216.34", "10.0.0.7")]

    monkeypatch.setattr(socket, "getaddrinfo", answers)
    with pytest.raises(Forbidden, match=r"rebound\.example is at no address of the internet") as refused:
        public_addresses("rebound.example")
    assert "10.0.0.7" not in str(refused.value), "names of this network are not looked up for strangers"


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "93.184.216.99", "::ffff:93.184.216.99", "2606:4700::1111", "2606:4700::2222"]
)
def test_this_machine_and_its_neighbours_are_refused_where_their_addresses_are_of_the_internet(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    own = [
        snicaddr(socket.AF_INET, "93.184.216.34", "255.255.255.0", None, None),
        snicaddr(socket.AF_INET6, "2606:4700::1111%eth0", "ffff:ffff:ffff:ffff::", None, None),
        snicaddr(socket.AF_INET6, "2606:4700:1::1", None, None, None),
    ]
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth0": own})
    with pytest.raises(Forbidden):
        public_addresses(address)
    assert public_addresses("93.184.217.1") == ["93.184.217.1"]
