"""The contract on the bus: every subject, every header, every message. No I/O.

Messages are msgspec structs, decoded once at the door with `decode` and encoded with `encode`; no dict of unknown shape
travels inside, except where a field is an agent's own data (`context`, `result`). `contract.py` describes all of it for
others.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from hubpeer.errors import STATUS as CODES
from hubpeer.errors import BadRequest, HubError, shown

# ── tokens ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

TOKEN: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
#: Client names that are also words of the contract or of common file systems.
RESERVED_CLIENTS: Final = frozenset({"hub", "con", "nul", "aux", "prn"})
#: Longest `Hub-Source-Id`, `Nats-Msg-Id`, `Hub-Request-Id`, in characters.
MAX_ID: Final = 256


def agent_token(value: str) -> str:
    """`value` if it can be an agent's name, else `bad_agent_id`. The server itself stores subjects with a literal `*`, NUL or
    zero-width characters, so nothing but this check stands between them and the hub."""
    if TOKEN.fullmatch(value) is None or value == "hub":  # `_INBOX.hub.` is the hub's own
        raise BadRequest("bad_agent_id", f"an agent is named [a-z0-9][a-z0-9_-]{{0,31}}, not '{shown(value)}'")
    return value


def client_token(value: str) -> str:
    """`value` if it can be a client's name, else `bad_client_id` or `reserved_client_id`."""
    if TOKEN.fullmatch(value) is None:
        raise BadRequest("bad_client_id", f"a client is named [a-z0-9][a-z0-9_-]{{0,31}}, not '{shown(value)}'")
    if value in RESERVED_CLIENTS:
        raise BadRequest("reserved_client_id", f"{value!r} is reserved")
    return value


def id_token(value: str, code: str) -> str:
    """`value` if it can be a document or plan id, else `code`."""
    if TOKEN.fullmatch(value) is None:
        raise BadRequest(code, f"not an id: '{shown(value)}'")
    return value


def iso(unix: float) -> str:
    """Unix seconds as ISO 8601 in UTC, with milliseconds and the offset written out."""
    return datetime.fromtimestamp(unix, UTC).isoformat(timespec="milliseconds")


# ── subjects ────────────────────────────────────────────────────────────────────────────────────────────────────────────

ROUTE: Final = "hub.route.*"
DOCS_INGEST: Final = "hub.docs.ingest"
HUB_STATUS: Final = "hub.status"
HUB_HEALTH: Final = "hub.health"
HUB_SCHEMA: Final = "hub.schema.*"


def route_subject(agent: str) -> str:
    return f"hub.route.{agent}"


def plan_subject(agent: str, plan: str, step: str) -> str:
    return f"hub.plan.{agent}.{plan}.{step}"


def result_subject(agent: str, plan: str, step: str) -> str:
    return f"hub.result.{agent}.{plan}.{step}"


def outcome_subject(agent: str, plan: str) -> str:
    return f"hub.outcome.{agent}.{plan}"


def ingest_subject(client: str) -> str:
    return f"{DOCS_INGEST}.{client}"


def stream_subject(client: str) -> str:
    return f"hub.docs.stream.{client}"


def receipt_subject(client: str, document: str) -> str:
    return f"hub.docs.receipt.{client}.{document}"


def dlq_subject(stream: str, owner: str) -> str:
    """Where a message of `stream` goes that could not be handled; an owner that is no token becomes `invalid`."""
    return f"hub.dlq.{stream}.{owner if TOKEN.fullmatch(owner) else 'invalid'}"


def object_bucket(client: str) -> str:
    """The Object Store bucket (ADR-20) a client stages large bodies in."""
    return f"DOCS_{client}"


# ── headers ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

MSG_ID: Final = "Nats-Msg-Id"
REQUEST_ID: Final = "Hub-Request-Id"
DEADLINE: Final = "Hub-Deadline"
CALL_PATH: Final = "Hub-Call-Path"
TRACEPARENT: Final = "traceparent"
ERROR: Final = "Nats-Service-Error"
ERROR_CODE: Final = "Nats-Service-Error-Code"
RETRY_AFTER: Final = "Retry-After-Ms"
FILENAME: Final = "Hub-Filename"
CONTENT_TYPE: Final = "Content-Type"
SOURCE_ID: Final = "Hub-Source-Id"
SHA256: Final = "Hub-Sha256"
OBJECT: Final = "Hub-Object"
CLIENT: Final = "Hub-Client"
WAIT: Final = "Hub-Wait"

Headers = Mapping[str, str]
NO_HEADERS: Final[Headers] = {}


def header(headers: Headers, name: str, limit: int = MAX_ID) -> str | None:
    """One header as text: None where it is absent or empty.

    Header names arrive as the sender spelled them; they are compared without case. Raises `bad_header` where the value is
    longer than `limit` characters or holds control characters.
    """
    value = headers.get(name)
    if value is None:
        lowered = name.lower()
        value = next((v for k, v in headers.items() if k.lower() == lowered), None)
    if not value:
        return None
    if len(value) > limit:
        raise BadRequest("bad_header", f"{name} is longer than {limit} characters", field=name)
    if any(ord(c) < 32 or ord(c) == 127 for c in value):
        raise BadRequest("bad_header", f"{name} holds control characters", field=name)
    return value


def deadline(headers: Headers) -> float | None:
    """`Hub-Deadline` (unix milliseconds) as unix seconds, or None. Raises `bad_deadline`."""
    value = header(headers, DEADLINE, 20)
    if value is None:
        return None
    if not value.isascii() or not value.isdigit() or not 0 < int(value) < 10**14:
        raise BadRequest("bad_deadline", f"{DEADLINE} is unix milliseconds, not '{shown(value)}'", field=DEADLINE)
    return int(value) / 1000


def call_path(headers: Headers) -> list[str]:
    """The agents a question has already visited, oldest first."""
    value = header(headers, CALL_PATH, 1024)
    return [agent_token(part.strip()) for part in value.split(",")] if value else []


# ── field types ─────────────────────────────────────────────────────────────────────────────────────────────────────────

Text = Annotated[str, Meta(max_length=8192)]
Line = Annotated[str, Meta(min_length=1, max_length=200)]
Word = Annotated[str, Meta(min_length=1, max_length=64)]
Words = Annotated[list[Word], Meta(max_length=64)]
AgentName = Annotated[str, Meta(pattern=f"^{TOKEN.pattern}$")]
#: Names of whatever shape, checked by the receiver so that the error names the right code.
Name = Annotated[str, Meta(max_length=64)]
Probability = Annotated[float, Meta(ge=0, le=1)]

MAX_QUERY: Final = 8192
#: Largest result a step may report, and largest `context` of a question, in bytes of JSON. A plan of MAX_AGENTS agents with
#: results of this size still fits into one message of 1 MiB.
MAX_RESULT: Final = 64 * 1024
MAX_CONTEXT: Final = 64 * 1024
MAX_TRACE: Final = 64 * 1024
MAX_AGENTS: Final = 12


class _Message(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of what others send to the hub: unknown fields are refused, so a misspelt one is never silently ignored."""


class _Reply(Struct, frozen=True):
    """Base of what the hub sends: receivers ignore fields they do not know, so fields can be added."""


# ── routing ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

WorkflowType = Literal["single", "sequential", "parallel"]
ConflictRule = Literal["finance_priority", "consensus_required", "ceo_decides"]
RoutingMethod = Literal["llm_intelligent", "builtin_encoder", "fallback_keywords"]
PlanState = Literal["proposed", "running", "done", "failed", "canceled", "expired"]
StepState = Literal["waiting", "ready", "working", "done", "failed", "skipped", "canceled"]


class RouteRequest(_Message, frozen=True):
    """A question. The subject's last token is the requesting agent; `requesting_agent`, where given, must equal it."""

    query: Annotated[str, Meta(max_length=MAX_QUERY)]
    context: dict[str, Any] | None = None
    dispatch: bool = True
    requesting_agent: Name | None = None


class PlannedStep(_Reply, frozen=True):
    """One agent's part of a plan."""

    agent: AgentName
    task: Text
    priority: Annotated[int, Meta(ge=1, le=MAX_AGENTS + 1)]
    depends_on: list[AgentName]
    data_needed: list[Line]


class Alternative(_Reply, frozen=True):
    """An agent that was not chosen, and how near it came."""

    agent: AgentName
    score: Probability


class RoutingDecision(_Reply, frozen=True):
    """The plan as the asker reads it and as every spoke named in it receives it."""

    workflow_type: WorkflowType
    agents: list[PlannedStep]
    reasoning: Text
    estimated_time_minutes: int
    conflict_resolution: ConflictRule
    routed_at: str
    requesting_agent: AgentName
    original_query: Annotated[str, Meta(max_length=MAX_QUERY)]
    routing_method: RoutingMethod
    plan_id: str
    state: PlanState
    fallback_used: bool | msgspec.UnsetType = msgspec.UNSET
    fallback_reason: str | msgspec.UnsetType = msgspec.UNSET
    confidence: Probability | msgspec.UnsetType = msgspec.UNSET
    alternatives: list[Alternative] = []


class RouteReply(_Reply, frozen=True):
    routing_decision: RoutingDecision
    status: Literal["success"] = "success"


class StepInput(_Reply, frozen=True):
    """What an earlier step of the same plan reported."""

    step_id: str
    status: StepState
    result: Any = None
    verdict: str | None = None


class StepMessage(_Reply, frozen=True):
    """`hub.plan.<agent>.<plan>.<step>`: one ready step, the whole plan, and the results it depends on, by agent."""

    plan_id: str
    step_id: str
    agent: AgentName
    task: Text
    data_needed: list[Line]
    results: dict[str, StepInput]
    plan: RoutingDecision
    context: dict[str, Any] | None = None
    type: Literal["io.hubpeer.plan.v1.step"] = "io.hubpeer.plan.v1.step"


class StepResult(_Message, frozen=True):
    """`hub.result.<agent>.<plan>.<step>`: what an agent says of its step.

    `done` carries `result` (any JSON, at most 64 KiB) and optionally a `verdict` ("approve", "reject", ...) that the plan's
    conflict rule works on; `failed` carries `error`; `progress` keeps the step alive and may carry a `note`.
    """

    status: Literal["progress", "done", "failed"]
    result: Any = None
    verdict: Annotated[str, Meta(max_length=64)] | None = None
    error: Annotated[str, Meta(max_length=2000)] | None = None
    note: Annotated[str, Meta(max_length=2000)] | None = None
    type: str | None = None


class StepOutcome(_Reply, frozen=True):
    agent: AgentName
    step_id: str
    status: StepState
    task: Text
    result: Any = None
    verdict: str | None = None
    error: str | None = None


class Resolution(_Reply, frozen=True):
    """How differing verdicts were settled.

    `none`: nothing to settle; `agreed`: all verdicts are equal; `decided`: the rule's agent decided; `open`: they differ and
    the rule does not settle it, so a person must.
    """

    rule: ConflictRule
    status: Literal["none", "agreed", "decided", "open"]
    verdict: str | None = None
    decided_by: str | None = None
    verdicts: dict[str, str] = {}


class Outcome(_Reply, frozen=True):
    """`hub.outcome.<agent>.<plan>`: how a plan ended."""

    plan_id: str
    requesting_agent: AgentName
    status: PlanState
    original_query: str
    steps: list[StepOutcome]
    conflict: Resolution
    finished_at: str
    reason: str | None = None
    type: Literal["io.hubpeer.plan.v1.outcome"] = "io.hubpeer.plan.v1.outcome"


class PlanQuery(_Message, frozen=True):
    """Body of `hub.plans.show`, `cancel`, `approve` and `replay`."""

    plan_id: Name
    reason: Annotated[str, Meta(max_length=500)] | None = None


class PlanList(_Message, frozen=True):
    """Body of `hub.plans.list`; empty means everything, newest first."""

    state: PlanState | None = None
    limit: Annotated[int, Meta(ge=1, le=200)] = 50


class PlanStatus(_Reply, frozen=True):
    """A plan with the state of each step."""

    plan: RoutingDecision
    state: PlanState
    steps: list[StepOutcome]
    updated_at: str
    outcome: Outcome | None = None


class PlanReply(_Reply, frozen=True):
    plan: PlanStatus
    status: Literal["success"] = "success"


class Trace(_Reply, frozen=True):
    """What a decision was made from, kept with its plan, so that it can be made again (`hub.plans.replay`)."""

    input_sha256: str  # of asker, question and context
    cards: dict[str, Card]  # of the agents that could be named
    rules: list[ConflictRule]
    max_agents: int
    model: str
    revision: str
    seed: int
    temperature: float


class ReplayReply(_Reply, frozen=True):
    """A decision as it was made and as it would be made now, from the same input and cards; `differences` names the fields
    that differ (agents, order, conflict_resolution, routing_method), `model_changed` whether another model decides now."""

    recorded: RoutingDecision
    trace: Trace
    now: RoutingDecision | None
    differences: list[str]
    model_changed: bool
    status: Literal["success"] = "success"


class PlanSummary(_Reply, frozen=True):
    plan_id: str
    state: PlanState
    workflow_type: WorkflowType
    agents: list[str]
    original_query: str
    routed_at: str


class PlanListReply(_Reply, frozen=True):
    plans: list[PlanSummary]
    status: Literal["success"] = "success"


# ── agents ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Card(Struct, frozen=True, forbid_unknown_fields=True):
    """What an agent says of itself. Data for the planner, never instructions to it."""

    capabilities: Annotated[list[Word], Meta(min_length=1, max_length=64)]
    specialties: Words = []
    description: Annotated[str, Meta(max_length=512)] = ""


class Register(_Message, frozen=True):
    """Body of `hub.agents.register`: the card, how often heartbeats will come (seconds), and which process this is."""

    capabilities: Annotated[list[Word], Meta(min_length=1, max_length=64)]
    specialties: Words = []
    description: Annotated[str, Meta(max_length=512)] = ""
    heartbeat_s: Annotated[float, Meta(ge=0.1, le=3600)] | None = None
    instance: Name = "default"
    agent: Name | None = None


class Presence(_Message, frozen=True):
    """Body of `hub.agents.heartbeat` and `hub.agents.leave`; may be empty."""

    instance: Name = "default"
    agent: Name | None = None


class Nothing(_Message, frozen=True):
    """A request that needs no body; `{}` and zero bytes both do."""


AgentState = Literal["configured", "live", "expired", "left"]


class AgentInfo(_Reply, frozen=True):
    """A card and whether its agent may be asked: `configured` (named by the operator, never seen) and `live` may."""

    agent: AgentName
    state: AgentState
    capabilities: list[str]
    specialties: list[str]
    description: str
    instances: int
    last_seen: str | None = None


class RegisterReply(_Reply, frozen=True):
    """`stream` and `consumer` name the JetStream pull consumer this agent takes its steps from."""

    agent: AgentName
    heartbeat_s: float
    expires_s: float
    stream: str
    consumer: str
    status: Literal["success"] = "success"


class AgentReply(_Reply, frozen=True):
    agent: AgentInfo
    status: Literal["success"] = "success"


class AgentListReply(_Reply, frozen=True):
    agents: list[AgentInfo]
    status: Literal["success"] = "success"


# ── documents ───────────────────────────────────────────────────────────────────────────────────────────────────────────

DocState = Literal["committed", "categorized", "failed"]
Sensitivity = Literal["public", "internal", "confidential", "restricted"]


class Categorization(_Reply, frozen=True):
    """What the model or the rules say of a document."""

    category: str
    confidence: Probability
    summary: str
    sensitivity: Sensitivity
    relevant_agents: list[str]
    key_entities: list[str]
    method: Literal["llm_intelligent", "builtin_encoder", "rules"]
    alternatives: list[dict[str, Any]] = []
    read_chars: int = 0
    total_chars: int = 0


class ErrorBody(_Reply, frozen=True):
    code: str
    message: str
    request_id: str
    field: str | msgspec.UnsetType = msgspec.UNSET
    retry_after_ms: int | msgspec.UnsetType = msgspec.UNSET


class ErrorReply(_Reply, frozen=True):
    """Every refusal, over every subject. `document_id` is set where the reason was kept under an id."""

    error: ErrorBody
    status: Literal["error"] = "error"
    document_id: str | msgspec.UnsetType = msgspec.UNSET


class Receipt(_Reply, frozen=True):
    """Proof: the document is in the client's store, on disk."""

    document_id: str
    sha256: str
    version: int
    duplicate: bool
    state: DocState
    status: Literal["success"] = "success"
    client: str | msgspec.UnsetType = msgspec.UNSET
    source_id: str | msgspec.UnsetType = msgspec.UNSET
    filename: str | msgspec.UnsetType = msgspec.UNSET
    categorization: Categorization | msgspec.UnsetType = msgspec.UNSET


class FailedReceipt(_Reply, frozen=True):
    """`hub.docs.receipt...` for a document that will never be stored: only its reason is."""

    document_id: str
    sha256: str
    error: ErrorBody
    client: str
    state: Literal["failed"] = "failed"
    status: Literal["error"] = "error"
    source_id: str | msgspec.UnsetType = msgspec.UNSET
    filename: str | msgspec.UnsetType = msgspec.UNSET


class DocQuery(_Message, frozen=True):
    """Body of `hub.docs.get` and `hub.docs.delete`."""

    document_id: Name


class TextQuery(_Message, frozen=True):
    """Body of `hub.docs.text`: characters from `offset`, at most `limit`."""

    document_id: Name
    offset: Annotated[int, Meta(ge=0, le=10**9)] = 0
    limit: Annotated[int, Meta(ge=1, le=100_000)] = 100_000


class DocList(_Message, frozen=True):
    """Body of `hub.docs.list`; newest first. `after` is the `next` of the page before."""

    category: Word | None = None
    state: DocState | None = None
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    after: Name | None = None


class Document(_Reply, frozen=True):
    """What the store knows of one document, without its text."""

    document_id: str
    version: int
    state: DocState
    filename: str
    media_type: str
    declared_type: str | None
    size: int
    sha256: str
    source_id: str | None
    received_at: str
    pages: int
    text_chars: int
    extraction: str
    notes: list[str]
    title: str | None = None
    categorization: Categorization | None = None
    error: dict[str, str] | None = None


class DocReply(_Reply, frozen=True):
    document: Document
    status: Literal["success"] = "success"


class DocListReply(_Reply, frozen=True):
    documents: list[Document]
    total: int
    next: str | None
    status: Literal["success"] = "success"


class TextReply(_Reply, frozen=True):
    document_id: str
    version: int
    text: str
    offset: int
    total_chars: int
    next_offset: int | None
    status: Literal["success"] = "success"


class DeleteReply(_Reply, frozen=True):
    document_id: str
    deleted: bool
    status: Literal["success"] = "success"


class DocStatsReply(_Reply, frozen=True):
    client: str
    documents: int
    failed: int
    pending: int
    bytes: int
    text_chars: int
    map_used_bytes: int
    map_size_bytes: int
    categories: dict[str, int]
    status: Literal["success"] = "success"


class DeadLetter(_Reply, frozen=True):
    """`hub.dlq...`: what could not be handled, and why. `data` is the message as text where it is text, else base64."""

    stream: str
    subject: str
    sequence: int
    deliveries: int
    error: ErrorBody
    headers: dict[str, str]
    size: int
    data: str
    encoding: Literal["utf-8", "base64"]
    at: str


# ── operators ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Health(_Reply, frozen=True):
    status: Literal["ok", "degraded"]
    checks: dict[str, str]


class StatusReply(_Reply, frozen=True):
    """The specification's fields (memory use, model name and state, queue) and what an operator asks next."""

    name: str
    version: str
    instance: str
    uptime_s: float
    memory_usage_mb: float
    memory_peak_mb: float
    model_name: str
    model_loaded: bool
    queue_size: int
    model: dict[str, Any]
    queue: dict[str, Any]
    agents: dict[str, str]
    plans: dict[str, int]
    streams: list[dict[str, Any]]
    stores: dict[str, Any]
    documents: dict[str, Any]
    bus: dict[str, Any]
    routing: dict[str, Any]
    status: Literal["ok", "degraded"] = "ok"


MESSAGES: Final[dict[str, type[Struct]]] = {
    "route_request": RouteRequest,
    "route_reply": RouteReply,
    "plan_step": StepMessage,
    "step_result": StepResult,
    "outcome": Outcome,
    "plan_query": PlanQuery,
    "plan_list": PlanList,
    "plan_reply": PlanReply,
    "plan_replay_reply": ReplayReply,
    "plan_list_reply": PlanListReply,
    "agent_register": Register,
    "agent_presence": Presence,
    "agent_register_reply": RegisterReply,
    "agent_reply": AgentReply,
    "agent_list_reply": AgentListReply,
    "doc_receipt": Receipt,
    "doc_failed_receipt": FailedReceipt,
    "doc_query": DocQuery,
    "doc_reply": DocReply,
    "doc_text_query": TextQuery,
    "doc_text_reply": TextReply,
    "doc_list": DocList,
    "doc_list_reply": DocListReply,
    "doc_delete_reply": DeleteReply,
    "doc_stats_reply": DocStatsReply,
    "dead_letter": DeadLetter,
    "health": Health,
    "status": StatusReply,
    "error": ErrorReply,
}

# ── encode, decode ──────────────────────────────────────────────────────────────────────────────────────────────────────

MAX_DEPTH: Final = 32
M = TypeVar("M", bound=Struct)
_decoders: dict[type[Struct], msgspec.json.Decoder[Any]] = {}
_encoder = msgspec.json.Encoder()
# Takes an unterminated string to the end of the data, so that a hostile one costs one pass, not one per quote.
_strings = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_escaped_nul = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
_lone_surrogate = re.compile(
    rb"(?<!\\)(?:\\\\)*\\u[dD](?:[89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..\\u[dD])[c-fC-F]..)"
)
_path = re.compile(r" - at `\$\.?(.*?)`$")


def encode(message: Struct) -> bytes:
    """`message` as UTF-8 JSON."""
    return _encoder.encode(message)


def encode_any(value: Any) -> bytes:
    """Any JSON value as UTF-8 JSON."""
    return _encoder.encode(value)


def decode(kind: type[M], data: bytes) -> M:
    """`data` as a `kind`. Raises `BadRequest` with the code and, where there is one, the field; never anything else.

    Zero bytes read as `{}` where every field has a default (so `nats req hub.docs.list.acme ""` works), otherwise as an
    empty request.
    """
    if not data.strip():
        if kind.__struct_fields__ and any(f.required for f in msgspec.structs.fields(kind)):
            raise BadRequest("bad_json", "empty request")
        data = b"{}"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise BadRequest("bad_encoding", f"not UTF-8 at byte {exc.start}") from None
    if data.startswith(b"\xef\xbb\xbf"):
        raise BadRequest("bad_encoding", "UTF-8 without a byte order mark is expected")
    if b"\0" in data[:4]:
        raise BadRequest("bad_encoding", "UTF-8 is expected, not UTF-16 or UTF-32")
    if _depth(data) > MAX_DEPTH:
        raise BadRequest("too_deep", f"nested deeper than {MAX_DEPTH}")
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    try:
        message: M = decoder.decode(data)
    except msgspec.ValidationError as exc:
        _refuse_malformed(data)  # what follows the first wrong field may not even be JSON, and that counts first
        raise _validation_error(str(exc)) from None
    except msgspec.DecodeError as exc:
        code = "bad_encoding" if _lone_surrogate.search(data) else "bad_json"
        raise BadRequest(code, str(exc)) from None
    except RecursionError:
        raise BadRequest("too_deep", f"nested deeper than {MAX_DEPTH}") from None
    _refuse_duplicate_keys(data)
    if _escaped_nul.search(data):
        # msgspec accepts an escaped NUL in a string; no store, log or model does anything good with one.
        raise BadRequest("bad_character", "NUL in text")
    return message


def decode_reply(kind: type[M], data: bytes) -> M:
    """A hub's answer as a `kind`; raises the `HubError` it carries where it is an error."""
    try:
        probe: Any = msgspec.json.decode(data)
        if isinstance(probe, dict) and probe.get("status") == "error" and isinstance(probe.get("error"), dict):
            error = msgspec.convert(probe["error"], ErrorBody)
            raise as_error(error)
        return msgspec.convert(probe, kind)
    except (msgspec.DecodeError, msgspec.ValidationError) as exc:
        raise HubError("bad_json", f"the reply is not what was expected: {exc}") from None


def as_error(body: ErrorBody) -> HubError:
    """The error a reply carries, as the exception the hub raised."""
    code = body.code if body.code in CODES else "internal"
    return HubError(
        code,
        body.message,
        field=body.field if isinstance(body.field, str) else None,
        retry_after_ms=body.retry_after_ms if isinstance(body.retry_after_ms, int) else None,
    )


def error_body(error: HubError, request_id: str) -> ErrorBody:
    return ErrorBody(
        code=error.code,
        message=error.message[:500],
        request_id=request_id,
        field=error.field if error.field is not None else msgspec.UNSET,
        retry_after_ms=error.retry_after_ms if error.retry_after_ms is not None else msgspec.UNSET,
    )


def _refuse_malformed(data: bytes) -> None:
    try:
        msgspec.json.decode(data, type=msgspec.Raw)
    except msgspec.DecodeError as exc:
        raise BadRequest("bad_json", str(exc)) from None


def _depth(data: bytes) -> int:
    depth = deepest = 0
    for char in _strings.sub(b"", data) if data.count(b"{") + data.count(b"[") > MAX_DEPTH else b"":
        if char in b"{[":
            depth += 1
            deepest = max(deepest, depth)
        elif char in b"}]":
            depth -= 1
    return deepest


def _refuse_duplicate_keys(data: bytes) -> None:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = shown(Counter(name for name, _ in pairs).most_common(1)[0][0])
            raise BadRequest("duplicate_key", f"{twice} stands twice", field=twice)
        return found

    json.loads(data, object_pairs_hook=unique)


# msgspec has no codes, so its wording is read here, once; tests pin every line of this table.
_VALIDATION: Final[list[tuple[re.Pattern[str], str]]] = [
    (re.compile(r"^Object missing required field `(?P<field>.+)`$"), "missing_field"),
    (re.compile(r"^Object contains unknown field `(?P<field>.*)`$", re.DOTALL), "unknown_field"),
    (re.compile(r"^Expected `(?:str|bytes)` of length <="), "field_too_long"),
    (re.compile(r"^Expected `(?:str|bytes)` of length >="), "empty_field"),
    (re.compile(r"^Expected `array` of length <="), "too_many_items"),
    (re.compile(r"^Expected `array` of length >="), "empty_field"),
    (re.compile(r"^Expected `object` of length <="), "too_many_fields"),
    (re.compile(r"^Expected `(?:int|float)` (?:>=|<=|>|<)"), "out_of_range"),
    (re.compile(r"^Expected `str` matching regex"), "bad_value"),
    (re.compile(r"^Invalid enum value '?(?P<value>.*?)'?$", re.DOTALL), "bad_value"),
    (re.compile(r"[Ii]nteger .*out of range|[Nn]umber out of range"), "bad_number"),
    (re.compile(r"^Expected `.+`, got `.+`"), "bad_type"),
]


def _validation_error(text: str) -> BadRequest:
    at = _path.search(text)
    field, where = (at.group(1), at.group()) if at else ("", "")
    what, code = text.removesuffix(where), "bad_value"
    for pattern, candidate in _VALIDATION:
        if found := pattern.search(what):
            code = candidate
            for group, said in found.groupdict().items():
                what = what.replace(said, shown(said))
                field = f"{field}.{said}".lstrip(".") if group == "field" else field
            break
    return BadRequest(code, what + where, field=shown(field) if field else None)
