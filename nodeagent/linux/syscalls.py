"""System calls that Python lacks: one function for each, named and ordered as in the manual's section 2.

Plain values in, descriptors and numbers out; a call that fails raises `OSError` with the path, or with what else names
the object. Every descriptor made here is close-on-exec. There is no policy here: callers say what a call is for.
"""

import ctypes
import os
import struct
from collections.abc import Callable
from ctypes import c_char, c_char_p, c_int, c_long, c_size_t, c_uint, c_ulong, c_void_p

# of openat2(2), open_tree(2), move_mount(2), statx(2)
AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_STATX_DONT_SYNC = 0x4000
AT_RECURSIVE = 0x8000
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10
OPEN_TREE_CLONE = 0x1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x04
MOVE_MOUNT_T_EMPTY_PATH = 0x40
MOVE_MOUNT_SET_GROUP = 0x100

# of fsopen(2), fsconfig(2), fsmount(2)
FSOPEN_CLOEXEC = 0x1
FSMOUNT_CLOEXEC = 0x1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6

# of mount(2), umount2(2)
MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MNT_DETACH = 0x2
UMOUNT_NOFOLLOW = 0x8

# of mount_setattr(2), fsmount(2)
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_RELATIME = 0x0
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_STRICTATIME = 0x20
MOUNT_ATTR_ATIME_MASK = 0x70
MOUNT_ATTR_IDMAP = 0x100000
MOUNT_ATTR_NOSYMFOLLOW = 0x200000

# of clone3(2), setns(2), unshare(2)
CLONE_PIDFD = 0x1000
CLONE_PARENT = 0x8000
CLONE_NEWNS = 0x20000
CLONE_NEWCGROUP = 0x2000000
CLONE_NEWUTS = 0x4000000
CLONE_NEWIPC = 0x8000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_INTO_CGROUP = 0x200000000

# of prctl(2)
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_NAME = 15
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_SECUREBITS = 28
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_CLEAR_ALL = 4
SECBIT_NO_SETUID_FIXUP = 0x4

# of seccomp(2)
SECCOMP_SET_MODE_FILTER = 1

# of statfs(2)
PROC_SUPER_MAGIC = 0x9FA0

_KEYCTL_JOIN_SESSION_KEYRING = 1
_CAPABILITY_VERSION_3 = 0x20080522
_STATX_MNT_ID = 0x1000
_Statfs = c_char * 120

# openat2(2): a lookup with RESOLVE_IN_ROOT may fail with EAGAIN while others rename or mount; attempts are bounded.
_OPENAT2_ATTEMPTS = 1000

_SHARED_NUMBERS = {
    "pidfd_send_signal": 424,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "clone3": 435,
    "close_range": 436,
    "openat2": 437,
    "mount_setattr": 442,
}
_NUMBERS = {
    "x86_64": {
        "clone": 56,
        "setfsuid": 122,
        "setfsgid": 123,
        "capget": 125,
        "capset": 126,
        "fstatfs": 138,
        "pivot_root": 155,
        "prctl": 157,
        "mount": 165,
        "umount2": 166,
        "sethostname": 170,
        "exit_group": 231,
        "keyctl": 250,
        "ppoll": 271,
        "unshare": 272,
        "syncfs": 306,
        "setns": 308,
        "seccomp": 317,
        "statx": 332,
    },
    "aarch64": {
        "umount2": 39,
        "mount": 40,
        "pivot_root": 41,
        "fstatfs": 44,
        "ppoll": 73,
        "capget": 90,
        "capset": 91,
        "exit_group": 94,
        "unshare": 97,
        "setfsuid": 151,
        "setfsgid": 152,
        "sethostname": 161,
        "prctl": 167,
        "keyctl": 219,
        "clone": 220,
        "syncfs": 267,
        "setns": 268,
        "seccomp": 277,
        "statx": 291,
    },
}[os.uname().machine] | _SHARED_NUMBERS

# All system calls of a process that waits in `pause` until it ends.
PAUSE_CALLS = (_NUMBERS["ppoll"], _NUMBERS["exit_group"])

_libc = ctypes.CDLL(None, use_errno=True)
# PyDLL keeps the interpreter's lock during the call, so that the child of clone3 has it as well.
_libc_with_lock = ctypes.PyDLL(None, use_errno=True)


def _declare(name: str, *argument_types: type, library: ctypes.CDLL = _libc) -> Callable[..., int]:
    """The system call `name` as a function: its first argument names the object in errors, the others are passed."""
    number = _NUMBERS[name]
    function = library["syscall"]
    function.restype = c_long
    function.argtypes = (c_long, *argument_types)

    def call(subject: str | int | None, *arguments: object) -> int:
        result: int = function(number, *arguments)
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"{name}: {os.strerror(code)}", subject)
        return result

    return call


_capget = _declare("capget", c_char_p, c_void_p)
_capset = _declare("capset", c_char_p, c_char_p)
_clone = _declare("clone", c_ulong, c_void_p, c_void_p, c_void_p, c_void_p, library=_libc_with_lock)
_clone3 = _declare("clone3", c_char_p, c_size_t, library=_libc_with_lock)
_close_range = _declare("close_range", c_uint, c_uint, c_uint)
_fsconfig = _declare("fsconfig", c_int, c_uint, c_char_p, c_char_p, c_int)
_fsmount = _declare("fsmount", c_int, c_uint, c_uint)
_fsopen = _declare("fsopen", c_char_p, c_uint)
_fstatfs = _declare("fstatfs", c_int, c_void_p)
_keyctl = _declare("keyctl", c_int, c_char_p)
_mount = _declare("mount", c_char_p, c_char_p, c_char_p, c_ulong, c_char_p)
_mount_setattr = _declare("mount_setattr", c_int, c_char_p, c_uint, c_char_p, c_size_t)
_move_mount = _declare("move_mount", c_int, c_char_p, c_int, c_char_p, c_uint)
_open_tree = _declare("open_tree", c_int, c_char_p, c_uint)
_openat2 = _declare("openat2", c_int, c_char_p, c_char_p, c_size_t)
_pidfd_send_signal = _declare("pidfd_send_signal", c_int, c_int, c_void_p, c_uint)
_ppoll = _declare("ppoll", c_void_p, c_uint, c_void_p, c_void_p, c_size_t, library=_libc_with_lock)
_pivot_root = _declare("pivot_root", c_char_p, c_char_p)
_prctl = _declare("prctl", c_int, c_ulong, c_ulong, c_ulong, c_ulong)
_prctl_string = _declare("prctl", c_int, c_char_p)
_seccomp = _declare("seccomp", c_uint, c_uint, c_void_p)
_sethostname = _declare("sethostname", c_char_p, c_size_t)
_setfsgid = _declare("setfsgid", c_uint)
_setfsuid = _declare("setfsuid", c_uint)
_setns = _declare("setns", c_int, c_int)
_statx = _declare("statx", c_int, c_char_p, c_int, c_uint, c_void_p)
_syncfs = _declare("syncfs", c_int)
_umount2 = _declare("umount2", c_char_p, c_int)
_unshare = _declare("unshare", c_int)


# ---- processes and namespaces ----


def clone(flags: int) -> int:
    """Fork like `clone3` with these flags, for use under a seccomp filter that knows only the older call.

    Returns the pid, 0 in the child. With CLONE_PIDFD, the pidfd gets the lowest free number.
    """
    pidfd = c_int(-1)
    return _clone(None, flags, None, ctypes.addressof(pidfd), None, None)


def clone3(flags: int = 0, *, cgroup: int = -1, exit_signal: int = 17) -> tuple[int, int]:
    """Fork with new namespaces: (pid, pidfd) in the parent, (0, -1) in the child.

    cgroup: a directory of cgroup v2 that the child starts in. Only for processes with one thread: no handler of
    `os.register_at_fork` is run.
    """
    pidfd = c_int(-1)
    flags |= CLONE_PIDFD | (CLONE_INTO_CGROUP if cgroup >= 0 else 0)
    arguments = struct.pack(
        "=11Q", flags, ctypes.addressof(pidfd), 0, 0, exit_signal, 0, 0, 0, 0, 0, max(cgroup, 0)
    )
    pid = _clone3(None, arguments, len(arguments))
    return (pid, pidfd.value) if pid else (0, -1)


def setns(descriptor: int, kind: int) -> None:
    """Join a namespace of `kind` (CLONE_NEW…, 0 for any), or several through a pidfd."""
    _setns(descriptor, descriptor, kind)


def unshare(flags: int) -> None:
    _unshare(None, flags)


def pidfd_send_signal(pidfd: int, signal: int) -> None:
    _pidfd_send_signal(pidfd, pidfd, signal, None, 0)


def prctl(option: int, argument: int = 0, argument3: int = 0) -> int:
    return _prctl(option, option, argument, argument3, 0, 0)


def set_name(name: str) -> None:
    """Set the name that ps and top show (PR_SET_NAME), cut to 15 bytes."""
    _prctl_string(PR_SET_NAME, PR_SET_NAME, os.fsencode(name)[:15])


def close_range(first: int, last: int = 0xFFFFFFFF) -> None:
    _close_range(first, first, last, 0)


def sethostname(name: str) -> None:
    encoded = name.encode()
    _sethostname(name, encoded, len(encoded))


def join_session_keyring() -> None:
    """Join a new, anonymous session keyring (keyctl(2), KEYCTL_JOIN_SESSION_KEYRING)."""
    _keyctl(None, _KEYCTL_JOIN_SESSION_KEYRING, None)


def pause() -> None:
    """Wait for a signal that has a handler, as pause(2) does, which not every architecture has."""
    try:
        _ppoll(None, None, 0, None, None, 0)
    except InterruptedError:
        pass


# ---- privilege ----


def capget() -> tuple[int, int, int]:
    """The (effective, permitted, inheritable) sets of the caller, bit n for capability n."""
    data = ctypes.create_string_buffer(24)
    _capget(None, struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), data)
    low = struct.unpack("=6I", data.raw)
    effective, permitted, inheritable = (low[n] | low[n + 3] << 32 for n in range(3))
    return effective, permitted, inheritable


def capset(effective: int, permitted: int, inheritable: int) -> None:
    sets = (effective, permitted, inheritable)
    data = struct.pack("=6I", *(s & 0xFFFFFFFF for s in sets), *(s >> 32 for s in sets))
    _capset(None, struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), data)


def setfsuid(uid: int) -> None:
    """Set the id for file access. setfsuid(2) reports no failure; with CAP_SETUID it has none."""
    _setfsuid(uid, uid)


def setfsgid(gid: int) -> None:
    _setfsgid(gid, gid)


def seccomp(operation: int, flags: int, arguments: int) -> int:
    """Do an operation of seccomp(2). arguments: the address of its argument."""
    return _seccomp(operation, operation, flags, arguments)


# ---- files and file systems ----


def openat2(directory: int, path: str, flags: int, *, resolve: int, mode: int = 0) -> int:
    """Open `path` below `directory` under the given rules of resolution."""
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, resolve)
    encoded = os.fsencode(path)
    attempts = _OPENAT2_ATTEMPTS
    while True:
        try:
            return _openat2(path, directory, encoded, how, len(how))
        except (BlockingIOError, InterruptedError):
            attempts -= 1
            if not attempts:
                raise


def syncfs(descriptor: int) -> None:
    """Return once everything written to the file system of an open file would survive a power cut."""
    _syncfs(descriptor, descriptor)


def statfs_type(descriptor: int) -> int:
    """The type of the file system that an open file is on (f_type of fstatfs(2))."""
    data = _Statfs()
    _fstatfs(descriptor, descriptor, data)
    return int.from_bytes(data.raw[:8], "little")


def statx_mount_id(descriptor: int) -> int:
    """The id of the mount that an open file was reached through, found without a request to a server."""
    data = ctypes.create_string_buffer(256)
    flags = AT_EMPTY_PATH | AT_STATX_DONT_SYNC
    _statx(descriptor, descriptor, b"", flags, _STATX_MNT_ID, data)
    return int.from_bytes(data.raw[144:152], "little")


# ---- mounts ----


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    encoded = [os.fsencode(text) for text in (source, target, kind)]
    _mount(target, *encoded, flags, os.fsencode(data) or None)


def umount2(target: str, flags: int) -> None:
    _umount2(target, os.fsencode(target), flags)


def pivot_root(new_root: str, put_old: str) -> None:
    _pivot_root(new_root, os.fsencode(new_root), os.fsencode(put_old))


def open_tree(directory: int, path: str, flags: int) -> int:
    return _open_tree(path, directory, os.fsencode(path), flags | OPEN_TREE_CLOEXEC)


def move_mount(source: int, target: int, target_path: str = "") -> None:
    """Attach the mount of the descriptor `source` at `target_path` below `target`, or at `target` itself."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | (0 if target_path else MOVE_MOUNT_T_EMPTY_PATH)
    _move_mount(target_path or target, source, b"", target, os.fsencode(target_path), flags)


def set_mount_group(source: int, target: int) -> None:
    """Put the private mount with root `target` into the peer group of the one with root `source` (Linux 5.15)."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH | MOVE_MOUNT_SET_GROUP
    _move_mount(target, source, b"", target, b"", flags)


def mount_setattr(
    directory: int,
    path: str,
    flags: int,
    *,
    attr_set: int = 0,
    attr_clr: int = 0,
    propagation: int = 0,
    userns: int = 0,
) -> None:
    attributes = struct.pack("=4Q", attr_set, attr_clr, propagation, userns)
    encoded = os.fsencode(path)
    _mount_setattr(path or directory, directory, encoded, flags, attributes, len(attributes))


def fsopen(kind: str) -> int:
    return _fsopen(kind, kind.encode(), FSOPEN_CLOEXEC)


def fsconfig(
    context: int, command: int, key: str | None = None, value: str | None = None, aux: int = 0
) -> None:
    encoded_key = None if key is None else key.encode()
    encoded_value = None if value is None else os.fsencode(value)
    _fsconfig(key, context, command, encoded_key, encoded_value, aux)


def fsmount(context: int, attributes: int) -> int:
    return _fsmount(context, context, FSMOUNT_CLOEXEC, attributes)
