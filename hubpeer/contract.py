"""The contract, written down for others: JSON Schema of every message, and AsyncAPI 3.0 of every subject.

`python -m hubpeer.contract` writes `schemas/`, with `--check` it only compares. `hub.schema.<name>` serves the same schemas.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from hubpeer import __version__, wire
from hubpeer.errors import BadRequest, shown


class Channel(Struct, frozen=True):
    """One subject of the contract. `receives`: what the hub takes there; `sends`: what it publishes or answers; keys of
    `wire.MESSAGES`, or None for raw bytes or no body."""

    name: str
    address: str
    kind: Literal["request-reply", "stream"]
    summary: str
    receives: str | None = None
    sends: str | None = None


CHANNELS: Final = (
    Channel("route", "hub.route.{agent}", "request-reply", "A question becomes a plan.", "route_request", "route_reply"),
    Channel("plan", "hub.plan.{agent}.{plan}.{step}", "stream", "PLANS: a ready step, for its agent.", None, "plan_step"),
    Channel("result", "hub.result.{agent}.{plan}.{step}", "stream", "RESULTS: what an agent says of its step.", "step_result"),
    Channel("outcome", "hub.outcome.{agent}.{plan}", "stream", "OUTCOMES: how a plan ended, for its asker.", None, "outcome"),
    Channel("plans_list", "hub.plans.list.{agent}", "request-reply", "An agent's plans.", "plan_list", "plan_list_reply"),
    Channel("plans_show", "hub.plans.show.{agent}", "request-reply", "One plan.", "plan_query", "plan_reply"),
    Channel("plans_cancel", "hub.plans.cancel.{agent}", "request-reply", "Call a plan off.", "plan_query", "plan_reply"),
    Channel("plans_approve", "hub.plans.approve.{agent}", "request-reply", "Run a proposed plan.", "plan_query", "plan_reply"),
    Channel("plans_replay", "hub.plans.replay.{agent}", "request-reply", "Decide again.", "plan_query", "plan_replay_reply"),
    Channel(
        "agents_register", "hub.agents.register.{agent}", "request-reply", "A card.", "agent_register", "agent_register_reply"
    ),
    Channel("agents_heartbeat", "hub.agents.heartbeat.{agent}", "request-reply", "Alive.", "agent_presence", "agent_reply"),
    Channel("agents_leave", "hub.agents.leave.{agent}", "request-reply", "Goodbye.", "agent_presence", "agent_reply"),
    Channel("agents_show", "hub.agents.show.{agent}", "request-reply", "One card.", None, "agent_reply"),
    Channel("agents_list", "hub.agents.list", "request-reply", "All cards.", None, "agent_list_reply"),
    Channel(
        "docs_ingest", "hub.docs.ingest.{client}", "request-reply", "A document's bytes; the receipt.", None, "doc_receipt"
    ),
    Channel("docs_stream", "hub.docs.stream.{client}", "stream", "DOCS: a document's bytes; the PubAck means accepted."),
    Channel(
        "docs_receipt", "hub.docs.receipt.{client}.{doc}", "stream", "RECEIPTS: committed, categorized.", None, "doc_receipt"
    ),
    Channel(
        "docs_failed", "hub.docs.receipt.{client}.{doc}", "stream", "RECEIPTS: failed, and why.", None, "doc_failed_receipt"
    ),
    Channel("docs_get", "hub.docs.get.{client}", "request-reply", "What is known of a document.", "doc_query", "doc_reply"),
    Channel("docs_text", "hub.docs.text.{client}", "request-reply", "A document's text.", "doc_text_query", "doc_text_reply"),
    Channel("docs_list", "hub.docs.list.{client}", "request-reply", "Documents.", "doc_list", "doc_list_reply"),
    Channel("docs_delete", "hub.docs.delete.{client}", "request-reply", "Delete one.", "doc_query", "doc_delete_reply"),
    Channel("docs_stats", "hub.docs.stats.{client}", "request-reply", "Counts.", None, "doc_stats_reply"),
    Channel("dlq", "hub.dlq.{stream}.{owner}", "stream", "DLQ: what could not be handled, and why.", None, "dead_letter"),
    Channel("health", "hub.health", "request-reply", "ok or degraded.", None, "health"),
    Channel("status", "hub.status", "request-reply", "Everything an operator asks.", None, "status"),
    Channel("schema", "hub.schema.{name}", "request-reply", "The JSON Schema of a message."),
)


def schema(name: str) -> dict[str, Any]:
    """The JSON Schema of one entry of `wire.MESSAGES`. Raises `unknown_schema`."""
    kind = wire.MESSAGES.get(name)
    if kind is None:
        raise BadRequest("unknown_schema", f"no schema named '{shown(name)}'; there are: {', '.join(wire.MESSAGES)}")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"io.hubpeer.v1.{name}",
        **msgspec.json.schema(kind),
    }


def asyncapi() -> dict[str, Any]:
    """Every channel as an AsyncAPI 3.0 document; payloads refer to the schema files beside it."""
    channels: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    for channel in CHANNELS:
        found: dict[str, Any] = {"address": channel.address, "description": f"{channel.summary} ({channel.kind})"}
        names = [part[1:-1] for part in channel.address.split(".") if part.startswith("{")]
        if names:
            found["parameters"] = {name: {"description": f"a token: {wire.TOKEN.pattern}"} for name in names}
        found["messages"] = {
            name: {"payload": {"$ref": f"./{name}.json"}} for name in (channel.receives, channel.sends) if name is not None
        } or {"bytes": {"description": "raw bytes, described by headers"}}
        channels[channel.name] = found
        pushes = channel.kind == "stream" and channel.sends is not None
        operations[channel.name] = {
            "action": "send" if pushes else "receive",
            "channel": {"$ref": f"#/channels/{channel.name}"},
            "summary": channel.summary,
        }
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "hubpeer", "version": __version__, "description": "Questions become plans, documents records."},
        "channels": channels,
        "operations": operations,
    }


def files() -> dict[str, bytes]:
    """File name -> content of everything in `schemas/`. JSON is YAML too, so `asyncapi.yaml` is written as JSON."""
    texts = {f"{name}.json": schema(name) for name in wire.MESSAGES} | {"asyncapi.yaml": asyncapi()}
    return {name: msgspec.json.format(wire.encode_any(text), indent=2) + b"\n" for name, text in texts.items()}


def differing(folder: Path) -> list[str]:
    """Names of the files in `folder` that are missing, outdated, or not part of the contract."""
    wanted = files()
    there = {path.name: path.read_bytes() for path in folder.glob("*") if path.suffix in (".json", ".yaml")}
    return sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))


def write(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    wanted = files()
    for name in differing(folder):
        if name in wanted:
            (folder / name).write_bytes(wanted[name])
        else:
            (folder / name).unlink()


if __name__ == "__main__":
    schemas = Path("schemas")
    if "--check" not in sys.argv[1:]:
        write(schemas)
    elif wrong := differing(schemas):
        raise SystemExit(f"schemas/ is not what hubpeer/wire.py says ({', '.join(wrong)}): run `make schemas`")
