"""How things look in a terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from hubpeer import wire
from hubpeer.errors import HubError
from hubpeer.plan import clean, levels

#: Where output goes to no terminal (a pipe, a log) there is no width to keep to.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)

_COLOURS = {
    "done": "green", "committed": "cyan", "categorized": "green", "ok": "green", "live": "green", "running": "cyan",
    "working": "cyan", "ready": "cyan", "failed": "red", "expired": "red", "canceled": "yellow", "skipped": "yellow",
    "degraded": "yellow", "left": "yellow",
}  # fmt: skip


def emit(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
    sys.stdout.flush()


def coloured(state: str) -> str:
    colour = _COLOURS.get(state)
    return f"[{colour}]{state}[/]" if colour else state


def plan(decision: wire.RoutingDecision, steps: list[wire.StepOutcome] | None = None) -> None:
    """A plan as a small graph: who starts, who comes behind whom; with results where there are any."""
    told = {step.agent: step for step in steps or [] if step.step_id != "decide"}
    head = f"[bold]{decision.workflow_type}[/] by {decision.routing_method}"
    if decision.fallback_reason is not UNSET:
        head += f" ({decision.fallback_reason})"
    if decision.confidence is not UNSET:
        head += f", confidence {decision.confidence:.2f}"
    tree = Tree(
        f"{head}, {decision.conflict_resolution}, about {decision.estimated_time_minutes} min  [dim]{decision.plan_id}[/]"
    )
    graph = {step.agent: step.depends_on for step in decision.agents}
    level = levels(graph)
    branches: dict[str, Tree] = {}
    for step in sorted(decision.agents, key=lambda s: level[s.agent]):
        # Under the latest of those it waits for; the others are named.
        above = max(step.depends_on, key=lambda a: level[a], default=None)
        others = [a for a in step.depends_on if a != above]
        line = f"[bold]{step.agent}[/]"
        if others:
            line += f" [dim](after {', '.join(others)} too)[/]"
        if step.agent in told:
            line += f" {coloured(told[step.agent].status)}"
        line += f"  {_plain(step.task)}"
        branch = (branches[above] if above is not None else tree).add(line)
        if step.agent in told and (text := _said(told[step.agent])):
            branch.add(f"[dim]{_plain(text, 300)}[/]")
        branches[step.agent] = branch
    console.print(tree)


def replay(found: wire.ReplayReply) -> None:
    """A decision as it was and as it would be."""
    trace = found.trace
    pairs(
        {
            "decided by": f"{trace.model} {trace.revision}" + (f", seed {trace.seed}" if trace.temperature else ""),
            "input": f"sha256 {trace.input_sha256[:16]}..., {len(trace.cards)} cards: {', '.join(trace.cards)}",
        }
    )
    plan(found.recorded)
    if not found.differences:
        changed = ", though another model decides now" if found.model_changed else ""
        console.print(f"today the same{changed}")
        return
    console.print(f"today different in: {', '.join(found.differences)}")
    if found.now is None:
        console.print("nobody fits")
    else:
        plan(found.now)


def _said(step: wire.StepOutcome) -> str:
    if step.error:
        return step.error
    text = step.result if isinstance(step.result, str) else msgspec.json.encode(step.result).decode()
    said = clean(text, 160) if step.result is not None else ""
    return f"{said} (verdict: {step.verdict})".lstrip() if step.verdict else said


def outcome(found: wire.Outcome) -> None:
    conflict = found.conflict
    line = f"outcome: {coloured(found.status)}"
    if conflict.status != "none":
        line += f", verdicts {conflict.status}"
        line += f": {_plain(conflict.verdict)}" if conflict.verdict else ""
        line += f" (by {conflict.decided_by})" if conflict.decided_by else ""
    if found.reason:
        line += f", {_plain(found.reason, 500)}"
    console.print(line)


def documents(found: list[wire.Document]) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("document", "state", "category", "for", "pages", "chars", "file"):
        table.add_column(
            name, justify="right" if name in ("pages", "chars") else "left", no_wrap=name == "document", overflow="fold"
        )
    for one in found:
        category = one.categorization
        table.add_row(
            one.document_id,
            coloured(one.state),
            f"{category.category} {category.confidence:.2f}" if category else one.error["code"] if one.error else "",
            ", ".join(category.relevant_agents) if category else "",
            str(one.pages),
            str(one.text_chars),
            _plain(one.filename),
        )
    console.print(table)


def document(one: wire.Document) -> None:
    rows = {
        "document": one.document_id,
        "state": coloured(one.state),
        "file": _plain(one.filename, 256),
        "title": _plain(one.title or "", 256),
        "type": one.media_type,
        "bytes": str(one.size),
        "pages": str(one.pages),
        "characters": str(one.text_chars),
        "received": one.received_at,
        "version": str(one.version),
        "sha256": one.sha256,
        "source id": _plain(one.source_id or "", 256),
        "notes": ", ".join(one.notes),
    }
    if one.error:
        rows |= {"error": f"{one.error['code']}: {_plain(one.error['message'], 500)}"}
    if found := one.categorization:
        rows |= {
            "category": f"{found.category} ({found.confidence:.2f}, {found.method})",
            "sensitivity": found.sensitivity,
            "for": ", ".join(found.relevant_agents),
            "summary": _plain(found.summary, 2000),
        }
    pairs(rows)


def pairs(rows: dict[str, str]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    console.print(table)


def receipt(one: wire.Receipt, path: Path) -> None:
    found = one.categorization
    what = f" {_plain(found.category)} ({found.confidence:.2f})" if found is not UNSET else ""
    same = ", known already" if one.duplicate else ""
    console.print(f"{one.document_id} {coloured(one.state)}{same}{what}  {_plain(str(path), 300)}")


def refusal(error: HubError, path: Path) -> None:
    console.print(f"[red]refused[/] {error.code}: {_plain(error.message, 300)}  {_plain(str(path), 300)}")


def agents(found: list[wire.AgentInfo]) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("agent", "state", "processes", "last seen", "capabilities; specialties"):
        table.add_column(name, overflow="fold")
    for one in found:
        words = ", ".join(one.capabilities) + ("; " + ", ".join(one.specialties) if one.specialties else "")
        table.add_row(one.agent, coloured(one.state), str(one.instances), one.last_seen or "", _plain(words, 2000))
    console.print(table)


def plans(found: list[wire.PlanSummary]) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("plan", "state", "agents", "routed at", "query"):
        table.add_column(name, overflow="fold")
    for one in found:
        row = (one.plan_id, coloured(one.state), ", ".join(one.agents), one.routed_at, _plain(one.original_query))
        table.add_row(*row)
    console.print(table)


def status(found: wire.StatusReply) -> None:
    streams = ", ".join(f"{s['name']} {s.get('messages', s.get('error'))}" for s in found.streams)
    stores = ", ".join(f"{name} {value}" for name, value in found.stores.items() if value)
    pairs(
        {
            "hub": f"{found.name} {found.version} {coloured(found.status)}, up {found.uptime_s:.0f} s",
            "memory": f"{found.memory_usage_mb:.0f} MiB, peak {found.memory_peak_mb:.0f} MiB",
            "model": f"{_plain(found.model_name)}{'' if found.model_loaded or found.model_name == 'none' else ' (not loaded)'}",
            "queue": ", ".join(f"{name} {value}" for name, value in found.queue.items()),
            "agents": ", ".join(f"{name} {coloured(state)}" for name, state in found.agents.items()),
            "plans": ", ".join(f"{name} {value}" for name, value in found.plans.items()),
            "routing": ", ".join(f"{name} {value}" for name, value in found.routing.get("counts", {}).items()),
            "documents": ", ".join(f"{name} {value}" for name, value in found.documents.get("counts", {}).items()),
            "stores": escape(stores),
            "streams (messages)": escape(streams),
            "nats-server": str(found.bus.get("server")),
            "problems": escape(
                "; ".join(f"{k}: {v}" for k, v in found.bus.get("checks", {}).items() if v not in ("ok", "none"))
            ),
        }
    )


def _plain(text: str, limit: int = 100) -> str:
    """Somebody else's text as it may stand in a terminal: one line, no markup, no control characters."""
    return escape(clean(text, limit))
