"""One real nats-server for all tests here, and one event loop, because the server is watched by tasks of that loop."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from hubpeer.bus.jetstream import JetStream
from hubpeer.bus.link import Link
from hubpeer.bus.server import EmbeddedServer
from hubpeer.settings import Server
from tests.bus.helpers import linked

_names = (f"T{number}" for number in itertools.count(1))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and pytest_asyncio.is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedServer]:
    started = EmbeddedServer(Server(port=0, sync_always=False), tmp_path_factory.mktemp("nats") / "data")
    await started.start()
    yield started
    await started.stop()


@pytest_asyncio.fixture(loop_scope="session")
async def link(server: EmbeddedServer) -> AsyncIterator[Link]:
    async with linked(server) as opened:
        yield opened


@pytest_asyncio.fixture(loop_scope="session")
async def js(link: Link) -> JetStream:
    return JetStream(link)


@pytest.fixture
def name() -> str:
    """A name no other test uses: for streams, buckets, subjects."""
    return next(_names)
