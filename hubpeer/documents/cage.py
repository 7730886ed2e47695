"""What a process that reads hostile documents may not do. Linux; each protection that the kernel refuses is left out.

The names these functions return are what is in force; `Extractor.status()` shows them to the operator.

Numbers and structures: linux/prctl.h, linux/landlock.h, linux/seccomp.h, linux/filter.h, and the syscall tables of the two
architectures.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_SECCOMP: Final = 22
_PR_SET_NO_NEW_PRIVS: Final = 38
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000


def die_with_parent(parent: int) -> None:
    """The kernel kills this process when the thread that started it is gone, whatever this process is doing then."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def enclose(readable: Iterable[Path]) -> list[str]:
    """For the zygote, and so for every child: the protections that a process needs no document to know."""
    with suppress(OSError):  # where memory runs out, the kernel ends a reader before it ends the hub
        Path("/proc/self/oom_score_adj").write_text("1000")
    held = []
    # Only root may leave the network alone; anybody may where user namespaces are allowed.
    if _libc.unshare(_CLONE_NEWNET) == 0 or _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0:
        held.append("no_network")
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
        held.append("no_new_privs")
    return held + _landlock(readable)


def restrict(memory: int, cpu_s: int) -> None:
    """For a child: `memory` bytes of address space, `cpu_s` seconds of processor, no file written, no program started."""
    for what, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 32),
    ):
        resource.setrlimit(what, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))  # SIGXCPU, which says why; SIGKILL a second later
    if _FILTER:
        program = ctypes.create_string_buffer(_FILTER, len(_FILTER))
        header = struct.pack("@HP", len(_FILTER) // 8, ctypes.addressof(program))
        _libc.prctl(_PR_SET_SECCOMP, 2, header, 0, 0)


# ── files and signals: Landlock ─────────────────────────────────────────────────────────────────────────────────────────

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_EVERY_FILE_ACCESS: Final = (1 << 13) - 1  # what version 1 of Landlock knows: execute, write, read, list, remove, make
_READ: Final = 1 << 2 | 1 << 3  # files and folders
_SCOPE_SIGNALS: Final = 1 << 1


def _landlock(readable: Iterable[Path]) -> list[str]:
    """From here on no file can be opened but to read what is beneath `readable`, and nobody outside can be signalled."""
    version = _libc.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return []
    scoped = version >= 6
    attributes = struct.pack("@QQQ", _EVERY_FILE_ACCESS, 0, _SCOPE_SIGNALS) if scoped else struct.pack("@Q", _EVERY_FILE_ACCESS)
    rules = _libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    if rules < 0:
        return []
    for path in readable:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _libc.syscall(_ADD_RULE, rules, 1, struct.pack("=Qi", _READ, folder), 0)
        os.close(folder)
    done = _libc.syscall(_RESTRICT_SELF, rules, 0) == 0
    os.close(rules)
    return (["files", "signals"] if scoped else ["files"]) if done else []


# ── system calls: seccomp ───────────────────────────────────────────────────────────────────────────────────────────────

#: What reading a document never needs and an intruder wants: sockets, programs, processes, other processes' memory, namespaces.
_REFUSED: Final = {
    # socket socketpair connect clone fork vfork execve kill ptrace mount keyctl unshare open_by_handle_at setns
    # process_vm_readv process_vm_writev bpf execveat io_uring_setup clone3
    "x86_64": (0xC000003E, (41, 53, 42, 56, 57, 58, 59, 62, 101, 165, 250, 272, 304, 308, 310, 311, 321, 322, 425, 435)),
    "aarch64": (0xC00000B7, (198, 199, 203, 220, 221, 129, 117, 40, 219, 97, 265, 268, 270, 271, 280, 281, 425, 435)),
}


def _filter() -> bytes:
    """A classic BPF program: calls of another architecture kill, those of the table fail with EACCES, all others pass."""
    if platform.machine() not in _REFUSED:
        return b""
    architecture, numbers = _REFUSED[platform.machine()]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | errno.EACCES, 0x80000000
    rest = len(numbers)
    program = [
        (load, 0, 0, 4),  # the architecture
        (equal, 1, 0, architecture),
        (give, 0, 0, kill),
        (load, 0, 0, 0),  # the call
        (at_least, rest + 1, 0, 0x40000000),  # x32 calls on x86-64
        *((equal, rest - i, 0, number) for i, number in enumerate(numbers)),
        (give, 0, 0, allow),
        (give, 0, 0, refuse),
    ]
    return b"".join(struct.pack("@HBBI", *line) for line in program)


_FILTER: Final = _filter()


def seccomp_works() -> bool:
    """Whether a child will be filtered; tried in a child of its own, because a filter never comes off again."""
    if not _FILTER:
        return False
    child = os.fork()
    if child == 0:
        restrict(1 << 40, 60)
        os._exit(0 if _libc.socket(1, 1, 0) < 0 and ctypes.get_errno() == errno.EACCES else 1)
    return os.waitpid(child, 0)[1] == 0
