"""Texts for failures between two hosts, for the reader of a pod's events: what is wrong, and what to do.

A server's own words are bounded, on one line, and without anything that may be secret.
"""

import errno
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

import aiohttp
from yarl import URL

from nodeagent.errors import RegistryUnavailable
from nodeagent.text import one_line

MAX_TEXT = 300  # of what a server says


@contextmanager
def network_errors(url: URL) -> Iterator[None]:
    """Turn errors of aiohttp and of the kernel into `RegistryUnavailable`."""
    try:
        yield
    except TimeoutError:
        raise RegistryUnavailable(f"{place(url)}: timed out") from None
    except (aiohttp.ClientError, OSError) as error:
        raise RegistryUnavailable(f"{place(url)}: {_reason(url, error)}") from None


def _reason(url: URL, error: aiohttp.ClientError | OSError) -> str:
    """What is wrong, and what to do about it; without a query, and without the bytes of a server that is not HTTP."""
    match error:
        case aiohttp.ClientHttpProxyError():
            wanted = (
                "; it wants a name and a password"
                if error.status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED
                else ""
            )
            return f"its proxy answers {error.status}{wanted}"
        case aiohttp.ClientProxyConnectionError():
            return f"its proxy {error.host}:{error.port}: {_cause(error.os_error)}"
        case aiohttp.ClientConnectorCertificateError():
            return (
                f"its certificate is not trusted ({_cause(error.certificate_error)}); give its authority as ca in "
                "hosts.toml, or correct the certificate"
            )
        case aiohttp.ClientSSLError():
            if "WRONG_VERSION_NUMBER" in str(error):
                return (
                    f"does not speak TLS; if plain HTTP is meant, write server = "
                    f'"http://{url.authority}" into hosts.toml'
                )
            return f"TLS fails: {_cause(error.os_error)}"
        case aiohttp.ClientConnectorDNSError():
            return _unresolved(url, error.os_error)
        case aiohttp.ClientConnectorError():
            return _cause(error.os_error)
        case aiohttp.ClientResponseError():
            return "its answer is not HTTP"
        case aiohttp.ServerDisconnectedError():
            return "closed the connection without an answer" + (
                "; does it want HTTPS?" if url.scheme == "http" else ""
            )
    return one_line(str(error).partition("?")[0], MAX_TEXT) or type(error).__name__


def _unresolved(url: URL, error: OSError) -> str:
    if error.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
        return f"no such host {url.host}; look at how it is spelt, and at the node's DNS"
    return f"the name {url.host} cannot be looked up: {_cause(error)}"


def _cause(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return one_line(error.verify_message, MAX_TEXT)
    if isinstance(error, ssl.SSLError):
        text = (error.reason or "").replace("_", " ").lower()
        return one_line(text, MAX_TEXT) or type(error).__name__
    if isinstance(error, OSError) and (error.errno or 0) > 0:
        remedy = "; is the registry running, and is this its port?"
        refused = error.errno == errno.ECONNREFUSED
        return os.strerror(error.errno or 0).lower() + (remedy if refused else "")
    return one_line((isinstance(error, OSError) and error.strerror) or str(error), MAX_TEXT)


def place(url: URL) -> str:
    """A URL without its query, which may be secret."""
    return str(url).partition("?")[0]
