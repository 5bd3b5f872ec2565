"""Shut a process in, for good: no network, no other processes, no files but those of one folder.

Three of Linux's own means, none of which needs to be root:

- Landlock: reads and writes stay in the folder, and reads in what Python itself is made of;
- seccomp, through libseccomp: only the calls that a computation needs, all others fail with "not permitted";
- limits of processor time, memory and file size; and the rights of root are given back, if there are any.

What remains: a process may see that a file exists, and its size; it may fill the disk with files in its
folder until its time is over; and it knows all that the process knew of which it was forked.
"""

import ctypes
import ctypes.util
import os
import resource
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

_FILE_BYTES = 64 * 2**20
_OPEN_FILES = 128

# Landlock has the same numbers on every machine. Rights by the version that brought them; see landlock(7).
_CREATE, _ADD, _RESTRICT = 444, 445, 446
_RIGHTS = {1: 2**13 - 1, 2: 2**14 - 1, 3: 2**15 - 1, 4: 2**15 - 1, 5: 2**16 - 1}
_READ_FILE, _READ_FOLDER, _WRITE_FILE = 1 << 2, 1 << 3, 1 << 1
_IN_FOLDER = (  # no programs, devices, sockets, pipes and links
    _READ_FILE | _READ_FOLDER | _WRITE_FILE | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 14
)  # and remove and make folders and files, and truncate

# From linux/prctl.h and linux/capability.h.
_PARENT_DIES, _DROP_BOUNDING, _NO_NEW_RIGHTS = 1, 24, 38
_CAPABILITY_VERSION = 0x20080522

_ALLOW, _NOT_PERMITTED, _NO_SUCH_CALL = 0x7FFF0000, 0x00050001, 0x00050026
_THREAD = 0x00010000  # the flag of clone that makes a thread, not a process
_CALLS = [
    "access", "arch_prctl", "brk", "chdir", "clock_getres", "clock_gettime", "clock_nanosleep", "close",
    "close_range", "copy_file_range", "creat", "dup", "dup2", "dup3", "epoll_create1", "epoll_ctl",
    "epoll_pwait", "epoll_wait", "eventfd2", "exit", "exit_group", "faccessat", "faccessat2", "fadvise64",
    "fallocate", "fchdir", "fcntl", "fdatasync", "flock", "fstat", "fstatfs", "fsync", "ftruncate", "futex",
    "futex_wait", "futex_wake", "get_robust_list", "getcpu", "getcwd", "getdents64", "getegid", "geteuid",
    "getgid", "getgroups", "getpid", "getppid", "getrandom", "getrlimit", "getrusage", "gettid",
    "gettimeofday", "getuid", "ioctl", "lseek", "lstat", "madvise", "membarrier", "mincore", "mkdir",
    "mkdirat", "mmap", "mprotect", "mremap", "munmap", "nanosleep", "newfstatat", "open", "openat",
    "openat2", "pipe", "pipe2", "poll", "ppoll", "pread64", "preadv", "pselect6", "pwrite64", "pwritev",
    "read", "readlink", "readlinkat", "readv", "rename", "renameat", "renameat2", "restart_syscall",
    "rmdir", "rseq", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sched_getaffinity", "sched_yield",
    "select", "sendfile", "set_robust_list", "set_tid_address", "sigaltstack", "stat", "statfs", "statx",
    "sysinfo", "time", "times", "truncate", "umask", "uname", "unlink", "unlinkat", "write", "writev",
]  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32)]


class _Compare(ctypes.Structure):
    _fields_ = [
        ("argument", ctypes.c_uint),
        ("operation", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    ]


class Sandbox:
    """What a process may do, made ready before it is forked; `enter` then shuts it in.

    Args:
        folder: the only place that it may write to.
        readable: files and folders that it may read beside it.
        seconds: of processor time.
        memory_mb: how much more memory it may take than it has (in MB of 2^20 bytes).

    Raises:
        OSError: this system cannot do it; the message says what is missing.
    """

    def __init__(self, folder: Path, readable: Iterable[Path], seconds: int, memory_mb: int) -> None:
        self.folder, self.seconds, self.memory_mb = folder, seconds, memory_mb
        self._seccomp, self._filter = _filter()
        self._ruleset = _ruleset(folder, readable)

    def enter(self, keep: Iterable[int]) -> None:
        """Shut this process in. There is no way back.

        Args:
            keep: the open files that it keeps; all others are closed.
        """
        os.chdir(self.folder)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        limit_memory(self.memory_mb)
        _limit(self.seconds)
        _checked(_libc.prctl(_PARENT_DIES, signal.SIGKILL, 0, 0, 0))
        _give_rights_back()
        _checked(_libc.prctl(_NO_NEW_RIGHTS, 1, 0, 0, 0))
        _checked(_libc.syscall(_RESTRICT, self._ruleset, 0))
        kept = sorted({0, 1, 2, *keep})
        for before, after in zip(kept, [*kept[1:], os.sysconf("SC_OPEN_MAX")], strict=True):
            os.closerange(before + 1, after)
        if error := self._seccomp.seccomp_load(self._filter):
            raise OSError(-error, os.strerror(-error))

    def close(self) -> None:
        """Free what was made ready."""
        os.close(self._ruleset)
        self._seccomp.seccomp_release(self._filter)


def python_itself() -> list[Path]:
    """What a Python process reads when it imports modules of its installation, and the system's libraries."""
    library = Path(__file__).parents[2]
    places = [sys.prefix, sys.base_prefix, "/usr/lib", "/lib", "/lib64", "/usr/lib64", "/etc/ld.so.cache"]
    places += [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    places += ["/dev/null", "/dev/urandom", "/dev/zero"]
    recorded = (library / "recorded").iterdir()  # in a checkout, links that lead out of the library
    return [library, *recorded, *(Path(place) for place in places if place != "/" and Path(place).exists())]


def _ruleset(folder: Path, readable: Iterable[Path]) -> int:
    version = _libc.syscall(_CREATE, None, 0, 1) if sys.platform == "linux" else -1
    if version < 1:
        raise OSError(
            "Grading runs the code of students, and this system cannot shut it in: Landlock is missing, "
            "which Linux has from version 5.13 on. Grade on such a system; a virtual machine will do."
        )
    rights = _RIGHTS[min(version, 5)]
    attributes = _Ruleset(rights, 3, 3)  # no TCP; no signals and no abstract sockets to the outside
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _checked(_libc.syscall(_CREATE, ctypes.byref(attributes), size, 0))
    for place, allowed in [(folder, _IN_FOLDER), *((place, _READ_FILE | _READ_FOLDER) for place in readable)]:
        opened = os.open(place, os.O_PATH | os.O_CLOEXEC)
        allowed &= rights if place.is_dir() else _READ_FILE
        if str(place) == os.devnull:
            allowed |= _WRITE_FILE
        _checked(_libc.syscall(_ADD, ruleset, 1, ctypes.byref(_Beneath(allowed, opened)), 0))
        os.close(opened)
    return ruleset


def _filter() -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    name = ctypes.util.find_library("seccomp") or "libseccomp.so.2"
    try:
        seccomp = ctypes.CDLL(name)
    except OSError:
        raise OSError(
            "Grading runs the code of students, and this system cannot shut it in: libseccomp is missing. "
            "Install it, on Debian and Ubuntu with: apt install libseccomp2"
        ) from None
    seccomp.seccomp_init.restype = ctypes.c_void_p
    pointer = ctypes.c_void_p(seccomp.seccomp_init(_NOT_PERMITTED))

    def rule(action: int, call: str, *comparisons: _Compare) -> None:
        number = seccomp.seccomp_syscall_resolve_name(call.encode())
        if number != -1:  # else this machine or this version does not know it, and it stays forbidden
            several = (_Compare * len(comparisons))(*comparisons)
            error = seccomp.seccomp_rule_add_array(pointer, action, number, len(comparisons), several)
            if error:
                raise OSError(-error, f"The rule for {call} could not be made: {os.strerror(-error)}")

    for call in _CALLS:
        rule(_ALLOW, call)
    rule(_ALLOW, "clone", _Compare(0, 7, _THREAD, _THREAD))
    rule(_NO_SUCH_CALL, "clone3")  # whose flags no filter can read; the C library then asks for clone
    rule(_ALLOW, "prlimit64", _Compare(2, 4, 0))  # to ask for a limit, not to set one
    return seccomp, pointer


def limit_memory(more_mb: int) -> None:
    """Let this process take so much more memory than it has (in MB of 2^20 bytes of address space)."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + more_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _limit(seconds: int) -> None:
    for what, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def _give_rights_back() -> None:
    """Drop all capabilities, so that root is a user like others."""
    for capability in range(64):
        _libc.prctl(_DROP_BOUNDING, capability, 0, 0, 0)  # those that do not exist, or are not held, refuse
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    _checked(_libc.capset(header, (ctypes.c_uint32 * 6)()))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
