"""Who there is: cards, liveness, and who may be asked. Pure; the clock is an argument (unix seconds)."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec import Struct

from hubpeer.wire import AgentInfo, AgentState, Card, Register, iso


class Agent(Struct, frozen=True):
    """One agent as the registry keeps it.

    An agent may run as several processes (`instances`: name -> last seen); it is live while one of them is.
    """

    name: str
    card: Card
    configured: bool = False  #: named by the operator: may be asked before it was ever seen
    heartbeat_s: float = 20.0
    instances: dict[str, float] = {}
    seen: float | None = None  #: last sign of life of any instance; None: never registered
    left: bool = False  #: its last instance said goodbye


def register(known: Agent | None, name: str, request: Register, heartbeat_s: float, now: float) -> Agent:
    """The agent after one of its processes registered; the newest card counts."""
    before = known if known is not None else Agent(name, Card(["none"]))
    return msgspec.structs.replace(
        before,
        card=Card(request.capabilities, request.specialties, request.description),
        heartbeat_s=request.heartbeat_s if request.heartbeat_s is not None else heartbeat_s,
        instances={**before.instances, request.instance: now},
        seen=now,
        left=False,
    )


def heartbeat(known: Agent, instance: str, now: float) -> Agent:
    """The agent after a sign of life."""
    return msgspec.structs.replace(known, instances={**known.instances, instance: now}, seen=now, left=False)


def leave(known: Agent, instance: str) -> Agent:
    """The agent after one of its processes said goodbye."""
    rest = {name: seen for name, seen in known.instances.items() if name != instance}
    return msgspec.structs.replace(known, instances=rest, left=not rest)


def prune(known: Agent, missed: int, now: float) -> Agent:
    """The agent without the processes that were not heard of for `missed` heartbeats."""
    rest = {name: seen for name, seen in known.instances.items() if now - seen <= missed * known.heartbeat_s}
    return known if len(rest) == len(known.instances) else msgspec.structs.replace(known, instances=rest)


def state(agent: Agent, missed: int, now: float) -> AgentState:
    """`configured` and `live` agents may be asked; an `expired` one may again after its next heartbeat, one that has
    `left` after it has registered again."""
    if agent.seen is None:
        return "configured"
    if agent.left:
        return "left"
    return "live" if prune(agent, missed, now).instances else "expired"


def may_be_asked(agents: Mapping[str, Agent], missed: int, now: float, asker: str = "") -> dict[str, Card]:
    """The cards a plan may name, without the asker's: nobody is handed their own question back."""
    return {
        name: agent.card
        for name, agent in agents.items()
        if name != asker and state(agent, missed, now) in ("configured", "live")
    }


def info(agent: Agent, missed: int, now: float) -> AgentInfo:
    return AgentInfo(
        agent=agent.name,
        state=state(agent, missed, now),
        capabilities=agent.card.capabilities,
        specialties=agent.card.specialties,
        description=agent.card.description,
        instances=len(prune(agent, missed, now).instances),
        last_seen=iso(agent.seen) if agent.seen is not None else None,
    )
