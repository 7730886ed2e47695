from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

import pytest
from nats.aio.msg import Msg

from hubpeer.bus.jetstream import JetStream
from hubpeer.bus.link import Link
from hubpeer.bus.server import EmbeddedServer
from hubpeer.bus.service import Endpoint, Reply, Request, Service
from hubpeer.errors import BadRequest, HubError
from tests.bus.helpers import linked, until

ALLOWED = "_INBOX."


class Desk:
    """A handler that works until it is told to go on."""

    def __init__(self) -> None:
        self.begun = 0
        self.most = 0
        self.now = 0
        self.go_on = asyncio.Event()

    async def slow(self, request: Request) -> Reply:
        self.begun += 1
        self.now += 1
        self.most = max(self.most, self.now)
        await self.go_on.wait()
        self.now -= 1
        return Reply(b"done")


async def echo(request: Request) -> Reply:
    return Reply(request.data, {"Hub-Seen": request.request_id})


@contextlib.asynccontextmanager
async def serving(
    server: EmbeddedServer,
    *endpoints: Endpoint,
    concurrency: int = 4,
    queue: int = 8,
    reply_inbox: Literal["any", "own"] = "any",
    secured: bool = True,
) -> AsyncIterator[Service]:
    """A service on the hub's own front connection, which may publish to inboxes only; or, not `secured`, on one that may do
    everything, so that only the code's check stands between a forged reply and the streams."""
    user, password = ("hub-front", server.front_password) if secured else ("", "")
    async with linked(server, user, password, "_INBOX.hub") as front:
        service = Service(
            front, "1.2.3", concurrency=concurrency, queue=queue, reply_inbox=reply_inbox, instance="i1", description="A test"
        )
        await service.start(list(endpoints))
        try:
            yield service
        finally:
            await service.stop(5)


def at(name: str, handler: Any, owner: int | None = None) -> Endpoint:
    return Endpoint("work", f"hub.{name}.*", handler, owner=owner, metadata={"response_schema": "x"})


def error_of(msg: Msg) -> dict[str, Any]:
    body = json.loads(msg.data)
    assert body["status"] == "error"
    assert msg.headers is not None
    assert msg.headers["Nats-Service-Error"] == body["error"]["code"]
    assert msg.headers["Hub-Request-Id"] == body["error"]["request_id"]
    return {**body["error"], "status": int(msg.headers["Nats-Service-Error-Code"]), "headers": msg.headers}


async def test_several_requests_are_worked_on_at_once_and_one_too_many_is_refused(
    server: EmbeddedServer, link: Link, name: str
) -> None:
    desk = Desk()
    async with serving(server, at(name, desk.slow), concurrency=3, queue=4) as service:
        asked = [asyncio.create_task(link.request(f"hub.{name}.a", b"", timeout_s=60)) for _ in range(7)]
        await until(lambda: desk.begun == 3 and service.in_flight == 7, "three at work, four waiting")
        for _ in range(3):
            refused = error_of(await link.request(f"hub.{name}.a", b""))
            assert (refused["code"], refused["status"]) == ("queue_full", 429)
            assert int(refused["headers"]["Retry-After-Ms"]) == refused["retry_after_ms"] >= 50
        desk.go_on.set()
        assert [m.data for m in await asyncio.gather(*asked)] == [b"done"] * 7
        assert desk.most == 3
        assert (await link.request(f"hub.{name}.a", b"")).data == b"done"
        figures = service.snapshot()["work"]
        assert (figures["requests"], figures["errors"], figures["refused"], figures["in_flight"]) == (11, 3, 3, 0)
        assert figures["p50_ms"] is not None


async def test_stopping_answers_everything_that_arrived(server: EmbeddedServer, link: Link, name: str) -> None:
    desk = Desk()
    async with serving(server, at(name, desk.slow), concurrency=5, queue=20) as service:
        asked = [asyncio.create_task(link.request(f"hub.{name}.a", b"", timeout_s=60)) for _ in range(20)]
        await until(lambda: service.in_flight == 20, "all have arrived")
        stopping = asyncio.create_task(service.stop(30))
        async with asyncio.timeout(30):
            while True:  # it takes nothing new while it finishes
                late = asyncio.create_task(link.request(f"hub.{name}.a", b"", timeout_s=60))
                await asyncio.wait({late}, timeout=0.2)
                if late.done():
                    break
                asked.append(late)
        assert isinstance(error := late.exception(), HubError)
        assert error.code == "bus_unavailable"
        desk.go_on.set()
        assert {m.data for m in await asyncio.gather(*asked[:20])} == {b"done"}
        for other in await asyncio.gather(*asked[20:], return_exceptions=True):
            assert isinstance(other, HubError) or (isinstance(other, Msg) and other.data == b"done")
        await stopping


async def test_what_does_not_finish_in_time_is_told_that_we_are_going(server: EmbeddedServer, link: Link, name: str) -> None:
    desk = Desk()
    async with serving(server, at(name, desk.slow), concurrency=2, queue=20) as service:
        asked = [asyncio.create_task(link.request(f"hub.{name}.a", b"", timeout_s=60)) for _ in range(5)]
        await until(lambda: service.in_flight == 5, "all have arrived")
        await service.stop(0.1)
        for msg in await asyncio.gather(*asked):
            assert (error_of(msg)["code"], error_of(msg)["status"]) == ("draining", 503)


async def test_an_exception_gives_its_caller_an_id_and_the_log_the_rest(
    server: EmbeddedServer, link: Link, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(_: Request) -> Reply:
        raise RuntimeError("/etc/secret: password is hunter2")

    async def refusing(_: Request) -> Reply:
        raise BadRequest("bad_value", "no such thing", field="thing")

    endpoints = Endpoint("broken", f"hub.{name}.broken", broken), Endpoint("refusing", f"hub.{name}.refusing", refusing)
    async with serving(server, *endpoints) as service:
        with caplog.at_level(logging.ERROR):
            answer = await link.request(f"hub.{name}.broken", b"")
        error = error_of(answer)
        assert (error["code"], error["status"]) == ("internal", 500)
        assert b"hunter2" not in answer.data
        assert b"secret" not in answer.data
        assert b"RuntimeError" not in answer.data
        assert error["request_id"] in caplog.text
        assert "hunter2" in caplog.text

        error = error_of(await link.request(f"hub.{name}.refusing", b"", {"Hub-Request-Id": "mine-1"}))
        assert (error["code"], error["status"], error["field"], error["request_id"]) == ("bad_value", 422, "thing", "mine-1")
        assert service.snapshot()["broken"]["errors"] == service.snapshot()["refusing"]["errors"] == 1


async def test_a_request_past_its_deadline_is_not_worked_on(server: EmbeddedServer, link: Link, name: str) -> None:
    async with serving(server, at(name, echo)) as service:
        late = {"Hub-Deadline": str(int(time.time() * 1000) - 1000)}
        assert error_of(await link.request(f"hub.{name}.a", b"x", late))["code"] == "deadline_passed"
        assert service.expired == 1
        early = {"hub-deadline": str(int(time.time() * 1000) + 60_000)}
        assert (await link.request(f"hub.{name}.a", b"x", early)).data == b"x"
        for bad in ("soon", "-5", "0", "1" * 15, "１２３"):
            assert error_of(await link.request(f"hub.{name}.a", b"x", {"Hub-Deadline": bad}))["code"] == "bad_deadline"


@pytest.mark.parametrize("bad", ["with space", "a/b", "x" * 65, "naïve", "a\tb", "../etc"])
async def test_a_bad_request_id_is_refused_and_never_echoed(server: EmbeddedServer, link: Link, name: str, bad: str) -> None:
    async with serving(server, at(name, echo)):
        answer = await link.request(f"hub.{name}.a", b"", {"Hub-Request-Id": bad})
        error = error_of(answer)
        assert error["code"] in ("bad_request_id", "bad_header")
        assert bad.encode() not in answer.data
        assert bad not in error["headers"].values()
        good = await link.request(f"hub.{name}.a", b"", {"Hub-Request-Id": "A.b_c-9"})
        assert good.headers == {"Hub-Request-Id": "A.b_c-9", "Hub-Seen": "A.b_c-9"}


async def test_a_reply_that_does_not_fit_is_an_error_and_not_the_end(server: EmbeddedServer, link: Link, name: str) -> None:
    async def large(request: Request) -> Reply:
        return Reply(b"x" * int(request.data))

    async with serving(server, at(name, large)):
        request_id = {"Hub-Request-Id": "i" * 16}
        most = link.max_payload - (12 + 4 + len("Hub-Request-Id") + 16)
        assert len((await link.request(f"hub.{name}.a", b"%d" % most, request_id)).data) == most
        for size in (most + 1, link.max_payload, link.max_payload + 1, 3 * link.max_payload):
            error = error_of(await link.request(f"hub.{name}.a", b"%d" % size, request_id))
            assert (error["code"], error["status"]) == ("reply_too_large", 413)
        assert (await link.request(f"hub.{name}.a", b"1")).data == b"x"


# ── replies that are none ───────────────────────────────────────────────────────────────────────────────────────────────

FORGED = (
    "",
    "hub.plan.legal.p9.s9",
    "hub.result.legal.p9.s9",
    "$JS.API.STREAM.PURGE.{stream}",
    "$JS.API.STREAM.DELETE.{stream}",
    "{stream}.forged",
    "_INBOX.*.x",
    "_INBOX.>",
    "_INBOX.",
    "_INBOX..x",
    "_INBOX.finance.",
    "_INBOXfinance.x",
    "_INBOX",
    "_R_",
    "Xinbox._INBOX.a.b",
)


@pytest.mark.parametrize("secured", [True, False], ids=["front connection", "code alone"])
async def test_nothing_is_published_to_a_forged_reply(
    server: EmbeddedServer, link: Link, js: JetStream, name: str, secured: bool
) -> None:
    await js.ensure_stream({"name": name, "subjects": [f"{name}.>"]})
    await js.publish(f"{name}.precious", b"1")
    heard: list[str] = []

    async def hear(msg: Msg) -> None:
        heard.append(msg.subject)

    async def empty(_: Request) -> Reply:
        return Reply(b"")

    for subject in ("hub.plan.>", "hub.result.>", f"{name}.>", "Xinbox.>", "_INBOX.finance.>"):
        await link.subscribe(subject, hear)
    async with serving(server, at(name, empty), secured=secured) as service:
        for number, reply in enumerate(FORGED, start=1):
            target = reply.format(stream=name)
            for subject in (f"hub.{name}.finance", "$SRV.INFO.hubpeer"):
                # Past nats-py, which refuses some of these: an attacker speaks the protocol.
                link.client._transport.write(f"PUB {subject} {target} 0\r\n\r\n".encode())
            await until(lambda n=number: service.bad_replies == 2 * n, f"{target!r} is dropped, twice")  # type: ignore[misc]
        assert (await link.request(f"hub.{name}.finance", b"")).data == b""
        assert service.snapshot()["work"]["requests"] == 1
    assert heard == []
    assert (await js.stream_state(name))["messages"] == 1


async def test_the_front_connection_could_not_even_if_the_code_did(server: EmbeddedServer, js: JetStream, name: str) -> None:
    await js.ensure_stream({"name": name, "subjects": [f"{name}.>", f"hub.plan.{name}.>"]})
    await js.publish(f"{name}.precious", b"1")
    before = await js.stream_state(name)
    async with linked(server, "hub-front", server.front_password, "_INBOX.hub") as front:
        for subject in (f"hub.plan.{name}.p.s", f"$JS.API.STREAM.PURGE.{name}", f"$JS.API.STREAM.DELETE.{name}", f"{name}.x"):
            await front.publish(subject, b"")
        await front.flush()
        assert len(front.refused) == 4
    assert await js.stream_state(name) == before


async def test_own_inbox_means_the_askers(server: EmbeddedServer, link: Link, name: str) -> None:
    heard: list[str] = []

    async def hear(msg: Msg) -> None:
        heard.append(msg.subject)

    await link.subscribe("_INBOX.marketing.>", hear)
    async with (
        serving(server, at(name, echo, owner=2), Endpoint("open", f"hub.{name}", echo), reply_inbox="own") as service,
        linked(server, prefix="_INBOX.finance") as finance,
    ):
        assert (await finance.request(f"hub.{name}.finance", b"mine")).data == b"mine"
        assert (await finance.request(f"hub.{name}", b"anybody's")).data == b"anybody's"
        await finance.publish(f"hub.{name}.finance", b"", reply="_INBOX.marketing.x.y")
        await finance.publish(f"hub.{name}.marketing", b"", reply="_INBOX.finance.x.y")
        await finance.publish(f"hub.{name}.finance", b"", reply="_INBOX.finances.x")
        await until(lambda: service.bad_replies == 3, "three are dropped")
        await finance.publish(f"hub.{name}.finance", b"", reply="_R_.aBc.dEf")  # from another account: the server's own reply
        assert (await finance.request(f"hub.{name}.finance", b"")).data == b""
    assert heard == []
    assert service.bad_replies == 3


# ── monitoring ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_it_is_a_micro_service_as_the_nats_command_expects(server: EmbeddedServer, link: Link, name: str) -> None:
    async with serving(server, at(name, echo), queue=1) as service:
        await link.request(f"hub.{name}.a", b"")
        await link.request(f"hub.{name}.a", b"", {"Hub-Deadline": "1"})
        for scope in ("", ".hubpeer", ".hubpeer.i1"):
            answers = {}
            for verb in ("PING", "INFO", "STATS"):
                answers[verb] = json.loads((await link.request(f"$SRV.{verb}{scope}", b"")).data)
                found = answers[verb]
                assert found["type"] == f"io.nats.micro.v1.{verb.lower()}_response"
                assert (found["name"], found["id"], found["version"]) == ("hubpeer", "i1", "1.2.3")
                assert all(isinstance(v, str) for v in found["metadata"].values())
            info, stats = answers["INFO"], answers["STATS"]
            assert info["description"] == "A test"
            assert info["endpoints"] == [
                {"name": "work", "subject": f"hub.{name}.*", "queue_group": "hub", "metadata": {"response_schema": "x"}}
            ]
            [work] = stats["endpoints"]
            assert (work["num_requests"], work["num_errors"], work["last_error"]) == (2, 1, "408:deadline_passed")
            assert all(isinstance(work[k], int) for k in ("processing_time", "average_processing_time"))
            assert stats["started"].startswith("20")
            assert isinstance(work["data"], dict)
        for other in ("$SRV.PING.other", "$SRV.PING.hubpeer.i2"):
            with pytest.raises(HubError) as nobody:
                await link.request(other, b"")
            assert nobody.value.code == "bus_unavailable"
    assert service.in_flight == 0
