"""Connections from listening sockets, as far as there is room for them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import resource
import socket
import ssl
from collections.abc import Callable

from runtime.connection import LINGER_S, HttpConnection
from runtime.door import BATCH, Door

log = logging.getLogger("edge.server")

MAX_FDS = 1 << 16
RESERVED_FDS = 256
"""Of the file descriptors: engines, databases, files, programs that are started."""
PEER_SHARE = 4
"""One address of another machine, or one /64 of IPv6, may have this part of the connections."""
SEND_BUFFER_BYTES = 128 << 10
"""Of the kernel's for each connection, which would grow to megabytes of an answer that nobody reads."""
UNSENT_BYTES = 16 << 10
"""Of these, what may wait for the peer to take what was sent before: so it is soon known that nobody reads."""
MAX_ACCEPTED = 64
"""Connections taken before others are served again."""
MAX_LEAVING, LEAVING_S = 32, 1.0
"""Of those turned away: sockets that stay open, and for how long, so that the answer is read before what is still sent
meets a closed one (RST)."""
REST_S = 1.0
"""How long nobody is let in after the system had nothing left for one more."""
_SHORT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"

Make = Callable[[socket.socket, str], HttpConnection]
"""The protocol of a connection, from its socket and its peer."""


def raise_fd_limit() -> int:
    """Allow this process as many file descriptors as it may have, within reason; how many those are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FDS if hard == resource.RLIM_INFINITY else min(hard, MAX_FDS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def room_for(wanted: int, *, max_fds: int) -> int:
    """Connections that there may be where so many descriptors are allowed."""
    room = max(max_fds - RESERVED_FDS, max_fds // 2)
    if room < wanted:
        log.warning("max_connections is %d instead of %d: the process may open %d files", room, wanted, max_fds)
    return min(wanted, room)


class Listener:
    """Lets connections in from a listening socket, which stays the caller's.

    The event loop's own server ends for good where `accept` fails for lack of a descriptor, and says nothing of a
    connection before its TLS handshake, which may never come to an end (uvloop 0.23, `UVStreamServer`).

    Args:
        tls: Not used for a Unix socket: nobody listens in.
    """

    def __init__(self, sock: socket.socket, door: Door, make: Make, tls: ssl.SSLContext | None) -> None:
        self._sock = sock
        self._door = door
        self._make = make
        self._tls = tls if sock.family != socket.AF_UNIX else None
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._rest: asyncio.TimerHandle | None = None
        self._leaving: dict[socket.socket, asyncio.TimerHandle] = {}
        """Turned away, the oldest first."""
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # of those that it accepts
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        self._open()

    def _open(self) -> None:
        self._loop.add_reader(self._sock, self._accept)

    def close(self) -> None:
        """Let nobody in any more."""
        self._loop.remove_reader(self._sock)
        if self._rest is not None:
            self._rest.cancel()
        for sock in list(self._leaving):
            self._let_go(sock)

    def _accept(self) -> None:
        for _ in range(MAX_ACCEPTED):
            try:
                sock, address = self._sock.accept()
            except OSError as e:  # also where nobody waits, or who did has gone
                if e.errno in _SHORT:
                    self._take_rest(e)
                return
            self._let_in(sock, peer_of(address))

    def _take_rest(self, error: OSError) -> None:
        self._door.note(error.strerror or "system")
        self._door.make_room(BATCH)
        self._loop.remove_reader(self._sock)
        self._rest = self._loop.call_later(REST_S, self._open)

    def _let_in(self, sock: socket.socket, peer: str) -> None:
        sock.setblocking(False)
        if not self._door.has_room(peer, now=self._loop.time()):
            self._turn_away(sock)
            return
        guest = self._make(sock, peer)
        self._door.enter(guest)
        task = self._loop.create_task(self._connect(sock, guest))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _turn_away(self, sock: socket.socket) -> None:
        self._door.note("turned away")
        if self._tls is not None:  # a handshake is what it would cost to say why
            sock.close()
            return
        with contextlib.suppress(OSError):
            sock.send(_FULL)
            sock.shutdown(socket.SHUT_WR)
        self._leaving[sock] = self._loop.call_later(LEAVING_S, self._let_go, sock)
        if len(self._leaving) > MAX_LEAVING:
            self._let_go(next(iter(self._leaving)))

    def _let_go(self, sock: socket.socket) -> None:
        self._leaving.pop(sock).cancel()
        sock.close()

    async def _connect(self, sock: socket.socket, guest: HttpConnection) -> None:
        handshake_s = self._door.manners.head_s if self._tls is not None else None
        shutdown_s = LINGER_S if self._tls is not None else None
        try:
            await self._loop.connect_accepted_socket(
                lambda: guest, sock, ssl=self._tls,
                ssl_handshake_timeout=handshake_s, ssl_shutdown_timeout=shutdown_s,
            )  # fmt: skip
        except OSError:  # of TLS too; whoever connects can bring it about, so it is counted, not logged
            self._door.note("failed handshake")
        finally:
            if not guest.is_connected:
                self._door.leave(guest)
                sock.close()


def peer_of(address: object) -> str:
    """Who connects, for counting: empty for programs of this machine. Of IPv6 the network: a machine has all of the
    addresses in one."""
    if not isinstance(address, tuple):
        return ""  # a Unix socket
    host = str(address[0]).partition("%")[0]  # pyright: ignore[reportUnknownArgumentType]  # a socket address
    ip = ipaddress.ip_address(host)
    ip = (ip.ipv4_mapped or ip) if isinstance(ip, ipaddress.IPv6Address) else ip
    if ip.is_loopback:
        return ""
    return str(ip) if ip.version == 4 else str(ipaddress.IPv6Network((ip.packed, 64), strict=False))
