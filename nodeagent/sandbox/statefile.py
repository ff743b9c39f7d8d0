"""Files of the state directory that another release of the agent may read: JSON objects with the version of their form.

What the version means, and when it changes, is said in `nodeagent.sandbox.protocol`. Standard library only: supervisors
import this.
"""

from typing import TypeVar

from nodeagent import files
from nodeagent.errors import IncompatibleVersion
from nodeagent.sandbox import protocol
from nodeagent.sandbox.protocol import Body

_MODE = 0o600

T = TypeVar("T")


def save(path: str, version: int, body: Body) -> None:
    """Replace the file. It need not survive a crash of the machine, as the state directory does not."""
    text = protocol.to_json({"version": version, **body})
    files.write_atomic(path, text, _MODE, sync=False)


def load(path: str, version: int, kind: type[T]) -> T:
    """The object without its version, if it has all members of `kind`. version: the newest that the caller understands.

    Raises FileNotFoundError, ValueError for what is damaged, IncompatibleVersion for a newer one.
    """
    with open(path, "rb") as file:
        text = file.read()
    try:
        body = protocol.decode(text)
        found = body.pop("version", 0)
        if not isinstance(found, int) or found < 0:
            raise ValueError(f"version {found!r:.20}")
        if found <= version:
            return protocol.checked(kind, body)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    raise IncompatibleVersion(
        f"{path}: version {found} is newer than {version}, the newest that this release understands; "
        "install the release of the agent that wrote it, or stop and remove the pod"
    )
