"""Bad input: one coded error each, and the hub goes on with nothing stored but a reason."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from nats.errors import TimeoutError as NatsTimeoutError

from tests import makers
from tests.flow.running import Bare, Hub

Q = {"query": "what did the budget do", "dispatch": False}

REQUESTS: list[tuple[str, str, Any, dict[str, str] | None, str]] = [
    ("nothing", "hub.route.finance", b"", None, "bad_json"),
    ("white space", "hub.route.finance", b"  \n", None, "bad_json"),
    ("cut off", "hub.route.finance", b'{"query": "a', None, "bad_json"),
    ("two objects", "hub.route.finance", b"{} {}", None, "bad_json"),
    ("a list", "hub.route.finance", b"[]", None, "bad_type"),
    ("single quotes", "hub.route.finance", b"{'query': 1}", None, "bad_json"),
    ("NaN", "hub.route.finance", b'{"query": NaN}', None, "bad_json"),
    ("a number for text", "hub.route.finance", {"query": 5}, None, "bad_type"),
    ("text for a boolean", "hub.route.finance", {"query": "a", "dispatch": "yes"}, None, "bad_type"),
    ("no query", "hub.route.finance", {}, None, "missing_field"),
    ("an unknown field", "hub.route.finance", {**Q, "urgency": 1}, None, "unknown_field"),
    ("a key twice", "hub.route.finance", b'{"query": "a", "query": "b"}', None, "duplicate_key"),
    ("deep nesting", "hub.route.finance", b'{"query": "a", "context": ' + b'{"a":' * 100_000, None, "too_deep"),
    ("not UTF-8", "hub.route.finance", b'{"query": "\xff"}', None, "bad_encoding"),
    ("UTF-16", "hub.route.finance", '{"query": "a"}'.encode("utf-16"), None, "bad_encoding"),
    ("a byte order mark", "hub.route.finance", b"\xef\xbb\xbf" + b'{"query": "a"}', None, "bad_encoding"),
    ("NUL in text", "hub.route.finance", b'{"query": "a\\u0000b"}', None, "bad_character"),
    ("an empty query", "hub.route.finance", {"query": ""}, None, "empty_query"),
    ("a query of spaces", "hub.route.finance", {"query": " \n\t "}, None, "empty_query"),
    ("a query of zero-width characters", "hub.route.finance", {"query": "\u200b\u200d\ufeff"}, None, "empty_query"),
    ("a query of 900 KB", "hub.route.finance", {"query": "a" * 900_000}, None, "field_too_long"),
    ("a context of 200 KB", "hub.route.finance", {**Q, "context": {"a": "b" * 200_000}}, None, "field_too_long"),
    ("an unknown agent asks", "hub.route.nobody", Q, None, "unknown_agent"),
    ("an agent in capitals", "hub.route.Finance", Q, None, "bad_agent_id"),
    ("a star for an agent", "hub.route.*", Q, None, "bad_agent_id"),
    ("a long agent", "hub.route." + "a" * 33, Q, None, "bad_agent_id"),
    ("an accented agent", "hub.route.finänce", Q, None, "bad_agent_id"),
    ("an identity that differs", "hub.route.finance", {**Q, "requesting_agent": "ceo"}, None, "identity_mismatch"),
    ("a deadline that is past", "hub.route.finance", Q, {"Hub-Deadline": "1000"}, "deadline_passed"),
    ("a deadline that is no time", "hub.route.finance", Q, {"Hub-Deadline": "soon"}, "bad_deadline"),
    ("a request id with spaces", "hub.route.finance", Q, {"Hub-Request-Id": "a b"}, "bad_request_id"),
    ("a path with a star", "hub.route.finance", Q, {"Hub-Call-Path": "sales,*"}, "bad_agent_id"),
    ("an unknown verb of plans", "hub.plans.destroy.finance", {}, None, "unknown_operation"),
    ("an unknown verb of agents", "hub.agents.clone.finance", {}, None, "unknown_operation"),
    ("a plan id that is none", "hub.plans.show.finance", {"plan_id": "../x"}, None, "bad_plan_id"),
    ("a card without capabilities", "hub.agents.register.legal", {"capabilities": []}, None, "empty_field"),
    ("a card with a long word", "hub.agents.register.legal", {"capabilities": ["x" * 65]}, None, "field_too_long"),
    ("a heartbeat of one never seen", "hub.agents.heartbeat.stranger", b"", None, "unknown_agent"),
    ("an agent nobody knows", "hub.agents.show.stranger", b"", None, "unknown_agent"),
    (
        "a card of somebody else",
        "hub.agents.register.legal",
        {"capabilities": ["a"], "agent": "ceo"},
        None,
        "identity_mismatch",
    ),
    ("a schema nobody knows", "hub.schema.nothing", b"", None, "unknown_schema"),
    ("a client as a path", "hub.docs.ingest.a/b", b"text", None, "bad_client_id"),
    ("a client in capitals", "hub.docs.ingest.Acme", b"text", None, "bad_client_id"),
    ("a reserved client", "hub.docs.ingest.hub", b"text", None, "reserved_client_id"),
    ("no client at all", "hub.docs.ingest", b"text", None, "client_not_named"),
    ("a client that differs", "hub.docs.ingest.bad", b"text", {"Hub-Client": "other"}, "identity_mismatch"),
    ("a digest that differs", "hub.docs.ingest.bad", b"text", {"Hub-Sha256": "0" * 64}, "digest_mismatch"),
    ("a digest that is none", "hub.docs.ingest.bad", b"text", {"Hub-Sha256": "abc"}, "bad_header"),
    ("a long content type", "hub.docs.ingest.bad", b"text", {"Content-Type": "x" * 10_000}, "bad_header"),
    ("waiting for what never comes", "hub.docs.ingest.bad", b"text", {"Hub-Wait": "forever"}, "bad_header"),
    ("a document id as a path", "hub.docs.get.bad", {"document_id": "../../etc/passwd"}, None, "bad_doc_id"),
    ("a limit of nothing", "hub.docs.list.bad", {"limit": 0}, None, "out_of_range"),
    ("true for a number", "hub.docs.list.bad", {"limit": True}, None, "bad_type"),
    ("a page that never was", "hub.docs.list.bad", {"after": "%%%"}, None, "bad_value"),
]


@pytest.mark.parametrize(("subject", "body", "headers", "code"), [r[1:] for r in REQUESTS], ids=[r[0] for r in REQUESTS])
async def test_a_bad_request_gets_one_coded_error(
    client: Bare, subject: str, body: Any, headers: dict[str, str] | None, code: str
) -> None:
    assert await client.code(subject, body, headers) == code
    assert (await client.reply("hub.health"))["status"] == "ok"


DOCUMENTS = [
    ("zero bytes", lambda: b"", "empty_document"),
    ("white space", lambda: b" \n ", "no_text"),
    ("a PDF header and nothing more", lambda: b"%PDF-1.7\n", "bad_pdf"),
    ("a truncated PDF", lambda: makers.pdf(["page"])[:300], "bad_pdf"),
    ("an encrypted PDF", lambda: makers.encrypted_pdf("secret", "password"), "pdf_encrypted"),
    ("a DOCX that is no zip", lambda: b"PK\x03\x04 and no more", "bad_docx"),
    ("a zip bomb", lambda: makers.zip_bomb_docx(60_000_000), "doc_too_large"),
    ("an image", lambda: b"\x89PNG\r\n\x1a\n" + b"\0" * 64, "unsupported_type"),
    ("random bytes", lambda: bytes(range(1, 255)) * 8, "unsupported_type"),
]


@pytest.mark.parametrize(("make", "code"), [d[1:] for d in DOCUMENTS], ids=[d[0] for d in DOCUMENTS])
async def test_a_bad_document_gets_one_coded_error_and_leaves_only_its_reason(client: Bare, make: Any, code: str) -> None:
    owner = "bad-" + code.replace("_", "-")[:20]
    data = make()
    before = (await client.reply(f"hub.docs.stats.{owner}"))["documents"]
    named = {"Hub-Filename": "x.docx"} if "docx" in code else None
    assert await client.code(f"hub.docs.ingest.{owner}", data, named) == code
    assert await client.code(f"hub.docs.ingest.{owner}", data) == code  # and again
    stats = await client.reply(f"hub.docs.stats.{owner}")
    assert (stats["documents"], stats["bytes"]) == (before, 0)
    [kept] = [
        d for d in (await client.reply(f"hub.docs.list.{owner}", {"state": "failed"}))["documents"] if d["size"] == len(data)
    ]
    assert kept["error"]["code"] == code
    assert (await client.reply("hub.health"))["status"] == "ok"


async def test_a_request_without_a_reply_subject_is_dropped_and_counted(client: Bare) -> None:
    before = (await client.reply("hub.status"))["bus"]["bad_replies"]
    await client.nc.publish("hub.route.finance", json.dumps(Q).encode())
    await client.nc.publish("hub.docs.ingest.silent", b"nobody waits")
    async with asyncio.timeout(10):
        while (await client.reply("hub.status"))["bus"]["bad_replies"] != before + 2:
            await asyncio.sleep(0.02)
    assert (await client.reply("hub.docs.stats.silent"))["documents"] == 0


async def test_a_forged_reply_subject_reaches_nothing(client: Bare) -> None:
    streams = {s.config.name: s.state.last_seq for s in await client.js.streams_info()}
    plans = await client.nc.subscribe("hub.plan.>")
    for reply in ("hub.plan.sales.forged.1", "$JS.API.STREAM.PURGE.PLANS", "$JS.API.STREAM.DELETE.DOCS", "hub.route.ceo",
                  "hub.docs.stream.victim", "_INBOX.*.x", "_INBOX.>", "a.b"):  # fmt: skip
        for subject in ("hub.route.finance", "hub.docs.list.acme", "$SRV.PING", "hub.status"):
            await client.nc.publish(subject, json.dumps(Q).encode(), reply=reply)
    assert (await client.reply("hub.health"))["status"] == "ok"
    assert {s.config.name: s.state.last_seq for s in await client.js.streams_info()} == streams
    with pytest.raises(NatsTimeoutError):
        await plans.next_msg(timeout=0.2)


async def test_a_document_of_nobody_in_the_stream_goes_to_the_dead_letters(client: Bare) -> None:
    letters = await client.nc.subscribe("hub.dlq.DOCS.*")
    await client.js.publish("hub.docs.stream.*", b"whose?")
    letter = await letters.next_msg(timeout=20)
    assert letter.subject == "hub.dlq.DOCS.invalid"
    assert json.loads(letter.data)["error"]["code"] == "bad_client_id"
    await client.js.publish("hub.docs.stream.acme", b"text", headers={"Hub-Sha256": "0" * 64, "Hub-Filename": "f.txt"})
    body = json.loads((await letters.next_msg(timeout=20)).data)
    assert (body["error"]["code"], body["data"], body["headers"]["Hub-Filename"]) == ("digest_mismatch", "text", "f.txt")


async def test_a_reply_that_does_not_fit_kills_nothing(client: Bare) -> None:
    for number in range(60):  # each listed with a long name, so that the page is large
        await client.reply("hub.docs.ingest.wide", f"text {number}".encode(), {"Hub-Filename": "ü" * 250})
    answer = await client.reply("hub.docs.list.wide", {"limit": 200})
    assert answer["total"] == 60


async def test_the_hub_has_lived_through_it_all(hub: Hub, client: Bare) -> None:
    assert hub.process is not None
    assert hub.process.poll() is None
    status = await client.reply("hub.status")
    assert status["status"] == "ok"
    assert status["bus"]["rebuilt"] == 0
    assert "Traceback" not in hub.log.read_text()
