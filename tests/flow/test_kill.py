"""A hub killed with SIGKILL loses nothing it has acknowledged, and carries on where it stopped."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
from pathlib import Path

import nats.errors
import pytest

from tests.flow.running import Bare, Hub, bare

SEED = 20261122


async def test_killed_while_documents_stream_in_nothing_acknowledged_is_lost(data: Path) -> None:
    """Five kills at random moments; every PubAck and every receipt given before, between and after holds at the end."""
    print(f"seed {SEED}")
    chance = random.Random(SEED)
    hub = Hub(data).start()
    accepted: dict[str, str] = {}  # source id -> sha256
    receipts: dict[str, str] = {}  # document id -> sha256, of those whose receipt we have seen
    number = 0
    for _ in range(5):
        async with bare(hub.url) as client:
            moment = asyncio.get_running_loop().time() + chance.uniform(0.1, 0.6)
            while asyncio.get_running_loop().time() < moment:
                number += 1
                body = f"document {number} of the kill test ".encode() * chance.randint(1, 40)
                headers = {"Hub-Source-Id": f"k{number}"}
                sha256 = hashlib.sha256(body).hexdigest()
                try:
                    if number % 2:
                        await client.js.publish("hub.docs.stream.killed", body, headers=headers, timeout=5)
                    else:
                        receipt = await client.reply("hub.docs.ingest.killed", body, headers, timeout=5)
                        assert receipt["sha256"] == sha256
                        receipts[receipt["document_id"]] = sha256
                    accepted[f"k{number}"] = sha256
                except (nats.errors.Error, TimeoutError):
                    break
            hub.kill()
        hub.start()
    async with bare(hub.url) as client:
        async with asyncio.timeout(100):
            while (await client.js.stream_info("DOCS")).state.messages:
                await asyncio.sleep(0.05)
        stored: dict[str, str] = {}
        after = None
        while True:
            page = await client.reply("hub.docs.list.killed", {"limit": 200, **({"after": after} if after else {})})
            for document in page["documents"]:
                assert document["source_id"] not in stored, "a document is there twice"
                stored[document["source_id"]] = document["sha256"]
            after = page["next"]
            if after is None:
                break
        print(f"{len(accepted)} accepted, {len(receipts)} receipts, {len(stored)} stored")
        assert len(accepted) > 20
        lost = {source: sha for source, sha in accepted.items() if stored.get(source) != sha}
        assert not lost
        for document_id, sha256 in receipts.items():
            got = await client.reply("hub.docs.get.killed", {"document_id": document_id})
            assert got["document"]["sha256"] == sha256
        async with asyncio.timeout(60):  # and what was committed is categorized in the end
            while (await client.reply("hub.docs.stats.killed"))["pending"]:
                await asyncio.sleep(0.05)
    assert hub.stop() == 0


async def _result(client: Bare, agent: str, plan: str, step: str) -> None:
    await client.js.publish(f"hub.result.{agent}.{plan}.{step}", json.dumps({"status": "done", "result": agent}).encode())


async def test_killed_at_every_stage_of_a_plan_it_is_finished_after_the_restart(data: Path) -> None:
    """Kill 1: the plan is out, nobody has taken its first step. Kill 2: right behind a result. Kill 3: before the last one."""
    hub = Hub(data).start()
    async with bare(hub.url) as client:
        decision = await client.route("ceo", "Compare the cost of the campaign with the pipeline")
        assert [a["agent"] for a in decision["agents"]] == ["finance", "marketing", "sales"]
    hub.kill()
    hub.start()
    async with bare(hub.url) as client:
        first = await client.step("finance")
        assert decision["plan_id"] in first.subject
        await client.answer(first, result="finance")
    hub.kill()
    hub.start()
    async with bare(hub.url) as client:
        second = await client.step("marketing", timeout=60)
        assert json.loads(second.data)["results"]["finance"]["result"] == "finance"
        await client.answer(second, result="marketing")
        third = await client.step("sales", timeout=60)
    hub.kill()
    hub.start()
    async with bare(hub.url) as client:
        await _result(client, "sales", *third.subject.split(".")[3:])
        outcome = await client.outcome(decision, within_s=60)
        assert outcome["status"] == "done"
        assert [s["result"] for s in outcome["steps"]] == ["finance", "marketing", "sales"]
        info = await client.js.stream_info("PLANS", subjects_filter=f"hub.plan.*.{decision['plan_id']}.*")
        assert sorted((info.state.subjects or {}).values()) == [1, 1, 1], "every step went out once"
    assert hub.stop() == 0


async def test_plans_and_agents_outlive_a_restart(data: Path) -> None:
    hub = Hub(data).start()
    async with bare(hub.url) as client:
        await client.reply("hub.agents.register.legal", {"capabilities": ["contract_review"], "heartbeat_s": 3600})
        proposed = await client.route("ceo", "who reviews the contract", dispatch=False)
    assert hub.stop() == 0
    hub.start()
    async with bare(hub.url) as client:
        assert (await client.reply("hub.agents.show.legal"))["agent"]["state"] == "live"
        shown = await client.reply("hub.plans.approve.ceo", {"plan_id": proposed["plan_id"]})
        assert shown["plan"]["state"] == "running"
        assert proposed["plan_id"] in (await client.step("legal")).subject
    assert hub.stop() == 0


async def test_a_second_hub_on_the_same_data_is_refused(data: Path) -> None:
    hub = Hub(data).start()
    with pytest.raises(AssertionError, match="store_locked"):
        Hub(data).start()
    async with bare(hub.url) as client:
        assert (await client.reply("hub.health"))["status"] == "ok"
    assert hub.stop() == 0


@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.0])
async def test_told_to_stop_while_its_server_is_gone_it_stops(data: Path, seconds: float) -> None:
    hub = Hub(data).start()
    server = _server_of(data)
    os.kill(server, signal.SIGKILL)
    await asyncio.sleep(seconds)  # not a wait: at which moment the order comes is what differs
    assert hub.stop() == 0
    assert not hub.family()
    assert "Traceback" not in hub.log.read_text()


def _server_of(data: Path) -> int:
    """The process id of the NATS server a hub has started."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (process / "cmdline").read_bytes().split(b"\0")
            if line[0].endswith(b"nats-server") and str(data).encode() in b" ".join(line):
                return int(process.name)
    raise AssertionError("no server runs")


async def test_a_client_at_its_quota_is_told_and_holds_up_nobody(data: Path) -> None:
    """Its documents do not wait in the stream for room that may never come."""
    hub = Hub(data, environ={"HUBPEER_DOCUMENTS__QUOTA": str(4 * 1024 * 1024)}).start()
    rng = random.Random(SEED)
    async with bare(hub.url) as client:
        for number in range(24):
            text = f"{number} " + " ".join(f"{rng.getrandbits(64):016x}" for _ in range(30_000))
            await client.js.publish("hub.docs.stream.full", text.encode())
        await client.js.publish("hub.docs.stream.small", b"the small client's document")
        receipts = await client.js.pull_subscribe("hub.docs.receipt.>", stream="RECEIPTS")
        codes: list[str] = []
        other: list[str] = []
        async with asyncio.timeout(60):
            while len(codes) < 10 or not other:
                for msg in await receipts.fetch(20, timeout=60):
                    receipt = json.loads(msg.data)
                    if receipt["status"] == "error":
                        codes.append(receipt["error"]["code"])
                    elif ".small." in msg.subject:
                        other.append(receipt["state"])
            while (await client.js.stream_info("DOCS")).state.messages:
                await asyncio.sleep(0.05)
        assert set(codes) == {"quota_exceeded"}
        letters = await client.js.stream_info("DLQ")
        assert letters.state.messages >= len(codes)
    assert hub.stop() == 0
