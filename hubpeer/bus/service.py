"""A NATS micro service after ADR-32, as `nats micro ls|info|stats|ping` expects it.

Beyond what nats-py's own does, and the reason for this one: an endpoint works on several requests at once; what waits behind
them is bounded and one more is answered 429 at once; stopping drains; an unexpected exception gives the caller an opaque id
and never its text; and replies go only where a reply may go (a reply subject is chosen by the sender and checked by nobody
else: see docs/adr/0002).
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Literal

from msgspec import UNSET, Struct
from nats.aio.msg import Msg

from hubpeer import wire
from hubpeer.bus.link import Link
from hubpeer.errors import BadRequest, Busy, HubError
from hubpeer.wire import NO_HEADERS, ErrorReply, Headers

log = logging.getLogger("hubpeer.service")

_own_inbox = "_INBOX.{}."
_account_reply = "_R_."


class Request(Struct, frozen=True):
    """One request, as a handler sees it. `tokens` are the subject's tokens; `deadline` is in unix seconds."""

    subject: str
    tokens: list[str]
    data: bytes
    headers: Headers
    request_id: str
    deadline: float | None


class Reply(Struct, frozen=True):
    data: bytes
    headers: Headers = NO_HEADERS


Handler = Callable[[Request], Awaitable[Reply]]


class Endpoint(Struct, frozen=True):
    """One subject and who answers it.

    `owner`: index of the subject's token that names whose request this is, where `_INBOX.<owner>.` must then be the reply
    (settings `nats.reply_inbox = "own"`); None for what anybody may ask.
    """

    name: str
    subject: str
    handler: Handler
    queue: str = "hub"
    owner: int | None = None
    metadata: dict[str, str] = {}


class _Stats:
    """What `$SRV.STATS` reports of an endpoint; times in nanoseconds."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.requests = self.errors = self.refused = self.processing_ns = 0
        self.last_error = ""
        self.recent: deque[int] = deque(maxlen=512)

    def percentile_ms(self, share: float) -> float | None:
        times = sorted(self.recent)
        return round(times[min(len(times) - 1, int(share * len(times)))] / 1e6, 3) if times else None


class Service:
    """All endpoints of this process under one service name."""

    NAME: Final = "hubpeer"

    def __init__(
        self,
        link: Link,
        version: str,
        *,
        concurrency: int,
        queue: int,
        reply_inbox: Literal["any", "own"],
        instance: str,
        description: str,
    ) -> None:
        self._link = link
        self._version = version
        self._concurrency = concurrency
        self._queue = queue
        self._reply_inbox = reply_inbox
        self.instance = instance
        self._description = description
        self._endpoints: list[tuple[Endpoint, _Stats, asyncio.Semaphore]] = []
        self._subscriptions: list[int] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._pending: dict[str, int] = {}
        self._draining = False
        self._started = ""
        self.bad_replies = 0  #: requests with a forged or missing reply subject: dropped
        self.expired = 0  #: requests that arrived after their own deadline: dropped

    # ── life ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def start(self, endpoints: list[Endpoint]) -> None:
        self._started = wire.iso(time.time())
        for endpoint in endpoints:
            stats, gate = _Stats(), asyncio.Semaphore(self._concurrency)
            self._endpoints.append((endpoint, stats, gate))
            handler = self._receiver(endpoint, stats, gate)
            self._subscriptions.append(await self._link.subscribe(endpoint.subject, handler, endpoint.queue))
        for verb, answer in (("PING", self._ping), ("INFO", self._info), ("STATS", self._stats)):
            for scope in ("", f".{self.NAME}", f".{self.NAME}.{self.instance}"):
                self._subscriptions.append(await self._link.subscribe(f"$SRV.{verb}{scope}", self._monitor(answer)))
        await self._link.flush()

    async def stop(self, drain_s: float) -> None:
        """Take nothing new, finish what has arrived within `drain_s` seconds, tell the rest that we are going."""
        self._draining = True
        await asyncio.gather(*(self._link.unsubscribe(key, drain=True) for key in self._subscriptions))
        if self._tasks:
            _, late = await asyncio.wait(set(self._tasks), timeout=drain_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        if self._link.connected:
            await self._link.flush()

    @property
    def in_flight(self) -> int:
        return len(self._tasks)

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """Per endpoint: requests, errors, refused, average and percentiles in milliseconds."""
        return {endpoint.name: self._endpoint_data(endpoint, stats) for endpoint, stats, _ in self._endpoints}

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _receiver(self, endpoint: Endpoint, stats: _Stats, gate: asyncio.Semaphore) -> Callable[[Msg], Awaitable[None]]:
        async def receive(msg: Msg) -> None:
            # Runs inside the subscription's loop: it only decides and hands over, so the next message is never kept waiting.
            tokens = msg.subject.split(".")
            if not self._reply_allowed(msg.reply, tokens, endpoint.owner):
                self.bad_replies += 1
                log.warning("dropped a request on %s: reply subject %r", ascii(msg.subject)[:80], msg.reply[:80])
                return
            stats.requests += 1
            waiting = self._pending.get(endpoint.name, 0)
            if waiting >= self._concurrency + self._queue:
                stats.refused += 1
                typical = stats.processing_ns / max(1, stats.requests - stats.refused) / 1e6
                wait_ms = max(50, int(typical * waiting / self._concurrency))
                busy = Busy("queue_full", f"{waiting} requests are waiting", retry_after_ms=wait_ms)
                await self._refuse(msg.reply, busy, _request_id(msg), stats)
                return
            self._pending[endpoint.name] = waiting + 1
            task = asyncio.create_task(self._work(endpoint, stats, gate, msg, tokens), name=f"request-{endpoint.name}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        return receive

    async def _work(self, endpoint: Endpoint, stats: _Stats, gate: asyncio.Semaphore, msg: Msg, tokens: list[str]) -> None:
        request_id = _request_id(msg)
        headers: Headers = msg.headers or NO_HEADERS
        try:
            async with gate:
                begun = time.perf_counter_ns()
                try:
                    if wire.header(headers, wire.REQUEST_ID) not in (None, request_id):
                        raise BadRequest("bad_request_id", f"{wire.REQUEST_ID} is 1 to 64 letters, digits, '.', '_' or '-'")
                    deadline = wire.deadline(headers)
                    if deadline is not None and deadline < time.time():
                        # The asker has stopped waiting; nats-py delivers requests buffered during an outage this late.
                        self.expired += 1
                        raise HubError("deadline_passed", "the request arrived after its deadline")
                    request = Request(msg.subject, tokens, msg.data, headers, request_id, deadline)
                    reply = await endpoint.handler(request)
                    answered = {wire.REQUEST_ID: request_id, **reply.headers}
                    if not self._link.fits(reply.data, answered):
                        raise HubError("reply_too_large", f"{len(reply.data)} bytes do not fit into one reply; ask for less")
                    await self._link.publish(msg.reply, reply.data, answered)
                except HubError as exc:
                    await self._refuse(msg.reply, exc, request_id, stats)
                except Exception:
                    log.exception("request %s on %s failed", request_id, ascii(msg.subject)[:80])
                    error = HubError("internal", f"internal error; the hub's log has it under {request_id}")
                    await self._refuse(msg.reply, error, request_id, stats)
                finally:
                    elapsed = time.perf_counter_ns() - begun
                    stats.processing_ns += elapsed
                    stats.recent.append(elapsed)
        except asyncio.CancelledError:
            await self._refuse(msg.reply, HubError("draining", "the hub is stopping; ask again"), request_id, stats)
            raise
        finally:
            self._pending[endpoint.name] -= 1

    async def _refuse(self, reply: str, error: HubError, request_id: str, stats: _Stats) -> None:
        stats.errors += 1
        stats.last_error = f"{error.status}:{error.code}"
        body = wire.encode(ErrorReply(wire.error_body(error, request_id), document_id=error.document_id or UNSET))
        headers = {
            wire.ERROR: error.code,
            wire.ERROR_CODE: str(error.status),
            wire.REQUEST_ID: request_id,
        }
        if error.retry_after_ms is not None:
            headers[wire.RETRY_AFTER] = str(error.retry_after_ms)
        try:
            await self._link.publish(reply, body, headers)
        except HubError as exc:
            log.warning("no reply could be sent: %s", exc)

    def _reply_allowed(self, reply: str, tokens: list[str], owner: int | None) -> bool:
        """A reply goes to an inbox; where every agent has its own, to the asker's. Wildcards are nobody's inbox."""
        if "*" in reply or ">" in reply or not reply.isascii() or not all(reply.split(".")):
            return False
        if reply.startswith(_account_reply):
            return True
        if self._reply_inbox == "own" and owner is not None and owner < len(tokens):
            return reply.startswith(_own_inbox.format(tokens[owner]))
        return reply.startswith("_INBOX.")

    # ── monitoring (ADR-32) ─────────────────────────────────────────────────────────────────────────────────────────

    def _monitor(self, answer: Callable[[], dict[str, Any]]) -> Callable[[Msg], Awaitable[None]]:
        async def receive(msg: Msg) -> None:
            if not self._reply_allowed(msg.reply, [], None):
                self.bad_replies += 1
                return
            try:
                await self._link.publish(msg.reply, wire.encode_any(answer()))
            except HubError as exc:
                log.warning("no monitoring reply could be sent: %s", exc)

        return receive

    def _identity(self, kind: str) -> dict[str, Any]:
        return {
            "type": f"io.nats.micro.v1.{kind}_response",
            "name": self.NAME,
            "id": self.instance,
            "version": self._version,
            "metadata": {"schemas": "hub.schema.<name>"},
        }

    def _ping(self) -> dict[str, Any]:
        return self._identity("ping")

    def _info(self) -> dict[str, Any]:
        return {
            **self._identity("info"),
            "description": self._description,
            "endpoints": [
                {"name": e.name, "subject": e.subject, "queue_group": e.queue, "metadata": e.metadata}
                for e, _, _ in self._endpoints
            ],
        }

    def _stats(self) -> dict[str, Any]:
        return {
            **self._identity("stats"),
            "started": self._started,
            "endpoints": [
                {
                    "name": e.name,
                    "subject": e.subject,
                    "queue_group": e.queue,
                    "num_requests": s.requests,
                    "num_errors": s.errors,
                    "last_error": s.last_error,
                    "processing_time": s.processing_ns,
                    "average_processing_time": s.processing_ns // max(1, s.requests),
                    "data": self._endpoint_data(e, s),
                }
                for e, s, _ in self._endpoints
            ],
        }

    def _endpoint_data(self, endpoint: Endpoint, stats: _Stats) -> dict[str, Any]:
        return {
            "requests": stats.requests,
            "errors": stats.errors,
            "refused": stats.refused,
            "in_flight": self._pending.get(endpoint.name, 0),
            "p50_ms": stats.percentile_ms(0.5),
            "p99_ms": stats.percentile_ms(0.99),
        }


_safe_id = re.compile(r"[A-Za-z0-9._-]{1,64}")


def _request_id(msg: Msg) -> str:
    """The sender's request id where it is fit to be echoed and logged, else one of ours."""
    given: Mapping[str, str] = msg.headers or NO_HEADERS
    value = given.get(wire.REQUEST_ID, "")
    return value if _safe_id.fullmatch(value) else secrets.token_hex(8)
