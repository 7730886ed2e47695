"""What a fresh hub does, with nothing configured: the encoder inside the package plans and categorizes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flow.running import Bare, Hub, bare

QUESTION = "Compare the cost of the spring campaign with the pipeline it brought"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    started = Hub(tmp_path_factory.mktemp("builtin") / "data", "--model", "builtin").start()
    yield started
    assert started.stop() == 0
    assert "Traceback" not in started.log.read_text()


async def test_a_question_is_planned_by_the_encoder_and_runs(client: Bare) -> None:
    decision = await client.route("ceo", QUESTION)
    assert decision["routing_method"] == "builtin_encoder"
    assert "fallback_used" not in decision
    assert 0 < decision["confidence"] <= 1
    assert {step["agent"] for step in decision["agents"]} <= {"finance", "marketing", "sales"}
    assert all(step["task"] for step in decision["agents"])
    first = next(step["agent"] for step in decision["agents"] if not step["depends_on"])
    assert decision["plan_id"] in (await client.step(first)).subject


async def test_one_that_nobody_fits_is_said_to_fit_nobody(client: Bare) -> None:
    assert await client.code("hub.route.ceo", {"query": "my grandmother's plum cake recipe, how many eggs?"}) == "no_match"


async def test_a_document_is_categorized_by_the_encoder(client: Bare) -> None:
    text = b"Invoice 2026-118. Amount due: 12,400 EUR, VAT included. Payment within 30 days to the account below. Thank you."
    receipt = await client.reply("hub.docs.ingest.acme", text, {"Hub-Filename": "i.txt", "Hub-Wait": "categorized"})
    assert receipt["categorization"]["method"] == "builtin_encoder"
    assert receipt["categorization"]["category"] == "invoice"


async def test_the_status_names_it(client: Bare) -> None:
    status = await client.reply("hub.status")
    assert (status["model_name"], status["model_loaded"]) == ("builtin", True)
    assert status["bus"]["checks"]["model"] == "ok"
    assert status["memory_usage_mb"] > 0


async def test_behind_a_language_model_it_is_the_first_fallback(tmp_path: Path) -> None:
    script = tmp_path / "script.json"
    script.write_text(json.dumps({"plans": {}}))
    behind = Hub(tmp_path / "data", "--model", f"scripted:{script}").start()
    async with bare(behind.url) as client:
        decision = await client.route("ceo", QUESTION, dispatch=False)
        assert (decision["routing_method"], decision["fallback_used"]) == ("builtin_encoder", True)
        assert decision["fallback_reason"] == "model_unavailable"
        status = await client.reply("hub.status")
        assert (status["model_name"], status["model"]["encoder"]["model_name"]) == ("scripted", "builtin")
    assert behind.stop() == 0


async def test_a_decision_can_be_made_again(client: Bare) -> None:
    decision = await client.route("ceo", QUESTION, dispatch=False)
    again = await client.reply("hub.plans.replay.ceo", {"plan_id": decision["plan_id"]})
    assert again["status"] == "success"
    assert again["recorded"]["agents"] == again["now"]["agents"] == decision["agents"]
    assert (again["differences"], again["model_changed"]) == ([], False)
    trace = again["trace"]
    assert trace["model"] == "builtin"
    assert len(trace["revision"]) == 12
    assert set(trace["cards"]) == {"finance", "marketing", "sales"}
    # Somebody else's plan is as unknown as one that never was.
    assert await client.code("hub.plans.replay.sales", {"plan_id": decision["plan_id"]}) == "not_found"


async def test_another_model_decides_otherwise_and_replay_says_so(tmp_path: Path) -> None:
    hub = Hub(tmp_path / "data", "--model", "none").start()
    async with bare(hub.url) as client:
        decision = await client.route("ceo", "roi", dispatch=False)
        assert decision["routing_method"] == "fallback_keywords"
        routed = (await client.reply("hub.status"))["routing"]["counts"]
        again = await client.reply("hub.plans.replay.ceo", {"plan_id": decision["plan_id"]})
        assert (again["differences"], again["model_changed"]) == ([], False)
        assert (await client.reply("hub.status"))["routing"]["counts"] == routed, "a replay is no routed question"
        # Cards too large to keep with the plan: it is planned all the same, and nothing is recorded.
        for number in range(20):
            words = [f"{number}_{word}".ljust(64, "x") for word in range(64)]
            await client.reply(f"hub.agents.register.big{number}", {"capabilities": words, "heartbeat_s": 3600})
        large = await client.route("ceo", "roi", dispatch=False)
        assert await client.code("hub.plans.replay.ceo", {"plan_id": large["plan_id"]}) == "not_found"
    assert hub.stop() == 0
    hub.options = ("--model", "builtin")
    hub.start()
    async with bare(hub.url) as client:
        again = await client.reply("hub.plans.replay.ceo", {"plan_id": decision["plan_id"]})
        assert (again["trace"]["model"], again["recorded"]["routing_method"]) == ("keywords", "fallback_keywords")
        assert again["model_changed"] is (again["now"] is not None and again["now"]["routing_method"] == "builtin_encoder")
        assert again["differences"]
    assert hub.stop() == 0
