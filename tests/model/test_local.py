"""The asyncio side: opening, asking, canceling, failing, closing."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hubpeer import settings as config
from hubpeer import taxonomy
from hubpeer.errors import Busy, HubError, SettingsError, Unavailable
from hubpeer.model import DocAsk, open_model
from hubpeer.model.local import LocalModel

from .conftest import an_ask


@pytest.fixture
async def model(tiny: Path) -> AsyncIterator[LocalModel]:
    opened = await open_model(config.Model(name=str(tiny), dtype="fp32", threads=1, stuck_s=30))
    assert isinstance(opened, LocalModel)
    yield opened
    await opened.close()


def soon(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


async def until(condition, seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_questions_and_documents_are_answered_side_by_side(model: LocalModel) -> None:
    document = DocAsk("acme", "An invoice. " * 50, taxonomy.DEFAULT, ["finance"])
    plan, record = await asyncio.gather(model.plan(an_ask(), soon()), model.categorize(document, None))
    assert plan.agents
    assert record.category in taxonomy.DEFAULT
    status = model.status()
    assert status["jobs"]["finished"] == 2
    assert status["queue"]["running"] == 0
    assert status["memory"]["weights_bytes"] > 0
    assert status["memory"]["peak_bytes"] >= status["memory"]["resident_bytes"] > 0


async def test_nobody_to_ask_is_an_empty_draft(model: LocalModel) -> None:
    assert (await model.plan(an_ask(cards={}), soon())).agents == []


async def test_expected_asks_find_their_prefix(model: LocalModel) -> None:
    model.expect([an_ask()])
    await until(lambda: model.status()["prefix_cache"]["read_ahead"] == 1)
    await model.plan(an_ask(), soon())
    assert model.status()["prefix_cache"]["hits"] == 1


async def test_a_canceled_ask_frees_the_model(model: LocalModel) -> None:
    asked = asyncio.create_task(model.plan(an_ask(), soon()))
    await until(lambda: model.status()["queue"]["running"] == 1)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    await until(lambda: model.status()["queue"]["running"] == 0)
    assert model.status()["jobs"]["canceled"] == 1
    assert (await model.plan(an_ask(), soon())).agents


async def test_a_passed_deadline_is_told(model: LocalModel) -> None:
    with pytest.raises(HubError) as late:
        await model.plan(an_ask(), time.monotonic() + 0.001)
    assert late.value.code == "deadline_passed"
    assert (await model.plan(an_ask(), soon())).agents


async def test_too_many_asks_are_refused_with_a_time(tiny: Path) -> None:
    model = await open_model(config.Model(name=str(tiny), dtype="fp32", threads=1, queue=2))
    assert model is not None
    answers = await asyncio.gather(*(model.plan(an_ask(asker=f"a{i}"), soon()) for i in range(40)), return_exceptions=True)
    refused = [a for a in answers if isinstance(a, Busy)]
    assert refused
    assert all(b.code == "queue_full" and b.retry_after_ms for b in refused)
    assert len(refused) + sum(hasattr(a, "agents") for a in answers) == 40
    await model.close()


async def test_a_failed_step_reloads_the_model(model: LocalModel) -> None:
    def fail(feeds):
        raise RuntimeError("no more")

    model._engine.forward.run = fail
    with pytest.raises(Unavailable):
        await model.plan(an_ask(), soon())
    await until(lambda: model.status()["reloads"] == 1 and model.status()["loaded"])
    assert (await model.plan(an_ask(), soon())).agents


async def test_a_hung_step_is_left_behind(tiny: Path) -> None:
    model = await open_model(config.Model(name=str(tiny), dtype="fp32", threads=1, stuck_s=60))
    assert isinstance(model, LocalModel)
    release = threading.Event()
    hung = model._engine

    def hang(feeds):
        release.wait(60)
        raise RuntimeError("too late")

    hung.forward.run = hang
    first = asyncio.create_task(model.plan(an_ask(), soon()))
    await until(lambda: hung.step_began is not None)
    with pytest.raises(HubError) as late:
        await model.plan(an_ask(), time.monotonic() + 0.1)
    assert late.value.code == "deadline_passed"
    assert hung.step_began is not None
    hung.step_began -= 100  # as if it had begun long ago
    assert (await model.plan(an_ask(), soon())).agents
    with pytest.raises(Unavailable, match="hung"):
        await first
    assert model.status()["hangs"] == 1
    release.set()
    await model.close()


async def test_closing_ends_what_runs_and_may_be_done_twice(tiny: Path) -> None:
    model = await open_model(config.Model(name=str(tiny), dtype="fp32", threads=1))
    assert model is not None
    asked = asyncio.create_task(model.plan(an_ask(), soon()))
    await until(lambda: model.status()["queue"]["running"] == 1)
    await model.close()
    await model.close()
    with pytest.raises(Unavailable):
        await asked
    with pytest.raises(Unavailable):
        await model.plan(an_ask(), soon())
    assert not model.status()["loaded"]


@pytest.mark.parametrize(
    ("name", "says"),
    [("/no/such/folder", "no such folder"), ("./nor/this/one", "no such folder"), ("just-a-word", "no such folder")],
)
async def test_a_name_that_leads_nowhere_says_so(name: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        await open_model(config.Model(name=name))


async def test_too_little_memory_says_how_much_is_needed(tiny: Path) -> None:
    with pytest.raises(SettingsError, match="kv_memory"):
        await open_model(config.Model(name=str(tiny), kv_memory=1000))


def test_without_torch_the_error_names_the_install(tiny: Path) -> None:
    code = (
        "import sys, asyncio; sys.modules['torch'] = None\n"
        "from hubpeer import model, settings, errors\n"
        f"try: asyncio.run(model.open_model(settings.Model(name={str(tiny)!r})))\n"
        "except errors.SettingsError as exc: print(exc)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'hubpeer[hub,llm]'" in said


async def test_a_gated_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: object, **__: object) -> str:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(Unavailable, match="accept the licence"):
        await open_model(config.Model(name="meta-llama/Llama-3.2-1B-Instruct"))
