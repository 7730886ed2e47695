from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubpeer import agents
from hubpeer.agents import Agent
from hubpeer.wire import Card, Register

MISSED = 3
BEAT = 20.0
NOW = 1_700_000_000.0
CARD = Card(["law"], ["contracts"], "reads contracts")
CONFIGURED = Agent("legal", CARD, configured=True)


def registered(known: Agent | None = None, now: float = NOW, **fields) -> Agent:
    return agents.register(known, "legal", Register(**{"capabilities": ["law"], **fields}), BEAT, now)


def state(agent: Agent, after: float = 0.0) -> str:
    return agents.state(agent, MISSED, NOW + after)


# ── a life ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_agent_the_operator_named_may_be_asked_before_it_was_ever_seen():
    assert state(CONFIGURED) == "configured"


def test_an_agent_that_registers_is_live_with_the_card_it_sent():
    agent = registered(specialties=["contracts"], description="reads contracts")
    assert (agent.name, agent.card, state(agent)) == ("legal", CARD, "live")
    assert agent.configured is False


def test_registering_again_replaces_the_card_and_keeps_that_the_operator_named_it():
    agent = registered(CONFIGURED, capabilities=["tax_law"])
    assert (agent.card, agent.configured) == (Card(["tax_law"]), True)


@pytest.mark.parametrize(("asked", "kept"), [(None, BEAT), (0.5, 0.5)])
def test_a_heartbeat_comes_as_often_as_the_agent_said_or_else_as_the_hub_expects(asked, kept):
    assert registered(heartbeat_s=asked).heartbeat_s == kept


@pytest.mark.parametrize(
    ("beat", "after", "expected"),
    [
        (20.0, 0.0, "live"),
        (20.0, 60.0, "live"),  # the third heartbeat may be as late as this
        (20.0, 60.1, "expired"),
        (1.0, 3.0, "live"),
        (1.0, 3.1, "expired"),
    ],
)
def test_an_agent_expires_after_three_missed_heartbeats(beat, after, expected):
    assert state(registered(heartbeat_s=beat), after) == expected


def test_an_expired_agent_that_the_operator_named_may_not_be_asked_either():
    assert state(registered(CONFIGURED), after=61) == "expired"


def test_a_heartbeat_keeps_an_agent_alive_and_brings_an_expired_one_back():
    agent = agents.heartbeat(registered(), "default", NOW + 50)
    assert [state(agent, after=s) for s in (100, 111)] == ["live", "expired"]
    assert state(agents.heartbeat(agent, "default", NOW + 500), after=500) == "live"


def test_an_agent_that_left_may_not_be_asked_until_it_registers_again():
    gone = agents.leave(registered(), "default")
    assert state(gone) == "left"
    assert state(registered(gone)) == "live"


def test_an_agent_lives_as_long_as_one_of_its_processes():
    both = registered(registered(instance="a"), instance="b")
    one = agents.leave(both, "a")
    assert (state(one), list(one.instances)) == ("live", ["b"])
    assert state(agents.leave(one, "b")) == "left"


def test_the_goodbye_of_an_unknown_process_ends_nobody():
    assert state(agents.leave(registered(instance="a"), "b")) == "live"


def test_a_process_that_went_silent_is_forgotten_and_the_others_stay():
    agent = agents.heartbeat(registered(registered(instance="a"), instance="b"), "b", NOW + 50)
    assert list(agents.prune(agent, MISSED, NOW + 61).instances) == ["b"]
    assert agents.prune(agent, MISSED, NOW + 60) is agent


# ── who may be asked ────────────────────────────────────────────────────────────────────────────────────────────────────

ROSTER = {
    "configured": Agent("configured", Card(["a"]), configured=True),
    "live": agents.register(None, "live", Register(["b"]), BEAT, NOW),
    "expired": agents.register(None, "expired", Register(["c"]), BEAT, NOW - 61),
    "left": agents.leave(agents.register(None, "left", Register(["d"]), BEAT, NOW), "default"),
}


@pytest.mark.parametrize(
    ("asker", "names"),
    [("", {"configured", "live"}), ("live", {"configured"}), ("configured", {"live"}), ("stranger", {"configured", "live"})],
)
def test_configured_and_live_agents_may_be_asked_but_never_the_asker(asker, names):
    found = agents.may_be_asked(ROSTER, MISSED, NOW, asker)
    assert set(found) == names
    assert all(found[name] == ROSTER[name].card for name in names)


@pytest.mark.parametrize(
    ("name", "state", "instances", "last_seen"),
    [
        ("configured", "configured", 0, None),
        ("live", "live", 1, "2023-11-14T22:13:20.000+00:00"),
        ("expired", "expired", 0, "2023-11-14T22:12:19.000+00:00"),
        ("left", "left", 0, "2023-11-14T22:13:20.000+00:00"),
    ],
)
def test_an_agents_info_says_how_it_is(name, state, instances, last_seen):
    found = agents.info(ROSTER[name], MISSED, NOW)
    assert (found.agent, found.state, found.instances, found.last_seen) == (name, state, instances, last_seen)
    assert found.capabilities == ROSTER[name].card.capabilities


# ── any order of events ─────────────────────────────────────────────────────────────────────────────────────────────────

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["register", "heartbeat", "leave", "prune"]), st.sampled_from("abc"), st.floats(0, 100, allow_nan=False)
    ),
    max_size=30,
)


@given(EVENTS)
def test_an_agent_is_live_exactly_while_one_process_was_heard_of_and_has_not_left(events):
    agent, heard, now = CONFIGURED, {}, NOW
    for what, instance, pause in events:
        now += pause
        if what == "register":
            agent, heard[instance] = registered(agent, now, instance=instance), now
        elif what == "heartbeat" and agent.seen is not None:
            agent, heard[instance] = agents.heartbeat(agent, instance, now), now
        elif what == "leave" and agent.seen is not None:
            agent = agents.leave(agent, instance)
            heard.pop(instance, None)
        else:
            agent = agents.prune(agent, MISSED, now)
        alive = {name for name, seen in heard.items() if now - seen <= MISSED * BEAT}
        assert set(agents.prune(agent, MISSED, now).instances) == alive
        assert (agents.state(agent, MISSED, now) in ("live", "configured")) == (bool(alive) or agent.seen is None)
        assert msgspec.json.decode(msgspec.json.encode(agent), type=Agent) == agent
