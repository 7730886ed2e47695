"""The scripted model says what its script says."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from hubpeer import settings as config
from hubpeer.errors import Busy, HubError, SettingsError, Unavailable
from hubpeer.model import DocAsk, DraftStep, PlanAsk, PlanDraft, open_model
from hubpeer.model.scripted import Entry, ScriptedModel

ASK = PlanAsk("ceo", "why?", {}, ["ceo_decides"])
DRAFT = PlanDraft([DraftStep("sales", "look")], "ceo_decides", "because")


async def test_a_script_is_read_from_its_file(tmp_path: Path) -> None:
    record = {
        "category": "contract", "confidence": 0.5, "summary": "s", "sensitivity": "internal", "relevant_agents": [],
        "key_entities": [], "method": "llm_intelligent",
    }  # fmt: skip
    file = tmp_path / "script.json"
    file.write_text(
        json.dumps(
            {
                "plans": {"why?": {"draft": {"agents": [{"agent": "sales", "task": "look"}]}}, "*": {"error": "queue_full"}},
                "documents": {"a.pdf": {"categorization": record}},
            }
        )
    )
    model = await open_model(config.Model(name=f"scripted:{file}"))
    assert model is not None
    assert (await model.plan(ASK, time.monotonic() + 9)).agents == [DraftStep("sales", "look")]
    with pytest.raises(Busy) as busy:
        await model.plan(PlanAsk("ceo", "what?", {}, []), time.monotonic() + 9)
    assert busy.value.retry_after_ms
    assert (await model.categorize(DocAsk("acme", "t", {}, [], filename="a.pdf"), None)).category == "contract"
    with pytest.raises(Unavailable):
        await model.categorize(DocAsk("acme", "t", {}, [], filename="b.pdf"), None)
    assert model.status()["model_name"] == "scripted"
    await model.close()
    with pytest.raises(Unavailable):
        await model.plan(ASK, time.monotonic() + 9)


@pytest.mark.parametrize("text", ["{", '{"plan": {}}', '{"plans": {"x": {"error": "nonsense"}}}'])
async def test_a_wrong_script_says_so(tmp_path: Path, text: str) -> None:
    file = tmp_path / "script.json"
    file.write_text(text)
    with pytest.raises(SettingsError, match=r"script\.json"):
        await open_model(config.Model(name=f"scripted:{file}"))
    with pytest.raises(SettingsError, match="cannot be read"):
        await open_model(config.Model(name=f"scripted:{tmp_path}/none.json"))


async def test_a_deadline_comes_before_a_slow_answer() -> None:
    model = ScriptedModel({"why?": Entry(draft=DRAFT, wait_s=60)})
    with pytest.raises(HubError) as late:
        await model.plan(ASK, time.monotonic() + 0.01)
    assert late.value.code == "deadline_passed"
    assert model.asked == [ASK]


async def test_none_is_no_model() -> None:
    assert await open_model(config.Model(name="none")) is None
