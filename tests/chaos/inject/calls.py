"""Sets of calls to the kernel, and how each call of them can fail."""

from __future__ import annotations

_FILES = (
    "openat,open,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,rmdir,write,pwrite64,fsync,fdatasync,"
    "ftruncate,fallocate,chmod,fchmod,fchown,chown,link,symlink,setxattr,removexattr"
)
_READS = "read,pread64,getdents64,newfstatat,getxattr,readlink"
_DESCRIPTORS = "openat,open,socket,accept4,pipe2,fcntl,pidfd_open,epoll_create1,eventfd2,memfd_create,socketpair"
_MESSAGES = "sendmsg,recvmsg,sendto,recvfrom,connect,accept4,socket"
_PROCESSES = "clone,clone3,fork,vfork,pidfd_open,pidfd_send_signal,kill,setns,unshare,prctl"
_WAITS = "waitid,wait4"  # which fail for want of children only
_MOUNTS = "mount,umount2,fsopen,fsconfig,fsmount,open_tree,move_mount,mount_setattr,pivot_root"
_OF_INIT = (
    "mount,umount2,fsopen,fsconfig,fsmount,open_tree,move_mount,mount_setattr,pivot_root,setresuid,setresgid,"
    "setgroups,capset,seccomp,execve,sethostname,unshare,mknod,mknodat,symlink,chown,fchown"
)

# The calls of a set, and how each of them can fail.
SETS = {
    "files": (_FILES, ("EIO", "ENOSPC", "EPERM", "ENOSPC+", "EIO+")),
    "reads": (_READS, ("EIO",)),
    "descriptors": (_DESCRIPTORS, ("EMFILE", "EMFILE+")),
    "messages": (_MESSAGES, ("ENOMEM", "ENOBUFS", "EINTR", "ENOMEM+")),
    "processes": (_PROCESSES, ("EPERM", "ENOMEM", "ENOMEM+")),
    "mounts": (_MOUNTS, ("EBUSY", "ENOMEM", "EPERM")),
    "all": (f"{_FILES},{_MESSAGES},{_PROCESSES},{_WAITS},{_MOUNTS}", ("KILL", "STOP")),
    "init": (_OF_INIT, ("EPERM", "ENOMEM", "EIO", "KILL", "STOP")),
}


def named(calls: str, *, lasts: bool) -> str:
    """The calls of a set, or the list of calls that `calls` is itself.

    lasts: they fail for a while. Not read and write then: they would fail for pipes and eventfds too, as they never do.
    """
    found = SETS[calls][0] if calls in SETS else calls
    return ",".join(c for c in found.split(",") if not (lasts and c in ("read", "write")))
