"""The rules of the store, on real LMDB files."""

import asyncio
import contextlib
import hashlib
import os
import threading
import time
import uuid
from pathlib import Path

import lmdb
import pytest

import hubpeer.store
from hubpeer.errors import BadRequest, Busy, HubError, StoreError
from hubpeer.settings import Documents, KiB, MiB
from hubpeer.store import Draft, Put, Stored, Stores, records, writer
from hubpeer.store import client as disk
from hubpeer.store.records import Ids
from hubpeer.wire import Categorization

NOW = "2026-11-22T10:00:00.000Z"


def draft(source_id: str | None = None, filename: str = "a.txt") -> Draft:
    return Draft(filename=filename, media_type="text/plain", received_at=NOW, source_id=source_id, pages=1, engine="plain")


def labelled(category: str = "invoice") -> Categorization:
    return Categorization(category, 0.9, "A summary.", "internal", ["finance"], ["EUR 5"], "rules")


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def refuse(stores: Stores, data: bytes, source_id: str | None = None, client: str = "acme") -> Stored:
    return await stores.reject(client, sha(data), len(data), "bad.pdf", source_id, NOW, "bad_pdf", "no pages")


@pytest.fixture
def stores(tmp_path: Path):
    opened = Stores(tmp_path / "stores", Documents())
    opened.open()
    yield opened
    opened.close()


# ── one document ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_was_put_is_got(stores):
    kept = await stores.put("acme", draft("s1"), b"hello", "héllo")
    stored = kept.stored
    assert (kept.duplicate, stored.version, stored.state, stored.size, stored.text_chars) == (False, 1, "committed", 5, 5)
    assert stored.sha256 == sha(b"hello") and stored.client == "acme" and stored.source_id == "s1"
    assert await stores.get("acme", stored.document_id) == stored
    assert await stores.raw("acme", stored.document_id) == b"hello"
    assert await stores.text("acme", stored.document_id, 0, 100) == (stored, "héllo", 5)
    assert await stores.find("acme", sha(b"hello"), None) == stored
    assert await stores.find("acme", sha(b"hello"), "s1") == stored


async def test_everything_is_there_after_a_restart(stores, tmp_path):
    stored = (await stores.put("acme", draft("s1"), b"hello" * 100_000, "text" * 50_000)).stored
    stores.close()
    stores.close()
    stores.open()
    assert await stores.pending() == [("acme", stored.document_id, 1)]
    assert await stores.raw("acme", stored.document_id) == b"hello" * 100_000
    assert (await stores.text("acme", stored.document_id, 199_998, 10))[1:] == ("xt", 200_000)
    assert (await stores.put("acme", draft("s1"), b"hello" * 100_000, "other")).duplicate


@pytest.mark.parametrize("size", [0, 1, records.BLOB_CHUNK - 1, records.BLOB_CHUNK, records.BLOB_CHUNK + 1, 5 * MiB])
async def test_bytes_of_every_size_come_back(stores, size):
    data = os.urandom(size)
    stored = (await stores.put("acme", draft(), data, "")).stored
    assert await stores.raw("acme", stored.document_id) == data


async def test_text_is_read_in_pieces(stores):
    text = "".join(chr(97 + n % 26) + "é" for n in range(100_000))
    stored = (await stores.put("acme", draft(), b"x", text)).stored
    chunk = records.TEXT_CHUNK
    for offset, limit in [
        (0, 1),
        (chunk - 1, 2),
        (chunk, chunk),
        (2 * chunk - 5, 100_000),
        (199_999, 5),
        (200_000, 5),
        (10**9, 1),
    ]:
        assert (await stores.text("acme", stored.document_id, offset, limit))[1] == text[offset : offset + limit]


async def test_a_text_that_is_no_unicode_is_refused_and_nothing_else_suffers(stores):
    with pytest.raises(BadRequest, match="bad_encoding"):
        await stores.put("acme", draft(), b"x", "a\ud800b")
    assert (await stores.put("acme", draft(), b"x", "ab")).stored.version == 1


# ── the same document twice ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_same_bytes_are_a_duplicate_and_its_source_id_is_remembered(stores):
    first = (await stores.put("acme", draft("s1"), b"one", "one")).stored
    assert await stores.put("acme", draft(None), b"one", "one") == Put(first, True)
    assert await stores.put("acme", draft("s2"), b"one", "one") == Put(first, True)
    second = (await stores.put("acme", draft("s2"), b"two", "two")).stored
    assert (second.document_id, second.version) == (first.document_id, 2)


async def test_find_remembers_a_new_source_id_too(stores):
    first = (await stores.put("acme", draft(), b"one", "one")).stored
    assert await stores.find("acme", sha(b"one"), "s9") == first
    assert (await stores.put("acme", draft("s9"), b"two", "two")).stored.document_id == first.document_id


async def test_same_source_other_bytes_is_a_new_version(stores):
    first = (await stores.put("acme", draft("s1"), b"one", "one")).stored
    await stores.categorize("acme", first.document_id, 1, labelled())
    assert await stores.find("acme", sha(b"two"), "s1") is None
    second = (await stores.put("acme", draft("s1"), b"two", "2")).stored
    assert (second.document_id, second.version, second.state) == (first.document_id, 2, "committed")
    assert await stores.raw("acme", first.document_id) == b"two"
    assert (await stores.text("acme", first.document_id, 0, 9))[1] == "2"
    assert await stores.find("acme", sha(b"one"), None) is None  # its bytes are gone
    stats = await stores.stats("acme")
    assert (stats.documents, stats.pending, stats.bytes, stats.text_chars, stats.categories) == (1, 1, 3, 1, {})
    assert (await stores.put("acme", draft("s1"), b"one", "one")).stored.version == 3


async def test_bytes_shared_by_two_documents_stay_until_both_let_go(stores):
    one = (await stores.put("acme", draft("s1"), b"one", "1")).stored
    two = (await stores.put("acme", draft("s2"), b"two", "2")).stored
    assert (await stores.put("acme", draft("s1"), b"two", "2")).stored.document_id == one.document_id
    assert await stores.delete("acme", two.document_id)
    assert await stores.raw("acme", one.document_id) == b"two"
    assert (await stores.find("acme", sha(b"two"), None)).document_id == one.document_id
    assert await stores.delete("acme", one.document_id)
    assert await stores.find("acme", sha(b"two"), None) is None


async def test_a_hundred_puts_of_the_same_bytes_at_once_are_one_document(stores):
    puts = await asyncio.gather(*(stores.put("acme", draft(f"s{n}"), b"same", "same") for n in range(100)))
    assert len({put.stored.document_id for put in puts}) == 1
    assert sum(not put.duplicate for put in puts) == 1
    assert (await stores.stats("acme")).documents == 1


async def test_clients_do_not_know_of_each_other(stores):
    stored = (await stores.put("acme", draft("s1"), b"one", "one")).stored
    other = await stores.put("bolt", draft("s1"), b"one", "one")
    assert not other.duplicate and other.stored.document_id != stored.document_id
    with pytest.raises(BadRequest, match="not_found"):
        await stores.get("bolt", stored.document_id)
    assert not await stores.delete("bolt", stored.document_id)


# ── refused documents ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_refused_document_keeps_its_reason_and_nothing_else(stores):
    bad = await refuse(stores, b"bad", "s1")
    assert bad.state == "failed" and bad.error == {"code": "bad_pdf", "message": "no pages"}
    assert await refuse(stores, b"bad", "s2") == bad
    assert await stores.find("acme", sha(b"bad"), "s1") == bad
    assert await stores.get("acme", bad.document_id) == bad
    assert (await stores.text("acme", bad.document_id, 0, 9))[1:] == ("", 0)
    with pytest.raises(BadRequest, match="not_found"):
        await stores.raw("acme", bad.document_id)
    assert await stores.categorize("acme", bad.document_id, 1, labelled()) is None
    stats = await stores.stats("acme")
    assert (stats.documents, stats.failed, stats.pending, stats.bytes) == (0, 1, 0, 0)
    assert await stores.pending() == []
    assert (await stores.list("acme"))[:2] == ([bad], 1)
    assert await stores.delete("acme", bad.document_id)
    assert await stores.find("acme", sha(b"bad"), "s1") is None


async def test_a_refusal_leaves_the_source_id_to_the_good(stores):
    bad = await refuse(stores, b"bad", "s1")
    good = (await stores.put("acme", draft("s1"), b"good", "good")).stored
    assert good.document_id != bad.document_id and good.version == 1
    await refuse(stores, b"worse", "s1")
    assert await stores.raw("acme", good.document_id) == b"good"
    stats = await stores.stats("acme")
    assert (stats.documents, stats.failed) == (1, 2)


async def test_refused_bytes_that_can_be_read_after_all_keep_their_id(stores):
    bad = await refuse(stores, b"bad")
    healed = (await stores.put("acme", draft(), b"bad", "text")).stored
    assert (healed.document_id, healed.version, healed.state) == (bad.document_id, 2, "committed")
    stats = await stores.stats("acme")
    assert (stats.documents, stats.failed) == (1, 0)
    assert await stores.find("acme", sha(b"bad"), None) == healed


# ── categorization, lists, counters ─────────────────────────────────────────────────────────────────────────────────────


async def test_categorization_belongs_to_a_version(stores):
    one = (await stores.put("acme", draft("s1"), b"one", "one")).stored
    done = await stores.categorize("acme", one.document_id, 1, labelled())
    assert done.state == "categorized" and done.categorization == labelled()
    assert await stores.get("acme", one.document_id) == done
    assert (await stores.put("acme", draft("s1"), b"one", "one")).stored == done
    assert await stores.pending() == []
    await stores.put("acme", draft("s1"), b"two", "two")
    assert await stores.categorize("acme", one.document_id, 1, labelled()) is None
    again = await stores.categorize("acme", one.document_id, 2, labelled("contract"))
    assert (await stores.stats("acme")).categories == {"contract": 1}
    assert (await stores.list("acme", category="contract"))[0] == [again]
    assert (await stores.list("acme", category="invoice"))[0] == []
    await stores.delete("acme", one.document_id)
    assert await stores.categorize("acme", one.document_id, 2, labelled()) is None


async def test_reading_never_makes_a_store(stores, tmp_path):
    assert await stores.find("nobody", sha(b"x"), "s") is None
    assert await stores.list("nobody") == ([], 0, None)
    assert (await stores.stats("nobody")).documents == 0
    assert await stores.categorize("nobody", "0" * 32, 1, labelled()) is None
    assert not await stores.delete("nobody", "0" * 32)
    assert not await stores.drop_client("nobody")
    for missing in ("0" * 32, "", "x" * 64, "é" * 32, "../../etc/passwd"):
        for client in ("nobody", "acme"):
            with pytest.raises(BadRequest, match="not_found"):
                await stores.get(client, missing)
            with pytest.raises(BadRequest, match="not_found"):
                await stores.text(client, missing, 0, 1)
            with pytest.raises(BadRequest, match="not_found"):
                await stores.raw(client, missing)
    assert [p.name for p in (tmp_path / "stores").iterdir()] == [".lock"]


async def test_a_thousand_documents_in_stable_pages(stores):
    puts = await asyncio.gather(*(stores.put("acme", draft(f"s{n}"), b"%d" % n, str(n)) for n in range(1000)))
    ids = [put.stored.document_id for put in puts]
    assert ids == sorted(ids)
    even = ids[::2]
    await asyncio.gather(*(stores.categorize("acme", i, 1, labelled("even")) for i in even))
    seen, after, pages = [], None, 0
    while True:
        page, total, after = await stores.list("acme", limit=64, after=after)
        assert total == 1000
        seen += [stored.document_id for stored in page]
        pages += 1
        if pages == 3:  # what comes or goes meanwhile moves nothing
            new = (await stores.put("acme", draft("new"), b"new", "new")).stored
            await stores.delete("acme", seen[10])
        if after is None:
            break
    assert pages == 16 and seen == ids[::-1] and new.document_id not in seen

    async def all_of(**query: str) -> list[str]:
        found, after = [], None
        while True:
            page, total, after = await stores.list("acme", limit=99, after=after, **query)
            found += [stored.document_id for stored in page]
            if after is None:
                assert total == len(found)
                return found

    left = set(ids) - {seen[10]}
    assert await all_of(category="even") == sorted(left & set(even), reverse=True)
    assert await all_of(state="categorized", category="even") == await all_of(state="categorized")
    assert await all_of(state="committed", category="even") == []
    assert await all_of(state="committed") == [new.document_id, *sorted(left - set(even), reverse=True)]
    assert await all_of(state="failed") == []
    with pytest.raises(BadRequest, match="bad_value"):
        await stores.list("acme", after="page-2")


def test_ids_rise_even_when_the_clock_goes_back(monkeypatch):
    ids = Ids()
    times = iter([5_000_000_000_000, 4_000_000_000_000, *[5_000_000_000_000] * 10_000])
    monkeypatch.setattr(time, "time_ns", lambda: next(times))
    made = [ids.new() for _ in range(10_002)]
    assert made == sorted(set(made))
    assert all(uuid.UUID(bytes=i).version == 7 and uuid.UUID(bytes=i).variant == uuid.RFC_4122 for i in made)


# ── room ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_map_grows_while_others_read(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "FIRST_MAP", MiB)
    stores = Stores(tmp_path, Documents(quota=64 * MiB))
    stores.open()
    with contextlib.closing(stores):
        first = (await stores.put("acme", draft(), b"first", "first")).stored
        assert (await stores.stats("acme")).map_size_bytes == MiB

        async def read() -> None:
            for _ in range(200):
                assert await stores.raw("acme", first.document_id) == b"first"

        blobs = [os.urandom(300 * KiB) for _ in range(60)]
        puts, *_ = await asyncio.gather(asyncio.gather(*(stores.put("acme", draft(), b, "t") for b in blobs)), read(), read())
        for put, blob in zip(puts, blobs, strict=True):
            assert await stores.raw("acme", put.stored.document_id) == blob
        stats = await stores.stats("acme")
        assert 17 * MiB < stats.map_used_bytes <= stats.map_size_bytes <= 64 * MiB


async def test_a_full_store_refuses_what_is_new_and_lets_the_rest_go_on(tmp_path):
    stores = Stores(tmp_path, Documents(quota=4 * MiB))
    stores.open()
    with contextlib.closing(stores):
        puts = [stores.put("acme", draft(), os.urandom(500 * KiB), "t") for _ in range(20)]
        results = await asyncio.gather(*puts, return_exceptions=True)
        kept = [r.stored for r in results if isinstance(r, Put)]
        assert {r.code for r in results if isinstance(r, StoreError)} == {"quota_exceeded"}
        assert 4 <= len(kept) <= 8
        small = await stores.put("acme", draft(), b"small", "t")  # what fits still fits
        other = await stores.put("bolt", draft(), os.urandom(500 * KiB), "t")
        assert not other.duplicate
        assert await stores.categorize("acme", kept[0].document_id, 1, labelled()) is not None
        for stored in kept:
            assert await stores.raw("acme", stored.document_id)
            assert await stores.delete("acme", stored.document_id)
        for _ in range(3):
            assert (await stores.put("acme", draft(), os.urandom(500 * KiB), "t")).stored.version == 1
        assert await stores.raw("acme", small.stored.document_id) == b"small"
        assert stores.status()["errors"] == {}


async def test_one_that_does_not_fit_does_not_fail_its_batch(tmp_path):
    stores = Stores(tmp_path, Documents(quota=4 * MiB))
    stores.open()
    with contextlib.closing(stores):
        blobs = [os.urandom(1000), os.urandom(6 * MiB), *(os.urandom(1000) for _ in range(20))]
        results = await asyncio.gather(*(stores.put("acme", draft(), b, "t") for b in blobs), return_exceptions=True)
        assert [isinstance(r, StoreError) for r in results] == [False, True] + [False] * 20


async def test_a_nearly_full_disk_is_said_before_it_is_full(stores, monkeypatch):
    monkeypatch.setattr(hubpeer.store, "disk_free", lambda path: MiB)
    with pytest.raises(StoreError, match="store_full") as error:
        await stores.put("acme", draft(), b"x", "x")
    assert error.value.retry_after_ms


async def test_a_full_queue_is_busy(stores, monkeypatch):
    monkeypatch.setattr(writer, "MAX_WAITING", 8)
    results = await asyncio.gather(*(stores.put("acme", draft(), b"%d" % n, "") for n in range(500)), return_exceptions=True)
    busy = [r for r in results if isinstance(r, Busy)]
    assert busy and all(r.code == "queue_full" for r in busy)
    assert (await stores.stats("acme")).documents == 500 - len(busy)


# ── failures ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_after_a_failed_commit_a_store_stops_until_it_is_verified(stores, monkeypatch):
    first = (await stores.put("acme", draft(), b"first", "")).stored
    with monkeypatch.context() as broken:

        def failing(self, changes):
            raise lmdb.Error("mdb_txn_commit: Input/output error")

        broken.setattr(disk.ClientStore, "write", failing)
        with pytest.raises(StoreError, match="store_io_error"):
            await stores.put("acme", draft(), b"second", "")
    for _ in range(3):  # the disk works again, the store rests
        with pytest.raises(StoreError, match="store_io_error") as error:
            await stores.put("acme", draft(), b"third", "")
        assert error.value.retry_after_ms > 0
    assert "acme" in stores.status()["failing"]
    assert not (await stores.put("bolt", draft(), b"other", "")).duplicate
    stores._handles["acme"].rests_until = 0
    assert not (await stores.put("acme", draft(), b"second", "")).duplicate
    assert await stores.raw("acme", first.document_id) == b"first"
    assert stores.status()["failing"] == {}


async def test_a_change_that_raises_fails_alone(stores):
    def bad(view):
        view.doc.put(b"half", b"written")
        raise RuntimeError("a bug")

    await stores.put("acme", draft(), b"zero", "")
    results = await asyncio.gather(
        *(stores.put("acme", draft(), b"%d" % n, "") for n in range(10)),
        stores._change("acme", bad),
        *(stores.put("acme", draft(), b"%d" % n, "") for n in range(10, 20)),
        return_exceptions=True,
    )
    assert [type(r) for r in results] == [Put] * 10 + [RuntimeError] + [Put] * 10
    assert (await stores.list("acme"))[1] == 21 == (await stores.stats("acme")).documents


async def test_a_canceled_put_harms_nobody(stores):
    tasks = [asyncio.create_task(stores.put("acme", draft(), b"%d" % n, "")) for n in range(50)]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks[::2]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    for n, result in enumerate(results):
        if not isinstance(result, BaseException):
            assert await stores.raw("acme", result.stored.document_id) == b"%d" % n


async def test_changes_share_commits(stores):
    await stores.put("acme", draft(), b"first", "")
    before = stores.status()["commits"]
    await asyncio.gather(*(stores.put("acme", draft(), b"%d" % n, "") for n in range(256)))
    assert stores.status()["commits"] - before <= 64


async def test_dropping_a_client_removes_its_directory_and_nobody_elses(stores, tmp_path):
    await stores.put("acme", draft("s"), b"one", "")
    other = (await stores.put("bolt", draft("s"), b"one", "")).stored
    assert await stores.drop_client("acme")
    assert not disk.folder(tmp_path / "stores", "acme").exists()
    assert (await stores.list("acme")) == ([], 0, None)
    assert await stores.get("bolt", other.document_id) == other
    again = await stores.put("acme", draft("s"), b"one", "")
    assert (again.duplicate, again.stored.version) == (False, 1)


async def test_only_so_many_stores_are_open(stores, monkeypatch):
    monkeypatch.setattr(hubpeer.store, "MAX_OPEN", 4)
    ids = {}
    for n in range(12):
        ids[f"c{n}"] = (await stores.put(f"c{n}", draft(), b"%d" % n, "")).stored.document_id
    assert stores.status()["clients_open"] <= 4 and stores.status()["clients_known"] == 12
    got = await asyncio.gather(*(stores.raw(client, ids[client]) for client in list(ids) * 5))
    assert got == [b"%d" % n for n in range(12)] * 5
    assert sorted(await stores.pending()) == sorted((client, i, 1) for client, i in ids.items())


async def test_the_loop_is_not_blocked_and_reads_run_elsewhere(stores, monkeypatch):
    threads = set()
    inner = disk.View.raw

    def watched(self, document):
        threads.add(threading.current_thread().name)
        return inner(self, document)

    monkeypatch.setattr(disk.View, "raw", watched)
    stored = (await stores.put("acme", draft(), b"x", "")).stored
    await stores.raw("acme", stored.document_id)
    assert all(name.startswith("store-read") for name in threads)


@pytest.mark.parametrize("part", ["shelf", "store", "data.mdb", "lock.mdb", "client.json"])
async def test_links_are_refused(stores, tmp_path, part):
    stored = (await stores.put("acme", draft(), b"x", "")).stored
    stores.close()
    path = disk.folder(tmp_path / "stores", "acme")
    victim = {"shelf": path.parent, "store": path}.get(part, path / part)
    victim.rename(tmp_path / "elsewhere")
    victim.symlink_to(tmp_path / "elsewhere")
    stores.open()
    if part == "shelf":  # not seen as a store; nothing is written through it either
        with pytest.raises(StoreError, match="store_unsafe_path"):
            await stores.put("acme", draft(), b"y", "")
        return
    with pytest.raises(StoreError, match="store_unsafe_path"):
        await stores.get("acme", stored.document_id)


def test_a_root_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(StoreError, match="store_unsafe_path"):
        Stores(tmp_path / "link", Documents()).open()


async def test_paths_tell_nothing_and_are_private(stores, tmp_path):
    await stores.put("acme", draft(filename="../../secret"), b"x", "")
    path = disk.folder(tmp_path / "stores", "acme")
    assert "acme" not in str(path.relative_to(tmp_path))
    assert [p.stat().st_mode & 0o777 for p in (tmp_path / "stores", path.parent, path)] == [0o700] * 3


async def test_closed_stores_say_so(stores):
    await stores.put("acme", draft(), b"x", "")
    stores.close()
    for call in (
        stores.put("acme", draft(), b"x", ""),
        stores.find("acme", sha(b"x"), None),
        stores.pending(),
        stores.stats("acme"),
    ):
        with pytest.raises(HubError, match="draining"):
            await call
