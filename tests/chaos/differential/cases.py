"""Calls whose answers are compared: each case makes the same ones on every runtime, and gives them labels."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc

from nodeagent.api import runtime_pb2 as pb
from tests.chaos.differential.caller import Caller, Container

UNKNOWN = "f" * 64
STATE = r"status\.(state|exit_code|reason|message|started_at|finished_at)$"
EVENTS_SECONDS = 5.0

CASES: list[Callable[[Caller], None]] = []


def case(function: Callable[[Caller], None]) -> Callable[[Caller], None]:
    CASES.append(function)
    return function


# --- pods -----------------------------------------------------------------------------------------------------------


@case
def pods_that_are_malformed(c: Caller) -> None:
    def run(label: str, config: pb.PodSandboxConfig, handler: str = "") -> None:
        request = pb.RunPodSandboxRequest(config=config, runtime_handler=handler)
        c.call("RunPodSandbox", request, label)

    run("without a config", pb.PodSandboxConfig())
    for name in ("name", "uid", "namespace"):
        config = c.pod_config()
        config.metadata.ClearField(name)
        run(f"without a {name}", config)
    run("of an unknown handler", c.pod_config(), "nowhere")
    run("with a hostname of 65 characters", c.pod_config(hostname="h" * 65))
    run("with a log directory that is relative", c.pod_config(log_directory="logs"))
    sysctls = pb.LinuxPodSandboxConfig(sysctls={"net.no.such": "1"})
    run("with an unknown sysctl", c.pod_config(linux=sysctls))
    port = pb.PortMapping(host_port=70_000, container_port=80)
    run("with host port 70000", c.pod_config(port_mappings=[port]))


@case
def pods_twice(c: Caller) -> None:
    pod = c.pod("twice, first")
    request = pb.RunPodSandboxRequest(config=pod.config)
    c.call("RunPodSandbox", request, "of a READY pod again")
    pod.stop("of a READY pod")
    c.call("RunPodSandbox", request, "of a stopped pod again")
    pod.stop("of a stopped pod")
    pod.status("of a stopped pod")
    pod.create(label="in a stopped pod")
    pod.remove("of a stopped pod")
    pod.remove("of a removed pod")
    pod.stop("of a removed pod")
    pod.status("of a removed pod")
    c.call("RunPodSandbox", request, "of a removed pod again")


@case
def pods_with_one_port(c: Caller) -> None:
    port = pb.PortMapping(host_port=28_080, container_port=80)
    c.pod("with a host port", port_mappings=[port])
    c.pod("with the host port of another pod", port_mappings=[port])


@case
def pods_that_are_ready(c: Caller) -> None:
    pod = c.pod(annotations={"a": "b"}, hostname="web")
    pod.status("of a READY pod")
    container = pod.run()
    pod.status("of a pod with a container")
    pod.remove("of a READY pod with a container that runs")
    container.status("whose pod was removed")


@case
def pods_unknown(c: Caller) -> None:
    for label, name in (("of an unknown pod", UNKNOWN), ("without an id", "")):
        c.call("StopPodSandbox", pb.StopPodSandboxRequest(pod_sandbox_id=name), label)
        c.call("RemovePodSandbox", pb.RemovePodSandboxRequest(pod_sandbox_id=name), label)
        c.call("PodSandboxStatus", pb.PodSandboxStatusRequest(pod_sandbox_id=name), label)
        c.call("PodSandboxStats", pb.PodSandboxStatsRequest(pod_sandbox_id=name), label)
        c.call("PortForward", pb.PortForwardRequest(pod_sandbox_id=name, port=[80]), label)
        c.call(
            "UpdatePodSandboxResources",
            pb.UpdatePodSandboxResourcesRequest(pod_sandbox_id=name),
            label,
        )


@case
def pods_in_lists(c: Caller) -> None:
    one, two = c.pod(labels={"app": "x"}), c.pod(labels={"app": "y"})
    two.stop()

    def listed(label: str, wanted: pb.PodSandboxFilter) -> None:
        c.call("ListPodSandbox", pb.ListPodSandboxRequest(filter=wanted), label, only=r"^items$")

    ready = pb.PodSandboxStateValue(state=pb.SANDBOX_READY)
    listed("by id", pb.PodSandboxFilter(id=one.id))
    listed("by the beginning of an id", pb.PodSandboxFilter(id=one.id[:16]))
    listed("by an unknown id", pb.PodSandboxFilter(id=UNKNOWN))
    listed("by label", pb.PodSandboxFilter(label_selector={"app": "x"}))
    listed("by an absent label", pb.PodSandboxFilter(label_selector={"app": "z"}))
    listed("by state", pb.PodSandboxFilter(state=ready))
    listed("by id and state", pb.PodSandboxFilter(id=two.id, state=ready))
    wanted = pb.PodSandboxFilter(id=one.id)
    c.call("ListPodSandbox", pb.ListPodSandboxRequest(filter=wanted), "of one READY pod")


# --- containers -----------------------------------------------------------------------------------------------------


@case
def containers_that_are_malformed(c: Caller) -> None:
    pod = c.pod()

    def create(label: str, pod_id: str, config: pb.ContainerConfig | None) -> None:
        request = pb.CreateContainerRequest(
            pod_sandbox_id=pod_id, config=config, sandbox_config=pod.config
        )
        c.call("CreateContainer", request, label)

    name, image = pb.ContainerMetadata(name="x"), pb.ImageSpec(image=c.image)
    good = pb.ContainerConfig(metadata=name, image=image)
    create("in an unknown pod", UNKNOWN, good)
    create("without a pod", "", good)
    create("without a config", pod.id, None)
    create("without metadata", pod.id, pb.ContainerConfig(image=image))
    create("without a name", pod.id, pb.ContainerConfig(metadata={}, image=image))
    create("without an image", pod.id, pb.ContainerConfig(metadata=name))
    absent = pb.ImageSpec(image="registry.invalid/absent:1")
    create("of an absent image", pod.id, pb.ContainerConfig(metadata=name, image=absent))
    missing = _mount(str(c.places / "no/such/path"))  # it is made
    pod.create(label="with a mount of a missing path", name="m1", mounts=[missing])
    relative = pb.Mount(container_path="a", host_path="/tmp")
    pod.create(label="with a relative path of a mount", name="m2", mounts=[relative])
    pod.create(label="with a relative working directory", name="w", working_dir="a")
    device = pb.Device(container_path="/dev/x", host_path="/dev/no-such", permissions="rw")
    pod.create(label="with a device that is absent", name="d", devices=[device])
    user = pb.LinuxContainerSecurityContext(run_as_username="nobody-of-this-name")
    linux = pb.LinuxContainerConfig(security_context=user)
    pod.create(label="of an unknown user", name="u", linux=linux)


def _mount(path: str) -> pb.Mount:
    return pb.Mount(container_path="/m", host_path=path)


@case
def containers_from_begin_to_end(c: Caller) -> None:
    pod = c.pod()
    container = pod.create(label="that is new")
    container.status("of a created container")
    config = pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name="c"), image=pb.ImageSpec(image=c.image)
    )
    again = pb.CreateContainerRequest(
        pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config
    )
    c.call("CreateContainer", again, "of a name that is taken")
    container.start("of a created container")
    container.status("of a running container")
    container.start("of a running container")
    container.stop("of a running container")
    container.status("of a container that was killed", STATE)
    container.stop("of an exited container")
    container.start("of an exited container")
    c.call("CreateContainer", again, "of the name of an exited container")
    container.remove("of an exited container")
    container.remove("of a removed container")
    container.stop("of a removed container")
    container.start("of a removed container")
    container.status("of a removed container")


@case
def containers_that_were_created(c: Caller) -> None:
    pod = c.pod()
    container = pod.create()
    container.stop("of a created container")
    container.status("of a created container that was stopped", STATE)
    container.start("of a created container that was stopped")
    container.status("of that container then", STATE)
    other = pod.create(name="other")
    other.remove("of a created container")
    third = pod.create(name="third")
    pod.stop("of a pod with a created container")
    third.status("of a created container whose pod was stopped", STATE)
    third.start("in a stopped pod")
    third.remove("in a stopped pod")


@case
def containers_that_end(c: Caller) -> None:
    pod = c.pod()
    for label, script in (
        ("that exited with 0", "exit 0"),
        ("that exited with 7", "exit 7"),
        ("that exited with 255", "exit 255"),
        ("that has killed itself", "kill -KILL $$; sleep 1; ulimit -c 0; exit 137"),
    ):
        name = f"c{len(c.answers)}"
        pod.ended("sh", "-c", script, name=name).status(f"of a container {label}", STATE)
    container = pod.run("sh", "-c", "trap 'exit 5' TERM; sleep 100000 & wait", name="traps")
    _until_it_traps(container)
    container.stop("of a container that heeds SIGTERM", timeout=60)
    container.status("of a container that heeded SIGTERM", STATE)
    container = pod.run("sh", "-c", "trap '' TERM; sleep 100000 & wait", name="ignores")
    _until_it_traps(container)
    container.stop("of a container that ignores SIGTERM", timeout=1)
    container.status("of a container that ignored SIGTERM", STATE)
    running = pod.run(name="running")
    pod.stop("of a pod with a container that runs")
    running.status("of a container whose pod was stopped", STATE)
    running.remove("of a running container of a stopped pod")


def _until_it_traps(container: Container) -> None:
    request = pb.ExecSyncRequest(
        container_id=container.id, cmd=["sh", "-c", "until pidof sleep; do sleep 0.1; done"]
    )
    container.caller.call("ExecSync", request)


@case
def containers_that_cannot_start(c: Caller) -> None:
    pod = c.pod()
    container = pod.create("/no/such/program", label="of an absent program")
    container.start("of an absent program")
    container.status("of an absent program", STATE)
    container = pod.create("/etc", name="directory", label="whose program is a directory")
    container.start("whose program is a directory")
    container.status("whose program is a directory", STATE)
    container = pod.create(name="elsewhere", label="in an absent directory", working_dir="/no/such")
    container.start("in an absent directory")


@case
def containers_that_run_are_removed(c: Caller) -> None:
    container = c.pod().run()
    container.remove("of a running container")
    container.status("of a running container that was removed")


@case
def containers_unknown(c: Caller) -> None:
    for label, name in (("of an unknown container", UNKNOWN), ("without an id", "")):
        container = Container(c, name)
        container.start(label)
        container.stop(label)
        container.remove(label)
        container.status(label)
        container.exec(label, "true")
        c.call("Exec", pb.ExecRequest(container_id=name, cmd=["true"], stdout=True), label)
        c.call("Attach", pb.AttachRequest(container_id=name, stdout=True), label)
        c.call("ReopenContainerLog", pb.ReopenContainerLogRequest(container_id=name), label)
        c.call("ContainerStats", pb.ContainerStatsRequest(container_id=name), label)
        limits = pb.LinuxContainerResources(cpu_shares=100)
        update = pb.UpdateContainerResourcesRequest(container_id=name, linux=limits)
        c.call("UpdateContainerResources", update, label)
        c.call("CheckpointContainer", pb.CheckpointContainerRequest(container_id=name), label)


@case
def containers_by_the_beginning_of_an_id(c: Caller) -> None:
    container = c.pod().run()
    short = Container(c, container.id[:12])
    short.status("by the beginning of an id", STATE)
    short.exec("by the beginning of an id", "true")
    short.stop("by the beginning of an id")


@case
def containers_in_lists(c: Caller) -> None:
    pod, other = c.pod(), c.pod()
    one, two = pod.run(name="one", labels={"app": "x"}), pod.create(name="two")
    other.ended("true", name="three", labels={"app": "x"})

    def listed(label: str, wanted: pb.ContainerFilter) -> None:
        request = pb.ListContainersRequest(filter=wanted)
        c.call("ListContainers", request, label, only=r"^containers$")

    running = pb.ContainerStateValue(state=pb.CONTAINER_RUNNING)
    listed("by id", pb.ContainerFilter(id=one.id))
    listed("by the beginning of an id", pb.ContainerFilter(id=one.id[:16]))
    listed("by an unknown id", pb.ContainerFilter(id=UNKNOWN))
    listed("by pod", pb.ContainerFilter(pod_sandbox_id=pod.id))
    listed("by the beginning of a pod's id", pb.ContainerFilter(pod_sandbox_id=pod.id[:16]))
    listed("by an unknown pod", pb.ContainerFilter(pod_sandbox_id=UNKNOWN))
    listed("by label", pb.ContainerFilter(label_selector={"app": "x"}))
    listed("by state", pb.ContainerFilter(state=running))
    listed("by pod and state", pb.ContainerFilter(pod_sandbox_id=pod.id, state=running))
    listed("by id and pod", pb.ContainerFilter(id=two.id, pod_sandbox_id=other.id))
    wanted = pb.ContainerFilter(id=one.id)
    request = pb.ListContainersRequest(filter=wanted)
    c.call("ListContainers", request, "of one that runs")


# --- in containers --------------------------------------------------------------------------------------------------


@case
def commands(c: Caller) -> None:
    pod = c.pod()
    container = pod.create(stdin=True)
    container.exec("in a created container", "true")
    _streams(c, container, "of a created container")
    container.start()
    container.exec("without a command")
    container.exec("that prints", "sh", "-c", "echo out; echo err >&2; exit 3")
    container.exec("of an absent program", "/no/such/program")
    container.exec("of a directory", "/etc")
    container.exec("that is killed", "sh", "-c", "kill -KILL $$")
    container.exec("whose time is over", "sleep", "1000", timeout=1)
    negative = pb.ExecSyncRequest(container_id=container.id, cmd=["true"], timeout=-1)
    c.call("ExecSync", negative, "with a negative timeout")
    _streams(c, container, "of a running container")
    c.call(
        "Exec",
        pb.ExecRequest(container_id=container.id, cmd=["sh"], tty=True, stderr=True, stdout=True),
        "with a terminal and stderr",
    )
    c.call("Exec", pb.ExecRequest(container_id=container.id, cmd=["sh"]), "without a stream")
    c.call("Exec", pb.ExecRequest(container_id=container.id, stdout=True), "without a command")
    tty = pb.AttachRequest(container_id=container.id, tty=True, stdin=True, stdout=True)
    c.call("Attach", tty, "with a terminal to a container without one")
    forward = pb.PortForwardRequest(pod_sandbox_id=pod.id, port=[80])
    c.call("PortForward", forward, "of a READY pod")
    none = pb.PortForwardRequest(pod_sandbox_id=pod.id)
    c.call("PortForward", none, "of a READY pod without a port")
    container.stop()
    container.exec("in an exited container", "true")
    _streams(c, container, "of an exited container")
    pod.stop()
    c.call("PortForward", forward, "of a stopped pod")


def _streams(c: Caller, container: Container, label: str) -> None:
    run = pb.ExecRequest(container_id=container.id, cmd=["true"], stdout=True)
    c.call("Exec", run, label)
    attach = pb.AttachRequest(container_id=container.id, stdout=True)
    c.call("Attach", attach, label)


@case
def limits(c: Caller) -> None:
    pod = c.pod()
    resources = pb.LinuxContainerResources(
        cpu_period=100_000, cpu_quota=50_000, cpu_shares=512, memory_limit_in_bytes=64 << 20
    )
    container = pod.create(linux=pb.LinuxContainerConfig(resources=resources))
    container.status("of a container with limits", r"resources")

    def update(label: str, **fields: Any) -> None:
        request = pb.UpdateContainerResourcesRequest(
            container_id=container.id, linux=pb.LinuxContainerResources(**fields)
        )
        c.call("UpdateContainerResources", request, label)

    update("of a created container", cpu_shares=256)
    container.start()
    update("of a running container", cpu_quota=60_000, memory_limit_in_bytes=128 << 20)
    container.status("of a container with new limits", r"resources")
    update("with a CPU quota of one microsecond", cpu_quota=1)
    update("with negative CPU shares", cpu_shares=-2)
    update("with a memory limit of 4096 bytes", memory_limit_in_bytes=4096)
    request = pb.UpdateContainerResourcesRequest(container_id=container.id)
    c.call("UpdateContainerResources", request, "without limits")
    container.stop()
    update("of an exited container", cpu_shares=300)


@case
def logs(c: Caller) -> None:
    pod = c.pod()
    container = pod.create()

    def reopen(label: str, name: str) -> None:
        c.call("ReopenContainerLog", pb.ReopenContainerLogRequest(container_id=name), label)

    reopen("of a created container", container.id)
    container.start()
    reopen("of a running container", container.id)
    container.stop()
    reopen("of an exited container", container.id)
    silent = pod.run(name="silent", log_path="")
    silent.status("of a container without a log", r"log_path")
    reopen("of a container without a log", silent.id)


@case
def usage(c: Caller) -> None:
    pod = c.pod()
    container = pod.create()

    def of_container(label: str) -> None:
        request = pb.ContainerStatsRequest(container_id=container.id)
        c.call("ContainerStats", request, label)

    def of_pod(label: str) -> None:
        request = pb.PodSandboxStatsRequest(pod_sandbox_id=pod.id)
        c.call("PodSandboxStats", request, label, only=r"^stats\.(attributes|linux\.[a-z_]+)($|\.)")

    def listed(label: str, wanted: pb.ContainerStatsFilter) -> None:
        request = pb.ListContainerStatsRequest(filter=wanted)
        c.call("ListContainerStats", request, label, only=r"^stats$")

    mine = pb.ContainerStatsFilter(pod_sandbox_id=pod.id)
    of_container("of a created container")
    listed("with a created container", mine)
    container.start()
    of_container("of a running container")
    of_pod("of a pod with a container that runs")
    listed("with a running container", mine)
    listed("by an unknown id", pb.ContainerStatsFilter(id=UNKNOWN))
    container.stop()
    of_container("of an exited container")
    listed("with an exited container", mine)
    pod.stop()
    of_pod("of a stopped pod")


# --- images and the node --------------------------------------------------------------------------------------------


@case
def image_calls(c: Caller) -> None:
    def status(label: str, image: str) -> None:
        request = pb.ImageStatusRequest(image=pb.ImageSpec(image=image))
        c.call("ImageStatus", request, label)

    known = c.call("ImageStatus", pb.ImageStatusRequest(image=pb.ImageSpec(image=c.image))).image
    status("by tag", c.image)
    status("by id", known.id)
    status("by the beginning of an id", known.id[:20])
    status("by digest", known.repo_digests[0])
    status("of an absent image", "registry.invalid/absent:1")
    status("of a malformed name", "UPPER:CASE:1")
    status("without a name", "")
    wanted = pb.ImageFilter(image=pb.ImageSpec(image=c.image))
    c.call("ListImages", pb.ListImagesRequest(filter=wanted), "by tag", only="^images")
    wanted = pb.ImageFilter(image=pb.ImageSpec(image="registry.invalid/absent:1"))
    c.call("ListImages", pb.ListImagesRequest(filter=wanted), "of an absent image")
    for label, image in (
        ("of a host that is absent", "registry.invalid/absent:1"),
        ("of a tag that is absent", f"{c.image.rpartition(':')[0]}:absent"),
        ("of a malformed name", "UPPER:CASE:1"),
        ("without a name", ""),
    ):
        c.call("PullImage", pb.PullImageRequest(image=pb.ImageSpec(image=image)), label)
    for label, image in (
        ("of an absent image", "registry.invalid/absent:1"),
        ("without a name", ""),
    ):
        c.call("RemoveImage", pb.RemoveImageRequest(image=pb.ImageSpec(image=image)), label)


@case
def images_in_use(c: Caller) -> None:
    container = c.pod().run()
    spec = pb.ImageSpec(image=c.image)
    c.call("RemoveImage", pb.RemoveImageRequest(image=spec), "of an image in use")
    container.status("of a container whose image was removed", r"image")
    container.exec("in a container whose image was removed", "true")
    c.call("RemoveImage", pb.RemoveImageRequest(image=spec), "twice")
    c.call("PullImage", pb.PullImageRequest(image=spec), "again")
    c.call("PullImage", pb.PullImageRequest(image=spec), "of what is there")


@case
def the_node(c: Caller) -> None:
    c.call("Version", pb.VersionRequest(), "of the node", only=r"^(version|runtime_api_version)$")
    c.call("Status", pb.StatusRequest(), "of the node", only=r"conditions|handlers\[0\]|features")
    c.call("RuntimeConfig", pb.RuntimeConfigRequest(), "of the node")
    c.call("ImageFsInfo", pb.ImageFsInfoRequest(), "of the node", only=r"\[0\]\.[a-z_]+$")
    c.call("UpdateRuntimeConfig", pb.UpdateRuntimeConfigRequest(), "without a config")
    wrong = pb.RuntimeConfig(network_config=pb.NetworkConfig(pod_cidr="nowhere"))
    c.call("UpdateRuntimeConfig", pb.UpdateRuntimeConfigRequest(runtime_config=wrong), "malformed")


# --- events ---------------------------------------------------------------------------------------------------------


@case
def events_of_a_life(c: Caller) -> None:
    stream = c.events()
    pod = c.pod()
    container = pod.run()
    container.stop()
    container.remove()
    pod.stop()
    pod.remove()
    names = {pod.id: "pod", container.id: "container"}
    # Which event is the last one is not the same everywhere.
    threading.Timer(EVENTS_SECONDS, stream.cancel).start()
    told: list[str] = []
    with suppress(grpc.RpcError, grpc.FutureCancelledError):
        for event in stream:
            if event.container_id in names:
                kind = pb.ContainerEventType.Name(event.container_event_type)
                told.append(f"{names[event.container_id]} {kind.split('_')[1].lower()}")
    c.note("GetContainerEvents of a life", ", ".join(told))
