"""Translation of usages to the messages of the stats calls. What could not be measured is absent, never 0."""

from collections.abc import Sequence

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cgroups.parse import Pressure, PressureLine
from nodeagent.cgroups.stats import CpuStats, MemoryStats, PressureStats
from nodeagent.cri import messages
from nodeagent.lifecycle.usage.disk import DiskUsage
from nodeagent.lifecycle.usage.stats import ContainerUsage, GroupUsage, SandboxUsage
from nodeagent.net.stats import InterfaceStats

_NO_PRESSURE = PressureStats(cpu=None, memory=None, io=None)

# --- containers -----------------------------------------------------------------------------------------------------


def container_stats(usage: ContainerUsage) -> pb.ContainerStats:
    container, cgroup = usage.container, usage.cgroup
    return pb.ContainerStats(
        attributes=pb.ContainerAttributes(
            id=container.id,
            metadata=messages.container_metadata(container),
            labels=container.config.labels,
            annotations=container.config.annotations,
        ),
        cpu=_cpu([usage], usage.at_ns, cgroup.pressure.cpu),
        memory=_memory([usage], usage.at_ns, cgroup.pressure.memory),
        writable_layer=_disk(usage.disk),
        swap=_swap(usage),
        io=_io(usage.at_ns, cgroup.pressure.io),
    )


def _disk(disk: DiskUsage) -> pb.FilesystemUsage:
    return pb.FilesystemUsage(
        timestamp=disk.at_ns,
        fs_id=pb.FilesystemIdentifier(mountpoint=disk.mountpoint),
        used_bytes=_value(disk.used_bytes),
        inodes_used=_value(disk.inodes_used),
    )


def _swap(usage: ContainerUsage) -> pb.SwapUsage | None:
    memory = usage.cgroup.memory
    if memory is None:
        return None
    limit = memory.swap_limit_bytes
    free = None if limit is None else max(0, limit - memory.swap_bytes)
    return pb.SwapUsage(
        timestamp=usage.at_ns,
        swap_usage_bytes=_value(memory.swap_bytes),
        swap_available_bytes=_value(free),
    )


# --- pods -----------------------------------------------------------------------------------------------------------


def sandbox_stats(usage: SandboxUsage) -> pb.PodSandboxStats:
    """Statistics of a pod, read from its own cgroup; without one, the sums over its running containers."""
    sandbox = usage.sandbox
    parts: Sequence[GroupUsage] = [usage.group] if usage.group else usage.containers
    pressure = usage.group.cgroup.pressure if usage.group else _NO_PRESSURE
    return pb.PodSandboxStats(
        attributes=pb.PodSandboxAttributes(
            id=sandbox.id,
            metadata=messages.sandbox_metadata(sandbox),
            labels=sandbox.config.labels,
            annotations=sandbox.config.annotations,
        ),
        linux=pb.LinuxPodSandboxStats(
            cpu=_cpu(parts, usage.at_ns, pressure.cpu),
            memory=_memory(parts, usage.at_ns, pressure.memory),
            network=_network(usage.interfaces, usage.at_ns),
            io=_io(usage.at_ns, pressure.io),
            process=pb.ProcessUsage(timestamp=usage.at_ns, process_count=_value(_processes(parts))),
            containers=[container_stats(container) for container in usage.containers],
        ),
    )


def _processes(usages: Sequence[GroupUsage]) -> int:
    return sum(usage.cgroup.pids.current for usage in usages if usage.cgroup.pids)


def _network(interfaces: Sequence[InterfaceStats], at_ns: int) -> pb.NetworkUsage | None:
    """Traffic of a pod; None on the node's network, as the kubelet needs a default interface in a message."""
    if not interfaces:
        return None
    default, *others = (_interface(interface) for interface in interfaces)
    return pb.NetworkUsage(timestamp=at_ns, default_interface=default, interfaces=others)


def _interface(stats: InterfaceStats) -> pb.NetworkInterfaceUsage:
    return pb.NetworkInterfaceUsage(
        name=stats.name,
        rx_bytes=_value(stats.rx_bytes),
        rx_errors=_value(stats.rx_errors),
        tx_bytes=_value(stats.tx_bytes),
        tx_errors=_value(stats.tx_errors),
    )


# --- sums over one or more containers -------------------------------------------------------------------------------


def _cpu(usages: Sequence[GroupUsage], at_ns: int, pressure: Pressure | None) -> pb.CpuUsage | None:
    known: list[CpuStats] = [usage.cgroup.cpu for usage in usages if usage.cgroup.cpu]
    if usages and not known:
        return None
    rates = [usage.usage_nano_cores for usage in usages if usage.usage_nano_cores is not None]
    return pb.CpuUsage(
        timestamp=at_ns,
        usage_core_nano_seconds=_value(sum(cpu.usage_ns for cpu in known)),
        usage_nano_cores=_value(sum(rates)) if rates else None,
        psi=_psi(pressure),
    )


def _memory(
    usages: Sequence[GroupUsage], at_ns: int, pressure: Pressure | None
) -> pb.MemoryUsage | None:
    known: list[MemoryStats] = [usage.cgroup.memory for usage in usages if usage.cgroup.memory]
    if usages and not known:
        return None
    free = [memory.available_bytes for memory in known]
    bounded = [value for value in free if value is not None]
    return pb.MemoryUsage(
        timestamp=at_ns,
        working_set_bytes=_value(sum(memory.working_set_bytes for memory in known)),
        available_bytes=_value(sum(bounded)) if free and len(bounded) == len(free) else None,
        usage_bytes=_value(sum(memory.usage_bytes for memory in known)),
        rss_bytes=_value(sum(memory.rss_bytes for memory in known)),
        page_faults=_value(sum(memory.page_faults for memory in known)),
        major_page_faults=_value(sum(memory.major_page_faults for memory in known)),
        psi=_psi(pressure),
    )


def _io(at_ns: int, pressure: Pressure | None) -> pb.IoUsage | None:
    return pb.IoUsage(timestamp=at_ns, psi=_psi(pressure)) if pressure else None


def _psi(pressure: Pressure | None) -> pb.PsiStats | None:
    if pressure is None:
        return None
    return pb.PsiStats(Full=_psi_data(pressure.full), Some=_psi_data(pressure.some))


def _psi_data(line: PressureLine) -> pb.PsiData:
    """Pressure in nanoseconds: the kernel counts microseconds (Documentation/accounting/psi.rst)."""
    return pb.PsiData(
        Total=line.total_usec * 1000, Avg10=line.avg10, Avg60=line.avg60, Avg300=line.avg300
    )


def _value(number: int | None) -> pb.UInt64Value | None:
    return None if number is None else pb.UInt64Value(value=number)
