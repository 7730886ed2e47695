"""The documents of all clients: one LMDB store each, opened when asked for. The only importer of lmdb.

    put      decide (duplicate, version, new) and write in one transaction of the client's writer -> fsync -> answer
    read     a short transaction on a reader thread -> plain values; none is ever held across an await

`records.py` is what lies on disk, `client.py` one store, `writer.py` group commit. The event loop never waits for the disk.

The same bytes, or the same source id, twice are the same document:
1. source id known, same bytes: a duplicate;
2. source id known, other bytes: the same document, one version up; of the version before only the metadata stays, its bytes
   go unless another document has them;
3. source id new or none, bytes known: a duplicate, and the source id means that document from now on.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import os
import re
import shutil
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

from hubpeer.errors import BadRequest, HubError, StoreError
from hubpeer.settings import Documents
from hubpeer.store import client as disk
from hubpeer.store import records
from hubpeer.store.client import ClientStore, View
from hubpeer.store.records import Draft, Put, Stored, not_found
from hubpeer.store.writer import Change, Handle, Writer
from hubpeer.wire import Categorization, DocState, DocStatsReply

__all__ = ["Draft", "Put", "Stored", "Stores"]

#: Environments open at once; each takes 3 descriptors and about 0.2 MB.
MAX_OPEN: Final = 256
#: Threads that write; every client belongs to one.
WRITERS: Final = 2
READERS: Final = 4
#: Bytes up to which hashing and packing are done where they are asked for; a thread hop costs about as much.
INLINE: Final = 32 * 1024
#: A put is refused (`store_full`) while less than this is free on the disk.
MIN_FREE: Final = 64 * 1024 * 1024

Pending = list[tuple[str, str, int]]
Page = tuple[list[Stored], int, str | None]
T = TypeVar("T")
_two_hex = re.compile(r"[0-9a-f]{2}")
_store_name = re.compile(r"[0-9a-f]{32}")


class Stores:
    """Every client's store under one directory, which belongs to this process while it is open.

    Client names come checked (`wire.client_token`). Every method may raise `StoreError`: `store_corrupt`, `store_io_error`
    and `store_unsafe_path` concern one client, the others go on.
    """

    def __init__(self, root: Path, limits: Documents) -> None:
        self._root = root
        self._limits = limits
        self._lock = threading.Lock()  # of the three below
        self._handles: OrderedDict[str, Handle] = OrderedDict()  # most recently used last
        self._known: set[str] = set()  # names of the directories that are stores
        self._errors: Counter[str] = Counter()
        self._writers: list[Writer] = []
        self._pool: ThreadPoolExecutor | None = None
        self._flock = -1
        self._crowded = False  # a store was opened: there may be too many

    def open(self) -> None:
        """Take the directory and start. Raises `store_locked` where another process has it, `store_unsafe_path`."""
        disk.refuse_links(self._root, directory=True)
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._flock = disk.lock(self._root / ".lock")
        disk.sync_directory(self._root)
        disk.sync_directory(self._root.parent)
        for shelf in self._root.iterdir():
            if _two_hex.fullmatch(shelf.name) and shelf.is_dir() and not shelf.is_symlink():
                for path in shelf.iterdir():
                    if _store_name.fullmatch(path.name):
                        self._known.add(path.name)
                    elif path.name.startswith((".new-", ".gone-")):  # a crash while making or removing one
                        shutil.rmtree(path)
        self._pool = ThreadPoolExecutor(READERS, "store-read")
        self._writers = [Writer(f"store-write-{n}") for n in range(WRITERS)]

    def close(self) -> None:
        """Finish what was queued and close everything. Safe twice. Blocks for as long as the disk needs."""
        for writer in self._writers:
            writer.stop()
        if self._pool is not None:
            self._pool.shutdown()
        for handle in self._handles.values():
            handle.close()
        self._writers, self._pool = [], None
        self._handles.clear()
        self._known.clear()
        if self._flock >= 0:
            os.close(self._flock)
            self._flock = -1

    # ── documents in ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def find(self, client: str, sha256: str, source_id: str | None) -> Stored | None:
        """What these bytes under this source id already are: a document (of which a put would be a duplicate) or the reason
        why they were refused (state `failed`). None: extract and put.

        A source id that is new for known bytes is recorded, so that the answer may be given out as a duplicate's.
        """

        def look(view: View) -> tuple[Stored | None, bool]:
            found = view.known(sha256, source_id)
            unmapped = source_id is not None and view.src.get(records.source_key(source_id)) is None
            return found or view.refused(sha256), found is not None and unmapped

        nothing: tuple[Stored | None, bool] = (None, False)
        found, link = await self._read(client, look, nothing)
        if not link:
            return found
        linked: Stored | None = await self._change(client, lambda view: view.link(sha256, source_id))
        return linked

    async def put(self, client: str, draft: Draft, data: bytes, text: str) -> Put:
        """Keep a document; on disk, under a name that is on disk, when this returns.

        Raises `quota_exceeded`, `store_full` (the disk), `queue_full`, `bad_encoding`.
        """
        if len(data) + len(text) <= INLINE:
            sha256, chunks = _prepared(data, text)
        else:
            sha256, chunks = await self._in_pool(_prepared, data, text)
        size = len(data) + sum(map(len, chunks))
        if disk_free(self._root) < size + MIN_FREE:
            raise StoreError("store_full", "the disk is nearly full", retry_after_ms=60_000)
        kept: Put = await self._change(
            client, lambda view: view.put(draft, data, sha256, chunks, len(text)), size=size, begins=True
        )
        return kept

    async def reject(
        self,
        client: str,
        sha256: str,
        size: int,
        filename: str,
        source_id: str | None,
        received_at: str,
        code: str,
        message: str,
    ) -> Stored:
        """Keep why a document was refused, not its bytes; the same bytes get the same answer again.

        It is listed (state `failed`) and deletable, and counts as `failed`, not into `documents`. The source id stays free for
        a document that can be read; should these very bytes be put later, they become version 2 of this id.
        """
        document = Stored(
            document_id="",
            version=1,
            client=client,
            sha256=sha256,
            size=size,
            filename=filename,
            media_type="",
            declared_type=None,
            source_id=source_id,
            received_at=received_at,
            title=None,
            pages=0,
            text_chars=0,
            extraction="partial",
            notes=[],
            engine="",
            headings=[],
            state="failed",
            error={"code": code, "message": message},
        )
        kept: Stored = await self._change(client, lambda view: view.reject(document), begins=True)
        return kept

    async def categorize(self, client: str, document_id: str, version: int, categorization: Categorization) -> Stored | None:
        """The document with its categorization; None where it was deleted or a newer version came meanwhile."""
        changed: Stored | None = await self._change(client, lambda view: view.categorize(document_id, version, categorization))
        return changed

    async def pending(self) -> Pending:
        """Client, document id and version of all that is committed and not categorized. A store that cannot be read is left
        out and counted in `status`."""
        return await self._in_pool(self._pending)

    def _pending(self) -> Pending:
        waiting: Pending = []
        for name in sorted(self._known):
            with contextlib.suppress(HubError):  # counted where it was raised
                waiting += self._pending_in(self._root / name[:2] / name)
        return waiting

    def _pending_in(self, path: Path) -> Pending:
        try:
            client = disk.name_in(path)
        except HubError as error:
            self._count(error)
            raise
        return [(client, document_id, version) for document_id, version in self._look(client, View.pending)]

    # ── documents out ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def get(self, client: str, document_id: str) -> Stored:
        """Raises `not_found`, for an unknown client too."""
        return await self._of(client, document_id, lambda view: view.named(document_id))

    async def text(self, client: str, document_id: str, offset: int, limit: int) -> tuple[Stored, str, int]:
        """The document, `limit` characters of its text from `offset`, and how many it has in all. Raises `not_found`."""

        def read(view: View) -> tuple[Stored, str, int]:
            document = view.named(document_id)
            return document, view.text(document, offset, limit), document.text_chars

        return await self._of(client, document_id, read)

    async def raw(self, client: str, document_id: str) -> bytes:
        """The bytes as they came, checked against their sha256. Raises `not_found`, for a failed document too."""
        return await self._of(client, document_id, lambda view: view.raw(view.named(document_id)))

    async def list(
        self,
        client: str,
        category: str | None = None,
        state: DocState | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> Page:
        """Documents newest first, how many there are in all, and the `after` of the next page (None: that was the last).

        A page goes on behind a document, not at a number, so what comes or goes meanwhile moves nothing. Raises `bad_value`.
        """
        key = disk.after_key(after)
        return await self._read(client, lambda view: view.page(category, state, limit, key), ([], 0, None))

    async def delete(self, client: str, document_id: str) -> bool:
        """Remove a document with its text, versions and source ids, and its bytes where no other document has them. False:
        there was none. Freed pages are written again by later documents; until then the bytes lie in the file."""
        return bool(await self._change(client, lambda view: view.delete(document_id)))

    async def stats(self, client: str) -> DocStatsReply:
        """A client's counters; zeros for one that has nothing."""
        counters, used, size = await self._in_pool(self._figures, client)
        return DocStatsReply(
            client=client,
            documents=counters.documents,
            failed=counters.failed,
            pending=counters.pending,
            bytes=counters.bytes,
            text_chars=counters.text_chars,
            map_used_bytes=used,
            map_size_bytes=size,
            categories=counters.categories,
        )

    async def drop_client(self, client: str) -> bool:
        """Remove everything a client has. False: it had nothing."""
        return self._knows(client) and await self._in_pool(self._drop, client)

    def status(self) -> dict[str, Any]:
        """For operators; waits for nothing. Sizes in bytes; documents and sizes of the stores that are open."""
        with self._lock:
            stores = [handle.store for handle in self._handles.values() if handle.store is not None]
            failing = {h.client: h.failure for h in self._handles.values() if h.failure}
            errors, known = dict(self._errors), len(self._known)
        return {
            "clients_open": len(stores),
            "clients_known": known,
            "documents": sum(store.counters.documents for store in stores),
            "failed": sum(store.counters.failed for store in stores),
            "pending": sum(store.counters.pending for store in stores),
            "map_used_bytes": sum(store.used for store in stores),
            "queue_depth": sum(writer.depth for writer in self._writers),
            "commits": sum(writer.commits for writer in self._writers),
            "disk_free_bytes": disk_free(self._root),
            "errors": errors,
            "failing": failing,
        }

    # ── stores ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _threads(self) -> ThreadPoolExecutor:
        """Raises `draining` where the stores are not open: "no such document" would be a lie."""
        if self._pool is None:
            raise StoreError("draining", "the stores are closed")
        return self._pool

    def _knows(self, client: str) -> bool:
        self._threads()
        return disk.folder(self._root, client).name in self._known

    def _handle(self, client: str) -> Handle:
        with self._lock:
            handle = self._handles.get(client)
            if handle is None:
                handle = self._handles[client] = Handle(client, self._opened)
            self._handles.move_to_end(client)
        return handle

    def _opened(self, handle: Handle, create: bool) -> ClientStore:
        """Called by a handle, alone. Raises `unknown_client` where there is no store and none is to be made."""
        path = disk.folder(self._root, handle.client)
        if handle.failure:
            disk.forget_cache(path)
        if path.name not in self._known:
            if not create:
                raise BadRequest("unknown_client", "this client has nothing")
            try:
                disk.create(self._root, handle.client, self._limits.quota)
            except OSError as error:
                raise StoreError("store_io_error", f"a store could not be made: {error.strerror}") from None
            with self._lock:
                self._known.add(path.name)
        store = ClientStore(self._root, handle.client, self._limits.quota)
        self._crowded = True
        return store

    def _close_oldest(self) -> None:
        """Keep at most MAX_OPEN environments. Called with no gate held, because it waits at other clients'."""
        self._crowded = False
        with self._lock:
            opened = [handle for handle in self._handles.values() if handle.store is not None]
        for handle in opened[: max(0, len(opened) - MAX_OPEN)]:
            handle.close()

    def _drop(self, client: str) -> bool:
        handle = self._handle(client)
        path = disk.folder(self._root, client)
        with handle.gate.alone():
            if path.name not in self._known:
                return False
            disk.refuse_links(path, directory=True)
            if handle.store is not None:
                handle.store.close()
                handle.store = None
            handle.failure = ""
            with self._lock:
                self._known.discard(path.name)
            disk.remove(path)
        return True

    def _figures(self, client: str) -> tuple[records.Counters, int, int]:
        if self._knows(client):
            with contextlib.suppress(BadRequest), self._handle(client).using() as store:  # unknown_client: just dropped
                return store.counters, store.used, store.map_size
        return records.Counters(), 0, 0

    # ── onto the store's threads ────────────────────────────────────────────────────────────────────────────────────────

    async def _read(self, client: str, read: Callable[[View], T], nothing: T) -> T:
        """`read` in one short transaction; `nothing` for a client without a store: reading never makes one."""
        if not self._knows(client):
            return nothing
        try:
            return await self._in_pool(self._look, client, read)
        except BadRequest as error:
            if error.code != "unknown_client":  # dropped this very moment
                raise
            return nothing

    async def _of(self, client: str, document_id: str, read: Callable[[View], T]) -> T:
        found = await self._read(client, read, None)
        if found is None:
            raise not_found(document_id)
        return found

    def _look(self, client: str, read: Callable[[View], T]) -> T:
        try:
            with self._handle(client).using() as store, store.reading() as view:
                result = read(view)
        except HubError as error:
            self._count(error)
            raise
        if self._crowded:
            self._close_oldest()
        return result

    async def _change(self, client: str, apply: Callable[[View], Any], *, size: int = 1024, begins: bool = False) -> Any:
        """`apply` in the next transaction of the client's writer; its result, after the commit. None for a client without a
        store, unless the change `begins` one."""
        if not self._knows(client) and not begins:
            return None
        writer = self._writers[int(disk.folder(self._root, client).name, 16) % len(self._writers)]
        try:
            result = await asyncio.wrap_future(writer.submit(Change(self._handle(client), apply, size, begins=begins)))
        except HubError as error:
            if error.code == "unknown_client":
                return None
            self._count(error)
            raise
        if self._crowded:
            await self._in_pool(self._close_oldest)
        return result

    async def _in_pool(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads(), functools.partial(function, *args))

    def _count(self, error: HubError) -> None:
        if error.status >= 500:
            with self._lock:
                self._errors[error.code] += 1


def _prepared(data: bytes, text: str) -> tuple[str, list[bytes]]:
    return hashlib.sha256(data).hexdigest(), records.packed(text)


def disk_free(path: Path) -> int:
    """Bytes a process may still write on the disk of `path`."""
    usage = os.statvfs(path)
    return usage.f_bavail * usage.f_frsize
