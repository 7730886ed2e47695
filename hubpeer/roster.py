"""The story of an agent: it registers, heartbeats, expires, leaves. `hub.agents.<verb>.<agent>`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

import msgspec

from hubpeer import agents, wire
from hubpeer.agents import Agent
from hubpeer.bus import Msg
from hubpeer.bus.jetstream import JetStream
from hubpeer.bus.link import Link
from hubpeer.bus.service import Endpoint, Reply, Request
from hubpeer.bus.topology import AGENTS_BUCKET, PLANS, agent_consumer
from hubpeer.errors import BadRequest, HubError, shown
from hubpeer.settings import Settings
from hubpeer.wire import Card

log = logging.getLogger("hubpeer.roster")

_decoder: Final = msgspec.json.Decoder(Agent)


class Roster:
    """Every agent there is, the same on every hub: kept in the bucket `HUB_AGENTS`, mirrored here."""

    def __init__(self, link: Link, js: JetStream, settings: Settings, clock: Callable[[], float] = time.time) -> None:
        self._link = link
        self._js = js
        self._settings = settings
        self._bucket = js.bucket(AGENTS_BUCKET)
        self._clock = clock
        self._agents: dict[str, Agent] = {name: Agent(name, card, configured=True) for name, card in settings.cards.items()}
        self._consumers: set[str] = set()
        self.changed: Callable[[], None] = lambda: None  #: called when a card has come, changed or gone

    async def start(self) -> None:
        """Follow the bucket, read what it holds, and make the consumers of the configured agents."""
        await self._link.subscribe(f"{self._bucket.prefix}*", self._on_change)
        for name in await self._bucket.keys():
            if found := await self._bucket.get(name):
                self._remember(_decoder.decode(found[0]))
        for name in list(self._agents):  # another hub's news may add to them meanwhile
            await self._ensure_consumer(name)

    async def _on_change(self, msg: Msg) -> None:
        if msg.data:
            try:
                self._remember(_decoder.decode(msg.data))
            except msgspec.MsgspecError as exc:
                log.error("%s holds what is no agent: %s", msg.subject, exc)

    def _remember(self, agent: Agent) -> None:
        configured = agent.name in self._settings.cards
        before = self._agents.get(agent.name)
        self._agents[agent.name] = msgspec.structs.replace(agent, configured=configured)
        if before is None or (before.card, before.left) != (agent.card, agent.left):
            self.changed()

    async def _keep(self, agent: Agent) -> None:
        await self._bucket.put(agent.name, msgspec.json.encode(agent))
        self._remember(agent)

    async def _ensure_consumer(self, name: str) -> None:
        if name not in self._consumers:
            for difference in await self._js.ensure_consumer(PLANS, agent_consumer(name, self._settings)):
                log.warning("%s", difference)
            self._consumers.add(name)

    # ── what the other stories ask ──────────────────────────────────────────────────────────────────────────────────

    def cards(self, asker: str = "") -> dict[str, Card]:
        """The cards of all agents that may be asked now, without the asker's."""
        return agents.may_be_asked(self._agents, self._settings.agents.missed, self._clock(), asker)

    def knows(self, name: str) -> bool:
        """Whether there is or was such an agent; one that has expired may still ask."""
        return name in self._agents

    def states(self) -> dict[str, str]:
        now = self._clock()
        return {name: agents.state(a, self._settings.agents.missed, now) for name, a in sorted(self._agents.items())}

    def infos(self) -> list[wire.AgentInfo]:
        now = self._clock()
        return [agents.info(a, self._settings.agents.missed, now) for _, a in sorted(self._agents.items())]

    # ── hub.agents.<verb>.<agent> ───────────────────────────────────────────────────────────────────────────────────

    def endpoints(self) -> list[Endpoint]:
        schemas = {"response_schema": "hub.schema.agent_reply"}
        return [
            Endpoint("agents", "hub.agents.*.*", self.answer, owner=3, metadata=schemas),
            Endpoint("agents-list", "hub.agents.list", self._list_all, metadata=schemas),
        ]

    async def _list_all(self, _: Request) -> Reply:
        return Reply(wire.encode(wire.AgentListReply(self.infos())))

    async def answer(self, request: Request) -> Reply:
        """One request about one agent; the subject's last token is that agent."""
        verb, name = request.tokens[2], wire.agent_token(request.tokens[3])
        if verb == "list":
            return await self._list_all(request)
        if verb == "show":
            return Reply(wire.encode(wire.AgentReply(self._info(name))))
        if verb == "register":
            body = wire.decode(wire.Register, request.data)
            _same(body.agent, name)
            return await self._register(name, body)
        if verb in ("heartbeat", "leave"):
            presence = wire.decode(wire.Presence, request.data)
            _same(presence.agent, name)
            known = self._agents.get(name)
            if known is None or known.seen is None or (known.left and verb == "heartbeat"):
                raise HubError("unknown_agent", f"{name} is not registered; send its card to hub.agents.register.{name}")
            if verb == "heartbeat":
                now = self._clock()
                known = agents.prune(known, self._settings.agents.missed, now)  # so that names of processes do not pile up
                await self._keep(agents.heartbeat(known, presence.instance, now))
            else:
                await self._keep(agents.leave(known, presence.instance))
            return Reply(wire.encode(wire.AgentReply(self._info(name))))
        raise BadRequest("unknown_operation", f"hub.agents has no {shown(verb)!r}: register, heartbeat, leave, list, show")

    async def _register(self, name: str, body: wire.Register) -> Reply:
        if name not in self._agents and len(self._agents) >= self._settings.agents.max_agents:
            raise HubError("quota_exceeded", f"there are {len(self._agents)} agents already")
        now = self._clock()
        known = self._agents.get(name)
        if known is not None:
            known = agents.prune(known, self._settings.agents.missed, now)
        agent = agents.register(known, name, body, self._settings.agents.heartbeat_s, now)
        await self._ensure_consumer(name)
        await self._keep(agent)
        log.info("agent %s registered (%d running)", name, len(agent.instances))
        expires = agent.heartbeat_s * self._settings.agents.missed
        return Reply(wire.encode(wire.RegisterReply(name, agent.heartbeat_s, expires, PLANS, name)))

    def _info(self, name: str) -> wire.AgentInfo:
        known = self._agents.get(name)
        if known is None:
            raise HubError("unknown_agent", f"there is no agent {name}")
        return agents.info(known, self._settings.agents.missed, self._clock())


def _same(said: str | None, subject: str) -> None:
    if said is not None and said != subject:
        raise BadRequest("identity_mismatch", f"the subject says {subject}, the body {shown(said)!r}", field="agent")
