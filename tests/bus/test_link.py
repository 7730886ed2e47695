from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from nats.aio.msg import Msg

from hubpeer.bus.link import Access, Link, message_size
from hubpeer.bus.server import EmbeddedServer
from hubpeer.errors import HubError, SettingsError, Unavailable
from hubpeer.settings import Server
from tests.bus.helpers import linked, raw, until

HEADERS = {"Hub-Filename": "größe.txt", "Hub-Source-Id": "x" * 200}


class Box:
    """Collects what a subscription delivers."""

    def __init__(self) -> None:
        self.got: list[bytes] = []

    async def take(self, msg: Msg) -> None:
        self.got.append(msg.data)


@pytest.mark.parametrize("headers", [None, {"a": "b"}, HEADERS], ids=["bare", "one header", "headers"])
async def test_a_message_of_exactly_max_payload_passes_and_one_byte_more_is_refused_here(
    link: Link, name: str, headers: dict[str, str] | None
) -> None:
    box = Box()
    await link.subscribe(name, box.take)
    most = b"x" * (link.max_payload - message_size(b"", headers))
    assert link.fits(most, headers)
    await link.publish(name, most, headers)
    await until(lambda: box.got, "the largest message arrives")

    assert not link.fits(most + b"x", headers)
    with pytest.raises(HubError) as refused:
        await link.publish(name, most + b"x", headers)
    assert refused.value.code == "payload_too_large"
    with pytest.raises(HubError) as refused:
        await link.request(name, most + b"x", headers)
    assert refused.value.code == "payload_too_large"

    await link.publish(name, b"after")
    await until(lambda: box.got[1:] == [b"after"], "the connection lives on")
    assert (link.rebuilt, link.last_error) == (0, "")


async def test_our_count_is_the_servers(server: EmbeddedServer, name: str) -> None:
    """Without our guard: the server takes what we call the limit, and closes the connection over one byte more."""
    async with raw(server.url, allow_reconnect=False) as nc:
        await nc.publish(name, b"x" * (nc.max_payload - message_size(b"", HEADERS)), headers=HEADERS)
        await nc.flush()
        await nc.publish(name, b"x" * (nc.max_payload - message_size(b"", HEADERS) + 1), headers=HEADERS)
        await until(lambda: nc.is_closed, "the server closes the connection")


@pytest.mark.parametrize("how", ["oversized", "protocol error"])
async def test_a_connection_closed_for_good_is_built_anew_with_its_subscriptions(link: Link, name: str, how: str) -> None:
    one, many = Box(), Box()
    gone = await link.subscribe(f"{name}.one", Box().take)
    await link.subscribe(f"{name}.one", one.take)
    await link.subscribe(f"{name}.*", many.take, queue="q")
    await link.unsubscribe(gone)
    for round_ in (1, 2):
        before = link.client
        if how == "oversized":
            await before.publish(name, b"x" * before.max_payload, headers=HEADERS)
        else:
            before._transport.write(b"NONSENSE\r\n")
        await until(lambda n=round_: link.rebuilt == n and link.connected, "a new connection")  # type: ignore[misc]
        assert link.client is not before
        await link.publish(f"{name}.one", b"%d" % round_)
        await until(lambda n=round_: len(one.got) == len(many.got) == n, "both subscriptions")  # type: ignore[misc]
    assert one.got == many.got == [b"1", b"2"]


async def test_subscribing_while_the_connection_is_built_anew_loses_nothing(link: Link, name: str) -> None:
    box, made, given_up = Box(), 0, 0
    for number in range(50):
        await link.subscribe(f"{name}.old.{number}", box.take)
    first = link.client

    def renewed() -> bool:
        """By us; or by nats-py, where the reset of the connection is seen before the server's last word."""
        return bool(link.rebuilt or first.stats["reconnects"]) and link.connected

    first._transport.write(b"NONSENSE\r\n")
    while not renewed():
        try:
            await link.subscribe(f"{name}.new.{made}", box.take)
            made += 1
        except Unavailable:
            given_up += 1
        await asyncio.sleep(0)
        if made + given_up > 2_000:
            await until(renewed, "a new connection")
    for number in range(50):
        await link.publish(f"{name}.old.{number}", b"")
    for number in range(min(made, 500)):
        await link.publish(f"{name}.new.{number}", b"")
    await until(lambda: len(box.got) == 50 + min(made, 500), f"all of {50 + min(made, 500)}, not {len(box.got)}")


async def test_a_refused_publish_fails_at_once(server: EmbeddedServer) -> None:
    async with linked(server, "hub-front", server.front_password, "_INBOX.hub") as front:
        with pytest.raises(HubError) as refused:
            await front.request("hub.plan.Finance.p.s", b"{}", timeout_s=30)
        assert refused.value.code == "forbidden_subject"
        await front.publish("$JS.API.STREAM.PURGE.PLANS", b"")  # nobody waits for this one: it is counted
        await front.flush()
        assert sum(front.refused.values()) == 2
        assert front.connected
        assert front._waiting == {}


async def test_a_request_ends_in_one_of_our_codes(link: Link, name: str) -> None:
    box = Box()
    await link.subscribe(f"{name}.silent", box.take)
    for subject, code, patience in ((f"{name}.nobody", "bus_unavailable", 30), (f"{name}.silent", "deadline_passed", 0.3)):
        with pytest.raises(HubError) as ended:
            await link.request(subject, b"", timeout_s=patience)
        assert ended.value.code == code
    assert link._waiting == {}


@pytest.mark.parametrize("user, password", [("hub-core", "wrong"), ("nobody", "x")])
async def test_wrong_credentials_are_a_wrong_setting(server: EmbeddedServer, user: str, password: str) -> None:
    with pytest.raises(SettingsError, match="refuses these credentials"):
        await Link(Access(server.url, "test", user=user, password=password)).open(wait_s=30)


class Impatient(EmbeddedServer):
    """A server that gives a client no time to log in, as one on a machine with too much to do."""

    def _config(self) -> str:
        assert "timeout: 10" in super()._config()
        return super()._config().replace("timeout: 10", "timeout: 0.000001")


async def test_a_login_that_took_too_long_is_tried_again(tmp_path: Path) -> None:
    server = Impatient(Server(port=0, sync_always=False), tmp_path / "data")
    await server.start()
    try:
        with pytest.raises(Unavailable):  # right credentials: not a wrong setting
            await Link(Access(server.url, "test", user="hub-core", password=server.core_password)).open(wait_s=0.5)
    finally:
        await server.stop()


async def test_no_server_is_waited_for_and_then_named() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"nats://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(Unavailable, match="no NATS server answers") as missing:
            await Link(Access(url, "test", reconnect_wait_s=0.05)).open(wait_s=0.5)
    assert missing.value.code == "bus_unavailable"


async def test_a_restarted_server_finds_us_as_we_want_to_be(tmp_path: Path) -> None:
    first = EmbeddedServer(Server(port=0, sync_always=False), tmp_path / "data")
    await first.start()
    async with linked(first) as link:
        kept, dropped, down = Box(), Box(), Box()
        await link.subscribe("a", kept.take)
        key = await link.subscribe("a", dropped.take)
        await first.stop()
        await until(lambda: not link.connected, "the connection is down")
        await link.unsubscribe(key, drain=True)
        await link.subscribe("b", down.take)
        again = EmbeddedServer(Server(port=first.port, sync_always=False), tmp_path / "data")
        await again.start()
        try:
            await until(lambda: link.connected, "the connection is back")
            await link.publish("a", b"1")
            await link.publish("b", b"2")
            await until(lambda: kept.got and down.got, "both subscriptions")
            assert (kept.got, down.got, dropped.got) == ([b"1"], [b"2"], [])
        finally:
            await again.stop()


async def test_after_closing_twice_there_is_nothing_left_to_use(server: EmbeddedServer) -> None:
    link = Link(Access(server.url, "test"))
    with pytest.raises(Unavailable):
        await link.publish("a", b"")
    await link.open()
    await link.close()
    await link.close()
    assert not link.connected
    with pytest.raises(Unavailable):
        await link.publish("a", b"")
    with pytest.raises(Unavailable):
        await link.request("a", b"")
    assert link._waiting == {}


async def test_a_server_lost_while_we_close_leaves_no_error_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = EmbeddedServer(Server(port=0, sync_always=False), tmp_path / "data")
    await server.start()
    left: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: left.append(context))
    link = Link(Access(server.url, "test", reconnect_wait_s=0.05))
    await link.open()
    await link.subscribe("a", Box().take)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)  # it answers nothing from here on
    loop.call_later(0.3, os.kill, server.pid, signal.SIGKILL)
    try:
        await link.close(drain_s=4)  # another server is there before that time is over
        assert not link.connected
    finally:
        await server.stop()
    caplog.clear()  # what it keeps of an error would keep a future from being found unfetched
    gc.collect()
    assert left == []
