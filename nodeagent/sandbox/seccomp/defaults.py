"""The seccomp profile of containers that ask for the runtime's default, as data.

It allows what programs use and what acts on nothing but themselves, their files and their own namespaces. What is in
no list is refused with EPERM: keyrings, io_uring, userfaultfd, kexec, swap, modules of the kernel, old calls that
nothing calls any more. What is newer than all lists does not exist for the container (ENOSYS), so that libraries fall
back to what they did before.
"""

from typing import NamedTuple

ALLOWED = """
    _llseek _newselect accept accept4 access adjtimex alarm arch_prctl arm_fadvise64_64
    arm_sync_file_range bind breakpoint brk cacheflush cachestat capget capset chdir chmod chown
    chown32 clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime
    clock_gettime64 clock_nanosleep clock_nanosleep_time64 close close_range connect
    copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_ctl_old
    epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 execve execveat exit
    exit_group faccessat faccessat2 fadvise64 fadvise64_64 fallocate fanotify_mark fchdir fchmod
    fchmodat fchmodat2 fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr file_getattr
    file_setattr flistxattr flock fork fremovexattr fsetxattr fstat fstat64 fstatat64 fstatfs
    fstatfs64 fsync ftruncate ftruncate64 futex futex_requeue futex_time64 futex_wait futex_waitv
    futex_wake futimesat get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid
    getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getitimer getpeername
    getpgid getpgrp getpid getppid getpriority getrandom getresgid getresgid32 getresuid
    getresuid32 getrlimit getrusage getsid getsockname getsockopt gettid gettimeofday getuid
    getuid32 getxattr getxattrat inotify_add_watch inotify_init inotify_init1 inotify_rm_watch
    io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit ioctl
    ioprio_get ioprio_set ipc kill landlock_add_rule landlock_create_ruleset
    landlock_restrict_self lchown lchown32 lgetxattr link linkat listen listmount listxattr
    listxattrat llistxattr lremovexattr lseek lsetxattr lsm_get_self_attr lsm_list_modules
    lsm_set_self_attr lstat lstat64 madvise map_shadow_stack membarrier memfd_create memfd_secret
    mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap mmap2 modify_ldt mprotect
    mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend
    mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync munlock
    munlockall munmap name_to_handle_at nanosleep newfstatat open openat openat2 pause pidfd_open
    pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll ppoll_time64 prctl
    pread64 preadv preadv2 prlimit64 process_mrelease process_vm_readv process_vm_writev pselect6
    pselect6_time64 ptrace pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv recv
    recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages removexattr removexattrat rename
    renameat renameat2 restart_syscall riscv_hwprobe rmdir rseq rt_sigaction rt_sigpending
    rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
    rt_sigtimedwait_time64 rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min
    sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval
    sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam sched_setscheduler
    sched_yield seccomp select semctl semget semop semtimedop semtimedop_time64 send sendfile
    sendfile64 sendmmsg sendmsg sendto set_robust_list set_thread_area set_tid_address set_tls
    setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups setgroups32 setitimer
    setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid
    setreuid32 setrlimit setsid setsockopt setuid setuid32 setxattr setxattrat shmat shmctl shmdt
    shmget shutdown sigaction sigaltstack signal signalfd signalfd4 sigpending sigprocmask
    sigreturn sigsuspend socketpair splice stat stat64 statfs statfs64 statmount statx symlink
    symlinkat sync sync_file_range sync_file_range2 syncfs sysinfo tee tgkill time timer_create
    timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64
    timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 times tkill
    truncate truncate64 ugetrlimit umask uname unlink unlinkat uretprobe utime utimensat
    utimensat_time64 utimes vfork vmsplice wait4 waitid waitpid write writev
""".split()

# Allowed in addition to processes that hold the capability, without which the kernel would refuse most of it anyway.
ALLOWED_WITH = {
    "BPF": "bpf".split(),
    "DAC_READ_SEARCH": "open_by_handle_at".split(),
    "PERFMON": "perf_event_open".split(),
    "SYS_ADMIN": """
        bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount mount_setattr
        move_mount open_tree open_tree_attr perf_event_open pivot_root quotactl quotactl_fd setdomainname sethostname
        setns syslog umount umount2 unshare
    """.split(),
    "SYS_BOOT": "reboot".split(),
    "SYS_CHROOT": "chroot".split(),
    "SYS_MODULE": "delete_module finit_module init_module".split(),
    "SYS_NICE": "get_mempolicy mbind set_mempolicy set_mempolicy_home_node".split(),
    "SYS_PACCT": "acct".split(),
    "SYS_PTRACE": "kcmp pidfd_getfd process_madvise".split(),
    "SYS_RAWIO": "ioperm iopl".split(),
    "SYS_TIME": "clock_settime clock_settime64 settimeofday stime".split(),
    "SYS_TTY_CONFIG": "vhangup".split(),
    "SYSLOG": "syslog".split(),
}

# The newest ones, which libseccomp may not know. Their numbers are the same on all architectures but Alpha
# (scripts/syscall.tbl of the kernel).
NUMBERS = {
    "cachestat": 451,
    "fchmodat2": 452,
    "map_shadow_stack": 453,
    "futex_wake": 454,
    "futex_wait": 455,
    "futex_requeue": 456,
    "statmount": 457,
    "listmount": 458,
    "lsm_get_self_attr": 459,
    "lsm_set_self_attr": 460,
    "lsm_list_modules": 461,
    "mseal": 462,
    "setxattrat": 463,
    "getxattrat": 464,
    "listxattrat": 465,
    "removexattrat": 466,
    "open_tree_attr": 467,
    "file_getattr": 468,
    "file_setattr": 469,
}


class Masked(NamedTuple):
    """A condition: the bits of the mask have, in this argument, the value."""

    argument: int
    mask: int
    value: int


_INT = 0xFFFFFFFF

# No new namespaces without SYS_ADMIN: the mask has clone's CLONE_NEW… flags. clone3 has its flags in memory, which no
# filter sees; it is made not to exist (ENOSYS), which makes C libraries use clone.
CLONE = (Masked(0, 0x7E020000, 0),)

# ADDR_COMPAT_LAYOUT and its like weaken a process: allowed are PER_LINUX, PER_LINUX32, both with UNAME26, and the query
# of the present one (personality(2)).
PERSONALITY = tuple(Masked(0, _INT, value) for value in (0x0, 0x8, 0x20000, 0x20008, _INT))

# All address families up to 47 except 38, AF_ALG, whose splices have written to page caches that containers share,
# and 40, AF_VSOCK, which knows no namespaces. The kernel takes the family from the lower half of the register.
SOCKET = (
    Masked(0, _INT ^ 31, 0),
    Masked(0, _INT ^ 3, 32),
    Masked(0, _INT ^ 1, 36),
    Masked(0, _INT, 39),
    Masked(0, _INT, 41),
    Masked(0, _INT ^ 1, 42),
    Masked(0, _INT ^ 3, 44),
)

# socketcall(2) has the family of a socket in memory, where no filter sees it. Without it C libraries use the separate
# calls, which 32-bit x86 has since Linux 4.3.
ABSENT = ("socketcall",)
