"""Seconds that the machine really gave: wall time less the time in which it stood still.

On a virtual machine whose cores are shared or capped, both cores stop for hundreds of milliseconds in the middle of whatever
runs, and a wall clock measures the neighbours. So a watcher on every core sleeps a millisecond at a time and notes when it
woke late: the core was not there. What a piece of work was given is its wall time less the time in which no core was there.
On a machine of its own the two are the same; where single cores come and go, what was given is still more than what was used.

`python -m bench.clock CORE FILE` is one watcher.
"""

from __future__ import annotations

import itertools
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

NAP = 0.001
#: A later awakening than this is a gap; the scheduler alone may let a watcher wait for three milliseconds on a busy core.
LATE = 0.005
_GAP = struct.Struct("dd")  # from, to, as time.perf_counter() counts, which is one clock for all processes


def watch(core: int, path: Path) -> None:
    os.sched_setaffinity(0, {core})
    parent = os.getppid()
    with path.open("wb", buffering=0) as file:
        last = time.perf_counter()
        while os.getppid() == parent:
            time.sleep(NAP)
            now = time.perf_counter()
            if now - last > LATE:
                file.write(_GAP.pack(last + NAP, now))
            last = now


class Lap(NamedTuple):
    began: float
    ended: float
    given: float  #: of the seconds in between, those in which some core was there

    @property
    def wall(self) -> float:
        return self.ended - self.began


class Clock:
    """A context in which pieces of work can be timed, from any thread."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bench-clock-")
        self._watchers: list[subprocess.Popen[bytes]] = []
        self._files: list[Path] = []

    def __enter__(self) -> Clock:
        for core in sorted(os.sched_getaffinity(0)):
            path = Path(self._folder.name) / str(core)
            self._watchers.append(subprocess.Popen([sys.executable, "-m", "bench.clock", str(core), str(path)]))
            self._files.append(path)
        while not all(path.is_file() for path in self._files):
            time.sleep(NAP)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        for watcher in self._watchers:
            watcher.kill()
            watcher.wait()
        self._folder.cleanup()

    def time(self, work: Callable[[], object]) -> Lap:
        began = time.perf_counter()
        work()
        return self.since(began)

    def since(self, began: float) -> Lap:
        """The lap from a reading of time.perf_counter() until now."""
        return self.laps([began, time.perf_counter()])[0]

    def laps(self, ticks: Sequence[float]) -> list[Lap]:
        """Those between readings of time.perf_counter()."""
        time.sleep(20 * NAP)  # a watcher whose core has just come back writes its gap now
        gaps = [list(_GAP.iter_unpack(_whole(path.read_bytes()))) for path in self._files]
        return [Lap(a, b, b - a - common(gaps, a, b)) for a, b in itertools.pairwise(ticks)]


def common(gaps: Sequence[Sequence[tuple[float, ...]]], began: float, ended: float) -> float:
    """Seconds of an interval in which every core had a gap; the gaps of one core do not overlap."""
    edges = sorted((at, change) for core in gaps for start, stop in core for at, change in ((start, 1), (stop, -1)))
    lost, absent, last = 0.0, 0, began
    for at, change in edges:
        at = min(max(at, began), ended)
        if absent == len(gaps):
            lost += at - last
        absent, last = absent + change, at
    return lost


def _whole(raw: bytes) -> bytes:
    return raw[: len(raw) - len(raw) % _GAP.size]


if __name__ == "__main__":
    watch(int(sys.argv[1]), Path(sys.argv[2]))
