"""One supervised connection to the bus. This module and its neighbours are the only importers of `nats`.

What nats-py leaves to its user, and this class does:

1. The server counts headers and payload against `max_payload`, nats-py only the payload, and the server's answer to one byte
   too many is to close the connection for good. `publish` counts both first.
2. Any `-ERR` but a permission violation or a stale connection leaves the client closed for good. A closed connection is
   built anew, with its subscriptions; we look for ourselves whether it is closed, too, because a broken pipe while it closes
   keeps nats-py from saying so.
3. A refused publish shows only in the error callback, while the caller waits for its timeout. `request` fails at once.
4. Callbacks are awaited inside the read loop; one that raises ends it. Ours only log and set futures.
5. A PING is written past commands that are still pending, so that `flush` and `drain` may return before the server has seen
   the subscription made, or ended, just before. Ours waits its turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import ssl
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from msgspec import Struct
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import (
    ConnectionClosedError,
    ConnectionDrainingError,
    Error,
    NoRespondersError,
    NoServersError,
    OutboundBufferLimitError,
)

from hubpeer.errors import HubError, SettingsError, Unavailable
from hubpeer.settings import Nats

log = logging.getLogger("hubpeer.bus")

Handler = Callable[[Msg], Awaitable[None]]

#: What the server adds around headers: "NATS/1.0\r\n", ": ", "\r\n" per line and an empty line.
_HEADER_LINE = 4
_HEADER_FRAME = 12

#: How often we look whether the connection was closed for good, in seconds.
_LOOK_S = 0.5

_gone = (ConnectionClosedError, ConnectionDrainingError, OutboundBufferLimitError)
_violation = re.compile(r"permissions violation for (publish|subscription) to \"([^\"]+)\"", re.IGNORECASE)


class Access(Struct, frozen=True):
    """Where the server is and who we are there."""

    url: str
    name: str
    user: str = ""
    password: str = ""
    token: str = ""
    creds: str = ""
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    inbox_prefix: str = "_INBOX"
    connect_timeout_s: float = 2.0
    ping_interval_s: float = 20.0
    reconnect_wait_s: float = 0.25

    @staticmethod
    def of(settings: Nats, name: str, *, front: bool = False, inbox_prefix: str = "_INBOX") -> Access:
        """The access the settings give; `front`: that of the connection that answers requests, where it has its own."""
        own = front and bool(settings.front_user or settings.front_creds)
        return Access(
            url=settings.url,
            name=name,
            user=settings.front_user if own else settings.user,
            password=settings.front_password if own else settings.password,
            token="" if own else settings.token,
            creds=settings.front_creds if own else settings.creds,
            tls_ca=settings.tls_ca,
            tls_cert=settings.tls_cert,
            tls_key=settings.tls_key,
            inbox_prefix=inbox_prefix,
            connect_timeout_s=settings.connect_timeout_s,
            ping_interval_s=settings.ping_interval_s,
        )

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "servers": [url.strip() for url in self.url.split(",")],
            "name": self.name,
            "inbox_prefix": self.inbox_prefix,
            "connect_timeout": self.connect_timeout_s,
            "ping_interval": self.ping_interval_s,
            "max_outstanding_pings": 2,
            "reconnect_time_wait": self.reconnect_wait_s,
            "max_reconnect_attempts": -1,
            "drain_timeout": 30,
        }
        credentials = {"user": self.user, "password": self.password, "token": self.token}
        options |= {key: value for key, value in credentials.items() if value}
        if self.creds:
            options["user_credentials"] = self.creds
        if self.tls_ca or self.tls_cert:
            try:
                context = ssl.create_default_context(cafile=self.tls_ca or None)
                if self.tls_cert:
                    context.load_cert_chain(self.tls_cert, self.tls_key or None)
            except (OSError, ssl.SSLError) as exc:
                raise SettingsError(f"nats.tls_*: {exc}") from exc
            options["tls"] = context
        return options


class _Client(Client):  # type: ignore[misc]  # nats-py is not typed
    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        self._pongs.append(future if future is not None else asyncio.get_running_loop().create_future())
        await self._send_command(b"PING\r\n")
        await self._flush_pending()


class _Held(Struct):
    """A subscription we owe, whatever connection carries it."""

    subject: str
    queue: str
    handler: Handler
    pending_msgs: int
    sub: Subscription | None = None


class Link:
    """A connection that comes back. Open it, use it, close it; `connected` says how it is."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._client: Client | None = None
        self._held: dict[int, _Held] = {}
        self._ids = iter(range(1, 2**62))
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        self._rebuild: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._closing = False
        self.rebuilt = 0  #: how often a connection that was closed for good was replaced
        self.last_error = ""
        self.refused: dict[str, int] = {}  #: subject -> permission violations

    # ── life ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def open(self, wait_s: float = 10.0) -> None:
        """Connect. A server that is not there yet is waited for; one that refuses us is not.

        Raises `bus_unavailable` (no server after `wait_s` seconds) or `SettingsError` (the server refuses our credentials).
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_s
        while True:
            try:
                self._client = await self._connect()
                self._watch = asyncio.create_task(self._look(), name=f"watch-{self._access.name}")
                return
            except (OSError, NoServersError, TimeoutError, Error) as exc:
                text = f"{exc} {self.last_error}".lower()
                refused = ("authorization", "authentication", "nkey", "user credentials")
                # A timeout says that one of the two was too slow, not that the credentials are wrong.
                if any(word in text for word in refused) and "timeout" not in text:
                    raise SettingsError(f"{self._access.url} refuses these credentials: {exc}") from exc
                if isinstance(exc, ssl.SSLError) or "certificate" in text:
                    raise SettingsError(f"{self._access.url}: TLS: {exc}") from exc
                if loop.time() >= until:
                    raise Unavailable("bus_unavailable", f"no NATS server answers at {self._access.url}: {exc}") from exc
                await asyncio.sleep(self._access.reconnect_wait_s)

    async def _connect(self) -> Client:
        # With reconnecting allowed, nats-py hides why a first attempt failed. So a first connection is made without, and
        # once it stands it is replaced by one that reconnects.
        # Neither may take for ever, which they do by themselves where reconnecting is unlimited and nobody listens.
        options = self._access.options()
        once = {**options, "allow_reconnect": False, "max_reconnect_attempts": 1}
        probe, client = _Client(), _Client()
        try:
            await probe.connect(**once, error_cb=self._on_error)
            await probe.close()
            async with asyncio.timeout(5 * self._access.connect_timeout_s):
                await client.connect(
                    **options,
                    allow_reconnect=True,
                    error_cb=self._on_error,
                    closed_cb=self._on_closed,
                    disconnected_cb=self._on_disconnected,
                    reconnected_cb=self._on_reconnected,
                )
        except BaseException:
            _discard(probe)
            _discard(client)
            raise
        return client

    async def close(self, drain_s: float = 5.0) -> None:
        """Deliver what is underway, then disconnect. Safe to call twice."""
        self._closing = True
        for task in (self._watch, self._rebuild):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        client = self._client
        if client is None or client.is_closed:
            return
        try:
            async with asyncio.timeout(drain_s):
                # Not `client.drain()`: broken off, it leaves the error of its own gathering for nobody to fetch.
                if client.is_connected:
                    await asyncio.gather(*(self.unsubscribe(key, drain=True) for key in list(self._held)))
                    await client.flush()
                await client.close()
        except (Error, TimeoutError, OSError) as exc:
            log.warning("closing the connection: %s", exc or type(exc).__name__)
            await client.close()
        finally:
            _discard(client)
            self._client = None

    @property
    def connected(self) -> bool:
        return self._client is not None and self._client.is_connected

    @property
    def client(self) -> Client:
        """The connection of this moment. Raises `bus_unavailable` while there is none."""
        if self._client is None or self._client.is_closed:
            raise Unavailable("bus_unavailable", "the connection to the bus is down")
        return self._client

    @property
    def max_payload(self) -> int:
        return int(self.client.max_payload)

    @property
    def server_version(self) -> str:
        version = self.client.connected_server_version
        return f"{version.major}.{version.minor}.{version.patch}"

    # ── callbacks: awaited inside nats-py's read loop, so they neither block nor raise ────────────────────────────────

    async def _on_error(self, exc: Exception) -> None:
        self.last_error = str(exc)
        found = _violation.search(str(exc))
        if found is None:
            # While we open, every attempt ends up here; `open` itself says in the end what came of them.
            level = logging.WARNING if self._client is not None else logging.DEBUG
            log.log(level, "%s: %s", self._access.name, exc or type(exc).__name__)
            return
        subject = found.group(2)
        log.warning("%s: the server refuses %s on %s", self._access.name, found.group(1), subject)
        if subject in self.refused or len(self.refused) < 1000:
            self.refused[subject] = self.refused.get(subject, 0) + 1
        # The parser lower-cases the text, so subjects are compared that way.
        for waiting in list(self._waiting.get(subject.lower(), ())):
            if not waiting.done():
                waiting.set_exception(HubError("forbidden_subject", f"the server does not allow us to publish to {subject}"))

    async def _on_disconnected(self) -> None:
        if not self._closing:
            log.warning("%s: disconnected", self._access.name)

    async def _on_reconnected(self) -> None:
        log.info("%s: reconnected", self._access.name)

    async def _on_closed(self) -> None:
        if not self._closing and (self._rebuild is None or self._rebuild.done()):
            log.error("%s: the connection was closed (%s); building a new one", self._access.name, self.last_error)
            self._rebuild = asyncio.create_task(self._build_again(), name=f"rebuild-{self._access.name}")

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            if self._client is not None and self._client.is_closed:
                await self._on_closed()

    async def _build_again(self) -> None:
        while not self._closing:
            if self._client is not None:
                _discard(self._client)
            try:
                self._client = await self._connect()
                # Who subscribes or unsubscribes meanwhile changes what we hold, and does so on the new connection.
                for held in list(self._held.values()):
                    held.sub = await self._subscribe(held)
                await self.flush()
                self.rebuilt += 1
                log.info("%s: connected again", self._access.name)
                return
            except (Error, OSError, TimeoutError, Unavailable) as exc:  # `Unavailable`: the new one was closed as well
                self.last_error = str(exc)
                if self._client is not None and not self._client.is_closed:
                    await self._client.close()
                await asyncio.sleep(self._access.reconnect_wait_s)

    # ── use ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def publish(self, subject: str, data: bytes, headers: Mapping[str, str] | None = None, reply: str = "") -> None:
        """Send one message. Raises `payload_too_large` before the server would close the connection over it."""
        self._guard(data, headers)
        try:
            await self.client.publish(subject, data, reply=reply, headers=dict(headers) if headers else None)
        except _gone as exc:
            raise Unavailable("bus_unavailable", "the connection to the bus is down") from exc

    async def request(self, subject: str, data: bytes, headers: Mapping[str, str] | None = None, timeout_s: float = 5.0) -> Msg:
        """Ask and wait for one reply.

        Raises `bus_unavailable` (nobody listens), `forbidden_subject` (the server refuses us), `deadline_passed` (no reply
        within `timeout_s` seconds), `payload_too_large`.
        """
        self._guard(data, headers)
        client = self.client
        refused: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(subject.lower(), set())
        waiting.add(refused)
        asked = asyncio.ensure_future(
            client.request(subject, data, timeout=timeout_s, headers=dict(headers) if headers else None)
        )
        try:
            await asyncio.wait({asked, refused}, return_when=asyncio.FIRST_COMPLETED)
            if refused.done():
                refused.result()
            return await asked
        except NoRespondersError:
            raise Unavailable("bus_unavailable", f"nobody answers on {subject}") from None
        except TimeoutError:
            raise HubError("deadline_passed", f"no reply on {subject} within {timeout_s:g} s") from None
        except _gone as exc:
            raise Unavailable("bus_unavailable", "the connection to the bus is down") from exc
        finally:
            waiting.discard(refused)
            if not waiting:
                self._waiting.pop(subject.lower(), None)
            refused.cancel()
            if not asked.done():
                asked.cancel()
                with contextlib.suppress(asyncio.CancelledError, Error):
                    await asked

    async def subscribe(self, subject: str, handler: Handler, queue: str = "", pending_msgs: int = 65_536) -> int:
        """Deliver every message of `subject` to `handler`, over whatever connection there is; `unsubscribe(id)` ends it."""
        held = _Held(subject, queue, handler, pending_msgs)
        held.sub = await self._subscribe(held)
        key = next(self._ids)
        self._held[key] = held
        return key

    async def _subscribe(self, held: _Held) -> Subscription:
        return await self.client.subscribe(
            held.subject,
            queue=held.queue,
            cb=held.handler,
            pending_msgs_limit=held.pending_msgs,
            pending_bytes_limit=256 * 1024 * 1024,
        )

    async def unsubscribe(self, key: int, drain: bool = False) -> None:
        """End a subscription; `drain`: what has already arrived is still handled."""
        held = self._held.pop(key, None)
        if held is None or held.sub is None or self._client is None or self._client.is_closed:
            return
        try:
            # While the connection is down there is nothing to drain, but nats-py must forget the subscription all the same:
            # it would make it again with the next connection.
            await (held.sub.drain() if drain and self._client.is_connected else held.sub.unsubscribe())
        except Error as exc:
            log.debug("unsubscribing %s: %s", held.subject, exc)

    def inbox(self) -> str:
        """A fresh subject under our inbox prefix."""
        return str(self.client.new_inbox())

    async def flush(self) -> None:
        await self.client.flush()

    def fits(self, data: bytes, headers: Mapping[str, str] | None) -> bool:
        return message_size(data, headers) <= self.max_payload

    def _guard(self, data: bytes, headers: Mapping[str, str] | None) -> None:
        size = message_size(data, headers)
        if size > self.max_payload:
            raise HubError(
                "payload_too_large",
                f"{size} bytes with headers, but the server takes {self.max_payload}; "
                "send large documents through the object store",
            )


def _discard(client: Client) -> None:
    """Let go of what a client still holds whose own closing broke off half-way."""
    for sub in list(client._subs.values()):
        sub._stop_processing()
    client._subs.clear()
    if client._transport is not None:
        client._transport.close()


def message_size(data: bytes, headers: Mapping[str, str] | None) -> int:
    """Bytes of a message as the server counts them against `max_payload`."""
    if not headers:
        return len(data)
    return len(data) + _HEADER_FRAME + sum(len(k.encode()) + len(v.encode()) + _HEADER_LINE for k, v in headers.items())
