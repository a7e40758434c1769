"""Connections to the internet only: an address that a stranger names must not lead into this device's own networks.

Looked at is where a connection goes, each time one is made: a name may stand for another address than a moment ago, and
a server may redirect to any.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_interface

import httpcore
import httpx
from typing_extensions import override

from edge.errors import Forbidden

_UNICAST = IPv6Network("2000::/3")
"""All that IANA gives out."""
_NAT64 = IPv6Network("64:ff9b::/96")
"""How the internet's IPv4 hosts are reached where there is IPv6 only (RFC 6052)."""
_ISATAP = frozenset({0x5EFE, 0x2005EFE})
"""Where the lower half of an address begins so, it ends in one of IPv4 (RFC 5214, section 6.1)."""


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address is one of the internet's (IANA's special-purpose registries, as Python knows them), and so is
    an address of IPv4 that it stands for."""
    if isinstance(address, IPv4Address):
        return address.is_global and not address.is_multicast
    inner = _inner(address)
    if inner is not None and not is_public(inner):
        return False
    return address.ipv4_mapped is not None or address in _NAT64 or (address in _UNICAST and address.is_global)


def _inner(address: IPv6Address) -> IPv4Address | None:
    low = int(address) & 0xFFFFFFFF
    if address in _NAT64 or (int(address) >> 32) & 0xFFFFFFFF in _ISATAP:
        return IPv4Address(low)
    return address.ipv4_mapped or address.sixtofour


def _own_networks() -> list[IPv4Network | IPv6Network]:
    """What this device reaches without a router."""
    import psutil  # 15 ms, spent only where a stranger names an address

    return [
        ip_interface(entry.address.partition("%")[0] + _prefix(entry.netmask)).network
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    ]


def _prefix(netmask: str | None) -> str:
    return f"/{int(ip_address(netmask)).bit_count()}" if netmask else ""  # none: point to point, one address


def _is_within(address: IPv4Address | IPv6Address, networks: list[IPv4Network | IPv6Network]) -> bool:
    inner = _inner(address) if isinstance(address, IPv6Address) else None
    return any(address in network or (inner is not None and inner in network) for network in networks)


def public_addresses(host: str) -> list[str]:
    """The addresses of a host.

    Raises:
        Forbidden: One of them is not the internet's, or is of a network of this device. Which is not told: who asks
            could else look up this network's names.
        OSError: It has none.
    """
    found = {str(entry[4][0]).partition("%")[0]: None for entry in socket.getaddrinfo(host, None)}
    own = _own_networks()
    if not all(is_public(ip) and not _is_within(ip, own) for ip in map(ip_address, found)):
        raise Forbidden(
            f"{host[:200]} is at no address of the internet.",
            hint="Pull it on the device (edge pull), or have the operator list the host in pull_hosts.",
        )
    return list(found)


class _Network(httpcore.SyncBackend):
    def __init__(self, private_hosts: frozenset[str]) -> None:
        self._private_hosts = private_hosts

    @override
    def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:  # fmt: skip
        failure: httpcore.NetworkError | httpcore.TimeoutException = httpcore.ConnectError(f"{host} has no address")
        for address in [host] if host.lower() in self._private_hosts else self._addresses(host):
            try:
                return super().connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as e:
                failure = e
        raise failure

    @staticmethod
    def _addresses(host: str) -> list[str]:
        try:
            return public_addresses(host)
        except OSError as e:
            raise httpcore.ConnectError(str(e)) from e


class InternetTransport(httpx.HTTPTransport):
    """Reaches the internet and the hosts that are listed, in lower case; anything else raises `Forbidden`. Uses no
    proxy."""

    def __init__(self, private_hosts: frozenset[str], verify: ssl.SSLContext) -> None:
        super().__init__(verify=verify)
        self._pool = httpcore.ConnectionPool(ssl_context=verify, network_backend=_Network(private_hosts))
