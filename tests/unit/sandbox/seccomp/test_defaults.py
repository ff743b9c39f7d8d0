"""The defaults of confinement, compared with those of other runtimes: each difference is a decision, with its reason.

Facts of containerd 2.4 (contrib/seccomp, pkg/oci), runc 1.5 (libcontainer/specconv) and Moby (daemon/pkg/oci), as their
sources had them in August 2026: which system calls, which paths.
"""

import errno
import os
from collections.abc import Mapping

from nodeagent.cgroups.devices import DEFAULT_RULES
from nodeagent.lifecycle.plan import mounts, process
from nodeagent.linux import bpf_classic, capabilities, libseccomp, seccomp
from nodeagent.requests import CapabilityChange
from nodeagent.sandbox.seccomp import defaults as ours
from nodeagent.sandbox.seccomp import profile as seccomp_profile

# ---- system calls ----

# On all architectures, and since Linux 4.8 ptrace and its like.
CONTAINERD = set(
    """
    _llseek _newselect accept accept4 access adjtimex alarm bind brk cachestat capget capset chdir chmod chown
    chown32 clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64
    clock_nanosleep clock_nanosleep_time64 close close_range connect copy_file_range creat dup dup2 dup3
    epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old
    eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 fadvise64_64 fallocate
    fanotify_mark fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr
    flistxattr flock fork fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate
    ftruncate64 futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake futimesat get_robust_list
    get_thread_area getcpu getcwd getdents getdents64 getegid getegid32 geteuid geteuid32 getgid getgid32
    getgroups getgroups32 getitimer getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid
    getresgid32 getresuid getresuid32 getrlimit getrusage getsid getsockname getsockopt gettid gettimeofday
    getuid getuid32 getxattr getxattrat inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel
    io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit ioctl ioprio_get ioprio_set
    ipc kill landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown lchown32 lgetxattr link
    linkat listen listmount listxattr listxattrat llistxattr lremovexattr lseek lsetxattr lsm_get_self_attr
    lsm_list_modules lsm_set_self_attr lstat lstat64 madvise map_shadow_stack membarrier memfd_create
    memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap mmap2 mprotect mq_getsetattr
    mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink mremap
    mseal msgctl msgget msgrcv msgsnd msync munlock munlockall munmap name_to_handle_at nanosleep newfstatat
    open openat openat2 pause pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll
    ppoll ppoll_time64 prctl pread64 preadv preadv2 prlimit64 process_mrelease pselect6 pselect6_time64 pwrite64
    pwritev pwritev2 read readahead readlink readlinkat readv recv recvfrom recvmmsg recvmmsg_time64 recvmsg
    remap_file_pages removexattr removexattrat rename renameat renameat2 restart_syscall rmdir rseq rt_sigaction
    rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
    rt_sigtimedwait_time64 rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min sched_getaffinity
    sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64
    sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield seccomp select semctl semget
    semop semtimedop semtimedop_time64 send sendfile sendfile64 sendmmsg sendmsg sendto set_robust_list
    set_thread_area set_tid_address setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups
    setgroups32 setitimer setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid setresuid32
    setreuid setreuid32 setrlimit setsid setsockopt setuid setuid32 setxattr setxattrat shmat shmctl shmdt
    shmget shutdown sigaltstack signalfd signalfd4 sigprocmask sigreturn socketcall socketpair splice stat
    stat64 statfs statfs64 statmount statx symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time
    timer_create timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64
    timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 times tkill truncate
    truncate64 ugetrlimit umask uname unlink unlinkat uretprobe utime utimensat utimensat_time64 utimes vfork
    vmsplice wait4 waitid waitpid write writev
    process_vm_readv process_vm_writev ptrace
    """.split()
)
CONTAINERD_BY_ARCHITECTURE = set(
    """
    arch_prctl arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush modify_ldt riscv_hwprobe set_tls
    sync_file_range2
    """.split()
)
CONTAINERD_WITH = {
    "BPF": "bpf",
    "DAC_READ_SEARCH": "open_by_handle_at",
    "PERFMON": "perf_event_open",
    "SYS_ADMIN": """
        bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount mount_setattr move_mount
        open_tree perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog umount umount2 unshare
    """,
    "SYS_BOOT": "reboot",
    "SYS_CHROOT": "chroot",
    "SYS_MODULE": "delete_module finit_module init_module",
    "SYS_NICE": "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    "SYS_PACCT": "acct",
    "SYS_PTRACE": "kcmp pidfd_getfd process_madvise",
    "SYS_RAWIO": "ioperm iopl",
    "SYS_TIME": "clock_settime clock_settime64 settimeofday stime",
    "SYS_TTY_CONFIG": "vhangup",
    "SYSLOG": "syslog",
}

ONLY_OURS = {
    "file_getattr": "Linux 6.17; does what ioctl(FS_IOC_FSGETXATTR) does, which no filter closes",
    "file_setattr": "Linux 6.17; does what ioctl(FS_IOC_FSSETXATTR) does, which no filter closes",
    "sigaction": "i386 and ARM: old programs call it; acts on the caller alone, as rt_sigaction does",
    "signal": "i386: the same",
    "sigpending": "i386 and ARM: the same",
    "sigsuspend": "i386 and ARM: the same",
}
ONLY_THEIRS = {
    "socketcall": "has the family of a socket in memory, so that AF_ALG and AF_VSOCK would be open to i386: ENOSYS",
}
ONLY_OURS_WITH = {
    (
        "SYS_ADMIN",
        "open_tree_attr",
    ): "Linux 6.15: open_tree and mount_setattr in one, which are allowed",
    (
        "SYS_ADMIN",
        "pivot_root",
    ): "whoever may mount and chroot may do this; container engines inside containers do",
}


def test_system_calls_of_every_container() -> None:
    theirs = CONTAINERD | CONTAINERD_BY_ARCHITECTURE
    assert set(ours.ALLOWED) - theirs == set(ONLY_OURS)
    assert theirs - set(ours.ALLOWED) == set(ONLY_THEIRS)
    assert set(ours.ABSENT) == set(ONLY_THEIRS)


def test_system_calls_by_capability() -> None:
    def pairs(lists: Mapping[str, list[str]]) -> set[tuple[str, str]]:
        return {(capability, name) for capability, names in lists.items() for name in names}

    theirs = pairs({capability: names.split() for capability, names in CONTAINERD_WITH.items()})
    assert pairs(ours.ALLOWED_WITH) - theirs == set(ONLY_OURS_WITH)
    assert theirs - pairs(ours.ALLOWED_WITH) == set()


# Conditions: the argument's values that are allowed; everything else is EPERM.
FAMILIES = set(range(64)) - {38, 40}  # AF_ALG, AF_VSOCK
LAST_FAMILY = 47  # above: none that a kernel has; theirs lets them through to EAFNOSUPPORT
PERSONALITIES = {0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF}
NAMESPACES = 0x7E020000  # of clone: mount, UTS, IPC, user, PID, network, cgroup


def allows(name: str, argument: int, *held: str) -> bool:
    compiled = seccomp_profile.runtime_default(capabilities.mask(held))
    number = libseccomp.number_of(name)
    assert number is not None
    data = bpf_classic.seccomp_data(number, seccomp.AUDIT_ARCH, [argument])
    action = bpf_classic.run(compiled.program, data)
    assert action in (libseccomp.ACT_ALLOW, libseccomp.ACT_ERRNO | errno.EPERM)
    return action == libseccomp.ACT_ALLOW


def test_conditions() -> None:
    families = {family for family in range(64) if allows("socket", family)}
    assert families == {family for family in FAMILIES if family <= LAST_FAMILY}
    tried = {*PERSONALITIES, 0x1, 0x40000, 0x200000, 0x400000, 0x8000000}
    assert {value for value in tried if allows("personality", value)} == PERSONALITIES
    for bit in range(32):
        assert allows("clone", 1 << bit) == (not NAMESPACES & 1 << bit)
        assert allows("clone", 1 << bit, "SYS_ADMIN")


ARCHITECTURES = {
    "x86_64": (
        {"x86"},
        {"x32": "nothing is built for it, and its numbers have passed filters by (2^30 added)"},
    ),
    "aarch64": ({"arm"}, {}),
}


def test_architectures() -> None:
    """Beside the native one."""
    theirs_too, refused = ARCHITECTURES[os.uname().machine]
    assert set(seccomp_profile._compat_architectures()) == theirs_too
    assert all(refused.values())


# ---- paths ----

RUNC_MASKED = set(
    """
    /proc/acpi /proc/asound /proc/kcore /proc/keys /proc/latency_stats /proc/sched_debug /proc/scsi /proc/timer_list
    /proc/timer_stats /sys/firmware
    """.split()
)
CONTAINERD_MASKED = RUNC_MASKED | {"/sys/devices/virtual/powercap"}
READONLY = {"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}

ONLY_OURS_MASKED = {
    "/proc/interrupts": "counts keystrokes and packets of the node; Moby masks it as well",
}
ONLY_OURS_MASKED_BY_PATTERN = {
    "devices/system/cpu/cpu[0-9]*/thermal_throttle": "tells when others compute; Moby masks it as well",
}


def test_masked_paths() -> None:
    assert set(mounts.MASKED_PATHS) - CONTAINERD_MASKED == set(ONLY_OURS_MASKED)
    assert CONTAINERD_MASKED - set(mounts.MASKED_PATHS) == set()
    assert {mounts.THERMAL_COUNTERS} == set(ONLY_OURS_MASKED_BY_PATTERN)


def test_read_only_paths() -> None:
    """The same in containerd and runc."""
    assert set(mounts.READONLY_PATHS) == READONLY


# ---- capabilities and devices ----

CAPABILITIES = set(
    """
    AUDIT_WRITE CHOWN DAC_OVERRIDE FOWNER FSETID KILL MKNOD NET_BIND_SERVICE NET_RAW SETFCAP SETGID SETPCAP SETUID
    SYS_CHROOT
    """.split()
)
DEVICES = {
    "b *:* m", "c *:* m", "c 1:3 rwm", "c 1:5 rwm", "c 1:7 rwm", "c 1:8 rwm", "c 1:9 rwm", "c 5:0 rwm", "c 5:2 rwm",
    "c 136:* rwm",
}  # fmt: skip


def test_capabilities() -> None:
    sets = process.capability_sets(CapabilityChange(), privileged=False)
    assert set(capabilities.names(sets["bounding"])) == CAPABILITIES


def test_devices() -> None:
    assert {str(rule) for rule in DEFAULT_RULES} == DEVICES
