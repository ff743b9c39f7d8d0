"""What the agent remembers: frozen records, and the pure transitions between them.

Facts are stored, state is derived. A record is replaced, never changed: a transition returns a new one, the store
writes it, and only then is it published.
"""

import msgspec


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Something that the store keeps under `key`."""

    @property
    def key(self) -> str:
        raise NotImplementedError


# --- images -----------------------------------------------------------------------------------------------------


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an image says about running it (image-spec ``config.md``); absent values are empty."""

    user: str = ""
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    stop_signal: str = ""
    labels: dict[str, str] = {}
    volumes: tuple[str, ...] = ()


class Image(Record, frozen=True, kw_only=True):
    """An image that is complete on this node: verified, unpacked, synced.

    id: digest of its config, ``sha256:…``; layers: chain IDs, lowest first; size_bytes: of its blobs as transferred.
    """

    id: str
    repo_tags: tuple[str, ...] = ()
    repo_digests: tuple[str, ...] = ()
    manifest: str
    layers: tuple[str, ...]
    size_bytes: int
    config: ImageConfig
    pulled_at: int
    pinned: bool = False

    @property
    def key(self) -> str:
        return self.id


class Layer(Record, frozen=True, kw_only=True):
    """An unpacked layer: ``layers/<chain ID>/``, read-only and shared by every image that has it."""

    chain_id: str
    diff_id: str
    blob: str
    size_bytes: int

    @property
    def key(self) -> str:
        return self.chain_id


# --- network ----------------------------------------------------------------------------------------------------


class Lease(Record, frozen=True, kw_only=True):
    """The addresses and the link of one pod: written before either exists, forgotten after both are gone."""

    pod_id: str
    addresses: tuple[str, ...]
    link: str
    acquired_at: int

    @property
    def key(self) -> str:
        return self.pod_id


class HostPort(Record, frozen=True, kw_only=True):
    """A port of the node that is forwarded to a pod. host_ip is empty for every address of the node."""

    protocol: str
    host_ip: str
    host_port: int
    pod_id: str
    pod_ip: str
    container_port: int

    @property
    def key(self) -> str:
        return f"{self.protocol}/{self.host_ip}/{self.host_port}"


KINDS: tuple[type[Record], ...] = (Image, Layer, Lease, HostPort)
