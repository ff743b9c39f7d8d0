"""The TLS side of the streaming server: certificate files, read again when they change."""

import os
import ssl
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TLSFiles:
    """PEM files. client_ca: whoever connects needs a certificate of one of these authorities."""

    certificate: str
    key: str
    client_ca: str | None = None

    def load(self) -> ssl.SSLContext:
        """A context of what the files hold now. OSError, which ssl.SSLError is: a file cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # A client could make us compute handshakes without end; OpenSSL 3 refuses it by itself.
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(self.certificate, self.key)
        if self.client_ca is not None:
            context.load_verify_locations(self.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def version(self) -> tuple[tuple[int, int, int], ...]:
        """Differs from what it was as soon as a file, or what a link leads to, was written or replaced."""
        paths = (self.certificate, self.key, self.client_ca)
        states = [os.stat(path) for path in paths if path is not None]
        return tuple((state.st_ino, state.st_mtime_ns, state.st_size) for state in states)
