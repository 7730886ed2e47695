"""A question becomes a plan, a plan becomes an outcome; seen by a client that knows only the contract."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.flow.running import Bare, Hub, bare

ROI = "I need ROI analysis for our Q4 holiday marketing campaign to validate budget allocation"
ACQUIRE = (
    "Should we acquire Company X? I need comprehensive analysis of financial impact, market implications, "
    "and integration complexity"
)
REALLOCATE = "How should I reallocate my Q1 marketing budget across digital channels for maximum ROI?"

SPECIFIED = {
    "workflow_type", "agents", "reasoning", "estimated_time_minutes", "conflict_resolution", "routed_at", "requesting_agent",
    "original_query", "routing_method", "fallback_used",
}  # fmt: skip


async def test_the_answer_has_the_specified_fields(client: Bare) -> None:
    decision = await client.route("finance", ROI, dispatch=False)
    assert set(decision) >= SPECIFIED
    assert [set(a) for a in decision["agents"]] == [{"agent", "task", "priority", "depends_on", "data_needed"}]
    routed = datetime.fromisoformat(decision["routed_at"])
    assert routed.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - routed) < timedelta(minutes=1)
    assert decision["requesting_agent"] == "finance"
    assert decision["original_query"] == ROI
    assert decision["routing_method"] == "fallback_keywords"
    assert decision["fallback_used"] is True


@pytest.mark.parametrize(
    ("asker", "query", "agents"),
    [("finance", ROI, ["marketing"]), ("ceo", ACQUIRE, ["finance"]), ("marketing", REALLOCATE, ["finance"])],
)
async def test_what_the_fallback_gives_for_the_scenarios(client: Bare, asker: str, query: str, agents: list[str]) -> None:
    decision = await client.route(asker, query, dispatch=False)
    assert [a["agent"] for a in decision["agents"]] == agents
    assert decision["workflow_type"] == "single"
    assert decision["estimated_time_minutes"] == 3


async def test_several_keywords_give_a_chain_in_the_specified_order(client: Bare) -> None:
    decision = await client.route("ceo", "Which deals did the campaign bring, and at what cost?", dispatch=False)
    assert [(a["agent"], a["depends_on"], a["priority"]) for a in decision["agents"]] == [
        ("finance", [], 1),
        ("marketing", ["finance"], 2),
        ("sales", ["marketing"], 3),
    ]
    assert decision["workflow_type"] == "sequential"
    assert decision["conflict_resolution"] == "consensus_required"
    assert decision["estimated_time_minutes"] == 9


@pytest.mark.parametrize("asker", ["finance", "marketing", "sales", "ceo"])
@pytest.mark.parametrize("query", ["budget cost campaign sales board", "hello there", "onboarding of new people"])
async def test_nobody_is_handed_their_own_question(client: Bare, asker: str, query: str) -> None:
    decision = await client.route(asker, query, dispatch=False)
    assert asker not in [a["agent"] for a in decision["agents"]]


async def test_where_nothing_matches_the_default_agent_is_asked_and_the_answer_says_so(client: Bare) -> None:
    decision = await client.route("sales", "hello there", dispatch=False)
    assert [a["agent"] for a in decision["agents"]] == ["finance"]
    assert "default" in decision["reasoning"]
    decision = await client.route("finance", "hello there", dispatch=False)
    assert [a["agent"] for a in decision["agents"]] == ["ceo"]


async def test_a_bare_client_plays_both_sides_to_the_outcome(client: Bare) -> None:
    decision = await client.route("ceo", "Compare the cost with the pipeline", context={"quarter": 3})
    first = await client.step("finance")
    body = json.loads(first.data)
    assert first.subject == f"hub.plan.finance.{decision['plan_id']}.{body['step_id']}"
    assert body["plan"]["original_query"] == "Compare the cost with the pipeline"
    assert body["context"] == {"quarter": 3}
    assert body["results"] == {}
    await client.answer(first, result={"eur": 5}, verdict="approve")
    second = await client.step("sales")
    body = json.loads(second.data)
    assert body["results"]["finance"]["result"] == {"eur": 5}
    await client.answer(second, result="fine", verdict="reject")
    outcome = await client.outcome(decision)
    assert outcome["status"] == "done"
    assert [(s["agent"], s["status"], s["result"]) for s in outcome["steps"]] == [
        ("finance", "done", {"eur": 5}),
        ("sales", "done", "fine"),
    ]
    assert outcome["conflict"]["status"] == "open"  # consensus was required, and there is none
    assert outcome["conflict"]["verdicts"] == {"finance": "approve", "sales": "reject"}


async def test_one_failed_step_keeps_what_the_others_found(client: Bare) -> None:
    decision = await client.route("ceo", "Compare the cost with the pipeline")
    await client.answer(await client.step("finance"), "failed", error="no figures")
    outcome = await client.outcome(decision)
    assert outcome["status"] == "failed"
    assert [(s["agent"], s["status"]) for s in outcome["steps"]] == [("finance", "failed"), ("sales", "skipped")]
    assert "no figures" in outcome["reason"]


async def test_a_dry_run_publishes_nothing_until_it_is_approved(client: Bare) -> None:
    decision = await client.route("ceo", "what did the budget do", dispatch=False)
    assert decision["state"] == "proposed"
    body = {"plan_id": decision["plan_id"]}
    shown = await client.reply("hub.plans.show.ceo", body)
    assert shown["plan"]["state"] == "proposed"
    assert [s["status"] for s in shown["plan"]["steps"]] == ["waiting"]
    assert (await client.reply("hub.plans.approve.ceo", body))["plan"]["state"] == "running"
    step = await client.step("finance")
    assert decision["plan_id"] in step.subject
    await client.answer(step, result=1)
    assert (await client.outcome(decision))["status"] == "done"
    assert await client.code("hub.plans.approve.ceo", body) == "plan_finished"


async def test_a_canceled_plan_takes_its_steps_back_and_ignores_late_results(client: Bare) -> None:
    decision = await client.route("ceo", "what did the budget do")
    body = {"plan_id": decision["plan_id"]}
    assert (await client.reply("hub.plans.cancel.ceo", {**body, "reason": "changed my mind"}))["plan"]["state"] == "canceled"
    outcome = await client.outcome(decision)
    assert (outcome["status"], outcome["reason"]) == ("canceled", "changed my mind")
    assert not await pending(client, f"hub.plan.*.{decision['plan_id']}.*")
    late = f"hub.result.finance.{decision['plan_id']}.1"
    await client.js.publish(late, b'{"status":"done","result":1}')
    again = await client.route("ceo", "what did the budget do")  # a later plan goes through behind it
    await client.answer(await client.step("finance"), result=2)
    assert (await client.outcome(again))["status"] == "done"
    assert (await client.reply("hub.plans.show.ceo", body))["plan"]["state"] == "canceled"
    assert await client.code("hub.plans.cancel.ceo", body) == "plan_finished"


async def pending(client: Bare, subject: str) -> dict[str, int]:
    info = await client.js.stream_info("PLANS", subjects_filter=subject)
    return dict(info.state.subjects or {})


async def test_plans_are_listed_to_their_asker_only(client: Bare) -> None:
    decision = await client.route("sales", "which campaign was it", dispatch=False)
    body = {"plan_id": decision["plan_id"]}
    mine = (await client.reply("hub.plans.list.sales", {"state": "proposed"}))["plans"]
    assert decision["plan_id"] in [p["plan_id"] for p in mine]
    others = (await client.reply("hub.plans.list.marketing"))["plans"]
    assert decision["plan_id"] not in [p["plan_id"] for p in others]
    for verb in ("show", "cancel", "approve"):
        assert await client.code(f"hub.plans.{verb}.marketing", body) == "not_found"
    assert await client.code("hub.plans.show.sales", {"plan_id": "p" + "0" * 24}) == "not_found"


async def test_the_same_request_id_gives_the_same_plan_and_its_steps_once(client: Bare) -> None:
    headers = {"Hub-Request-Id": "once-and-only"}
    body = {"query": "what did the campaign bring"}
    answers = await asyncio.gather(*(client.reply("hub.route.ceo", body, headers) for _ in range(8)))
    ids = {a["routing_decision"]["plan_id"] for a in answers}
    assert len(ids) == 1
    assert await client.code("hub.route.ceo", {"query": "another question"}, headers) == "conflict"
    step = await client.step("marketing")
    await client.answer(step, result=1)
    assert (await client.outcome(answers[0]["routing_decision"]))["status"] == "done"
    assert len(await pending(client, f"hub.plan.marketing.{ids.pop()}.*")) == 1


async def test_a_question_that_would_come_back_is_refused_with_its_path(client: Bare) -> None:
    asked = {"query": "what does the campaign cost"}
    answer = await client.reply("hub.route.sales", asked, {"Hub-Call-Path": "marketing"})
    assert answer["error"]["code"] == "call_loop"
    assert "marketing -> sales -> marketing" in answer["error"]["message"]
    assert await client.code("hub.route.sales", asked, {"Hub-Call-Path": "sales,ceo"}) == "call_loop"
    assert (await client.reply("hub.route.sales", {**asked, "dispatch": False}, {"Hub-Call-Path": "ceo"}))[
        "status"
    ] == "success"


async def test_steps_carry_the_path_the_question_took(client: Bare) -> None:
    await client.reply("hub.route.sales", {"query": "which campaign"}, {"Hub-Call-Path": "ceo"})
    step = await client.step("marketing")
    assert step.headers is not None
    assert step.headers["Hub-Call-Path"] == "ceo,sales"
    await client.answer(step, result=None)


async def test_what_is_no_result_goes_to_the_dead_letters_and_the_plan_goes_on(client: Bare) -> None:
    decision = await client.route("ceo", "what did the budget do")
    step = await client.step("finance")
    subject = step.subject.replace("hub.plan.", "hub.result.", 1)
    letters = await client.nc.subscribe("hub.dlq.RESULTS.*")
    for bad, code in [
        (b"not json", "bad_json"),
        (b'{"status":"perhaps"}', "bad_value"),
        (b'{"status":"done","result":"' + b"x" * 100_000 + b'"}', "field_too_long"),
    ]:
        await client.js.publish(subject, bad)
        letter = json.loads((await letters.next_msg(timeout=20)).data)
        assert letter["error"]["code"] == code
        assert letter["subject"] == subject
    for wrong in (f"hub.result.sales.{decision['plan_id']}.1", "hub.result.finance.pnone.1", "hub.result.*.p1.1"):
        await client.js.publish(wrong, b'{"status":"done"}')
        letter = json.loads((await letters.next_msg(timeout=20)).data)
        assert letter["error"]["code"] in ("not_found", "bad_agent_id")
    await client.answer(step, result="right")
    assert (await client.outcome(decision))["steps"][0]["result"] == "right"


# ── agents ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_agent_registers_is_asked_and_expires(client: Bare) -> None:
    card = {"capabilities": ["contract_review"], "specialties": ["liability"], "heartbeat_s": 2}
    registered = await client.reply("hub.agents.register.legal", card)
    assert (registered["stream"], registered["consumer"]) == ("PLANS", "legal")
    ask = {"query": "who checks the contract for liability", "dispatch": False}
    decision = (await client.reply("hub.route.ceo", ask))["routing_decision"]
    assert [a["agent"] for a in decision["agents"]] == ["legal"]
    async with asyncio.timeout(20):
        while (await client.reply("hub.agents.show.legal"))["agent"]["state"] != "expired":
            await asyncio.sleep(0.05)
    decision = (await client.reply("hub.route.ceo", ask))["routing_decision"]
    assert "legal" not in [a["agent"] for a in decision["agents"]]
    assert (await client.reply("hub.agents.heartbeat.legal"))["agent"]["state"] == "live"


async def test_an_agent_that_leaves_is_not_asked(client: Bare) -> None:
    for instance in ("one", "two"):
        await client.reply("hub.agents.register.harbour", {"capabilities": ["berth_allocation"], "instance": instance})
    assert (await client.reply("hub.agents.leave.harbour", {"instance": "one"}))["agent"]["state"] == "live"
    assert (await client.reply("hub.agents.leave.harbour", {"instance": "two"}))["agent"]["state"] == "left"
    decision = await client.route("ceo", "which berth allocation", dispatch=False)
    assert "harbour" not in [a["agent"] for a in decision["agents"]]


async def test_the_default_cards_are_the_specifications(client: Bare) -> None:
    agents = {a["agent"]: a for a in (await client.reply("hub.agents.list"))["agents"]}
    assert agents["finance"]["capabilities"] == ["financial_analysis", "budget_planning", "roi_calculation", "risk_assessment"]
    assert agents["marketing"]["specialties"] == ["digital_marketing", "content_strategy", "customer_acquisition"]
    assert agents["sales"]["capabilities"] == [
        "pipeline_forecasting", "deal_analysis", "performance_analysis", "territory_planning",
    ]  # fmt: skip
    assert agents["ceo"]["specialties"] == ["strategic_planning", "competitive_intelligence", "executive_decision_support"]
    assert (await client.reply("hub.agents.list.finance"))["agents"]


# ── with a scripted model ───────────────────────────────────────────────────────────────────────────────────────────────


def part(agent: str, *depends_on: str) -> dict[str, Any]:
    return {"agent": agent, "task": f"{agent}'s part", "depends_on": list(depends_on), "data_needed": ["figures"]}


SCRIPT = {
    "plans": {
        ROI: {"draft": {"agents": [part("marketing")], "reasoning": "it is their campaign", "confidence": 0.9}},
        ACQUIRE: {
            "draft": {
                "agents": [part("finance"), part("sales"), part("marketing", "sales")],
                "conflict_resolution": "finance_priority",
            }
        },
        REALLOCATE: {"draft": {"agents": [part("finance"), part("sales", "finance")], "conflict_resolution": "ceo_decides"}},
        "cycle of budget": {"draft": {"agents": [part("finance", "sales"), part("sales", "finance")]}},
        "yourself, budget": {"draft": {"agents": [part("ceo")]}},
        "invented, budget": {"draft": {"agents": [part("wizard")]}},
        "late, budget": {"draft": {"agents": [part("sales")]}, "wait_s": 60},
        "full, budget": {"error": "queue_full"},
        "broken, budget": {"error": "internal"},
    }
}


#: A short deadline, and behind the model nothing but the keyword rule.
SCRIPTED = {"HUBPEER_ROUTING__DEADLINE_S": "4", "HUBPEER_MODEL__ENCODER": "false"}


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("scripted")
    script = folder / "script.json"
    script.write_text(json.dumps(SCRIPT))
    hub = Hub(folder / "data", "--model", f"scripted:{script}", environ=SCRIPTED).start()
    yield hub
    assert hub.stop() == 0


async def test_scenario_1_reaches_its_outcome(scripted: Hub) -> None:
    async with bare(scripted.url) as client:
        decision = await client.route("finance", ROI)
        assert (decision["routing_method"], decision["confidence"]) == ("llm_intelligent", 0.9)
        assert "fallback_used" not in decision
        step = await client.step("marketing")
        assert json.loads(step.data)["task"] == "marketing's part"
        await client.answer(step, result={"roi": 2.1})
        assert (await client.outcome(decision))["steps"][0]["result"] == {"roi": 2.1}


async def test_scenario_2_runs_two_in_parallel_and_one_behind(scripted: Hub) -> None:
    async with bare(scripted.url) as client:
        decision = await client.route("ceo", ACQUIRE)
        assert decision["workflow_type"] == "parallel"
        assert {a["agent"]: a["priority"] for a in decision["agents"]} == {"finance": 1, "sales": 1, "marketing": 2}
        finance, sales = await client.step("finance"), await client.step("sales")  # both are out before either is done
        assert not await pending(client, f"hub.plan.marketing.{decision['plan_id']}.*")
        await client.answer(sales, result="pipeline fits", verdict="buy")
        marketing = await client.step("marketing")  # needs sales only
        assert json.loads(marketing.data)["results"] == {
            "sales": {"step_id": "2", "status": "done", "result": "pipeline fits", "verdict": "buy"}
        }
        await client.answer(marketing, result="brand fits", verdict="buy")
        await client.answer(finance, result="too dear", verdict="do not buy")
        outcome = await client.outcome(decision)
        assert outcome["status"] == "done"
        assert outcome["conflict"] == {
            "rule": "finance_priority", "status": "decided", "verdict": "do not buy", "decided_by": "finance",
            "verdicts": {"finance": "do not buy", "sales": "buy", "marketing": "buy"},
        }  # fmt: skip


async def test_scenario_3_runs_one_after_the_other_and_the_ceo_decides(scripted: Hub) -> None:
    async with bare(scripted.url) as client:
        decision = await client.route("marketing", REALLOCATE)
        assert decision["workflow_type"] == "sequential"
        await client.answer(await client.step("finance"), result="less", verdict="cut")
        await client.answer(await client.step("sales"), result="more", verdict="grow")
        last = await client.step("ceo")
        results = json.loads(last.data)["results"]
        assert {agent: r["verdict"] for agent, r in results.items()} == {"finance": "cut", "sales": "grow"}
        await client.answer(last, result="grow, but slowly", verdict="grow")
        conflict = (await client.outcome(decision))["conflict"]
        assert (conflict["status"], conflict["decided_by"], conflict["verdict"]) == ("decided", "ceo", "grow")


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("cycle of budget", "rejected_cycle"),
        ("yourself, budget", "rejected_self_route"),
        ("invented, budget", "rejected_unknown_agent"),
        ("late, budget", "deadline_passed"),
        ("full, budget", "queue_full"),
        ("broken, budget", "internal"),
    ],
)
async def test_a_model_that_is_wrong_late_or_full_falls_to_the_keywords_in_time(scripted: Hub, query: str, reason: str) -> None:
    async with bare(scripted.url) as client:
        decision = await client.route("ceo", query, dispatch=False)
        assert decision["routing_method"] == "fallback_keywords"
        assert decision["fallback_used"] is True
        assert decision["fallback_reason"] == reason
        assert [a["agent"] for a in decision["agents"]] == ["finance"]
