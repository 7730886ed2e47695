"""Everything one may ask of a hub, as plain async calls. Spokes, publishers and the command line are built on it.

    async with Client("nats://127.0.0.1:4222", agent="finance") as hub:
        decision = await hub.route("Which campaign paid off?")
        outcome = await hub.outcome(decision.plan_id)
        receipt = await hub.docs("acme").add(Path("contract.pdf").read_bytes(), filename="contract.pdf")

Every call raises `HubError` with the hub's code, or one of the bus's (`bus_unavailable`, `deadline_passed`,
`forbidden_subject`).
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from hubpeer import wire
from hubpeer.bus import Msg
from hubpeer.bus.jetstream import ApiError, JetStream
from hubpeer.bus.link import Access, Link
from hubpeer.errors import HubError
from hubpeer.wire import Outcome, Receipt, ReplayReply, RoutingDecision

R = TypeVar("R", bound=Struct)

#: Bodies above this many bytes travel through the object store.
INLINE_LIMIT = 750 * 1024
#: How often a waiting call looks whether its outcome came while the connection was down, in seconds.
_LOOK_S = 2.0


class Client:
    """One connection to a hub's bus, speaking for one agent (or for an operator, without one)."""

    def __init__(self, url: str = "nats://127.0.0.1:4222", *, agent: str = "", timeout_s: float = 15.0, **access: Any) -> None:
        prefix = f"_INBOX.{wire.agent_token(agent)}" if agent else "_INBOX"
        self.agent = agent
        self.timeout_s = timeout_s
        self.link = Link(Access(url=url, name=agent or "hubpeer-client", inbox_prefix=prefix, **access))
        self.js = JetStream(self.link)
        self._outcomes: dict[str, asyncio.Future[Outcome]] = {}
        self._listening = False

    async def __aenter__(self) -> Client:
        await self.open()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        await self.close()

    async def open(self, wait_s: float = 10.0) -> None:
        await self.link.open(wait_s)

    async def close(self) -> None:
        for waiting in self._outcomes.values():
            waiting.cancel()
        await self.link.close()

    async def ask(
        self,
        kind: type[R],
        subject: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> R:
        """One request; the reply as a `kind`."""
        patience = timeout_s if timeout_s is not None else self.timeout_s
        sent = {wire.DEADLINE: str(int((time.time() + patience) * 1000)), **(headers or {})}
        reply = await self.link.request(subject, body, sent, timeout_s=patience)
        return wire.decode_reply(kind, reply.data)

    # ── questions ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def route(
        self,
        query: str,
        context: dict[str, Any] | None = None,
        *,
        dispatch: bool = True,
        call_path: str = "",
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> RoutingDecision:
        """Ask; the hub answers with a plan and, unless `dispatch` is false, runs it. The same `request_id` again gives the
        same plan."""
        body = wire.encode(wire.RouteRequest(query, context, dispatch))
        headers = {wire.REQUEST_ID: request_id or secrets.token_hex(12)}
        if call_path:
            headers[wire.CALL_PATH] = call_path
        await self._listen()
        reply = await self.ask(wire.RouteReply, wire.route_subject(self._me()), body, headers, timeout_s)
        return reply.routing_decision

    async def outcome(self, plan_id: str, timeout_s: float | None = None) -> Outcome:
        """Wait until a plan of ours has ended. Raises `deadline_passed` after `timeout_s` seconds (None: wait for ever)."""
        await self._listen()
        arrived = self._outcomes.setdefault(plan_id, asyncio.get_running_loop().create_future())
        subject = wire.outcome_subject(self._me(), plan_id)
        try:
            async with asyncio.timeout(timeout_s):
                while not arrived.done():
                    # What came before we listened, or while the connection was down, is in the stream.
                    if found := await self._last("OUTCOMES", subject):
                        return wire.decode_reply(Outcome, found)
                    await asyncio.wait({arrived}, timeout=_LOOK_S)
                return arrived.result()
        except TimeoutError:
            raise HubError("deadline_passed", f"plan {plan_id} has not ended within {timeout_s:g} s") from None
        finally:
            self._outcomes.pop(plan_id, None)

    async def _listen(self) -> None:
        if not self._listening:
            self._listening = True
            try:
                await self.link.subscribe(f"hub.outcome.{self._me()}.*", self._on_outcome)
            except BaseException:
                self._listening = False
                raise

    async def _on_outcome(self, msg: Msg) -> None:
        waiting = self._outcomes.get(msg.subject.rsplit(".", 1)[-1])
        if waiting is not None and not waiting.done():
            try:
                waiting.set_result(wire.decode_reply(Outcome, msg.data))
            except HubError as exc:
                waiting.set_exception(exc)

    async def _last(self, stream: str, subject: str) -> bytes | None:
        """The newest message of a subject by direct get (ADR-31), which permissions can allow subject by subject."""
        try:
            msg = await self.link.request(f"$JS.API.DIRECT.GET.{stream}.{subject}", b"", timeout_s=2.0)
        except HubError as exc:
            if exc.code in ("bus_unavailable", "deadline_passed"):
                return None
            raise
        return msg.data or None

    async def plans(self, state: wire.PlanState | None = None, limit: int = 50) -> list[wire.PlanSummary]:
        body = wire.encode(wire.PlanList(state, limit))
        return (await self.ask(wire.PlanListReply, f"hub.plans.list.{self._me()}", body)).plans

    async def replay(self, plan_id: str) -> ReplayReply:
        """One of our plans decided again, from what it was decided from; nothing is kept."""
        body = wire.encode(wire.PlanQuery(plan_id))
        return await self.ask(ReplayReply, f"hub.plans.replay.{self._me()}", body)

    async def plan(self, verb: str, plan_id: str, reason: str | None = None) -> wire.PlanStatus:
        """`show`, `cancel` or `approve` a plan of ours."""
        body = wire.encode(wire.PlanQuery(plan_id, reason))
        return (await self.ask(wire.PlanReply, f"hub.plans.{verb}.{self._me()}", body)).plan

    def _me(self) -> str:
        if not self.agent:
            raise HubError("bad_agent_id", "say for which agent: Client(url, agent=...)")
        return self.agent

    # ── agents, operators ───────────────────────────────────────────────────────────────────────────────────────────

    async def agents(self) -> list[wire.AgentInfo]:
        return (await self.ask(wire.AgentListReply, "hub.agents.list")).agents

    async def register(self, request: wire.Register) -> wire.RegisterReply:
        return await self.ask(wire.RegisterReply, f"hub.agents.register.{self._me()}", wire.encode(request))

    async def presence(self, verb: str, instance: str) -> wire.AgentInfo:
        """`heartbeat` or `leave`."""
        body = wire.encode(wire.Presence(instance))
        return (await self.ask(wire.AgentReply, f"hub.agents.{verb}.{self._me()}", body, timeout_s=5.0)).agent

    async def status(self) -> wire.StatusReply:
        return await self.ask(wire.StatusReply, wire.HUB_STATUS, timeout_s=5.0)

    async def health(self) -> wire.Health:
        return await self.ask(wire.Health, wire.HUB_HEALTH, timeout_s=5.0)

    async def schema(self, name: str) -> dict[str, Any]:
        reply = await self.link.request(f"hub.schema.{name}", b"", timeout_s=5.0)
        found: dict[str, Any] = msgspec.json.decode(reply.data)
        if "error" in found and found.get("status") == "error":
            raise wire.as_error(msgspec.convert(found["error"], wire.ErrorBody))
        return found

    # ── documents ───────────────────────────────────────────────────────────────────────────────────────────────────

    def docs(self, client: str) -> Documents:
        return Documents(self, wire.client_token(client))


class Documents:
    """One client's documents."""

    def __init__(self, hub: Client, client: str) -> None:
        self._hub = hub
        self._client = client

    async def add(
        self,
        data: bytes,
        filename: str = "",
        content_type: str = "",
        source_id: str = "",
        *,
        wait: str = "committed",
        timeout_s: float | None = None,
    ) -> Receipt:
        """Give the hub one document and wait for the receipt: it is in the store, on disk.

        `wait="categorized"` waits for the category too. `source_id` is yours and makes sending it again harmless.
        """
        headers, body = await self._packed(data, filename, content_type, source_id)
        headers[wire.WAIT] = wait
        return await self._hub.ask(Receipt, wire.ingest_subject(self._client), body, headers, timeout_s or 60.0)

    async def stream(self, data: bytes, filename: str = "", content_type: str = "", source_id: str = "") -> int:
        """Publish one document into the stream DOCS: returns its sequence once it is *accepted*; the receipt comes on
        `hub.docs.receipt.<client>.<document>`."""
        headers, body = await self._packed(data, filename, content_type, source_id)
        try:
            return (await self._hub.js.publish(wire.stream_subject(self._client), body, headers)).seq
        except ApiError as exc:
            raise HubError("queue_full", f"the stream does not take it: {exc}", retry_after_ms=1000) from exc

    async def _packed(self, data: bytes, filename: str, content_type: str, source_id: str) -> tuple[dict[str, str], bytes]:
        digest = hashlib.sha256(data).hexdigest()
        given = {wire.FILENAME: filename, wire.CONTENT_TYPE: content_type, wire.SOURCE_ID: source_id, wire.SHA256: digest}
        headers = {name: value for name, value in given.items() if value}
        if len(data) <= min(INLINE_LIMIT, self._hub.link.max_payload - 8192):
            return headers, data
        await self._hub.js.object_put(wire.object_bucket(self._client), digest, data)
        return {**headers, wire.OBJECT: digest}, b""

    async def get(self, document_id: str) -> wire.Document:
        body = wire.encode(wire.DocQuery(document_id))
        return (await self._hub.ask(wire.DocReply, f"hub.docs.get.{self._client}", body)).document

    async def text(self, document_id: str) -> str:
        """The whole text, page by page."""
        parts: list[str] = []
        offset: int | None = 0
        while offset is not None:
            body = wire.encode(wire.TextQuery(document_id, offset))
            page = await self._hub.ask(wire.TextReply, f"hub.docs.text.{self._client}", body)
            parts.append(page.text)
            offset = page.next_offset
        return "".join(parts)

    async def list(
        self, category: str | None = None, state: wire.DocState | None = None, limit: int = 50, after: str | None = None
    ) -> wire.DocListReply:
        body = wire.encode(wire.DocList(category, state, limit, after))
        return await self._hub.ask(wire.DocListReply, f"hub.docs.list.{self._client}", body)

    async def delete(self, document_id: str) -> None:
        body = wire.encode(wire.DocQuery(document_id))
        await self._hub.ask(wire.DeleteReply, f"hub.docs.delete.{self._client}", body)

    async def stats(self) -> wire.DocStatsReply:
        return await self._hub.ask(wire.DocStatsReply, f"hub.docs.stats.{self._client}")
