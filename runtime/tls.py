"""The certificate that the appliance shows, from files that may change while it runs."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

from edge.errors import ConfigError

log = logging.getLogger("edge.server")

_Stamp = tuple[int, int, int]


class TlsFiles:
    """A server's TLS context that is made anew when its files changed, at the next handshake. Files that cannot be
    used, such as a certificate whose key is not there yet, change nothing."""

    def __init__(self, cert: str, key: str) -> None:
        """Read the files.

        Raises:
            ConfigError: They cannot be read, or do not belong together.
        """
        self._cert, self._key = Path(cert), Path(key)
        try:
            self._stamps = self._look()
            self.context = self._current = self._load()
        except (OSError, ValueError) as e:  # SSLError is an OSError
            raise ConfigError(
                f"The certificate {cert} and its key {key} cannot be used: {_reason(e)}.",
                hint="Both are PEM files, readable by the user that serves. To try it, make them with: openssl req "
                "-x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 -subj /CN=edge "
                "-addext subjectAltName=DNS:edge.local -keyout key.pem -out cert.pem",
            ) from e
        self.context.sni_callback = self._choose

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        """Called at each handshake, with or without a name."""
        self._refresh()
        connection.context = self._current

    def _refresh(self) -> None:
        try:
            stamps = self._look()
            if stamps == self._stamps:
                return
            self._stamps = stamps
            self._current = self._load()
        except (OSError, ValueError) as e:
            log.error("the new certificate %s cannot be used, the old one stays: %s", self._cert, _reason(e))
        else:
            log.warning("the certificate %s was read again", self._cert)

    def _look(self) -> tuple[_Stamp, _Stamp]:
        first, second = self._cert.stat(), self._key.stat()
        return (first.st_ino, first.st_mtime_ns, first.st_size), (second.st_ino, second.st_mtime_ns, second.st_size)

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(self._cert, self._key, password=_no_password)
        return context


def _no_password() -> str:
    raise ValueError("the key is encrypted; an appliance that starts by itself cannot ask for its password")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
