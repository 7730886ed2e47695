"""The process that forks one child per document: `python -m hubpeer.documents.zygote PARENT`, started by `Extractor`.

It has no threads, no secrets and next to no environment, and the readers' libraries are loaded before the first fork. Its
standard input is a socket from the hub:

    hub -> zygote   one packet per document: a `Task`, and three descriptors: the document, where parts go, the lifeline
    zygote -> hub   once, when it is ready: the protections in force
    lifeline        when the hub shuts or closes its end, the child is killed; when the child has ended, its exit status comes
                    back as four bytes. An end of file without them means that the zygote itself is gone

The hub's death closes the socket, and the zygote ends with all its children; the zygote's death kills them through the kernel.
"""

from __future__ import annotations

import gc
import logging
import os
import selectors
import signal
import socket
import struct
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from hubpeer.documents import cage
from hubpeer.documents.parts import Part, Task, frame
from hubpeer.documents.readers import read
from hubpeer.errors import DocumentRejected

STATUS: Final = struct.Struct("@i")  # a wait status as os.waitpid gives it
MAX_TASK: Final = 64 * 1024


def main() -> None:
    cage.die_with_parent(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the hub, which closes us when it is done
    hub = socket.socket(fileno=0)
    nowhere = os.open(os.devnull, os.O_RDWR)
    logging.disable()  # what a library thinks of a document is of no use to an operator
    libraries = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    protections = cage.enclose([*libraries, Path(__file__).parents[1]])
    if cage.seccomp_works():
        protections.append("syscalls")
    gc.freeze()  # the collector leaves these pages alone, so the children share them
    hub.send(msgspec.json.encode(protections))
    _serve(hub, nowhere)


class _Child:
    """One document being read."""

    def __init__(self, pid: int, lifeline: socket.socket) -> None:
        self.pid = pid
        self.lifeline = lifeline
        self.exit = os.pidfd_open(pid)  # readable once the child has ended

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)  # nobody but `reap` frees the number, so it cannot be somebody else's

    def reap(self) -> int:
        """Wait for its end; its exit status."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.exit)
        return status


def _serve(hub: socket.socket, nowhere: int) -> None:
    """Begin and end children until the hub is gone."""
    children: set[_Child] = set()
    with selectors.DefaultSelector() as ready:
        ready.register(hub, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                child = key.data
                if child is None:
                    child = _begin(hub, nowhere)
                    if child is None:
                        _end(children)
                        return
                    children.add(child)
                    ready.register(child.lifeline, selectors.EVENT_READ, child)
                    ready.register(child.exit, selectors.EVENT_READ, child)
                elif key.fd == child.exit:
                    for watched in (child.lifeline, child.exit):
                        with suppress(KeyError):
                            ready.unregister(watched)
                    children.remove(child)
                    with suppress(OSError), child.lifeline:  # the hub may have gone on
                        child.lifeline.send(STATUS.pack(child.reap()))
                elif child in children:  # not one that ended in this same round
                    ready.unregister(child.lifeline)
                    child.kill()


def _end(children: set[_Child]) -> None:
    """The hub is gone or closing. No exit status is sent: these documents were not at fault and may be tried again."""
    for child in children:
        child.kill()
    for child in children:
        child.reap()


def _begin(hub: socket.socket, nowhere: int) -> _Child | None:
    """Fork for the next document; None where the hub is gone."""
    packet, descriptors, _, _ = socket.recv_fds(hub, MAX_TASK, 3)
    if not packet:
        return None
    document, output, lifeline = descriptors
    zygote = os.getpid()
    pid = os.fork()
    if pid == 0:
        _read(msgspec.json.decode(packet, type=Task), document, output, nowhere, zygote)
    os.close(document)
    os.close(output)
    return _Child(pid, socket.socket(fileno=lifeline))


def _read(task: Task, document: int, output: int, nowhere: int, zygote: int) -> NoReturn:
    """The life of a child: read the document, write its parts, end. Never returns."""
    try:
        cage.die_with_parent(zygote)
        for standard in (0, 1, 2):  # libraries write there without asking
            os.dup2(nowhere, standard)
        low, high = sorted((document, output))  # all else is closed: the hub's socket, the lifelines of others
        os.closerange(3, low)
        os.closerange(low + 1, high)
        os.closerange(high + 1, os.sysconf("SC_OPEN_MAX"))
        cage.restrict(task.memory, task.cpu_s)
        with open(document, "rb") as source, socket.socket(fileno=output) as sink:
            try:
                for part in read(source.read(), task):
                    sink.sendall(frame(part))
                sink.sendall(frame(Part("end")))
            except DocumentRejected as exc:
                sink.sendall(frame(Part("rejected", exc.message, exc.code)))
    except BaseException:  # nothing may escape into the zygote's own code above us on the stack
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
