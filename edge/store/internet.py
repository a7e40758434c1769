"""Connections to the internet only: an address that a stranger names must not lead into this device's own networks.

Looked at is where a connection goes, each time one is made: a name may stand for another address than a moment ago, and
a server may redirect to any.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address

import httpcore
import httpx
from typing_extensions import override

from edge.errors import Forbidden


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address is one of the internet's (IANA's special-purpose registries, as Python knows them)."""
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None) or address
    return inner.is_global and not inner.is_multicast


def public_addresses(host: str) -> list[str]:
    """The addresses of a host.

    Raises:
        Forbidden: One of them is not the internet's.
        OSError: It has none.
    """
    found = {str(entry[4][0]).partition("%")[0]: None for entry in socket.getaddrinfo(host, None)}
    if inside := [address for address in found if not is_public(ip_address(address))]:
        raise Forbidden(
            f"{host[:200]} is at {inside[0]}, which is no address of the internet.",
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
