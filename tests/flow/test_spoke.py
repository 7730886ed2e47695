"""The SDK: a spoke takes steps, reports, reconnects, leaves; a client asks."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from hubpeer.client import Client
from hubpeer.errors import HubError
from hubpeer.spoke import Done, Spoke, Step, StepFailed
from tests.flow.running import Hub, bare


def spoke(hub: Hub, agent: str, capabilities: list[str], work: Any, **options: Any) -> Spoke:
    made = Spoke(agent, capabilities, url=hub.url, **options)
    made.step(work)
    return made


async def test_a_spoke_answers_and_another_asks(hub: Hub) -> None:
    async def count(step: Step) -> Done:
        await step.progress("counting")
        return Done({"berths": 4, "asked": step.requesting_agent, "context": step.context}, verdict="go")

    async with spoke(hub, "pier", ["berth_allocation"], count), spoke(hub, "captain", ["ship_steering"], count) as captain:
        outcome = await captain.ask("how is the berth allocation", {"day": 2}, timeout_s=30)
        assert outcome.status == "done"
        [step] = outcome.steps
        assert (step.agent, step.status, step.verdict) == ("pier", "done", "go")
        assert step.result == {"berths": 4, "asked": "captain", "context": {"day": 2}}
    async with Client(hub.url) as client:
        assert {a.agent: a.state for a in await client.agents()}["pier"] == "left"


async def test_a_failing_step_says_so_without_its_inner_text(hub: Hub) -> None:
    async def fail(step: Step) -> None:
        if "deliberate" in step.query:
            raise StepFailed("no crane today")
        raise ValueError("password=hunter2")

    async def idle(step: Step) -> None: ...

    async with spoke(hub, "crane", ["crane_lifting"], fail), spoke(hub, "foreman", ["crew_rota"], idle) as foreman:
        outcome = await foreman.ask("deliberate crane failure", timeout_s=30)
        assert (outcome.status, outcome.steps[0].error) == ("failed", "no crane today")
        outcome = await foreman.ask("crane accident", timeout_s=30)
        assert outcome.steps[0].error == "the agent failed: ValueError"


async def test_a_question_within_a_step_that_loops_is_refused(hub: Hub) -> None:
    codes: list[str] = []

    async def ask_back(step: Step) -> str:
        try:
            await step.ask("what about the lighthouse keeper")
        except HubError as exc:
            codes.append(exc.code)
        return "asked"

    async def idle(step: Step) -> None: ...

    async with spoke(hub, "lighthouse", ["lighthouse_keeper"], idle) as keeper, spoke(hub, "buoy", ["buoy_repair"], ask_back):
        assert (await keeper.ask("buoy repair please", timeout_s=30)).status == "done"
    assert codes == ["call_loop"]


async def test_steps_of_one_agent_are_shared_by_its_processes(hub: Hub) -> None:
    seen: dict[str, int] = {}

    def worker(name: str) -> Any:
        async def work(step: Step) -> str:
            seen[step.plan_id] = seen.get(step.plan_id, 0) + 1
            return name

        return work

    async def idle(step: Step) -> None: ...

    async with (
        spoke(hub, "winch", ["winch_pulling"], worker("one"), concurrency=1),
        spoke(hub, "winch", ["winch_pulling"], worker("two"), concurrency=1),
        spoke(hub, "deck", ["deck_washing"], idle) as deck,
    ):
        outcomes = await asyncio.gather(*(deck.ask(f"winch number {n}", timeout_s=60) for n in range(8)))
    assert [o.status for o in outcomes] == ["done"] * 8
    assert list(seen.values()) == [1] * 8


async def test_a_spoke_that_dies_over_a_step_hands_it_to_the_next(tmp_path: Path) -> None:
    hub = Hub(tmp_path / "data", environ={"HUBPEER_PLANS__ACK_WAIT_S": "1"}).start()
    begun = asyncio.Event()

    async def never(step: Step) -> None:
        begun.set()
        await asyncio.Event().wait()

    async def work(step: Step) -> str:
        return "done by the second"

    first = spoke(hub, "sales", ["pipeline"], never)
    await first.start()
    async with bare(hub.url) as client:
        decision = await client.route("ceo", "what is in the pipeline")
        await asyncio.wait_for(begun.wait(), 30)
        await first.client.link.close(drain_s=0.1)  # as if its machine were gone: no report, no ack, no goodbye
        async with spoke(hub, "sales", ["pipeline"], work):
            outcome = await client.outcome(decision, within_s=60)
    await first.stop(grace_s=0.1)
    assert outcome["steps"][0]["result"] == "done by the second"
    assert hub.stop() == 0


async def test_a_spoke_waits_for_a_hub_and_outlives_its_restart(tmp_path: Path) -> None:
    async def work(step: Step) -> str:
        return "still here"

    hub = Hub(tmp_path / "data").start()
    async with spoke(hub, "finance", ["budget"], work), bare(hub.url):
        hub.kill()
        hub.start()
        async with bare(hub.url) as again:
            decision = await again.route("ceo", "what did the budget do")
            assert (await again.outcome(decision, within_s=60))["status"] == "done"
    assert hub.stop() == 0


async def test_an_unfit_card_fails_at_home_not_on_the_bus() -> None:
    with pytest.raises(Exception, match="length"):
        Spoke("legal", ["x" * 65])
    with pytest.raises(HubError, match="bad_agent_id"):
        Spoke("Legal Dept", ["contracts"])


async def test_a_client_publishes_and_reads_documents(hub: Hub) -> None:
    async with Client(hub.url) as client:
        docs = client.docs("sdk")
        receipt = await docs.add(b"Minutes of the meeting", "m.txt", source_id="1", wait="categorized")
        assert receipt.state == "categorized"
        assert await docs.text(receipt.document_id) == "Minutes of the meeting"
        large = b"A long line of text.\n" * 60_000  # above what travels inline
        assert len(await docs.text((await docs.add(large, "large.txt")).document_id)) > 1_000_000
        assert await docs.stream(b"streamed", "s.txt") > 0
        with pytest.raises(HubError) as refused:
            await docs.add(b"%PDF-1.4 no", "x.pdf")
        assert refused.value.code == "bad_pdf"
        await docs.delete(receipt.document_id)
        with pytest.raises(HubError, match="not_found"):
            await docs.get(receipt.document_id)
