"""Small things the bus tests share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import nats
from nats.aio.client import Client as Nats

from hubpeer.bus.link import Access, Link
from hubpeer.bus.server import EmbeddedServer


async def until(true: Callable[[], Any], what: str, within_s: float = 30) -> None:
    """Wait for a state."""
    try:
        async with asyncio.timeout(within_s):
            while not true():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"not within {within_s} s: {what}") from None


@contextlib.asynccontextmanager
async def linked(server: EmbeddedServer, user: str = "", password: str = "", prefix: str = "_INBOX") -> AsyncIterator[Link]:
    opened = Link(Access(server.url, "test", user=user, password=password, inbox_prefix=prefix, reconnect_wait_s=0.05))
    await opened.open()
    try:
        yield opened
    finally:
        await opened.close()


async def quiet(_: Exception) -> None:
    """nats-py prints tracebacks of errors by default; here they are meant."""


@contextlib.asynccontextmanager
async def raw(url: str, **options: Any) -> AsyncIterator[Nats]:
    """nats-py and nothing of ours."""
    nc = await nats.connect(url, error_cb=quiet, **options)
    try:
        yield nc
    finally:
        await nc.close()
