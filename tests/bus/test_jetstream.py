from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hubpeer.bus import topology
from hubpeer.bus.jetstream import NS, STREAM_FULL, WRONG_LAST_SEQUENCE, ApiError, JetStream, Message, Puller, object_config
from hubpeer.bus.link import Access, Link
from hubpeer.bus.server import EmbeddedServer
from hubpeer.errors import HubError, SettingsError
from hubpeer.settings import Server, Settings
from tests.bus.helpers import linked, raw, until


def stream(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "subjects": [f"{name}.>"], "retention": "limits", "storage": "file", **more}


def consumer(name: str, **more: Any) -> dict[str, Any]:
    return {"durable_name": "c", "filter_subject": f"{name}.>", "ack_policy": "explicit", "ack_wait": 30 * NS, **more}


# ── configuration ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_everything_of_the_contract_is_made_once_and_then_found_unchanged(tmp_path: Path) -> None:
    server = EmbeddedServer(Server(port=0, sync_always=False), tmp_path / "data")
    await server.start()
    try:
        async with linked(server) as link:
            js = JetStream(link)
            assert await topology.ensure(js, Settings()) == []
            for agent in ("finance", "sales"):
                assert await js.ensure_consumer("PLANS", topology.agent_consumer(agent, Settings())) == []
            assert await topology.ensure(js, Settings()) == []
            assert await js.ensure_consumer("PLANS", topology.agent_consumer("sales", Settings())) == []
    finally:
        await server.stop()


async def test_a_difference_is_told_and_nothing_is_rewritten(js: JetStream, name: str) -> None:
    assert await js.ensure_stream(stream(name, max_age=NS * 3600, max_msgs=7)) == []
    assert await js.ensure_consumer(name, consumer(name, max_deliver=3)) == []
    before = await js.api(f"STREAM.INFO.{name}"), await js.api(f"CONSUMER.INFO.{name}.c")

    found = await js.ensure_stream(stream(name, max_age=NS * 60, max_msgs=7, description="ours"))
    found += await js.ensure_consumer(name, consumer(name, max_deliver=4))
    assert [(d.what, d.field, d.ours, d.theirs) for d in found] == [
        (f"stream {name}", "max_age", NS * 60, NS * 3600),
        (f"stream {name}", "description", "ours", None),
        (f"consumer {name}/c", "max_deliver", 4, 3),
    ]
    assert str(found[2]) == f"consumer {name}/c: max_deliver is 3 on the server, 4 here"
    after = await js.api(f"STREAM.INFO.{name}"), await js.api(f"CONSUMER.INFO.{name}.c")
    assert [i["config"] for i in after] == [i["config"] for i in before]


@pytest.mark.parametrize("field, value", [("retention", "workqueue"), ("storage", "memory"), ("subjects", ["elsewhere.>"])])
async def test_another_kind_of_stream_is_not_ours_to_use(js: JetStream, name: str, field: str, value: Any) -> None:
    await js.ensure_stream({**stream(name), "subjects": [f"{name}.>"]})
    with pytest.raises(SettingsError, match=f"stream {name}: {field}"):
        await js.ensure_stream({**stream(name), field: value})
    assert (await js.api(f"STREAM.INFO.{name}"))["config"].get(field) != value


async def test_a_stream_that_cannot_be_made_is_a_setting_to_change(js: JetStream, name: str) -> None:
    await js.ensure_stream(stream(name))
    with pytest.raises(SettingsError, match="cannot be created"):  # its subjects are taken
        await js.ensure_stream({**stream(f"{name}x"), "subjects": [f"{name}.>"]})


# ── publishing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_expected_sequence_and_the_message_id_make_a_publish_harmless_to_repeat(js: JetStream, name: str) -> None:
    await js.ensure_stream(stream(name))
    first = await js.publish(f"{name}.a", b"1", expect_last=0)
    with pytest.raises(ApiError) as refused:
        await js.publish(f"{name}.a", b"2", expect_last=0)
    assert refused.value.err_code == WRONG_LAST_SEQUENCE
    second = await js.publish(f"{name}.a", b"2", msg_id="x", expect_last=first.seq)
    assert second.duplicate is False
    assert await js.last(name, f"{name}.a") == (
        b"2",
        second.seq,
        {"Nats-Msg-Id": "x", "Nats-Expected-Last-Subject-Sequence": "1"},
    )
    again = await js.publish(f"{name}.a", b"2", msg_id="x")
    assert (again.seq, again.duplicate) == (second.seq, True)
    assert await js.last(name, f"{name}.none") is None


async def test_a_full_stream_says_so_at_once(js: JetStream, name: str) -> None:
    await js.ensure_stream(stream(name, max_msgs=1, discard="new"))
    await js.publish(f"{name}.a", b"")
    async with asyncio.timeout(5):
        with pytest.raises(ApiError) as full:
            await js.publish(f"{name}.b", b"")
    assert full.value.err_code == STREAM_FULL


async def test_a_batch_is_stored_all_or_none(js: JetStream, name: str) -> None:
    await js.ensure_stream(stream(name, allow_atomic=True))
    first = {"Nats-Expected-Last-Subject-Sequence": "0"}
    await js.publish_all([(f"{name}.a{i}", b"x", first) for i in range(3)])
    assert (await js.stream_state(name))["messages"] == 3
    for taken in range(3):  # whichever of the three is there already
        subjects = [f"{name}.b{taken}{i}" for i in range(3)]
        subjects[taken] = f"{name}.a{taken}"
        with pytest.raises(ApiError) as refused:
            await js.publish_all([(s, b"y", first) for s in subjects])
        assert refused.value.err_code == WRONG_LAST_SEQUENCE
        assert (await js.stream_state(name))["messages"] == 3
    await js.publish_all([(f"{name}.alone", b"z", first)])
    await js.publish_all([(f"{name}.c{i}", b"z", first) for i in range(12)])
    assert (await js.stream_state(name))["messages"] == 16


async def test_a_stream_without_batches_refuses_one(js: JetStream, name: str) -> None:
    await js.ensure_stream(stream(name))
    with pytest.raises(ApiError):
        await js.publish_all([(f"{name}.a", b"", {}), (f"{name}.b", b"", {})])
    assert (await js.stream_state(name))["messages"] == 0


async def test_many_subjects_are_listed_page_by_page(js: JetStream, name: str) -> None:
    await js.ensure_stream(stream(name))
    await asyncio.gather(*(js.publish(f"{name}.{i}", b"") for i in range(300)))
    assert sorted(await js.subjects(name, f"{name}.>")) == sorted(f"{name}.{i}" for i in range(300))
    assert await js.subjects(name, f"{name}.7") == [f"{name}.7"]
    assert await js.subjects(name, "nothing.>") == []


# ── buckets ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_bucket_changes_by_compare_and_set_only(js: JetStream, name: str) -> None:
    bucket = js.bucket(name)
    await js.ensure_stream(bucket.config())
    assert await bucket.get("a") is None
    one = await bucket.create("a", b"1")
    assert one is not None
    assert await bucket.create("a", b"other") is None
    assert await bucket.get("a") == (b"1", one)
    two = await bucket.update("a", b"2", one)
    assert two is not None
    assert await bucket.update("a", b"late", one) is None
    assert await bucket.get("a") == (b"2", two)
    await bucket.put("b", b"3")
    assert sorted(await bucket.keys()) == ["a", "b"]

    async def add_one() -> None:
        while True:
            value, revision = await bucket.get("n") or (b"0", 0)
            if await bucket.update("n", b"%d" % (int(value) + 1), revision) is not None:
                return

    await asyncio.gather(*(add_one() for _ in range(20)))
    found = await bucket.get("n")
    assert found is not None
    assert found[0] == b"20"


async def test_a_lost_ack_does_not_look_like_somebody_elses_change(link: Link, js: JetStream, name: str) -> None:
    """The change arrives, its ack does not: the retry is told the revision, not that it came too late."""
    bucket = js.bucket(name)
    await js.ensure_stream(bucket.config())
    ask, lost = link.request, 0

    async def lose_one_ack(subject: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal lost
        answer = await ask(subject, *args, **kwargs)
        if subject.startswith("$KV") and not lost:
            lost += 1
            raise HubError("deadline_passed", "lost")
        return answer

    link.request = lose_one_ack  # type: ignore[method-assign]
    assert await bucket.create("a", b"1") == 1
    assert lost == 1


async def test_nats_pys_own_bucket_reads_and_writes_the_same(server: EmbeddedServer, js: JetStream, name: str) -> None:
    bucket = js.bucket(name)
    await js.ensure_stream(bucket.config())
    await bucket.put("ours", b"1")
    async with raw(server.url) as nc:
        theirs = await nc.jetstream().key_value(name)
        assert (await theirs.get("ours")).value == b"1"
        await theirs.put("theirs", b"2")
        revision = await theirs.put("ours", b"3")
        assert await bucket.get("ours") == (b"3", revision)
        await theirs.delete("ours")
    assert await bucket.get("ours") is None
    assert await bucket.get("theirs") is not None


# ── pulling ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def take(puller: Puller, count: int) -> list[Message]:
    found: list[Message] = []
    async with asyncio.timeout(30):
        async for message in puller:
            found.append(message)
            if len(found) == count:
                break
    return found


async def counts(js: JetStream, name: str) -> tuple[int, int]:
    info = await js.api(f"CONSUMER.INFO.{name}.c")
    return info["num_pending"], info["num_ack_pending"]


async def test_ack_nak_and_term_do_what_they_say(link: Link, js: JetStream, name: str) -> None:
    await js.ensure_stream(stream(name))
    await js.ensure_consumer(name, consumer(name))
    for i in range(3):
        await js.publish(f"{name}.{i}", b"%d" % i, {"Hub-A": "b"})
    async with Puller(link, name, "c", batch=8) as puller:
        one, two, three = await take(puller, 3)
        assert (one.subject, one.data, one.headers["Hub-A"]) == (f"{name}.0", b"0", "b")
        assert (one.stream, one.consumer, one.deliveries, one.sequence) == (name, "c", 1, 1)
        await one.ack()
        await two.nak(0.05)
        await three.term("bad_json")
        [again] = await take(puller, 1)
        assert (again.sequence, again.deliveries) == (2, 2)
        await again.ack()
        await link.flush()
    assert await counts(js, name) == (0, 0)


async def test_a_message_that_is_worked_on_is_not_handed_out_again(link: Link, js: JetStream, name: str) -> None:
    await js.ensure_stream(stream(name))
    await js.ensure_consumer(name, consumer(name, ack_wait=3 * NS // 2))
    await js.publish(f"{name}.a", b"slow")
    async with Puller(link, name, "c", batch=4) as puller:
        [message] = await take(puller, 1)
        loop = asyncio.get_running_loop()
        for _trial in range(3):  # a machine that stands still for a whole ack wait makes a trial void
            begun = loop.time()
            others = asyncio.create_task(take(puller, 1))
            async with message.kept_alive(every_s=0.2):
                await until(lambda: others.done() or loop.time() - begun > 3.5, "two ack waits have gone by")  # noqa: B023
                kept = not others.done()
            before = message.deliveries
            [message] = await others  # no longer kept alive: after its ack wait it comes again
            assert message.deliveries == before + 1
            if kept:
                break
        assert kept
        await message.ack()


async def test_a_publisher_cannot_pass_for_the_server(link: Link, js: JetStream, name: str) -> None:
    """Empty messages with the headers of the server's own words are messages like any other."""
    await js.ensure_stream(stream(name))
    await js.ensure_consumer(name, consumer(name))
    for status in ("404", "408", "409", "503", "100"):
        await js.publish(f"{name}.{status}", b"", {"Status": status, "Description": "No Messages"})
    async with Puller(link, name, "c", batch=2) as puller:
        found = await take(puller, 5)
        assert [m.headers["Status"] for m in found] == ["404", "408", "409", "503", "100"]
        for message in found:
            await message.ack()


async def test_a_puller_asks_again_when_its_pull_has_expired(
    link: Link, js: JetStream, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Puller, "EXPIRES_S", 0.2)
    await js.ensure_stream(stream(name))
    await js.ensure_consumer(name, consumer(name))
    async with Puller(link, name, "c") as puller:
        waiting = asyncio.create_task(take(puller, 1))
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await until(lambda: loop.time() - begun > 1, "several pulls have expired")
        assert not waiting.done()
        await js.publish(f"{name}.a", b"late")
        [message] = await waiting
        assert message.data == b"late"


async def test_pulling_goes_on_over_a_server_restart(tmp_path: Path) -> None:
    server = EmbeddedServer(Server(port=0), tmp_path / "data")
    await server.start()
    link = Link(Access(server.url, "test", reconnect_wait_s=0.05))
    await link.open()
    js = JetStream(link)
    await js.ensure_stream(stream("S"))
    await js.ensure_consumer("S", consumer("S", ack_wait=10 * NS))
    seen: Counter[bytes] = Counter()

    async def work() -> None:
        async with Puller(link, "S", "c", batch=4) as puller:
            async for message in puller:
                seen[message.data] += 1
                with contextlib.suppress(HubError):
                    await message.ack()

    working = asyncio.create_task(work())
    for i in range(5):
        await js.publish("S.a", b"%d" % i)
    await until(lambda: len(seen) == 5, "the first five")
    await server.stop()
    again = EmbeddedServer(Server(port=server.port), tmp_path / "data")
    await again.start()
    try:
        for i in range(5, 10):
            await js.publish("S.a", b"%d" % i, within_s=30)
        await until(lambda: len(seen) == 10, "all ten")
        assert sum(seen.values()) <= 11  # the one whose ack the stop cut off may come twice
        assert not working.done()
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        await link.close()
        await again.stop()


# ── objects ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [0, 1, 256 * 1024, 256 * 1024 + 1, 3_000_000])
async def test_an_object_comes_back_as_it_was(server: EmbeddedServer, js: JetStream, name: str, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    await js.object_put(name, "größe/1.pdf", data)
    assert await js.object_get(name, "größe/1.pdf", limit=size) == data
    async with raw(server.url) as nc:
        theirs = await nc.jetstream().object_store(name)
        if size:
            assert (await theirs.get("größe/1.pdf")).data == data
        assert (await theirs.get_info("größe/1.pdf")).size == size


async def test_what_nats_py_puts_we_read(server: EmbeddedServer, js: JetStream, name: str) -> None:
    await js.ensure_stream(object_config(name))
    async with raw(server.url) as nc:
        await (await nc.jetstream().object_store(name)).put("theirs", b"y" * 700_000)
    assert await js.object_get(name, "theirs", limit=1_000_000) == b"y" * 700_000


async def test_an_object_is_refused_where_it_cannot_be_had(js: JetStream, name: str) -> None:
    async def code(object_name: str, limit: int = 1 << 20) -> str:
        with pytest.raises(HubError) as refused:
            await js.object_get(name, object_name, limit, timeout_s=5)
        return refused.value.code

    assert await code("nothing") == "object_not_found"  # no bucket at all
    await js.object_put(name, "a", b"x" * 1000)
    assert await code("nothing") == "object_not_found"
    assert await code("a", limit=999) == "doc_too_large"
    await js.object_delete(name, "a")
    await js.object_delete(name, "a")
    assert await code("a") == "object_not_found"
    assert (await js.stream_state(f"OBJ_{name}"))["messages"] == 0


async def test_an_object_whose_bytes_changed_is_not_given_out(js: JetStream, name: str) -> None:
    await js.object_put(name, "a", b"x" * 1000)
    info = await js.object_info(name, "a")
    await js.api(f"STREAM.PURGE.OBJ_{name}", {"filter": f"$O.{name}.C.{info['nuid']}"})
    await js.publish(f"$O.{name}.C.{info['nuid']}", b"y" * 1000)
    with pytest.raises(HubError) as refused:
        await js.object_get(name, "a", limit=1 << 20)
    assert refused.value.code == "digest_mismatch"


async def test_an_object_without_its_chunks_ends_in_an_error(js: JetStream, name: str) -> None:
    await js.object_put(name, "a", b"x" * 1000)
    info = await js.object_info(name, "a")
    await js.api(f"STREAM.PURGE.OBJ_{name}", {"filter": f"$O.{name}.C.{info['nuid']}"})
    with pytest.raises(HubError) as refused:
        await js.object_get(name, "a", limit=1 << 20, timeout_s=0.5)
    assert refused.value.code == "object_not_found"
    assert (await js.api(f"CONSUMER.NAMES.OBJ_{name}"))["consumers"] == []
