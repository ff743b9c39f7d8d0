"""The static pods that the kubelet is given: each shows a few things that a runtime must get right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support import images

Json = dict[str, Any]

BUSYBOX = "registry.k8s.io/e2e-test-images/busybox:1.29-4"
NGINX = "registry.k8s.io/e2e-test-images/nginx:1.14-4"
HEALTH = "registry.k8s.io/e2e-test-images/grpc-health:1"
FOREVER = "while :; do sleep 1000; done"
MEMORY_LIMIT = 64 << 20
GRACE_SECONDS = 80
# Of every probe: what fails them is never how long a busy machine takes to answer.
PROBING = {"periodSeconds": 1, "timeoutSeconds": 60}


def health_image(program: Path) -> images.Image:
    """The server that answers gRPC probes."""
    layer = images.layer(images.Tree().file("health", program.read_bytes(), 0o755))
    return images.Image("e2e-test-images/grpc-health", ("1",), (layer,), {"Cmd": ["/health"]})


def pod(name: str, *containers: Json, **spec: Any) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": {"app": name}},
        "spec": {"containers": list(containers), "terminationGracePeriodSeconds": 2, **spec},
    }


def shell(name: str, script: str, **fields: Any) -> Json:
    return {"name": name, "image": BUSYBOX, "command": ["sh", "-c", script], **fields}


def exec_probe(script: str, **fields: Any) -> Json:
    return {"exec": {"command": ["sh", "-c", script]}, **PROBING, **fields}


def web(host_port: int | None, host_folder: Path) -> Json:
    """An init container, then a sidecar, then two containers, which share volumes and the network."""
    port: Json = {"containerPort": 80}
    if host_port is not None:
        port |= {"hostPort": host_port, "hostIP": "127.0.0.1"}
    mounts = [
        {"name": "memory", "mountPath": "/memory"},
        {"name": "host", "mountPath": "/host"},
        {"name": "downward", "mountPath": "/downward"},
    ]
    prepare = shell("prepare", "date >/memory/prepared", volumeMounts=mounts)
    sidecar = shell(
        "sidecar",
        f"test -e /memory/prepared && sleep 1 && date >/memory/sidecar && {FOREVER}",
        restartPolicy="Always",
        startupProbe=exec_probe("test -e /memory/sidecar"),
        volumeMounts=mounts,
    )
    server = {
        "name": "server",
        "image": NGINX,
        "ports": [port],
        "readinessProbe": {"httpGet": {"path": "/", "port": 80}, **PROBING},
        "livenessProbe": {"tcpSocket": {"port": 80}, **PROBING},
    }
    client = shell(
        "client",
        f"test -e /memory/sidecar && echo hello from $POD_IP && {FOREVER}",
        env=[{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
        readinessProbe=exec_probe("wget -q -O /dev/null http://127.0.0.1/"),
        resources={"limits": {"cpu": "250m", "memory": str(MEMORY_LIMIT)}},
        volumeMounts=mounts,
    )
    limit = {"containerName": "client", "resource": "limits.memory"}
    downward = [
        {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
        {"path": "memory", "resourceFieldRef": limit},
    ]
    volumes = [
        {"name": "memory", "emptyDir": {"medium": "Memory"}},
        {"name": "host", "hostPath": {"path": str(host_folder), "type": "Directory"}},
        {"name": "downward", "downwardAPI": {"items": downward}},
    ]
    return pod("web", server, client, initContainers=[prepare, sidecar], volumes=volumes)


def health() -> Json:
    """Answers gRPC probes."""
    probe = {"grpc": {"port": 50051}, **PROBING}
    container = {
        "name": "health",
        "image": HEALTH,
        "readinessProbe": probe,
        "livenessProbe": probe,
    }
    return pod("health", container)


def once() -> Json:
    """Ends well, and says so."""
    script = "echo done; echo all is well >/dev/termination-log"
    return pod("once", shell("once", script), restartPolicy="Never")


def listener() -> Json:
    """Answers to what it is told on its standard input."""
    script = "while read -r line; do echo got $line; done"
    return pod("listener", shell("listener", script, stdin=True))


def crash() -> Json:
    return pod("crash", shell("crash", "echo going down >&2; exit 3"))


def hungry() -> Json:
    """Takes more memory than it may."""
    command = ["dd", "if=/dev/zero", "of=/dev/null", "bs=128M"]
    limits = {"limits": {"memory": "32Mi"}}
    container = {"name": "hungry", "image": BUSYBOX, "command": command, "resources": limits}
    return pod("hungry", container, restartPolicy="Never")


def unhealthy() -> Json:
    """Fails its liveness probe as soon as it runs."""
    probe = exec_probe("exit 1", failureThreshold=1)
    return pod("unhealthy", shell("unhealthy", FOREVER, livenessProbe=probe))


def graceful(host_folder: Path) -> Json:
    """Tells a folder of the host how it is ended."""
    script = """
        trap 'sleep 1; echo stopped >>/host/graceful; exit 0' TERM
        echo up >/host/graceful
        while :; do sleep 0.1; done
    """
    hook = {"exec": {"command": ["sh", "-c", "echo hook >>/host/graceful"]}}
    mounts = [{"name": "host", "mountPath": "/host"}]
    container = shell("graceful", script, lifecycle={"preStop": hook}, volumeMounts=mounts)
    volumes = [{"name": "host", "hostPath": {"path": str(host_folder)}}]
    return pod("graceful", container, terminationGracePeriodSeconds=GRACE_SECONDS, volumes=volumes)
