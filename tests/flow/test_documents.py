"""A document becomes a record: over request-reply, over the stream, by reference; seen by a client that knows the contract."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from pathlib import Path

import nats.js.api
import pytest

from tests import makers
from tests.flow.running import Bare

#: Files that nobody of this project wrote.
CORPUS = [
    p for kind in ("pdf", "docx") for p in sorted(Path(os.environ.get("TEST_CORPUS", os.devnull)).rglob(f"*.{kind}"))[:10]
]

KINDS = {
    "contract.pdf": (lambda: makers.pdf(["This agreement of supplier and customer. Liability."]), "application/pdf"),
    "report.docx": (
        lambda: makers.docx(["Revenue and gross margin rose in the quarter."]),
        "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    ),
    "note.txt": (lambda: b"Minutes of the meeting. Present: Ana, Joe.", "text/plain"),
    "brief.md": (lambda: b"# Campaign brief\n\nTarget audience: families. Channels: *search*.", "text/markdown"),
    "page.html": (lambda: b"<html><body><h1>Press release</h1><script>x()</script><p>We open.</p></body></html>", "text/html"),
    "deals.csv": (lambda: b"deal,stage,amount\nGlobex,proposal,100\nInitech,won,200\n", "text/csv"),
    "data.json": (lambda: json.dumps({"invoice": {"number": 7, "amount": 12.5}}).encode(), "application/json"),
    "mail.eml": (
        lambda: b"From: a@x.example\r\nTo: b@y.example\r\nSubject: Invoice 7\r\n"
        b"Date: Mon, 02 Mar 2026 09:00:00 +0000\r\n\r\nPlease pay.\r\n",
        "message/rfc822",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
async def test_every_kind_is_known_by_its_content(client: Bare, name: str) -> None:
    make, media_type = KINDS[name]
    data = make()
    # The name and the declared type lie; the content decides.
    headers = {"Hub-Filename": name, "Content-Type": "application/octet-stream", "Hub-Wait": "categorized"}
    receipt = await client.reply("hub.docs.ingest.kinds", data, headers)
    assert receipt["status"] == "success", receipt
    assert receipt["sha256"] == hashlib.sha256(data).hexdigest()
    assert (receipt["version"], receipt["duplicate"], receipt["state"]) == (1, False, "categorized")
    found = receipt["categorization"]
    assert found["method"] == "rules"
    assert 0 <= found["confidence"] <= 1
    assert found["sensitivity"] in {"public", "internal", "confidential", "restricted"}
    document = (await client.reply("hub.docs.get.kinds", {"document_id": receipt["document_id"]}))["document"]
    assert document["media_type"] == media_type
    assert document["filename"] == name
    text = await client.reply("hub.docs.text.kinds", {"document_id": receipt["document_id"]})
    assert text["text"].strip()
    assert text["total_chars"] == document["text_chars"]
    assert "x()" not in text["text"]


async def test_a_document_that_fits_a_category_gets_it(client: Bare) -> None:
    text = b"Invoice 2026-118. Amount due: 12,400 EUR. VAT included. Payment within 30 days to the bank account below."
    receipt = await client.reply("hub.docs.ingest.cats", text, {"Hub-Filename": "i.txt", "Hub-Wait": "categorized"})
    assert receipt["categorization"]["category"] == "invoice"
    assert "finance" in receipt["categorization"]["relevant_agents"]
    assert receipt["categorization"]["summary"] in " ".join(text.decode().split()) or receipt["categorization"]["summary"]


async def test_the_same_bytes_or_source_id_twice_are_the_same_document(client: Bare) -> None:
    send = client.reply
    first = await send("hub.docs.ingest.twice", b"the first text", {"Hub-Source-Id": "erp-1"})
    again = await send("hub.docs.ingest.twice", b"the first text", {"Hub-Source-Id": "erp-1"})
    other_id = await send("hub.docs.ingest.twice", b"the first text", {"Hub-Source-Id": "erp-2"})
    no_id = await send("hub.docs.ingest.twice", b"the first text")
    assert {r["document_id"] for r in (first, again, other_id, no_id)} == {first["document_id"]}
    assert [r["duplicate"] for r in (first, again, other_id, no_id)] == [False, True, True, True]
    changed = await send("hub.docs.ingest.twice", b"the second text", {"Hub-Source-Id": "erp-1"})
    assert (changed["document_id"], changed["version"], changed["duplicate"]) == (first["document_id"], 2, False)
    elsewhere = await send("hub.docs.ingest.twice-other", b"the first text", {"Hub-Source-Id": "erp-1"})
    assert elsewhere["document_id"] != first["document_id"]  # another client's document is another document
    assert (await send("hub.docs.stats.twice"))["documents"] == 1


async def test_many_at_once_of_the_same_bytes_are_one_document(client: Bare) -> None:
    receipts = await asyncio.gather(*(client.reply("hub.docs.ingest.rush", b"all at once") for _ in range(16)))
    assert len({r["document_id"] for r in receipts}) == 1
    assert sum(not r["duplicate"] for r in receipts) == 1
    assert (await client.reply("hub.docs.stats.rush"))["documents"] == 1


async def test_streamed_documents_are_accepted_then_committed_then_categorized(client: Bare) -> None:
    states: dict[str, list[str]] = {}
    done = asyncio.Event()

    async def receipt(msg: object) -> None:
        body = json.loads(msg.data)  # type: ignore[attr-defined]
        states.setdefault(body["source_id"], []).append(body["state"])
        if sum("categorized" in s or "failed" in s for s in states.values()) == 21:
            done.set()

    await client.nc.subscribe("hub.docs.receipt.streamed.*", cb=receipt)
    for number in range(20):
        headers = {"Hub-Source-Id": f"s{number}", "Hub-Filename": f"{number}.txt"}
        ack = await client.js.publish("hub.docs.stream.streamed", f"Streamed report number {number}".encode(), headers=headers)
        assert ack.stream == "DOCS"
    await client.js.publish("hub.docs.stream.streamed", b"%PDF-1.4 but cut off", headers={"Hub-Source-Id": "bad"})
    await asyncio.wait_for(done.wait(), 60)
    assert states.pop("bad") == ["failed"]
    assert all(seen == ["committed", "categorized"] for seen in states.values()), states
    listed = await client.reply("hub.docs.list.streamed", {"state": "categorized", "limit": 200})
    assert listed["total"] == 20
    await empty(client, "DOCS")


async def empty(client: Bare, stream: str) -> None:
    """Wait until everything in a work queue is acknowledged."""
    async with asyncio.timeout(30):
        while (await client.js.stream_info(stream)).state.messages:
            await asyncio.sleep(0.02)


async def test_large_documents_come_by_reference(client: Bare) -> None:
    body = ("A long report. " * 200_000).encode()
    assert len(body) > 2_500_000
    bucket = await client.js.create_object_store("DOCS_large")
    await bucket.put("report.txt", body)
    receipt = await client.reply("hub.docs.ingest.large", b"", {"Hub-Object": "report.txt", "Hub-Filename": "report.txt"}, 60)
    assert receipt["status"] == "success", receipt
    assert receipt["sha256"] == hashlib.sha256(body).hexdigest()
    page = await client.reply("hub.docs.text.large", {"document_id": receipt["document_id"], "offset": 15, "limit": 14})
    assert page["text"] == "A long report."
    assert (
        await client.code("hub.docs.ingest.large", b"", {"Hub-Object": "report.txt"}) == "object_not_found"
    )  # in the store now
    await bucket.put("report.txt", body)
    assert await client.code("hub.docs.ingest.large", b"body too", {"Hub-Object": "report.txt"}) == "bad_header"
    assert await client.code("hub.docs.ingest.unseen", b"", {"Hub-Object": "report.txt"}) == "object_not_found"
    await client.js.publish("hub.docs.stream.large", b"", headers={"Hub-Object": "report.txt", "Hub-Source-Id": "by-ref"})
    async with asyncio.timeout(30):  # once committed, the staged object is removed
        while True:
            try:
                await bucket.get_info("report.txt")
            except nats.js.errors.ObjectNotFoundError:
                break
            await asyncio.sleep(0.05)


async def test_text_comes_in_pages_that_fit_a_message(client: Bare) -> None:
    text = "".join(chr(0x1F300 + i % 400) for i in range(150_000))  # four bytes each
    receipt = await client.reply("hub.docs.ingest.pages", text.encode()[:700_000])
    got, offset = "", 0
    while offset is not None:
        page = await client.reply("hub.docs.text.pages", {"document_id": receipt["document_id"], "offset": offset})
        got += page["text"]
        offset = page["next_offset"]
    assert got == text[: 700_000 // 4]


async def test_lists_come_newest_first_in_pages(client: Bare) -> None:
    ids = [(await client.reply("hub.docs.ingest.listed", f"text {n}".encode()))["document_id"] for n in range(7)]
    seen, after = [], None
    while True:
        page = await client.reply("hub.docs.list.listed", {"limit": 3, **({"after": after} if after else {})})
        seen += [d["document_id"] for d in page["documents"]]
        after = page["next"]
        assert page["total"] == 7
        if after is None:
            break
    assert seen == ids[::-1]


async def test_a_deleted_document_is_gone(client: Bare) -> None:
    receipt = await client.reply("hub.docs.ingest.gone", b"soon gone")
    body = {"document_id": receipt["document_id"]}
    assert (await client.reply("hub.docs.delete.gone", body))["deleted"] is True
    for verb in ("get", "text", "delete"):
        assert await client.code(f"hub.docs.{verb}.gone", body) == "not_found"
    assert (await client.reply("hub.docs.stats.gone"))["documents"] == 0
    fresh = await client.reply("hub.docs.ingest.gone", b"soon gone")
    assert fresh["duplicate"] is False


async def test_nobody_sees_another_clients_documents(client: Bare) -> None:
    receipt = await client.reply("hub.docs.ingest.alpha", b"alpha's secret")
    body = {"document_id": receipt["document_id"]}
    for verb in ("get", "text", "delete"):
        mine = await client.ask(f"hub.docs.{verb}.beta", body)
        never = await client.ask(f"hub.docs.{verb}.beta", {"document_id": "0" * 32})
        strip = lambda m: {k: v for k, v in json.loads(m.data)["error"].items() if k not in ("request_id", "message")}  # noqa: E731
        assert strip(mine) == strip(never)
        assert json.loads(mine.data)["error"]["code"] == "not_found"
    assert (await client.reply("hub.docs.list.beta"))["documents"] == []
    assert (await client.reply("hub.docs.text.alpha", body))["text"] == "alpha's secret"


async def test_another_clients_message_ids_swallow_nothing(client: Bare) -> None:
    """The duplicate window of a stream spans all clients, so ours is the shortest there is."""
    await client.js.publish("hub.docs.stream.thief", b"poison", headers={"Nats-Msg-Id": "invoice-1"})
    window = time.monotonic() + 0.25
    while time.monotonic() < window:  # the window is the server's time, so time is what has to pass
        await asyncio.sleep(0.05)
    ack = await client.js.publish("hub.docs.stream.victim", b"the real invoice", headers={"Nats-Msg-Id": "invoice-1"})
    assert not ack.duplicate
    async with asyncio.timeout(30):
        while (await client.reply("hub.docs.stats.victim"))["documents"] != 1:
            await asyncio.sleep(0.05)


async def test_a_full_backlog_is_refused_to_its_publisher_only(client: Bare) -> None:
    info = await client.js.stream_info("DOCS")
    assert info.config.discard == nats.js.api.DiscardPolicy.NEW
    assert info.config.discard_new_per_subject is True
    assert info.config.max_msgs_per_subject and info.config.max_msgs_per_subject > 0


@pytest.mark.skipif(len(CORPUS) < 20, reason="TEST_CORPUS names no folder with ten PDF and ten DOCX files")
async def test_twenty_real_files_end_in_one_terminal_state_each(client: Bare) -> None:
    terminal: dict[str, list[str]] = {}

    async def receipt(msg: object) -> None:
        body = json.loads(msg.data)  # type: ignore[attr-defined]
        if body["state"] in ("categorized", "failed"):
            terminal.setdefault(body["source_id"], []).append(body["state"])

    await client.nc.subscribe("hub.docs.receipt.corpus.*", cb=receipt)
    for file in CORPUS:
        headers = {"Hub-Filename": file.name, "Hub-Source-Id": file.name}
        await client.js.publish("hub.docs.stream.corpus", file.read_bytes(), headers=headers)
    async with asyncio.timeout(110):
        while len(terminal) < 20:
            await asyncio.sleep(0.05)
    await empty(client, "DOCS")
    assert all(len(states) == 1 for states in terminal.values()), terminal
    assert sum(states == ["categorized"] for states in terminal.values()) >= 12, terminal
