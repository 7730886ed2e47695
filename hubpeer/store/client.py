"""One client's store: one LMDB environment in a directory of its own. Blocking; called on the store's threads only.

    meta    "store", "counters"            -> Marker, Counters
    doc     document                       -> Stored, the current version (never its text: a list of 5,000 is 22x faster so)
    old     document + version             -> Stored, an earlier version; its bytes and text are gone, its metadata stays
    blob    sha256 + chunk                 -> the bytes, shared by the documents of `ref`
    ref     sha256 + document              -> which documents have these bytes now
    bad     sha256                         -> document, of bytes that were refused
    text    document + chunk               -> the text, zlib
    src     hash of source id              -> document
    srcs    document + hash of source id   -> nothing; `src` backwards, for deleting
    idx     kind + hash of value + document -> nothing; by state and by category

Documents are 16-byte UUIDv7, so every key order is the order of arrival. All values are sealed (records.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import lmdb
import lmdb.verify
import msgspec

from hubpeer.errors import BadRequest, StoreError, shown
from hubpeer.settings import MiB
from hubpeer.store import records
from hubpeer.store.records import Counters, Draft, Ids, Marker, Put, Stored, document_key, not_found
from hubpeer.wire import Categorization, DocState

TABLES: Final = (b"meta", b"doc", b"old", b"blob", b"ref", b"bad", b"text", b"src", b"srcs", b"idx")
#: Address space a new store begins with; doubled whenever it is full, up to the quota.
FIRST_MAP: Final = 64 * MiB
#: Past the quota, for what must go on there: deleting needs fresh pages before it frees any.
RESERVE: Final = 16 * MiB

T = TypeVar("T")
_ids = Ids()
_encode = msgspec.msgpack.Encoder().encode
_stored = msgspec.msgpack.Decoder(Stored)
_counters = msgspec.msgpack.Decoder(Counters)
_marker = msgspec.msgpack.Decoder(Marker)


# ── the directory ───────────────────────────────────────────────────────────────────────────────────────────────────────


def folder(root: Path, client: str) -> Path:
    """Where a client's store lies; the name itself never becomes part of a path."""
    digest = hashlib.sha256(client.encode()).hexdigest()[:32]
    return root / digest[:2] / digest


def name_in(path: Path) -> str:
    """Whose store lies in `path`. Raises `store_corrupt` where that cannot be read or is somebody else's."""
    try:
        name = msgspec.json.decode((path / "client.json").read_bytes())["client"]
        if folder(path.parent.parent, name) == path:
            return str(name)
    except (OSError, msgspec.DecodeError, KeyError, TypeError, AttributeError, UnicodeError):
        pass
    raise StoreError("store_corrupt", f"{path.name}: client.json does not name this store's client")


def refuse_links(path: Path, *, directory: bool) -> None:
    """Raise `store_unsafe_path` where `path` is there and is a link or of another kind. Somebody who can plant a link would
    otherwise choose where the store writes."""
    with contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not (stat.S_ISDIR(mode) if directory else stat.S_ISREG(mode)):
            raise StoreError("store_unsafe_path", f"{path.name} is not a plain {'directory' if directory else 'file'}")


def sync_directory(path: Path) -> None:
    """Make names in `path` outlive a power cut; LMDB syncs its files, never their directory."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock(path: Path) -> int:
    """Take `path` for this process; the descriptor holds it. Raises `store_locked`. LMDB itself would let two hubs in."""
    refuse_links(path, directory=False)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise StoreError("store_locked", "another process has these stores open") from None
    return fd


def create(root: Path, client: str, quota: int) -> None:
    """Make an empty store. It gets its name only when it is complete and on disk, so a directory that is there but does not
    open is damaged, never new."""
    path = folder(root, client)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    refuse_links(path.parent, directory=True)
    fresh = path.with_name(f".new-{secrets.token_hex(8)}")
    fresh.mkdir(mode=0o700)
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    env = _open(fresh, _first_map(quota))
    try:
        with env.begin(write=True) as txn:
            tables = {name: env.open_db(name, txn=txn) for name in TABLES}
            meta = Rows(txn, b"meta", tables[b"meta"])
            meta.put(b"store", _encode(Marker(client, records.SCHEMA, now)))
            meta.put(b"counters", _encode(Counters()))
    finally:
        env.close()
    with (fresh / "client.json").open("xb") as file:
        file.write(msgspec.json.encode({"client": client, "schema": records.SCHEMA, "created_at": now}))
        file.flush()
        os.fsync(file.fileno())
    sync_directory(fresh)
    fresh.rename(path)


def remove(path: Path) -> None:
    """Remove a store's directory; after a crash in the middle it is not there, or not there and half cleaned up."""
    gone = path.with_name(f".gone-{secrets.token_hex(8)}")
    path.rename(gone)
    sync_directory(path.parent)
    shutil.rmtree(gone)


def forget_cache(path: Path) -> None:
    """Drop what the kernel remembers of a store's file. After a failed fsync Linux calls the unwritten pages clean, so only
    what is read from the disk again says what is there (Rebello et al., ATC 2020)."""
    try:
        fd = os.open(path / "data.mdb", os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return  # opening the store says what is wrong
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _first_map(quota: int) -> int:
    return _pages(max(min(FIRST_MAP, quota), MiB))


def _pages(size: int) -> int:
    return -(-size // 65536) * 65536


def _open(path: Path, map_size: int) -> Any:
    # No writemap: unhardened, and a full disk would be a SIGBUS. lib_version pinned: format 3 cannot be read by 0.9.
    return lmdb.open(
        str(path),
        map_size=map_size,
        max_dbs=len(TABLES),
        max_readers=64,
        readahead=False,
        sync=True,
        metasync=True,
        writemap=False,
        mode=0o600,
        lib_version=0,
    )


def _verify(path: Path) -> None:
    """Read the file without LMDB, which aborts the process (SIGBUS, assert) on some damage. Raises `store_corrupt`.

    `lmdb.verify` walks every page of every tree and knows the size the file must have. Added here: the two meta pages are
    always one transaction apart, so a damaged newer one cannot pass for the state before.
    """
    data = path / "data.mdb"
    try:
        problems = lmdb.verify.verify(str(data), subdir=False)
        if not problems:
            with data.open("rb") as file:
                walker = lmdb.verify._Verifier(file, data.stat().st_size)
                walker.detect_engine()
                first = walker._read_meta(0, 1)
                second = walker._read_meta(1, first.psize)
            if abs(first.txnid - second.txnid) != 1:
                problems = ["the meta pages are not one transaction apart"]
    except FileNotFoundError:
        problems = ["data.mdb is missing"]
    except (lmdb.verify.VerifyError, OSError, ValueError, IndexError, OverflowError, MemoryError) as exc:
        problems = [str(exc)]
    if problems:
        raise StoreError("store_corrupt", f"{path.name}: {problems[0]}"[:300])


# ── one table in one transaction ────────────────────────────────────────────────────────────────────────────────────────


class Rows:
    """One table within one transaction: seals what is put, checks what is got."""

    def __init__(self, txn: Any, name: bytes, db: Any) -> None:
        self._txn, self._name, self._db = txn, name, db

    def get(self, key: bytes) -> bytes | None:
        """Raises `store_corrupt`."""
        value = self._txn.get(key, db=self._db)
        return None if value is None else records.unseal(self._name, key, value)

    def need(self, key: bytes) -> bytes:
        """A record that another one says is there. Raises `store_corrupt` where it is not."""
        payload = self.get(key)
        if payload is None:
            raise StoreError("store_corrupt", f"a record of table {self._name.decode()} is missing")
        return payload

    def put(self, key: bytes, payload: bytes = b"") -> None:
        self._txn.put(key, records.seal(self._name, key, payload), db=self._db)

    def delete(self, key: bytes) -> None:
        self._txn.delete(key, db=self._db)

    def keys(self, prefix: bytes) -> Iterator[bytes]:
        """The keys that begin with `prefix`, oldest first. Not to be changed meanwhile."""
        cursor = self._txn.cursor(db=self._db)
        if cursor.set_range(prefix):
            for key in cursor.iternext(values=False):
                if not key.startswith(prefix):
                    return
                yield key

    def latest(self, prefix: bytes, before: bytes | None) -> Iterator[bytes]:
        """The keys `prefix` + document, newest first, beginning behind the document `before`."""
        cursor = self._txn.cursor(db=self._db)
        end = prefix + (b"\xff" * 17 if before is None else before)
        if cursor.set_range(end):
            if not cursor.prev():
                return
        elif not cursor.last():
            return
        for key in cursor.iterprev(values=False):
            if not key.startswith(prefix):
                return
            yield key

    def drop(self, prefix: bytes) -> None:
        for key in list(self.keys(prefix)):
            self.delete(key)

    def audit(self, *, contents: bool) -> int:
        """Check that each row is found under its own key, and with `contents` its seal; count them. Raises `store_corrupt`.

        A damaged key would otherwise be a document that is not there, which no seal can tell.
        """
        count = 0
        for key in self._txn.cursor(db=self._db).iternext(values=False):
            value = self._txn.get(key, db=self._db)
            if value is None:
                raise StoreError("store_corrupt", f"table {self._name.decode()} is out of order")
            if contents:
                records.unseal(self._name, bytes(key), bytes(value))
            count += 1
        return count


# ── one transaction ─────────────────────────────────────────────────────────────────────────────────────────────────────


class View:
    """One client's documents within one transaction; the transaction ends before anybody waits for anything."""

    def __init__(self, client: str, txn: Any, tables: dict[bytes, Any]) -> None:
        self.client = client
        rows = {name: Rows(txn, name, tables[name]) for name in TABLES}
        self.meta, self.doc, self.old, self.blob, self.ref = (rows[n] for n in (b"meta", b"doc", b"old", b"blob", b"ref"))
        self.bad, self.texts, self.src, self.srcs, self.idx = (rows[n] for n in (b"bad", b"text", b"src", b"srcs", b"idx"))

    # reading

    def counters(self) -> Counters:
        return _counters.decode(self.meta.need(b"counters"))

    def get(self, key: bytes) -> Stored | None:
        payload = self.doc.get(key)
        return None if payload is None else _stored.decode(payload)

    def named(self, document_id: str) -> Stored:
        """Raises `not_found`."""
        key = document_key(document_id)
        found = None if key is None else self.get(key)
        if found is None:
            raise not_found(document_id)
        return found

    def _expected(self, key: bytes) -> Stored:
        """The document an index speaks of."""
        return _stored.decode(self.doc.need(key))

    def known(self, sha256: str, source_id: str | None) -> Stored | None:
        """The document that these bytes under this source id are already; None where there is something to keep.

        1. The source id is known: its document if it has these bytes now; with other bytes they are a new version.
        2. Else the bytes are known: the oldest document that has them.
        """
        if source_id is not None:
            owner = self.src.get(records.source_key(source_id))
            if owner is not None:
                found = self._expected(owner)
                return found if found.sha256 == sha256 else None
        for key in self.ref.keys(bytes.fromhex(sha256)):
            self.ref.need(key)
            return self._expected(key[32:])
        return None

    def refused(self, sha256: str) -> Stored | None:
        """The document that says why these bytes were refused."""
        key = self.bad.get(bytes.fromhex(sha256))
        return None if key is None else self._expected(key)

    def raw(self, document: Stored) -> bytes:
        """The document's bytes; what does not have its sha256 is `store_corrupt`."""
        if document.state == "failed":
            raise not_found(document.document_id)
        chunks = [self.blob.need(key) for key in self.blob.keys(document.digest)]
        data = b"".join(chunks)
        if hashlib.sha256(data).digest() != document.digest:
            raise StoreError("store_corrupt", f"the bytes of document {document.document_id} are damaged")
        return data

    def text(self, document: Stored, offset: int, limit: int) -> str:
        """Characters `offset` to `offset + limit`; unpacks only the chunks they lie in."""
        end = min(offset + limit, document.text_chars)
        if offset >= end:
            return ""
        first, last = offset // records.TEXT_CHUNK, (end - 1) // records.TEXT_CHUNK
        whole = "".join(records.unpacked(self.texts.need(_at(document.key, n))) for n in range(first, last + 1))
        start = first * records.TEXT_CHUNK
        return whole[offset - start : end - start]

    def page(
        self, category: str | None, state: DocState | None, limit: int, after: bytes | None
    ) -> tuple[list[Stored], int, str | None]:
        """Up to `limit` documents older than `after`, newest first; how many there are in all; where to go on."""
        counters = self.counters()
        if category is not None:
            # Only what is categorized has a category.
            total = counters.categories.get(category, 0) if state in (None, "categorized") else 0
            rows, prefix = self.idx, records.category_key(category)
        elif state is not None:
            categorized = counters.documents - counters.pending
            total = {"committed": counters.pending, "categorized": categorized, "failed": counters.failed}[state]
            rows, prefix = self.idx, records.state_key(state)
        else:
            total = counters.documents + counters.failed
            rows, prefix = self.doc, b""
        found: list[Stored] = []
        if total:
            for key in rows.latest(prefix, after):
                if len(found) == limit:
                    return found, total, found[-1].document_id
                rows.need(key)
                found.append(self._expected(key[len(prefix) :]))
        return found, total, None

    def pending(self) -> list[tuple[str, int]]:
        prefix = records.state_key("committed")
        waiting = [self._expected(key[len(prefix) :]) for key in self.idx.keys(prefix)]
        return [(document.document_id, document.version) for document in waiting]

    # writing

    def put(self, draft: Draft, data: bytes, sha256: str, text: list[bytes], chars: int) -> Put:
        """Keep a document; decided here, inside the write transaction, so that two of the same become one."""
        known = self.link(sha256, draft.source_id)
        if known is not None:
            return Put(known, duplicate=True)
        # What is left: a new version of the source's document, bytes once refused that now can be read, or a new document.
        owner = None if draft.source_id is None else self.src.get(records.source_key(draft.source_id))
        before = self._expected(owner) if owner is not None else self.refused(sha256)
        stored = Stored(
            document_id=(before.key if before else _ids.new()).hex(),
            version=before.version + 1 if before else 1,
            client=self.client,
            sha256=sha256,
            size=len(data),
            filename=draft.filename,
            media_type=draft.media_type,
            declared_type=draft.declared_type,
            source_id=draft.source_id,
            received_at=draft.received_at,
            title=draft.title,
            pages=draft.pages,
            text_chars=chars,
            extraction=draft.extraction,
            notes=draft.notes,
            engine=draft.engine,
            headings=draft.headings,
            state="committed",
        )
        if before is not None:
            self.old.put(_at(before.key, before.version), _encode(before))
            self._drop_content(before)
        if not any(True for _ in self.ref.keys(stored.digest)):
            for n, piece in enumerate(records.pieces(data)):
                self.blob.put(_at(stored.digest, n), piece)
        self.ref.put(stored.digest + stored.key)
        for n, chunk in enumerate(text):
            self.texts.put(_at(stored.key, n), chunk)
        self._map_source(draft.source_id, stored.key)
        self._replace(before, stored)
        return Put(stored, duplicate=False)

    def link(self, sha256: str, source_id: str | None) -> Stored | None:
        """`known`; and the source id, where it is new, means that document from now on."""
        found = self.known(sha256, source_id)
        if found is not None:
            self._map_source(source_id, found.key)
        return found

    def reject(self, document: Stored) -> Stored:
        """Keep why bytes were refused. They are not the source id's document, so a later success of it is a document of its
        own, and a good document is not harmed by a bad successor."""
        found = self.refused(document.sha256)
        if found is not None:
            return found
        stored = msgspec.structs.replace(document, document_id=_ids.new().hex())
        self.bad.put(stored.digest, stored.key)
        self._replace(None, stored)
        return stored

    def categorize(self, document_id: str, version: int, categorization: Categorization) -> Stored | None:
        key = document_key(document_id)
        before = None if key is None else self.get(key)
        if before is None or before.version != version or before.state == "failed":
            return None
        after = msgspec.structs.replace(before, state="categorized", categorization=categorization)
        self._replace(before, after)
        return after

    def delete(self, document_id: str) -> bool:
        key = document_key(document_id)
        document = None if key is None else self.get(key)
        if key is None or document is None:
            return False
        for row in list(self.srcs.keys(key)):
            self.src.delete(row[16:])
            self.srcs.delete(row)
        self.old.drop(key)
        self._drop_content(document)
        self._replace(document, None)
        return True

    def _map_source(self, source_id: str | None, key: bytes) -> None:
        if source_id is not None and self.src.get(records.source_key(source_id)) is None:
            self.src.put(records.source_key(source_id), key)
            self.srcs.put(key + records.source_key(source_id))

    def _drop_content(self, document: Stored) -> None:
        """Remove a version's text, and its bytes where no other document has them. The metadata is the caller's."""
        if document.state == "failed":
            self.bad.delete(document.digest)
            return
        self.texts.drop(document.key)
        self.ref.delete(document.digest + document.key)
        if not any(True for _ in self.ref.keys(document.digest)):
            self.blob.drop(document.digest)

    def _replace(self, before: Stored | None, after: Stored | None) -> None:
        """Change one document's record with everything that is derived from it: the one place that does."""
        counters = self.counters()
        if before is not None:
            counters = counters.counting(before, -1)
            for row in _index_rows(before):
                self.idx.delete(row)
            if after is None:
                self.doc.delete(before.key)
        if after is not None:
            counters = counters.counting(after, 1)
            for row in _index_rows(after):
                self.idx.put(row)
            self.doc.put(after.key, _encode(after))
        self.meta.put(b"counters", _encode(counters))


def _at(key: bytes, n: int) -> bytes:
    return key + n.to_bytes(4, "big")


def _index_rows(document: Stored) -> list[bytes]:
    rows = [records.state_key(document.state) + document.key]
    if document.categorization is not None:
        rows.append(records.category_key(document.categorization.category) + document.key)
    return rows


# ── one environment ─────────────────────────────────────────────────────────────────────────────────────────────────────


class ClientStore:
    """An open store. Any thread may read; one thread writes; `grow`, `shrink` and `close` only while nobody does either.

    `counters`, `used` and `map_size` (bytes) are those of the last commit, for who must not wait.
    """

    def __init__(self, root: Path, client: str, quota: int) -> None:
        """Raises `store_corrupt`, `store_unsafe_path`, `store_io_error`."""
        path = folder(root, client)
        for directory in (root, path.parent, path):
            refuse_links(directory, directory=True)
        for name in ("data.mdb", "lock.mdb", "client.json"):
            refuse_links(path / name, directory=False)
        if name_in(path) != client:
            raise StoreError("store_corrupt", f"{path.name} belongs to another client")
        _verify(path)
        self.client = client
        self._quota = _pages(max(quota, MiB))
        size = (path / "data.mdb").stat().st_size
        try:
            # Who made the directory may have died before it was on disk.
            for directory in (path, path.parent, root):
                sync_directory(directory)
            self._env = _open(path, max(_first_map(quota), _pages(size)))
        except (lmdb.Error, OSError) as exc:
            raise StoreError("store_io_error", f"{path.name}: {exc}"[:300]) from None
        try:
            self._tables = self._checked_tables(path)
            with self.reading() as view:
                self.counters = view.counters()
            self.used, self.map_size = self._sizes()
        except lmdb.Error as exc:
            self._env.close()
            raise StoreError("store_corrupt", f"{path.name}: {exc}"[:300]) from None
        except BaseException:
            self._env.close()
            raise

    def _checked_tables(self, path: Path) -> dict[bytes, Any]:
        self._env.reader_check()
        if set(self._env.dbs()) != set(TABLES):
            raise StoreError("store_corrupt", f"{path.name} does not have the tables of a store")
        # Handles opened in a transaction that only reads would end with it; this one writes nothing.
        with self._env.begin(write=True) as txn:
            tables = {name: self._env.open_db(name, txn=txn, create=False) for name in TABLES}
        with self._env.begin() as txn:
            view = View(self.client, txn, tables)
            marker = _marker.decode(view.meta.need(b"store"))
            if marker.client != self.client:
                raise StoreError("store_corrupt", f"{path.name} belongs to another client")
            if marker.schema > records.SCHEMA:
                raise StoreError("store_corrupt", f"{path.name} was written by a newer hubpeer (layout {marker.schema})")
            counters = view.counters()
        with self._env.begin(buffers=True) as txn:  # buffers: bytes and texts are looked up, not copied
            counts = {name: Rows(txn, name, db).audit(contents=name not in (b"blob", b"text")) for name, db in tables.items()}
        if counts[b"doc"] != counters.documents + counters.failed or counts[b"ref"] != counters.documents:
            raise StoreError("store_corrupt", f"{path.name}: documents are missing")
        return tables

    @contextlib.contextmanager
    def reading(self) -> Iterator[View]:
        """A transaction to read in. What LMDB says while it reads is `store_corrupt`."""
        try:
            with self._env.begin() as txn:
                yield View(self.client, txn, self._tables)
        except lmdb.Error as exc:
            raise StoreError("store_corrupt", f"reading failed: {exc}"[:300]) from None

    def write(self, changes: list[Callable[[View], T]]) -> list[T]:
        """Make changes in one transaction, all or none; on disk when this returns.

        Raises what a change raises, `lmdb.MapFullError` where the map must grow first, and any other `lmdb.Error` or
        `OSError` where it is unknown what is on disk: then the store must not be written to before it is opened again.
        """
        with self._env.begin(write=True) as txn:
            view = View(self.client, txn, self._tables)
            results = [change(view) for change in changes]
            counters = view.counters()
        self.counters = counters
        self.used, self.map_size = self._sizes()
        return results

    def grow(self, *, into_reserve: bool) -> bool:
        """Double the map, up to the quota (past it into the reserve, for what frees or finishes). False: no room left."""
        now = self._env.info()["map_size"]
        limit = self._quota + (RESERVE if into_reserve else 0)
        if now >= limit:
            return False
        self._env.set_mapsize(min(2 * now, limit))
        return True

    def shrink(self) -> None:
        """Close the reserve again; LMDB keeps the map as large as what is used."""
        if self._env.info()["map_size"] > self._quota:
            self._env.set_mapsize(self._quota)

    def _sizes(self) -> tuple[int, int]:
        """Bytes of the file in use (its high-water mark) and bytes of the map, as of the last commit."""
        info = self._env.info()
        return (info["last_pgno"] + 1) * self._env.stat()["psize"], info["map_size"]

    def close(self) -> None:
        self._env.close()


def after_key(after: str | None) -> bytes | None:
    """A page's `next` as a key. Raises `bad_value`."""
    key = None if after is None else document_key(after)
    if after is not None and key is None:
        raise BadRequest("bad_value", f"not the `next` of a page: {shown(after)!r}", field="after")
    return key
