"""Opens the edges, starts the stories, closes in reverse order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hubpeer import __version__, model
from hubpeer.bus import topology
from hubpeer.bus.jetstream import JetStream
from hubpeer.bus.link import Access, Link
from hubpeer.bus.server import OLDEST, EmbeddedServer
from hubpeer.bus.service import Service
from hubpeer.conduct import Conductor
from hubpeer.deadletter import DeadLetters
from hubpeer.documents import Extractor
from hubpeer.errors import SettingsError
from hubpeer.ingest import Ingest
from hubpeer.operate import Operations
from hubpeer.roster import Roster
from hubpeer.route import Router
from hubpeer.settings import Settings
from hubpeer.store import Stores

if TYPE_CHECKING:  # numpy is loaded only where the encoder is used
    from hubpeer.encoder import BuiltIn

log = logging.getLogger("hubpeer")


class Peer:
    """A running hub. `async with Peer.open(settings) as peer: await peer.serve(stop)`."""

    def __init__(
        self, settings: Settings, url: str, conductor: Conductor, ingest: Ingest, server: EmbeddedServer | None
    ) -> None:
        self.settings = settings
        self.url = url
        self.server = server
        self._conductor = conductor
        self._ingest = ingest

    async def serve(self, stop: asyncio.Event) -> None:
        """Run until `stop` is set. A story that dies takes the hub down with its error: half a hub is worse than none."""
        stories = {
            asyncio.create_task(self._conductor.run(), name="plans"),
            asyncio.create_task(self._ingest.run(), name="documents"),
        }
        stopped = asyncio.create_task(stop.wait(), name="stop")
        try:
            done, _ = await asyncio.wait({stopped, *stories}, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopped}:
                task.result()
        finally:
            for task in (stopped, *stories):
                task.cancel()
            await asyncio.gather(stopped, *stories, return_exceptions=True)

    @staticmethod
    @contextlib.asynccontextmanager
    async def open(settings: Settings) -> AsyncIterator[Peer]:
        """Everything a hub needs, in order; a hub inside this context answers requests. Closed in reverse order."""
        data = _data_directory(settings)
        async with contextlib.AsyncExitStack() as stack:
            # The process that reads documents imports its libraries while the rest is opened.
            extractor = Extractor(settings.documents)
            stack.push_async_callback(extractor.close)
            extractor_ready = asyncio.create_task(extractor.start(), name="extractor")

            stores = Stores(data / "clients", settings.documents)
            stores.open()
            stack.callback(stores.close)

            llm = await model.open_model(settings.model)
            if llm is not None:
                stack.push_async_callback(llm.close)
            wanted = settings.model.name == "builtin" or (llm is not None and settings.model.encoder)
            encoder = await asyncio.to_thread(_open_encoder) if wanted else None

            server: EmbeddedServer | None = None
            if not settings.nats.url:
                server = EmbeddedServer(settings.server, data)
                stack.push_async_callback(server.stop)
                await server.start()
                settings = _with_embedded(settings, server)

            instance = secrets.token_hex(8)
            core = Link(Access.of(settings.nats, f"hubpeer-core-{instance}", inbox_prefix="_INBOX.hub"))
            front = Link(Access.of(settings.nats, f"hubpeer-front-{instance}", front=True, inbox_prefix="_INBOX.hub"))
            for link in (core, front):
                await link.open()
                stack.push_async_callback(link.close)
            _check_version(core)

            js = JetStream(core)
            differences = await topology.ensure(js, settings)
            for difference in differences:
                log.warning("not as configured here, left as it is: %s", difference)

            letters = DeadLetters(js)
            roster = Roster(core, js, settings)
            await roster.start()
            conductor = Conductor(core, js, settings, letters)
            router = Router(settings, roster, conductor, llm, encoder)
            stack.callback(router.stop)
            ingest = Ingest(settings, core, js, stores, extractor, llm, encoder, roster, letters)
            service = Service(
                front,
                __version__,
                concurrency=settings.service.concurrency,
                queue=settings.service.queue,
                reply_inbox=settings.nats.reply_inbox,
                instance=instance,
                description="Turns questions into plans and documents into records",
            )
            edges = (core, front, js, service)
            operations = Operations(
                *edges, roster, router, conductor, ingest, stores, extractor, llm, encoder, letters, differences
            )
            router.expect()
            await extractor_ready
            await service.start(
                [*router.endpoints(), *conductor.endpoints(), *roster.endpoints(), *ingest.endpoints(), *operations.endpoints()]
            )
            stack.push_async_callback(service.stop, settings.service.drain_s)
            yield Peer(settings, settings.nats.url, conductor, ingest, server)
            log.info("stopping")


def _open_encoder() -> BuiltIn:
    from hubpeer.encoder import BuiltIn

    return BuiltIn.open()


def _data_directory(settings: Settings) -> Path:
    path = Path(settings.data)
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as exc:
        raise SettingsError(f"data directory {path}: {exc.strerror}; choose another with --data DIR") from exc
    return path


def _with_embedded(settings: Settings, server: EmbeddedServer) -> Settings:
    nats = msgspec.structs.replace(
        settings.nats,
        url=server.url,
        user="hub-core",
        password=server.core_password,
        front_user="hub-front",
        front_password=server.front_password,
    )
    return msgspec.structs.replace(settings, nats=nats)


def _check_version(link: Link) -> None:
    have = tuple(int(part) for part in link.server_version.split("."))
    if have < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise SettingsError(f"nats-server {link.server_version} has known security holes; {needed} or newer is needed")
