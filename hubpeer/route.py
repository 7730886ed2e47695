"""The story of a question: `hub.route.<agent>` in, a plan out. Read `Router.answer` from top to bottom."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING

import msgspec

from hubpeer import __version__, keywords, plan, wire
from hubpeer.bus.service import Endpoint, Reply, Request
from hubpeer.conduct import Conductor
from hubpeer.errors import BadRequest, HubError, shown
from hubpeer.model import Model, PlanAsk
from hubpeer.plan import Draft, Question, Record, Rejected
from hubpeer.roster import Roster
from hubpeer.settings import Settings
from hubpeer.wire import Card, RouteRequest, RoutingDecision, RoutingMethod, Trace

if TYPE_CHECKING:  # numpy is loaded only where the encoder is used
    from hubpeer.encoder import BuiltIn

log = logging.getLogger("hubpeer.route")

#: First letter of the ids of plans that are known by their `Hub-Request-Id`.
_RESENT = "r"
#: Kept back from the asker's deadline, in seconds, for the next rung, the stores and the way back.
_RESERVE_S = 0.1
#: Texts of cards the encoder reads ahead in one go.
_AT_ONCE = 32


class Router:
    """Turns questions into plans, by the first rung of the ladder that can."""

    def __init__(
        self,
        settings: Settings,
        roster: Roster,
        conductor: Conductor,
        model: Model | None,
        encoder: BuiltIn | None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._roster = roster
        self._conductor = conductor
        self._model = model
        self._encoder = encoder
        self._clock = clock
        self._unread = False  #: cards have changed since the encoder read them
        self._reading: asyncio.Task[None] | None = None
        self.counts: Counter[str] = Counter()
        conductor.verbs["replay"] = self.replay
        roster.changed = self.expect

    def expect(self) -> None:
        """The cards have changed: let model and encoder read them before somebody waits for it."""
        self._unread = self._encoder is not None
        if self._unread and (self._reading is None or self._reading.done()):
            self._reading = asyncio.create_task(self._read_cards())
        if self._model is not None:
            live = [name for name, state in self._roster.states().items() if state == "live"][:8]
            self._model.expect([self._ask(name, RouteRequest("")) for name in live])

    async def _read_cards(self) -> None:
        """Let the encoder read all cards, a few texts at a time so that a hub that stops need not wait for it; once more where
        some changed meanwhile."""
        while self._unread and self._encoder is not None:
            self._unread = False
            texts = self._encoder.unread(self._roster.cards().values())
            for start in range(0, len(texts), _AT_ONCE):
                await asyncio.to_thread(self._encoder.known, texts[start : start + _AT_ONCE])

    def stop(self) -> None:
        """Read no further ahead."""
        if self._reading is not None:
            self._reading.cancel()

    def endpoints(self) -> list[Endpoint]:
        metadata = {
            "request_schema": "hub.schema.route_request",
            "response_schema": "hub.schema.route_reply",
            "example": 'nats req hub.route.finance \'{"query": "..."}\' --timeout 15s',
        }
        return [Endpoint("route", wire.ROUTE, self.answer, owner=2, metadata=metadata)]

    async def answer(self, request: Request) -> Reply:
        """Take one question through the hub: check it, plan it, keep the plan, publish it, answer."""
        asker = _asker(request)
        if not self._roster.knows(asker):
            raise HubError("unknown_agent", f"{asker} is no agent here; send its card to hub.agents.register.{asker} first")
        body = _question(request, asker)
        visited = _visited(request, asker, self._settings.routing.max_call_path)
        plan_id = _plan_id(request, asker, self._clock())

        if plan_id.startswith(_RESENT) and (known := await self._conductor.find(plan_id)):
            if known.decision.original_query != body.query:
                raise HubError("conflict", "this request id was used for another question")
            return _reply(known)

        ask = self._ask(asker, body)
        decision = await self._decide(ask, plan_id, request.deadline)
        self.counts[decision.routing_method] += 1
        if isinstance(decision.fallback_reason, str):
            self.counts[f"fallback_{decision.fallback_reason}"] += 1
        if again := [step.agent for step in decision.agents if step.agent in visited]:
            path = " -> ".join([*visited, asker, again[0]])
            raise HubError("call_loop", f"the question would come back to {again[0]}: {path}")

        ceo = plan.CEO in self._roster.cards()
        trace = self._trace(ask, decision)
        record = plan.propose(decision, body.context, [*visited, asker], self._clock(), ceo_available=ceo, trace=trace)
        return _reply(await self._conductor.begin(record, dispatch=body.dispatch))

    # ── the ladder ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _ask(self, asker: str, body: RouteRequest) -> PlanAsk:
        routing = self._settings.routing
        return PlanAsk(asker, body.query, self._roster.cards(asker), routing.conflict_rules, routing.max_agents, body.context)

    async def _decide(self, ask: PlanAsk, plan_id: str, deadline: float | None) -> RoutingDecision:
        routing = self._settings.routing
        question = Question(ask.asker, ask.query, ask.rules, routing.default_rule, ask.max_agents)
        cards = ask.cards
        why: str | None = None  # the rung above did not answer
        for method, rung in self._rungs if cards else ():
            try:
                decision = self._build(await rung(ask, deadline), question, cards, method, plan_id, why)
            except HubError as exc:
                why = exc.code
                log.info("plan %s: not by %s: %s", plan_id, method, exc)
                continue
            if isinstance(decision, RoutingDecision):
                return decision
            why = f"rejected_{decision.reason}"
            log.warning("plan %s: the draft of %s is no plan: %s %s", plan_id, method, decision.reason, decision.detail)

        why = why or ("no_model" if cards else "no_agents")
        # Where the encoder has found nobody, a question is not pressed on somebody all the same.
        defaults = [] if why == "no_match" and not routing.default_always else routing.default_agents
        fallback = keywords.draft(ask.query, ask.asker, cards, defaults, ask.max_agents)
        if fallback is None:
            self.counts["no_match"] += 1
            near = ", ".join(f"{a.agent} ({a.score:g})" for a in keywords.runners_up(ask.query, cards))
            raise HubError("no_match", f"no agent fits; nearest: {near}" if near else "there is no other agent to ask")
        if fallback.conflict_resolution not in ask.rules:
            fallback = msgspec.structs.replace(fallback, conflict_resolution=None)
        decision = self._build(fallback, question, cards, "fallback_keywords", plan_id, why)
        if isinstance(decision, Rejected):
            raise AssertionError(f"the keyword rule broke a plan rule: {decision}")
        return decision

    @property
    def _rungs(self) -> Iterator[tuple[RoutingMethod, Callable[[PlanAsk, float | None], Awaitable[Draft]]]]:
        if self._model is not None:
            yield "llm_intelligent", self._ask_model
        if self._encoder is not None:
            yield "builtin_encoder", self._ask_encoder

    async def _ask_model(self, ask: PlanAsk, deadline: float | None) -> Draft:
        assert self._model is not None
        patience = self._settings.routing.deadline_s
        if deadline is not None:
            patience = min(patience, deadline - self._clock() - _RESERVE_S)
        if patience <= 0:
            raise HubError("deadline_passed", "no time is left for the model")
        try:
            # The model honours the deadline itself; should it hang, we leave all the same.
            async with asyncio.timeout(patience + _RESERVE_S / 2):
                return await self._model.plan(ask, time.monotonic() + patience)
        except TimeoutError:
            raise HubError("deadline_passed", f"the model did not answer within {patience:g} s") from None

    async def _ask_encoder(self, ask: PlanAsk, _: float | None) -> Draft:
        assert self._encoder is not None
        found = await asyncio.to_thread(self._encoder.plan, ask)
        if not isinstance(found, Draft):
            raise HubError("no_match", f"nobody fits ({found.confidence:.2f})")
        return found

    def _build(
        self,
        draft: Draft,
        question: Question,
        cards: dict[str, Card],
        method: RoutingMethod,
        plan_id: str,
        why: str | None = None,
    ) -> RoutingDecision | Rejected:
        decision = plan.build(draft, question, cards, method, plan_id, wire.iso(self._clock()), why)
        if isinstance(decision, Rejected):
            self.counts[f"rejected_{decision.reason}"] += 1
        return decision

    # ── once more ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _decided_by(self, decision: RoutingDecision) -> tuple[str, str]:
        """Name and revision of the rung that decided."""
        by = {"llm_intelligent": self._model, "builtin_encoder": self._encoder}.get(decision.routing_method)
        return (by.name, by.revision) if by is not None else ("keywords", __version__)

    def _trace(self, ask: PlanAsk, decision: RoutingDecision) -> Trace | None:
        """What to keep with the plan; nothing where recording is off, or where the cards are so large that the record, which
        grows with every result, might in the end not fit into one message."""
        if not self._settings.routing.record:
            return None
        said = wire.encode_any([ask.asker, ask.query, ask.context])
        digest, (name, revision), model = hashlib.sha256(said).hexdigest(), self._decided_by(decision), self._settings.model
        trace = Trace(digest, ask.cards, ask.rules, ask.max_agents, name, revision, model.seed, model.temperature)
        return trace if len(wire.encode(trace)) <= wire.MAX_TRACE else None

    async def replay(self, record: Record, request: Request) -> Reply:
        """`hub.plans.replay.<agent>`: decide a plan's question again, from the cards it was decided from; nothing is kept."""
        then = record.trace
        if then is None:
            raise HubError("not_found", "nothing was recorded: routing.record is off, or the cards were too large")
        old = record.decision
        ask = PlanAsk(old.requesting_agent, old.original_query, then.cards, then.rules, then.max_agents, record.context)
        now: RoutingDecision | None = None
        try:
            now = await self._decide(ask, record.plan_id, request.deadline)
        except HubError as exc:
            if exc.code != "no_match":
                raise
        changed = now is not None and self._decided_by(now) != (then.model, then.revision)
        return Reply(wire.encode(wire.ReplayReply(old, then, now, plan.differences(old, now), changed)))


def _reply(record: Record) -> Reply:
    decision = msgspec.structs.replace(record.decision, state=record.state)
    return Reply(wire.encode(wire.RouteReply(decision)))


def _asker(request: Request) -> str:
    if request.tokens[2] == "*":  # what `nats micro request hubpeer route` sends
        raise BadRequest("bad_agent_id", 'name the asking agent: nats req hub.route.<agent> \'{"query": "..."}\'')
    return wire.agent_token(request.tokens[2])


def _question(request: Request, asker: str) -> RouteRequest:
    body = wire.decode(RouteRequest, request.data)
    if body.requesting_agent is not None and body.requesting_agent != asker:
        said = shown(body.requesting_agent)
        raise BadRequest("identity_mismatch", f"the subject says {asker}, the body {said!r}", field="requesting_agent")
    if not any(c.isprintable() and not c.isspace() for c in body.query):
        raise BadRequest("empty_query", "the query has no visible character", field="query")
    if body.context is not None and len(wire.encode_any(body.context)) > wire.MAX_CONTEXT:
        raise BadRequest("field_too_long", f"context is at most {wire.MAX_CONTEXT} bytes of JSON", field="context")
    return body


def _visited(request: Request, asker: str, limit: int) -> list[str]:
    visited = wire.call_path(request.headers)
    if asker in visited:
        raise HubError("call_loop", f"{asker} asks again: {' -> '.join([*visited, asker])}")
    if len(visited) >= limit:
        raise HubError("call_loop", f"the question went through {len(visited)} agents already")
    return visited


def _plan_id(request: Request, asker: str, now: float) -> str:
    """A resent question, known by its `Hub-Request-Id`, gets the id it had; any other a new one that sorts by time."""
    if wire.header(request.headers, wire.REQUEST_ID) is not None:
        digest = hashlib.blake2b(f"{asker}\0{request.request_id}".encode(), digest_size=15).digest()
        return _RESENT + base64.b32hexencode(digest).decode().lower()
    raw = int(now * 1000).to_bytes(6, "big") + secrets.token_bytes(9)
    return "p" + base64.b32hexencode(raw).decode().lower()
