"""Group commit: changes that arrive while the disk is busy go into the next transaction together.

One commit costs one or two fsyncs whatever it holds, so with 64 callers this is about 30 times the commits of one change each
when tried. A change is acknowledged after the commit that holds it, never before.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Final

import lmdb

from hubpeer.errors import Busy, HubError, StoreError
from hubpeer.settings import MiB
from hubpeer.store.client import ClientStore, View

#: One transaction takes at most so many changes, and no further one once it holds so many bytes.
MAX_CHANGES: Final = 64
MAX_BYTES: Final = 8 * MiB
#: Changes and bytes that may wait in one writer; one more is `queue_full`.
MAX_WAITING: Final = 4096
MAX_WAITING_BYTES: Final = 512 * MiB
#: After a failed commit a store refuses for so long (seconds) before it is read from the disk again.
REST_S: Final = 1.0


class Gate:
    """Many may share it, or one may have it alone. Who waits to be alone goes before who comes to share."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._sharing = 0
        self._waiting = 0
        self._alone = False

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not self._waiting)
            self._sharing += 1
        try:
            yield
        finally:
            with self._changed:
                self._sharing -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._alone and not self._sharing)
            self._waiting -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


class Handle:
    """One client's store, open or not.

    `opening(handle, create)` is called alone, when somebody wants the store and it is not open; `create`: make it where there
    is none.
    """

    def __init__(self, client: str, opening: Callable[[Handle, bool], ClientStore]) -> None:
        self.client = client
        self.store: ClientStore | None = None
        self.gate = Gate()
        self.failure = ""  # why it stopped acknowledging; empty: it works
        self.rests_until = 0.0  # time.monotonic()
        self._opening = opening

    @contextlib.contextmanager
    def using(self, *, create: bool = False) -> Iterator[ClientStore]:
        """The open store, which nobody closes or grows meanwhile. Raises what opening raises."""
        while True:
            with self.gate.shared():
                if self.store is not None:
                    yield self.store
                    return
            with self.gate.alone():
                if self.store is None:
                    self._refuse_while_resting()
                    self.store = self._opening(self, create)
                    self.failure = ""

    def fail(self, error: Exception) -> None:
        """Stop acknowledging: nobody knows what is on disk. Close; open again, verified, after REST_S."""
        self.failure = f"{type(error).__name__}: {error}"[:200]
        self.rests_until = time.monotonic() + REST_S
        self.close()

    def close(self) -> None:
        with self.gate.alone():
            if self.store is not None:
                self.store.close()
                self.store = None

    def _refuse_while_resting(self) -> None:
        rest = self.rests_until - time.monotonic()
        if self.failure and rest > 0:
            raise StoreError(
                "store_io_error",
                f"the store failed ({self.failure}) and is verified before it takes anything again",
                retry_after_ms=int(rest * 1000) + 1,
            )


class Change:
    """One change that waits. `size`: bytes it will write. `begins`: it brings something new, so it may make the client's store;
    else it frees space or ends what was begun, and may use the reserve behind the quota."""

    def __init__(self, handle: Handle, apply: Callable[[View], Any], size: int, *, begins: bool) -> None:
        self.handle = handle
        self.apply = apply
        self.size = size
        self.begins = begins
        self.done: Future[Any] = Future()


class Writer:
    """One thread. A client's changes are always the same writer's, in the order they came; clients take turns."""

    def __init__(self, name: str) -> None:
        self._waiting: OrderedDict[str, deque[Change]] = OrderedDict()
        self._changed = threading.Condition()
        self._stopping = False
        self.depth = 0  # changes that wait
        self._bytes = 0
        self.commits = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, change: Change) -> Future[Any]:
        """Raises `queue_full`, and `draining` once the writer stops."""
        with self._changed:
            if self._stopping:
                raise StoreError("draining", "the stores are closing")
            if self.depth >= MAX_WAITING or (self.depth and self._bytes + change.size > MAX_WAITING_BYTES):
                raise Busy("queue_full", f"{self.depth} changes wait for the disk", retry_after_ms=1000)
            self._waiting.setdefault(change.handle.client, deque()).append(change)
            self.depth += 1
            self._bytes += change.size
            self._changed.notify()
        return change.done

    def stop(self) -> None:
        """Return when everything that waits is committed or refused. Safe twice."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next():
            self._commit([change for change in batch if change.done.set_running_or_notify_cancel()])

    def _next(self) -> list[Change]:
        """The next client's changes; empty when the writer stops."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            if not self._waiting:
                return []
            client, queue = self._waiting.popitem(last=False)
            batch = [queue.popleft()]
            size = batch[0].size
            while queue and len(batch) < MAX_CHANGES and size + queue[0].size <= MAX_BYTES:
                size += queue[0].size
                batch.append(queue.popleft())
            if queue:
                self._waiting[client] = queue  # behind the others
            self.depth -= len(batch)
            self._bytes -= size
            return batch

    def _commit(self, batch: list[Change]) -> None:
        """Commit a batch; where a change raises, or finds no room, the changes one by one, so that each answers for itself."""
        if not batch:
            return
        try:
            results = self._write(batch)
        except Exception as error:
            if len(batch) > 1 and not (isinstance(error, HubError) and error.code == "store_io_error"):
                for change in batch:
                    self._commit([change])
                return
            for change in batch:
                change.done.set_exception(error)
            return
        for change, result in zip(batch, results, strict=True):
            change.done.set_result(result)

    def _write(self, batch: list[Change]) -> list[Any]:
        """One transaction, replayed in a larger map as long as it does not fit. Raises HubErrors, or what a change raises."""
        handle = batch[0].handle
        begins = any(change.begins for change in batch)
        grown = False
        while True:
            try:
                with handle.using(create=begins) as store:
                    results = store.write([change.apply for change in batch])
                self.commits += 1
                break
            except lmdb.MapFullError:
                with handle.gate.alone():
                    grown = True
                    if handle.store is not None and not handle.store.grow(into_reserve=not begins):
                        raise StoreError(
                            "quota_exceeded", "the client's store has reached its quota; delete documents first"
                        ) from None
            except (lmdb.Error, OSError) as error:
                # Acknowledge nothing more: after a failed fsync the next one reports success without having written.
                handle.fail(error)
                raise StoreError("store_io_error", f"the commit failed: {error}"[:300]) from None
        if grown and not begins:
            with handle.gate.alone():
                if handle.store is not None:
                    handle.store.shrink()
        return results
