"""The certificate files of the streaming server, which are read again when they change."""

import os
import ssl
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TLSFiles:
    """Paths of PEM files. client_ca: clients need a certificate of one of these authorities."""

    certificate: str
    key: str
    client_ca: str | None = None

    def load(self) -> ssl.SSLContext:
        """Make a context of the files as they are. Raises OSError, which ssl.SSLError is, for a file it cannot use."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # A client could make the server compute handshakes without end; OpenSSL 3 refuses renegotiation by itself.
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(self.certificate, self.key)
        if self.client_ca is not None:
            context.load_verify_locations(self.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def version(self) -> tuple[tuple[int, int, int], ...]:
        """A value that changes whenever a file, or the target of a link, is written or replaced."""
        paths = (self.certificate, self.key, self.client_ca)
        states = [os.stat(path) for path in paths if path is not None]
        return tuple((state.st_ino, state.st_mtime_ns, state.st_size) for state in states)
