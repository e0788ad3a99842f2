"""TLS: the context of the server, whose certificate follows its files."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

from service.access.watch import Watch
from service.errors import SettingsError

_log = logging.getLogger(__name__)


class Certificate:
    """The certificate in two files; each handshake takes the files as they are, at most a second old."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Read the files.

        Args:
            certificate: PEM file with the certificate and its chain.
            key: PEM file with its key.

        Raises:
            SettingsError: a file cannot be read, is damaged or encrypted, or they do not belong together.
        """
        self._files = (certificate, key)
        self._watch = Watch(self._files)
        self._current = self._read()

    def context(self) -> ssl.SSLContext:
        """Return the context for a server."""
        context = self._read()
        # Called by each handshake, with or without a server name. A context of its own for each state of the files:
        # one that fails to load would be left with half of them.
        context.sni_callback = self._choose
        return context

    def pem(self) -> tuple[bytes, bytes]:
        """Return the certificate with its chain, and its key, as a handshake takes them now."""
        if self._watch.has_changed():
            self._read_again()
        return self._pem

    def _choose(self, connection: ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
        if self._watch.has_changed():
            self._read_again()
        connection.context = self._current

    def _read_again(self) -> None:
        try:
            self._current = self._read()
        except SettingsError as error:
            _log.error("the certificate stays as it was: %s", error)
        else:
            _log.info("read the certificate again: %s", self._files[0])

    def _read(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        certificate, key = self._files
        try:
            # Without a password OpenSSL would ask for one on the terminal.
            context.load_cert_chain(certificate, key, password=lambda: "")
            self._pem = certificate.read_bytes(), key.read_bytes()
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise SettingsError(
                f"LIPCERT_TLS_CERTIFICATE={str(certificate)!r} and LIPCERT_TLS_KEY={str(key)!r} cannot be used "
                f"({error.strerror if isinstance(error, OSError) else error}); name PEM files that can be read, of a "
                "certificate chain and of its key without a password"
            ) from error
        return context
