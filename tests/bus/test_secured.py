"""nats.conf does what it says: everybody can do their own work, and nobody can do anything in another's name."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

from hubpeer.bus.jetstream import JetStream, object_config
from hubpeer.bus.link import Access, Link
from hubpeer.client import Client
from hubpeer.errors import HubError, SettingsError
from hubpeer.spoke import Done, Spoke, Step
from tests.bus.helpers import raw, until
from tests.bus.secured import AGENTS, CONF, Secured

STREAMS = ("PLANS", "RESULTS", "OUTCOMES", "DOCS", "RECEIPTS", "DLQ", "KV_HUB_AGENTS", "KV_HUB_PLANS")
EVERYBODY = (*AGENTS, "acme")


@pytest.fixture(scope="module")
def bus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    started = Secured(tmp_path_factory.mktemp("secured"))
    try:
        started.start_hub()
        yield started
    finally:
        started.stop()


@pytest_asyncio.fixture(loop_scope="session")
async def core(bus: Secured) -> AsyncIterator[JetStream]:
    """What the hub itself may do, to look at the streams."""
    link = Link(Access(bus.url, "test", inbox_prefix="_INBOX.hub", **bus.access("hub-core")))
    await link.open()
    yield JetStream(link)
    await link.close()


def spoke(bus: Secured, agent: str) -> Spoke:
    made = Spoke(agent, ["budget_planning"], url=bus.url, **bus.access(agent))

    @made.step
    async def work(step: Step) -> Done:
        return Done({"by": agent, "task": step.task}, verdict="approve")

    return made


async def test_a_spoke_works_end_to_end(bus: Secured) -> None:
    async with spoke(bus, "finance") as finance, spoke(bus, "marketing"):
        outcome = await finance.ask("Which campaign brought the most customers?", timeout_s=60)
        assert (outcome.status, [s.agent for s in outcome.steps]) == ("done", ["marketing"])
        assert outcome.steps[0].result["by"] == "marketing"

        async with Client(bus.url, agent="ceo", **bus.access("ceo")) as ceo:
            decision = await ceo.route("Does the budget cover the cost of the campaign?")
            assert {s.agent for s in decision.agents} == {"finance", "marketing"}
            found = await ceo.outcome(decision.plan_id, timeout_s=60)
            assert (found.status, found.conflict.status, found.conflict.verdict) == ("done", "agreed", "approve")
            states = {a.agent: a.state for a in await ceo.agents()}
            assert states["finance"] == states["marketing"] == "live"
            assert (await ceo.plan("show", decision.plan_id)).state == "done"
            assert decision.plan_id in [p.plan_id for p in await ceo.plans()]
        async with Client(bus.url, agent="ceo", **bus.access("ceo")) as later:  # the outcome is read from the stream
            assert (await later.outcome(decision.plan_id, timeout_s=30)).plan_id == decision.plan_id
        assert finance.steps_done == 1
        assert finance.client.link.refused == {}


async def test_a_client_gives_documents_and_an_agent_reads_them(bus: Secured, core: JetStream) -> None:
    await core.ensure_stream(object_config("DOCS_acme"))
    async with Client(bus.url, agent="acme", **bus.access("acme")) as acme:
        heard: list[Any] = []

        async def hear(msg: Msg) -> None:
            heard.append(json.loads(msg.data))

        await acme.link.subscribe("hub.docs.receipt.acme.*", hear)
        mine = acme.docs("acme")
        receipt = await mine.add(b"Invoice 7: amount due 100 EUR, payment within 30 days.", "invoice.txt", wait="categorized")
        assert receipt.state == "categorized"
        await mine.stream(b"Minutes of the meeting of 4 March. Decisions: none.", "minutes.txt")
        await until(lambda: len({r["document_id"] for r in heard if r["state"] == "categorized"}) == 2, "both receipts")
        large = b"one line of a large document\n" * 40_000
        assert (await mine.add(large, "large.txt")).state == "committed"
        assert (await mine.list()).total == 3
        assert acme.link.refused == {}
    async with Client(bus.url, agent="finance", **bus.access("finance")) as finance:
        assert (await finance.docs("acme").get(receipt.document_id)).filename == "invoice.txt"
        assert (await finance.docs("acme").text(receipt.document_id)).startswith("Invoice 7")
        with pytest.raises(HubError) as refused:
            await finance.docs("acme").delete(receipt.document_id)
        assert refused.value.code == "bus_unavailable"  # not imported: nobody is there
    async with Client(bus.url, agent="acme", **bus.access("acme")) as acme:
        await acme.docs("acme").delete(receipt.document_id)
        assert (await acme.docs("acme").stats()).documents == 2


async def test_operators_see_and_the_hub_needs_no_more_than_it_has(bus: Secured) -> None:
    async with Client(bus.url, **bus.access("ops")) as ops:
        status = await ops.status()
        assert status.status == "ok"
        assert status.bus["refused"] == {}, "the hub asked for something nats.conf does not give it"
        assert (await ops.health()).status == "ok"
        reply = await ops.link.request("$SRV.INFO.hubpeer", b"")
        subjects = {e["subject"] for e in json.loads(reply.data)["endpoints"]}
        for stream in STREAMS:
            assert "state" in await ops.js.api(f"STREAM.INFO.{stream}")
        for forbidden in ("STREAM.PURGE.PLANS", "STREAM.DELETE.PLANS", "CONSUMER.DELETE.PLANS.finance"):
            with pytest.raises(HubError) as refused:
                await ops.js.api(forbidden)
            assert refused.value.code == "forbidden_subject"
    allowed = set(re.findall(r'"(\S+) hub"', CONF.read_text()))
    assert subjects == allowed, "hub-front's rights are the hub's endpoints, no more and no less"


async def test_the_health_check_of_the_container_says_so(bus: Secured) -> None:
    found = await asyncio.to_thread(bus.healthy)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "hubpeer" in found.stdout


async def test_credentials_are_needed(bus: Secured) -> None:
    for access in ({}, {"user": "finance", "password": "wrong"}, {"user": "marketing", "password": bus.passwords["FINANCE"]}):
        with pytest.raises(SettingsError):
            await Link(Access(bus.url, "test", **access)).open(wait_s=10)


# ── attacks ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def carriers(me: str) -> list[tuple[str, bytes, dict[str, str]]]:
    """Requests `me` may send, that change nothing by themselves, and whose answers an attacker would like to aim."""
    refused_by_stream = {"Nats-Expected-Last-Subject-Sequence": "999999"}
    if me == "acme":
        return [
            ("hub.docs.list.acme", b"", {}),
            ("hub.docs.stream.acme", b"x", refused_by_stream),
            ("$O.DOCS_acme.C.x", b"x", refused_by_stream),
        ]
    return [
        (f"hub.plans.list.{me}", b"", {}),
        ("hub.agents.list", b"", {}),
        (f"hub.route.{me}", b"no json", {}),
        (f"$JS.API.CONSUMER.MSG.NEXT.PLANS.{me}", b'{"batch": 1, "no_wait": true}', {}),
        (f"$JS.API.DIRECT.GET.OUTCOMES.hub.outcome.{me}.nothing", b"", {}),
        (f"$JS.ACK.PLANS.{me}.1.999999.999999.1.0", b"+ACK", {}),
        (f"hub.result.{me}.p.s", b"{}", refused_by_stream),
    ]


def targets(others: list[str]) -> list[str]:
    """Subjects on which a message would do harm."""
    return [
        *(f"$JS.API.STREAM.{verb}.{stream}" for verb in ("PURGE", "DELETE") for stream in STREAMS[:2]),
        *(f"hub.{kind}.{other}.p9.s9" for kind in ("plan", "result") for other in others),
        *(f"hub.outcome.{other}.p9" for other in others),
        *(f"_INBOX.{other}.x.y" for other in others),
        "hub.docs.stream.globex",
        "hub.dlq.DOCS.acme",
        "$KV.HUB_AGENTS.finance",
    ]


def intrusions(others: list[str]) -> list[tuple[str, bytes, dict[str, str]]]:
    """Things `me` may not ask for at all."""
    presence = b'{"instance": "x"}'
    card = b'{"capabilities": ["evil"]}'
    question = b'{"query": "budget?"}'
    found = [
        ("hub.route.*", question, {}),
        ("hub.route.>", question, {}),
        ("hub.docs.ingest", b"text", {"Hub-Client": "globex"}),
        ("hub.docs.ingest.globex", b"text", {}),
        ("hub.docs.stream.globex", b"text", {}),
        ("hub.docs.list.globex", b"", {}),
        ("$O.DOCS_globex.C.x", b"x", {}),
        ("$KV.HUB_AGENTS.finance", b"{}", {}),
        ("$KV.HUB_PLANS.p", b"{}", {}),
        ("hub.dlq.DOCS.acme", b"{}", {}),
        ("hub.docs.receipt.acme.d", b"{}", {}),
        ("$JS.API.CONSUMER.CREATE.PLANS", b'{"stream_name": "PLANS", "config": {"ack_policy": "none"}}', {}),
        ("$JS.API.STREAM.CREATE.EVIL", b'{"name": "EVIL", "subjects": ["hub.evil"], "sources": [{"name": "PLANS"}]}', {}),
        *(
            (f"$JS.API.STREAM.{verb}.{s}", body, {})
            for s in STREAMS
            for verb, body in (("PURGE", b""), ("DELETE", b""), ("MSG.GET", b'{"seq": 1}'), ("INFO", b""))
        ),
    ]
    for other in others:
        found += [
            (f"hub.route.{other}", question, {}),
            (f"hub.plan.{other}.p9.s9", b"{}", {}),
            (f"hub.result.{other}.p9.s9", b'{"status": "done"}', {}),
            (f"hub.outcome.{other}.p9", b"{}", {}),
            (f"hub.plans.list.{other}", b"", {}),
            (f"hub.agents.register.{other}", card, {}),
            (f"hub.agents.leave.{other}", presence, {}),
            (f"$JS.API.CONSUMER.MSG.NEXT.PLANS.{other}", b'{"batch": 1, "no_wait": true}', {}),
            (f"$JS.API.DIRECT.GET.OUTCOMES.hub.outcome.{other}.p", b"", {}),
            (f"$JS.ACK.PLANS.{other}.1.1.1.1.0", b"+TERM", {}),
            (f"$JS.API.CONSUMER.DELETE.PLANS.{other}", b"", {}),
        ]
    return found


async def snapshot(core: JetStream) -> dict[str, Any]:
    """Everything an attack could change."""
    found: dict[str, Any] = {}
    for stream in STREAMS:
        info = await core.api(f"STREAM.INFO.{stream}")
        found[stream] = {**info["state"], **info["config"]}
        found[stream].pop("num_subjects", None)
    for agent in AGENTS:
        info = await core.api(f"CONSUMER.INFO.PLANS.{agent}")
        found[f"ack floor of {agent}"] = info["ack_floor"]
    return found


def granted(reply: Msg) -> bool:
    """An attempt succeeds where anything but a refusal comes back."""
    status = (reply.headers or {}).get("Status", "")
    with contextlib.suppress(ValueError):
        return "error" not in json.loads(reply.data)
    return not status.startswith(("4", "5"))


async def attempt(nc: Nats, subject: str, body: bytes, headers: dict[str, str]) -> bool:
    try:
        return granted(await nc.request(subject, body, timeout=1, headers=headers or None))
    except Exception:  # no responders, timeout: nothing came back
        return False


async def test_nobody_can_act_for_another_and_no_forged_reply_lands(bus: Secured, core: JetStream) -> None:
    async with contextlib.AsyncExitStack() as stack:
        # A step waits for every agent, so there is something to steal.
        asker = await stack.enter_async_context(Client(bus.url, agent="ceo", **bus.access("ceo")))
        await asker.route("Compare budget, campaign and sales pipeline")
        everyone = {n: await stack.enter_async_context(raw(bus.url, **bus.access(n))) for n in EVERYBODY}
        watched: dict[str, list[str]] = {name: [] for name in EVERYBODY}
        for name, nc in everyone.items():

            async def overheard(msg: Msg, seen: list[str] = watched[name]) -> None:
                seen.append(msg.subject)

            await nc.subscribe(">", cb=overheard)
            await nc.flush()
        before = await snapshot(core)
        attempts = 0
        succeeded: list[tuple[str, str]] = []
        for me, nc in everyone.items():
            others = [a for a in AGENTS if a != me]
            heard = {name: len(seen) for name, seen in watched.items() if name != me}
            tried = intrusions(others)
            worked = await asyncio.gather(*(attempt(nc, *one) for one in tried))
            succeeded += [(me, one[0]) for one, got in zip(tried, worked, strict=True) if got]
            for (subject, body, headers), target in itertools.product(carriers(me), targets(others)):
                await nc.publish(subject, body, reply=target, headers=headers or None)
            attempts += len(tried) + len(carriers(me)) * len(targets(others))
            # What was forged is answered once everybody's honest requests after it are.
            for name, other in everyone.items():
                await other.flush()
                await other.request(carriers(name)[0][0], b"", timeout=20)
            for name, count in heard.items():
                succeeded += [(me, subject) for subject in watched[name][count:] if not honest(subject, name)]
        after = await snapshot(core)
    print(f"{attempts} attempts, {len(succeeded)} succeeded")
    assert after == before
    assert attempts >= 100
    assert succeeded == []


def honest(subject: str, name: str) -> bool:
    """The request above, and its answer, as a subscription to everything hears them."""
    return subject == carriers(name)[0][0] or (subject.startswith("_INBOX.") and not subject.endswith(".x.y"))


async def test_nobody_hears_what_is_not_theirs(bus: Secured) -> None:
    """`>` is everything of one's own account: of another's plans, steps, answers and documents, nothing."""
    async with contextlib.AsyncExitStack() as stack:
        heard: dict[str, list[str]] = {name: [] for name in EVERYBODY}
        for name in EVERYBODY:
            nc = await stack.enter_async_context(raw(bus.url, **bus.access(name)))

            async def hear(msg: Msg, into: list[str] = heard[name]) -> None:
                into.append(msg.subject)

            for subject in (">", "hub.>", "_INBOX.>", "$JS.>", "_R_.>"):
                await nc.subscribe(subject, cb=hear)
            await nc.flush()
        async with spoke(bus, "sales"), Client(bus.url, agent="marketing", **bus.access("marketing")) as marketing:
            decision = await marketing.route("How does the sales pipeline look?")
            await marketing.outcome(decision.plan_id, timeout_s=60)
        for name in EVERYBODY:
            mine = (f"hub.outcome.{name}.", f"hub.docs.receipt.{name}.")
            foreign = [s for s in heard[name] if not s.startswith(mine)]
            if name in ("sales", "marketing"):  # what they asked, and what they were answered
                foreign = [s for s in foreign if name not in s and not s.startswith(("_INBOX.", "_R_.", "hub.agents.list"))]
            assert foreign == [], name


ONE_ACCOUNT = """
jetstream { store_dir: $NATS_STORE_DIR }
authorization { users: [
  { user: "hub-core", password: $HUB_CORE_PASSWORD }
  { user: "finance", password: $FINANCE_PASSWORD, permissions: {
      publish: { allow: ["$JS.API.CONSUMER.MSG.NEXT.PLANS.finance"] }, subscribe: { allow: ["_INBOX.finance.>"] } } }
] }
"""


async def test_why_there_is_an_account_for_everyone(tmp_path: Path) -> None:
    """In one account, the right to take one's own steps is the right to purge every stream: the server answers a pull that
    finds nothing with an empty message, to whatever reply subject the asker named. Should this test fail one day, the server
    has learned to check reply subjects, and nats.conf may become simpler."""
    conf = tmp_path / "one.conf"
    conf.write_text(ONE_ACCOUNT)
    bus = Secured(tmp_path, conf)
    try:
        link = Link(Access(bus.url, "test", **bus.access("hub-core")))
        await link.open()
        js = JetStream(link)
        await js.ensure_stream({"name": "PLANS", "subjects": ["hub.plan.*.*.*"]})
        await js.ensure_stream({"name": "VICTIM", "subjects": ["victim"]})
        consumer = {"durable_name": "finance", "filter_subject": "hub.plan.finance.*.*", "ack_policy": "explicit"}
        await js.ensure_consumer("PLANS", consumer)
        await js.publish("victim", b"precious")
        async with raw(bus.url, inbox_prefix="_INBOX.finance", **bus.access("finance")) as finance:
            pull = b'{"batch": 1, "no_wait": true}'
            await finance.publish("$JS.API.CONSUMER.MSG.NEXT.PLANS.finance", pull, reply="$JS.API.STREAM.PURGE.VICTIM")
            await finance.flush()
            async with asyncio.timeout(20):
                while (await js.stream_state("VICTIM"))["messages"]:
                    await asyncio.sleep(0.02)
        await link.close()
    finally:
        bus.stop()
