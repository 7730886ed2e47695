from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Annotated, Any

import jsonschema
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta, Struct

from hubpeer import contract, deadletter, route, wire
from hubpeer.bus.service import Request
from hubpeer.errors import STATUS, BadRequest, Busy, HubError
from hubpeer.wire import DocList, Presence, Register, RouteRequest, StepResult, TextQuery

ROOT = Path(__file__).parents[2]


def refusal(kind: type[Struct], data: bytes) -> BadRequest:
    """The one error `data` gets as a `kind`, with a short answer. What takes quadratic time runs into the test's time limit."""
    with pytest.raises(BadRequest) as caught:
        wire.decode(kind, data)
    answer = wire.encode(wire.ErrorReply(wire.error_body(caught.value, "r1")))
    assert len(answer) <= 1024
    assert json.loads(answer)["error"]["message"].isprintable()
    return caught.value


def nested(depth: int) -> bytes:
    """A question whose context is `depth` levels deep, itself included."""
    return b'{"query":"x","context":{"a":' + b"[" * (depth - 2) + b"]" * (depth - 2) + b"}}"


def context(value: bytes) -> bytes:
    return b'{"query":"x","context":{"a":%s}}' % value


# ── decode: the catalogue of bad input, rows 1 to 30 ──────────────────────────────────────────────────────────────────

QUESTION = b'{"query":"x"}'
KEYS = b",".join(b'"%d":0' % n for n in range(100_000))
CATALOGUE: list[tuple[str, type[Struct], bytes, str, str | None]] = [
    ("1 zero bytes", RouteRequest, b"", "bad_json", None),
    ("2 whitespace only", RouteRequest, b" \r\n\t", "bad_json", None),
    ("3 truncated", RouteRequest, b"{", "bad_json", None),
    ("3 truncated behind an emoji", RouteRequest, rb'{"query":"\ud83d\ude00"', "bad_json", None),
    ("4 trailing garbage", RouteRequest, QUESTION + b" x", "bad_json", None),
    ("5 two objects", RouteRequest, QUESTION * 2, "bad_json", None),
    ("6 an array", RouteRequest, b"[]", "bad_type", None),
    ("6 null", RouteRequest, b"null", "bad_type", None),
    ("6 a string", RouteRequest, b'"x"', "bad_type", None),
    ("6 a number", RouteRequest, b"5", "bad_type", None),
    ("7 single quotes", RouteRequest, b"{'query':'x'}", "bad_json", None),
    ("7 a comment", RouteRequest, b'{"query":"x"/*c*/}', "bad_json", None),
    ("7 a trailing comma", RouteRequest, b'{"query":"x",}', "bad_json", None),
    ("8 NaN", RouteRequest, context(b"NaN"), "bad_json", None),
    ("8 Infinity", RouteRequest, context(b"-Infinity"), "bad_json", None),
    ("9 1e999", RouteRequest, context(b"1e999"), "bad_number", "context[...]"),
    ("9 5,000 digits", RouteRequest, context(b"9" * 5000), "bad_number", "context[...]"),
    ("9 5,000 digits for a limit", DocList, b'{"limit":%s}' % (b"9" * 5000), "bad_number", "limit"),
    ("9 1e999 seconds", Register, b'{"capabilities":["a"],"heartbeat_s":1e999}', "bad_number", "heartbeat_s"),
    ("10 -1", DocList, b'{"limit":-1}', "out_of_range", "limit"),
    ("10 0", DocList, b'{"limit":0}', "out_of_range", "limit"),
    ("10 201", DocList, b'{"limit":201}', "out_of_range", "limit"),
    ("10 2^63", DocList, b'{"limit":9223372036854775808}', "out_of_range", "limit"),
    ("10 1.5", DocList, b'{"limit":1.5}', "bad_type", "limit"),
    ("10 seconds below the least", Register, b'{"capabilities":["a"],"heartbeat_s":0.01}', "out_of_range", "heartbeat_s"),
    ("11 true for an integer", DocList, b'{"limit":true}', "bad_type", "limit"),
    ("12 a string for an integer", DocList, b'{"limit":"5"}', "bad_type", "limit"),
    ("13 a missing field", RouteRequest, b"{}", "missing_field", "query"),
    ("14 an unknown field", RouteRequest, b'{"query":"x","quary":1}', "unknown_field", "quary"),
    ("14 an unknown field of two lines", RouteRequest, rb'{"query":"x","a\nb":1}', "unknown_field", r"a\nb"),
    ("14 an unknown field without a name", RouteRequest, b'{"query":"x","":1}', "unknown_field", None),
    ("14 an unknown field of 100 KB", RouteRequest, b'{"query":"x","%s":1}' % (b"k" * 100_000), "unknown_field",
     "k" * 61 + "..."),
    ("15 a key twice", RouteRequest, b'{"query":"x","query":"y"}', "duplicate_key", "query"),
    ("15 a key twice, deeper", RouteRequest, context(b'[{"b":1,"c":2,"b":3}]'), "duplicate_key", "b"),
    ("15 a key twice among 100,000", RouteRequest, context(b"{%s,%s}" % (KEYS, b'"99999":1')), "duplicate_key", "99999"),
    ("16 33 deep", RouteRequest, nested(33), "too_deep", None),
    ("16 100,000 deep", RouteRequest, b"[" * 100_000, "too_deep", None),
    ("16 100,000 deep, closed", RouteRequest, context(b"[" * 100_000 + b"]" * 100_000), "too_deep", None),
    ("16 deep, then a string of quotes that never ends", RouteRequest, b"[" * 33 + b'"' + rb"\"" * 450_000, "too_deep", None),
    ("17 250,000 elements", Register, b'{"capabilities":[%s"a"]}' % (b'"a",' * 250_000), "too_many_items", "capabilities"),
    ("18 100,000 keys", RouteRequest, b"{%s}" % KEYS, "unknown_field", "0"),
    ("19 a query of 900 KB", RouteRequest, b'{"query":"%s"}' % (b"x" * 900_000), "field_too_long", "query"),
    ("20 invalid UTF-8", RouteRequest, b'{"query":"\xff"}', "bad_encoding", None),
    ("21 overlong UTF-8", RouteRequest, b'{"query":"\xc0\xaf"}', "bad_encoding", None),
    ("21 an encoded surrogate", RouteRequest, b'{"query":"\xed\xa0\x80"}', "bad_encoding", None),
    ("22 a lone high surrogate", RouteRequest, rb'{"query":"\ud800"}', "bad_encoding", None),
    ("22 a lone high surrogate before text", RouteRequest, rb'{"query":"\ud800 and more"}', "bad_encoding", None),
    ("22 two high surrogates", RouteRequest, rb'{"query":"\ud800\ud800"}', "bad_encoding", None),
    ("22 a lone low surrogate", RouteRequest, rb'{"query":"\udc00"}', "bad_encoding", None),
    *[(f"23 {code}", RouteRequest, '{"query":"x"}'.encode(code), "bad_encoding", None)
      for code in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")],
    ("24 a byte order mark", RouteRequest, b"\xef\xbb\xbf" + QUESTION, "bad_encoding", None),
    ("25 an escaped NUL", RouteRequest, rb'{"query":"a\u0000b"}', "bad_character", None),
    ("25 an escaped NUL behind a backslash", RouteRequest, rb'{"query":"a\\\u0000b"}', "bad_character", None),
    ("25 an escaped NUL in the context", RouteRequest, context(rb'{"a\u0000":1}'), "bad_character", None),
    ("25 a NUL", RouteRequest, b'{"query":"a\0b"}', "bad_json", None),
    ("26 a raw escape sequence", RouteRequest, b'{"query":"\x1b[2J"}', "bad_json", None),
    ("29 gzip", RouteRequest, gzip.compress(QUESTION), "bad_encoding", None),
    ("30 msgpack", RouteRequest, msgspec.msgpack.encode({"query": "x"}), "bad_encoding", None),
    ("30 protobuf", RouteRequest, b"\n\x05query", "bad_json", None),
    ("30 XML", RouteRequest, b'<?xml version="1.0"?><query/>', "bad_json", None),
    ("30 HTML", RouteRequest, b"<!doctype html><p>", "bad_json", None),
    ("30 an HTTP request", RouteRequest, b"GET / HTTP/1.1\r\nHost: hub\r\n\r\n", "bad_json", None),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "data", "code", "field"), [row[1:] for row in CATALOGUE], ids=[row[0] for row in CATALOGUE])
def test_a_bad_body_gets_one_coded_error_that_names_the_field(kind, data, code, field):
    error = refusal(kind, data)
    assert (error.code, error.field) == (code, field)


@pytest.mark.parametrize(
    ("data", "query"),
    [
        (rb'{"query":"\u001b[2J"}', "\x1b[2J"),  # row 26: data like any other
        ('{"query":"\u202eabc"}'.encode(), "\u202eabc"),  # row 28
        (b'{"query":"a%s"}' % (b"\xcc\x81" * 5000), "a" + "\u0301" * 5000),  # row 28
        (rb'{"query":"\ud83d\ude00"}', "😀"),
        (rb'{"query":"\\ud800 and \\u0000 as text"}', r"\ud800 and \u0000 as text"),
        (b'{"query":"%s"}' % (b"x" * 8192), "x" * 8192),
        (b'{"query":"%s \\" {{{"}' % (b"[" * 40), "[" * 40 + ' " {{{'),
        (b' \n{"query":"x"}\n', "x"),
    ],
)  # fmt: skip
def test_unusual_but_honest_text_is_taken_as_it_is(data, query):
    assert wire.decode(RouteRequest, data).query == query


def test_32_levels_are_not_too_deep():
    assert wire.decode(RouteRequest, nested(32)).query == "x"


@pytest.mark.parametrize("query", ["", " ", "\u200b\u200d", "\u202e\n", "\u2028"])
def test_a_question_without_a_visible_character_is_empty(query):
    """Row 27. The body is well formed, so it is the door of `route` that refuses it."""
    data = wire.encode(RouteRequest(query))
    assert wire.decode(RouteRequest, data).query == query
    request = Request("hub.route.hr", ["hub", "route", "hr"], data, {}, "r1", None)
    with pytest.raises(BadRequest) as caught:
        route._question(request, "hr")
    assert (caught.value.code, caught.value.field) == ("empty_query", "query")


@pytest.mark.parametrize("kind", [wire.Nothing, Presence, DocList, wire.PlanList])
@pytest.mark.parametrize("data", [b"", b" \n", b"{}"])
def test_no_body_at_all_is_fine_where_no_field_is_required(kind, data):
    assert wire.decode(kind, data) == kind()


INBOUND = [RouteRequest, StepResult, wire.PlanQuery, wire.PlanList, Register, Presence, wire.Nothing, wire.DocQuery, TextQuery,
           DocList]  # fmt: skip


@pytest.mark.parametrize("kind", INBOUND)
def test_what_others_send_may_hold_no_unknown_field(kind):
    assert kind.__struct_config__.forbid_unknown_fields
    assert refusal(kind, b'{"colour":"red"}').code == "unknown_field"


@pytest.mark.parametrize("kind", [kind for kind in wire.MESSAGES.values() if kind not in INBOUND])
def test_receivers_ignore_fields_the_hub_may_add_later(kind):
    assert not kind.__struct_config__.forbid_unknown_fields


@given(st.binary(max_size=200) | st.text(max_size=50).map(str.encode))
def test_any_bytes_are_decoded_or_refused_and_nothing_else_ever_happens(data):
    for kind in (RouteRequest, Presence):
        try:
            wire.decode(kind, data)
        except BadRequest as error:
            assert STATUS[error.code] in (400, 422)


@given(st.data())
def test_a_valid_message_with_one_byte_changed_is_decoded_or_refused(data):
    body = bytearray(wire.encode(EXAMPLES["agent_register"]))
    at = data.draw(st.integers(0, len(body) - 1))
    body[at] = data.draw(st.integers(0, 255))
    try:
        wire.decode(Register, bytes(body))
    except BadRequest as error:
        assert STATUS[error.code] in (400, 422)


# ── msgspec's wording, one line of wire._VALIDATION after the other ─────────────────────────────────────────────────────


class Limited(Struct, forbid_unknown_fields=True):
    """One field for each kind of limit msgspec knows."""

    number: Annotated[int, Meta(ge=1, le=9)] = 1
    share: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    name: Annotated[str, Meta(min_length=1, max_length=3, pattern="^[a-z]+$")] = "a"
    raw: Annotated[bytes, Meta(min_length=1, max_length=3)] = b"a"
    words: Annotated[list[Annotated[str, Meta(max_length=3)]], Meta(min_length=1, max_length=3)] = msgspec.field(
        default_factory=lambda: ["a"]
    )
    table: Annotated[dict[str, int], Meta(max_length=2)] = {}
    state: wire.DocState = "failed"
    child: wire.ErrorBody | None = None


WORDING = [
    # pattern number, body, code, field
    (0, b'{"child":{"code":"x","message":"x"}}', "missing_field", "child.request_id"),
    (1, b'{"colour":1}', "unknown_field", "colour"),
    (2, b'{"name":"abcd"}', "field_too_long", "name"),
    (2, b'{"raw":"AAAAAAAA"}', "field_too_long", "raw"),
    (2, b'{"words":["a","abcd"]}', "field_too_long", "words[1]"),
    (3, b'{"name":""}', "empty_field", "name"),
    (3, b'{"raw":""}', "empty_field", "raw"),
    (4, b'{"words":["a","b","c","d"]}', "too_many_items", "words"),
    (5, b'{"words":[]}', "empty_field", "words"),
    (6, b'{"table":{"a":1,"b":2,"c":3}}', "too_many_fields", "table"),
    (7, b'{"number":0}', "out_of_range", "number"),
    (7, b'{"number":10}', "out_of_range", "number"),
    (7, b'{"share":0}', "out_of_range", "share"),
    (7, b'{"share":1.0}', "out_of_range", "share"),
    (8, b'{"name":"A"}', "bad_value", "name"),
    (9, b'{"state":"gone"}', "bad_value", "state"),
    (10, b'{"share":1e999}', "bad_number", "share"),
    (10, b'{"number":' + b"9" * 5000 + b"}", "bad_number", "number"),
    (11, b'{"number":"1"}', "bad_type", "number"),
    (11, b'{"child":5}', "bad_type", "child"),
    (11, b'{"table":{"a":"x"}}', "bad_type", "table[...]"),
]


@pytest.mark.parametrize(("line", "data", "code", "field"), WORDING)
def test_the_wording_of_msgspec_is_read_as_the_right_code_and_field(line, data, code, field):
    with pytest.raises(msgspec.ValidationError) as wording:
        msgspec.json.decode(data, type=Limited)
    text = wire._path.sub("", str(wording.value))
    first = next(number for number, (pattern, _) in enumerate(wire._VALIDATION) if pattern.search(text))
    assert (first, wire._VALIDATION[first][1]) == (line, code)
    error = refusal(Limited, data)
    assert (error.code, error.field) == (code, field)


def test_every_line_of_the_wording_is_pinned():
    assert {line for line, *_ in WORDING} == set(range(len(wire._VALIDATION)))


@pytest.mark.parametrize("said", ["x" * 5000, "\x1b[2J" * 50, "`" * 100, "x` - at `$.query", "\\" * 300, "'", "ü" * 100])
def test_at_most_64_characters_are_echoed_and_those_are_escaped(said):
    for kind, body in ((RouteRequest, {"query": "x", said: 1}), (DocList, {"state": said})):
        message = refusal(kind, wire.encode_any(body)).message
        assert message.isascii()
        assert message.isprintable()
        assert len(message) <= 64 + len("Object contains unknown field ``") + len(" - at `$.state`")


# ── tokens: rows 31 to 39 ───────────────────────────────────────────────────────────────────────────────────────────────

NO_TOKENS = [
    "../../etc", "..", ".", "", "a/b", "a\\b", "/abs", "C:", "a%2e%2e%2fb",
    "a\0b", "a\nb", "acme\n", "a b", " a", "a\t", "*", ">", "a.b", "a.*", "\u200b", "a\u200bb",
    "\u0430cme", "\uff41cme", "caf\u00e9", "cafe\u0301", "\u0661", "Acme", "ACME", "-a", "_a",
    "a" * 33, "a" * 64, "a" * 3000, "$JS", "$SYS", "_INBOX",
]  # fmt: skip


@pytest.mark.parametrize("value", NO_TOKENS)
def test_what_is_no_token_names_no_agent_no_client_and_no_id(value):
    checks = [
        (lambda: wire.agent_token(value), "bad_agent_id"),
        (lambda: wire.client_token(value), "bad_client_id"),
        (lambda: wire.id_token(value, "bad_doc_id"), "bad_doc_id"),
    ]
    for check, code in checks:
        with pytest.raises(BadRequest) as caught:
            check()
        assert caught.value.code == code
        assert caught.value.message.isascii()
        assert caught.value.message.isprintable()
        assert len(caught.value.message) <= 120


@pytest.mark.parametrize("value", ["a", "0", "acme", "acme-2_b", "a" * 32])
def test_a_token_comes_back_as_it_is(value):
    assert wire.agent_token(value) == wire.client_token(value) == wire.id_token(value, "bad_plan_id") == value


@pytest.mark.parametrize("value", ["hub", "con", "nul", "aux", "prn"])
def test_a_reserved_word_names_no_client(value):
    with pytest.raises(BadRequest, match="reserved_client_id"):
        wire.client_token(value)


@pytest.mark.parametrize(
    ("owner", "subject"),
    [
        ("acme", "hub.dlq.DOCS.acme"),
        ("*", "hub.dlq.DOCS.invalid"),
        ("", "hub.dlq.DOCS.invalid"),
        ("a.b", "hub.dlq.DOCS.invalid"),
    ],
)
def test_a_dead_letter_goes_to_its_owner_or_to_nobody(owner, subject):
    assert wire.dlq_subject("DOCS", owner) == subject


@pytest.mark.parametrize(
    ("made", "subject"),
    [
        (wire.route_subject("hr"), "hub.route.hr"),
        (wire.plan_subject("hr", "p1", "2"), "hub.plan.hr.p1.2"),
        (wire.result_subject("hr", "p1", "2"), "hub.result.hr.p1.2"),
        (wire.outcome_subject("hr", "p1"), "hub.outcome.hr.p1"),
        (wire.ingest_subject("acme"), "hub.docs.ingest.acme"),
        (wire.stream_subject("acme"), "hub.docs.stream.acme"),
        (wire.receipt_subject("acme", "d1"), "hub.docs.receipt.acme.d1"),
        (wire.object_bucket("acme"), "DOCS_acme"),
    ],
)
def test_subjects_are_those_of_the_contract(made, subject):
    assert made == subject


# ── headers ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("headers", "value"),
    [
        ({}, None),
        ({"Hub-Filename": ""}, None),
        ({"Hub-Filename": "a.txt"}, "a.txt"),
        ({"hub-filename": "a.txt"}, "a.txt"),
        ({"HUB-FILENAME": "ü.txt"}, "ü.txt"),
        ({"Hub-Filename": "x" * 256}, "x" * 256),
    ],
)
def test_a_header_is_found_however_its_name_is_written(headers, value):
    assert wire.header(headers, wire.FILENAME) == value


@pytest.mark.parametrize("value", ["x" * 257, "a\r\nX: y", "a\0", "a\tb", "\x7f"])
def test_a_header_that_is_too_long_or_holds_control_characters_is_refused_by_its_name(value):
    with pytest.raises(BadRequest) as caught:
        wire.header({"content-type": value}, wire.CONTENT_TYPE)
    assert (caught.value.code, caught.value.field) == ("bad_header", "Content-Type")


@pytest.mark.parametrize(("value", "seconds"), [(None, None), ("", None), ("1", 0.001), ("1700000000123", 1700000000.123)])
def test_a_deadline_is_unix_milliseconds(value, seconds):
    assert wire.deadline({} if value is None else {wire.DEADLINE: value}) == seconds


@pytest.mark.parametrize("value", ["0", "-1", "+5", "1.5", "1e12", "soon", " 5", "1_000", "²", "٥", "100000000000000"])
def test_what_is_no_time_is_no_deadline(value):
    with pytest.raises(BadRequest) as caught:
        wire.deadline({wire.DEADLINE: value})
    assert (caught.value.code, caught.value.field) == ("bad_deadline", "Hub-Deadline")


def test_a_deadline_of_many_digits_is_a_bad_header():
    with pytest.raises(BadRequest, match="bad_header"):
        wire.deadline({wire.DEADLINE: "9" * 5000})


@pytest.mark.parametrize(
    ("value", "path"), [(None, []), ("", []), ("ceo", ["ceo"]), ("ceo, finance ,sales", ["ceo", "finance", "sales"])]
)
def test_a_call_path_names_the_agents_visited(value, path):
    assert wire.call_path({} if value is None else {wire.CALL_PATH: value}) == path


@pytest.mark.parametrize(
    ("value", "code"),
    [("ceo,,sales", "bad_agent_id"), (",", "bad_agent_id"), ("ceo;sales", "bad_agent_id"), ("Ceo", "bad_agent_id"),
     ("a," * 512 + "a", "bad_header")],
)  # fmt: skip
def test_a_call_path_that_is_no_list_of_agents_is_refused(value, code):
    with pytest.raises(BadRequest, match=code):
        wire.call_path({wire.CALL_PATH: value})


@pytest.mark.parametrize(
    ("unix", "text"),
    [(0, "1970-01-01T00:00:00.000+00:00"), (1_700_000_000.1239, "2023-11-14T22:13:20.123+00:00")],
)
def test_a_time_is_written_in_utc_with_milliseconds_and_offset(unix, text):
    assert wire.iso(unix) == text


# ── every message: there and back, and its schema ───────────────────────────────────────────────────────────────────────

AT = "2026-01-01T00:00:00.000+00:00"
STEP = wire.PlannedStep("sales", "count the deals", 1, [], ["open deals"])
DECISION = wire.RoutingDecision(
    "parallel", [STEP, wire.PlannedStep("marketing", "plan", 2, ["sales"], [])], "because", 6, "ceo_decides", AT, "ceo",
    "Should we buy Company X?", "fallback_keywords", "p1", "running", fallback_used=True, fallback_reason="no_model",
    confidence=0.5, alternatives=[wire.Alternative("legal", 0.25)],
)  # fmt: skip
OUTCOMES = [wire.StepOutcome("sales", "1", "done", "count the deals", {"deals": 3}, "approve")]
RESOLUTION = wire.Resolution("ceo_decides", "decided", "approve", "ceo", {"sales": "approve"})
OUTCOME = wire.Outcome("p1", "ceo", "done", "Should we?", OUTCOMES, RESOLUTION, AT)
CATEGORIZATION = wire.Categorization("invoice", 0.9, "An invoice.", "internal", ["finance"], ["Acme"], "rules",
                                     [{"category": "contract", "score": 0.1}], 10, 20)  # fmt: skip
ERROR = wire.ErrorBody("queue_full", "256 wait", "r1", retry_after_ms=1500)
DOCUMENT = wire.Document("d1", 1, "categorized", "a.txt", "text/plain", None, 5, "0" * 64, None, AT, 1, 5, "complete", [],
                         categorization=CATEGORIZATION)  # fmt: skip
INFO = wire.AgentInfo("sales", "live", ["deals"], [], "", 1, AT)

EXAMPLES: dict[str, Struct] = {
    "route_request": RouteRequest("Should we buy Company X?", {"region": ["EU", None, 1.5]}, False, "ceo"),
    "route_reply": wire.RouteReply(DECISION),
    "plan_step": wire.StepMessage("p1", "2", "marketing", "plan", [], {"sales": wire.StepInput("1", "done", 3)}, DECISION),
    "step_result": StepResult("done", {"deals": 3}, "approve"),
    "outcome": OUTCOME,
    "plan_query": wire.PlanQuery("p1", "changed my mind"),
    "plan_list": wire.PlanList("running", 10),
    "plan_reply": wire.PlanReply(wire.PlanStatus(DECISION, "done", OUTCOMES, AT, OUTCOME)),
    "plan_replay_reply": wire.ReplayReply(
        DECISION,
        wire.Trace("0" * 64, {"sales": wire.Card(["deals"])}, ["ceo_decides"], 6, "builtin", "a1b2", 0, 0.0),
        None,
        ["agents"],
        True,
    ),
    "plan_list_reply": wire.PlanListReply([wire.PlanSummary("p1", "done", "single", ["sales"], "Should we?", AT)]),
    "agent_register": Register(["deals"], ["quotas"], "sells", 5.0, "host-1", "sales"),
    "agent_presence": Presence("host-1", "sales"),
    "agent_register_reply": wire.RegisterReply("sales", 20.0, 60.0, "PLANS", "sales"),
    "agent_reply": wire.AgentReply(INFO),
    "agent_list_reply": wire.AgentListReply([INFO]),
    "doc_receipt": wire.Receipt("d1", "0" * 64, 1, False, "committed", client="acme", categorization=CATEGORIZATION),
    "doc_failed_receipt": wire.FailedReceipt("d1", "0" * 64, ERROR, "acme", filename="a.pdf"),
    "doc_query": wire.DocQuery("d1"),
    "doc_reply": wire.DocReply(DOCUMENT),
    "doc_text_query": TextQuery("d1", 5, 10),
    "doc_text_reply": wire.TextReply("d1", 1, "héllo\u202e\n", 0, 7, None),
    "doc_list": DocList("invoice", "categorized", 10, "d0"),
    "doc_list_reply": wire.DocListReply([DOCUMENT], 1, None),
    "doc_delete_reply": wire.DeleteReply("d1", True),
    "doc_stats_reply": wire.DocStatsReply("acme", 1, 0, 0, 5, 5, 4096, 1 << 30, {"invoice": 1}),
    "dead_letter": wire.DeadLetter("DOCS", "hub.docs.stream.acme", 7, 5, ERROR, {"Hub-Filename": "a"}, 2, "hi", "utf-8", AT),
    "health": wire.Health("degraded", {"bus": "ok", "model": "stuck"}),
    "status": wire.StatusReply("hubpeer", "0.1.0", "i1", 1.5, 80.0, 90.0, "none", False, 0, {}, {}, {"sales": "live"},
                               {"running": 1}, [{"name": "PLANS"}], {}, {}, {}, {}),
    "error": wire.ErrorReply(ERROR, document_id="d1"),
}  # fmt: skip
NAMES = list(wire.MESSAGES)


def test_every_message_has_an_example_here():
    assert {name: type(example) for name, example in EXAMPLES.items()} == wire.MESSAGES


@pytest.mark.parametrize("name", NAMES)
def test_a_message_is_the_same_after_its_way_over_the_bus(name):
    data = wire.encode(EXAMPLES[name])
    assert wire.decode(wire.MESSAGES[name], data) == EXAMPLES[name]
    assert b"UNSET" not in data


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_of_a_message_is_valid_and_describes_it(name):
    schema = contract.schema(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(json.loads(wire.encode(EXAMPLES[name])))
    assert not validator.is_valid([])
    assert schema["$id"] == f"io.hubpeer.v1.{name}"


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("route_request", {}),
        ("route_request", {"query": "x", "colour": 1}),
        ("route_request", {"query": "x" * 8193}),
        ("step_result", {"status": "perhaps"}),
        ("agent_register", {"capabilities": []}),
        ("doc_list", {"limit": 201}),
        ("error", {"status": "success"}),
    ],
)
def test_what_decode_refuses_the_schema_refuses_too(name, body):
    refusal(wire.MESSAGES[name], wire.encode_any(body))
    assert not jsonschema.Draft202012Validator(contract.schema(name)).is_valid(body)


def test_an_unknown_schema_is_refused_with_the_names_there_are():
    with pytest.raises(BadRequest, match="unknown_schema: no schema named 'nope'; there are: route_request, "):
        contract.schema("nope")


def test_the_schemas_folder_is_what_the_messages_say():
    assert contract.differing(ROOT / "schemas") == []


def test_every_message_stands_in_a_channel_and_every_channel_names_messages_there_are():
    named = {name for channel in contract.CHANNELS for name in (channel.receives, channel.sends) if name}
    assert named | {"error"} == set(wire.MESSAGES)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "é", '"', "\\"]), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(JSON, st.sampled_from(["progress", "done", "failed"]))
def test_whatever_an_agent_reports_arrives_as_it_was(result, status):
    said = StepResult(status, result)
    assert wire.decode(StepResult, wire.encode(said)) == said


# ── the answer of a hub ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "error",
    [
        BadRequest("out_of_range", "limit is 1..200", field="limit"),
        Busy("queue_full", "256 wait", retry_after_ms=1500),
        HubError("internal", "r1"),
    ],
)
def test_an_error_is_the_same_on_the_other_side(error):
    answer = wire.encode(wire.ErrorReply(wire.error_body(error, "r1")))
    with pytest.raises(HubError) as caught:
        wire.decode_reply(wire.Health, answer)
    found = caught.value
    for fact in ("code", "message", "field", "retry_after_ms", "status"):
        assert getattr(found, fact) == getattr(error, fact)


def test_the_text_of_an_error_is_cut_so_that_its_answer_stays_small():
    assert len(wire.error_body(HubError("internal", "x" * 5000), "r1").message) == 500


def test_a_code_of_a_newer_hub_reads_as_internal():
    answer = b'{"status":"error","error":{"code":"brand_new","message":"m","request_id":"r1"}}'
    with pytest.raises(HubError, match="internal: m"):
        wire.decode_reply(wire.Health, answer)


def test_a_reply_is_decoded_though_it_holds_fields_of_a_newer_hub():
    assert wire.decode_reply(wire.Health, b'{"status":"ok","checks":{},"new":1}') == wire.Health("ok", {})


@pytest.mark.parametrize(
    "answer",
    [b"", b"{", b"\xff", b"[]", b"5", b"{}", b'{"status":"fine","checks":{}}', b'{"status":"error","error":{"code":5}}'],
)
def test_a_reply_that_is_none_is_a_coded_error(answer):
    with pytest.raises(HubError, match="bad_json: the reply is not what was expected"):
        wire.decode_reply(wire.Health, answer)


# ── dead letters ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Dead(Struct):
    """A message that could not be handled, as the bus hands it over."""

    data: bytes
    subject: str = "hub.docs.stream.acme"
    stream: str = "DOCS"
    sequence: int = 7
    deliveries: int = 5
    headers: dict[str, str] = {}
    ended: list[str] = []

    async def term(self, reason: str) -> None:
        self.ended.append(reason)


class Kept:
    """A stream that keeps what is published."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes, str]] = []

    async def publish(self, subject: str, data: bytes, *, msg_id: str) -> None:
        self.messages.append((subject, data, msg_id))


async def buried(message: Any) -> tuple[str, bytes, wire.DeadLetter]:
    stream = Kept()
    letters = deadletter.DeadLetters(stream)
    await letters.bury(message, BadRequest("bad_json", "no JSON"))
    ((subject, data, msg_id),) = stream.messages
    assert (msg_id, message.ended, letters.counts) == (f"{message.stream}-7", ["bad_json"], {"bad_json": 1})
    return subject, data, wire.decode(wire.DeadLetter, data)


@pytest.mark.parametrize(
    ("message", "subject"),
    [
        (Dead(b"x"), "hub.dlq.DOCS.acme"),
        (Dead(b"x", "hub.docs.stream.*"), "hub.dlq.DOCS.invalid"),
        (Dead(b"x", "hub.result.sales.p1.1", "RESULTS"), "hub.dlq.RESULTS.sales"),
    ],
)
async def test_what_cannot_be_handled_is_kept_under_its_owner_with_the_reason(message, subject):
    to, _, letter = await buried(message)
    assert to == subject
    assert (letter.stream, letter.subject, letter.sequence, letter.deliveries) == (message.stream, message.subject, 7, 5)
    assert (letter.error.code, letter.data, letter.encoding, letter.size) == ("bad_json", "x", "utf-8", 1)


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        ("grüße".encode(), "utf-8"),
        (b"\xff\xfe", "base64"),
        (b"x" * 1_000_000, "utf-8"),
        (b"\x01" * 1_000_000, "base64"),  # as text each would take six bytes of JSON
        (b'"' * 200_000, "utf-8"),
        (b"\xff" * 1_000_000, "base64"),
    ],
)
async def test_a_dead_letter_fits_into_one_message_whatever_is_in_it(data, encoding):
    headers = {f"{n:03}" + "n" * 500: "\x01" * 5000 for n in range(500)}
    _, sent, letter = await buried(Dead(data, headers=headers))
    assert len(sent) < 1_000_000
    assert (letter.encoding, letter.size) == (encoding, len(data))
