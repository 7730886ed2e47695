"""The plan: a small directed acyclic graph over agents that exist now. Its rules, its life, its end. Pure.

A planner (a model, the keyword rule) writes a `Draft`; `build` checks it and computes what follows from it (levels, workflow
type), so a `RoutingDecision` that exists is valid. `Record` is the one thing that travels through a plan's life; every
function here takes one and returns the next. What to publish is always derivable from the record alone (`ready`, `outcome`),
so whoever reads the record after a crash can carry on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

import msgspec
from msgspec import UNSET, Struct

from hubpeer.errors import BadRequest
from hubpeer.wire import (
    Alternative,
    ConflictRule,
    Outcome,
    PlannedStep,
    PlanState,
    PlanStatus,
    PlanSummary,
    Resolution,
    RoutingDecision,
    RoutingMethod,
    StepInput,
    StepMessage,
    StepOutcome,
    StepResult,
    StepState,
    Trace,
    WorkflowType,
    iso,
)

#: Step id of the last step that `ceo_decides` adds; the planned steps are numbered from 1.
DECIDE: Final = "decide"
CEO: Final = "ceo"
FINANCE: Final = "finance"
MINUTES_PER_STEP: Final = 3

# ── from draft to decision ──────────────────────────────────────────────────────────────────────────────────────────────


class DraftStep(Struct, frozen=True):
    agent: str
    task: str
    depends_on: list[str] = []
    data_needed: list[str] = []


class Draft(Struct, frozen=True):
    """What a planner says; nothing in it is believed before `build` has checked it."""

    agents: list[DraftStep]
    conflict_resolution: str | None = None
    reasoning: str = ""
    confidence: float | None = None
    alternatives: list[Alternative] = []


class Rejected(Struct, frozen=True):
    """Why a draft is no plan. `reason` is one of: empty, too_many_agents, self_route, unknown_agent, agent_twice,
    unknown_dependency, cycle, unknown_rule."""

    reason: str
    detail: str = ""


class Question(Struct, frozen=True):
    """What is asked, by whom, under which rules."""

    asker: str
    query: str
    rules: list[ConflictRule]
    default_rule: ConflictRule
    max_agents: int


def check(steps: Collection[DraftStep], question: Question, known: Collection[str]) -> Rejected | None:
    """The rules of the graph; None where all hold."""
    names = [step.agent for step in steps]
    if not names:
        return Rejected("empty")
    if len(names) > question.max_agents:
        return Rejected("too_many_agents", f"{len(names)} > {question.max_agents}")
    if question.asker in names:
        return Rejected("self_route", question.asker)
    if unknown := sorted(set(names) - set(known)):
        return Rejected("unknown_agent", ", ".join(unknown))
    if len(set(names)) != len(names):
        return Rejected("agent_twice", next(n for n in names if names.count(n) > 1))
    if dangling := sorted({d for step in steps for d in step.depends_on} - set(names)):
        return Rejected("unknown_dependency", ", ".join(dangling))
    if len(levels({step.agent: step.depends_on for step in steps})) != len(names):
        return Rejected("cycle")
    return None


def levels(depends_on: Mapping[str, Collection[str]]) -> dict[str, int]:
    """Longest way from a start to each node; nodes on or behind a cycle are left out."""
    found: dict[str, int] = {}
    while True:
        new = {
            node: max((found[d] + 1 for d in needs), default=0)
            for node, needs in depends_on.items()
            if node not in found and all(d in found for d in needs)
        }
        if not new:
            return found
        found |= new


def workflow_type(depends_on: Mapping[str, Collection[str]]) -> WorkflowType:
    """`single`: one agent; `parallel`: several can start at once; `sequential`: one starts, all others come behind it."""
    if len(depends_on) == 1:
        return "single"
    return "parallel" if sum(not needs for needs in depends_on.values()) > 1 else "sequential"


def build(
    draft: Draft,
    question: Question,
    known: Collection[str],
    method: RoutingMethod,
    plan_id: str,
    routed_at: str,
    fallback_reason: str | None = None,
) -> RoutingDecision | Rejected:
    """A checked plan, or why there is none. Never raises for what the planner wrote."""
    if wrong := check(draft.agents, question, known):
        return wrong
    rule = draft.conflict_resolution
    if rule is not None and rule not in question.rules:
        return Rejected("unknown_rule", rule[:64])
    graph = {step.agent: list(dict.fromkeys(step.depends_on)) for step in draft.agents}
    level = levels(graph)
    return RoutingDecision(
        workflow_type=workflow_type(graph),
        agents=[
            PlannedStep(
                agent=step.agent,
                task=clean(step.task, 2000) or clean(question.query, 2000),
                priority=level[step.agent] + 1,
                depends_on=graph[step.agent],
                data_needed=[text for item in step.data_needed[:16] if (text := clean(item, 200))],
            )
            for step in sorted(draft.agents, key=lambda s: level[s.agent])
        ],
        reasoning=clean(draft.reasoning, 2000),
        estimated_time_minutes=MINUTES_PER_STEP * len(draft.agents),
        conflict_resolution=next((r for r in question.rules if r == rule), question.default_rule),
        routed_at=routed_at,
        requesting_agent=question.asker,
        original_query=question.query,
        routing_method=method,
        plan_id=plan_id,
        state="proposed",
        fallback_used=True if fallback_reason is not None else UNSET,
        fallback_reason=fallback_reason if fallback_reason is not None else UNSET,
        confidence=min(1.0, max(0.0, draft.confidence)) if draft.confidence is not None else UNSET,
        alternatives=[
            Alternative(a.agent, min(1.0, max(0.0, a.score)))
            for a in draft.alternatives
            if a.agent in known and a.agent not in graph and a.agent != question.asker
        ][:5],
    )


def differences(one: RoutingDecision, other: RoutingDecision | None) -> list[str]:
    """In which of its choices a decision differs from another one (None: nobody fits)."""
    if other is None:
        return ["agents"]
    graphs = [{step.agent: sorted(step.depends_on) for step in d.agents} for d in (one, other)]
    found = {
        "agents": graphs[0].keys() != graphs[1].keys(),
        "order": graphs[0] != graphs[1],
        "conflict_resolution": one.conflict_resolution != other.conflict_resolution,
        "routing_method": one.routing_method != other.routing_method,
    }
    return [name for name, differs in found.items() if differs]


def clean(text: str, limit: int) -> str:
    """Text as data: no control characters, one space between words, at most `limit` characters."""
    words = "".join(c if c.isprintable() else " " for c in text).split()
    joined = " ".join(words)
    return joined if len(joined) <= limit else joined[: limit - 1].rstrip() + "…"


# ── the life of a plan ──────────────────────────────────────────────────────────────────────────────────────────────────

FINAL_STEPS: Final = frozenset({"done", "failed", "skipped", "canceled"})
FINAL_PLANS: Final = frozenset({"done", "failed", "canceled", "expired"})


class Step(Struct, frozen=True):
    step_id: str
    agent: str
    task: str
    data_needed: list[str]
    depends_on: list[str]  #: step ids
    state: StepState = "waiting"
    since: float = 0.0  #: unix seconds of the last change or sign of progress
    result: Any = None
    verdict: str | None = None
    error: str | None = None
    timed_out: bool = False


class Record(Struct, frozen=True):
    """A plan and how far it is; the value under `HUB_PLANS/<plan id>`."""

    decision: RoutingDecision
    state: PlanState
    steps: list[Step]
    created: float
    updated: float
    context: dict[str, Any] | None = None
    call_path: list[str] = []  #: the agents the question has visited, its asker last
    reason: str | None = None  #: why it was canceled or failed
    announced: bool = False  #: the outcome is in its stream
    trace: Trace | None = None  #: what the decision was made from

    @property
    def plan_id(self) -> str:
        return self.decision.plan_id

    @property
    def final(self) -> bool:
        return self.state in FINAL_PLANS


def propose(
    decision: RoutingDecision,
    context: dict[str, Any] | None,
    call_path: list[str],
    now: float,
    *,
    ceo_available: bool,
    trace: Trace | None = None,
) -> Record:
    """A new record. Where the ceo decides and can be asked, and is not the asker, the ceo gets a last step over all results."""
    ids = {step.agent: str(number) for number, step in enumerate(decision.agents, start=1)}
    steps = [
        Step(ids[s.agent], s.agent, s.task, s.data_needed, [ids[d] for d in s.depends_on], since=now) for s in decision.agents
    ]
    if decision.conflict_resolution == "ceo_decides" and len(steps) > 1 and ceo_available and decision.requesting_agent != CEO:
        task = clean(f"Decide from all results: {decision.original_query}", 2000)
        steps.append(Step(DECIDE, CEO, task, [], [s.step_id for s in steps], since=now))
    return Record(decision, "proposed", steps, now, now, context, call_path, trace=trace)


def start(record: Record, now: float) -> Record:
    """Dispatch a proposed plan; a running one stays as it is. Raises `plan_finished`."""
    if record.final:
        raise BadRequest("plan_finished", f"the plan is {record.state}")
    if record.state == "running":
        return record
    return _advance(msgspec.structs.replace(record, state="running", updated=now), now)


def report(record: Record, step_id: str, agent: str, result: StepResult, now: float) -> Record:
    """The record after an agent reported. Late, repeated and foreign reports change nothing: what is final stays final.

    Raises `not_found` where the plan has no such step of this agent: the sender made it up.
    """
    step = next((s for s in record.steps if s.step_id == step_id and s.agent == agent), None)
    if step is None:
        raise BadRequest("not_found", f"the plan has no step {step_id[:32]} of {agent}")
    if record.state != "running" or step.state not in ("ready", "working"):
        return record
    if result.status == "progress":
        changed = msgspec.structs.replace(step, state="working", since=now)
    elif result.status == "done":
        changed = msgspec.structs.replace(step, state="done", since=now, result=result.result, verdict=result.verdict or None)
    else:
        changed = msgspec.structs.replace(step, state="failed", since=now, error=result.error or "failed", result=result.result)
    return _advance(_with(record, changed, now), now)


def expire(record: Record, idle_s: float, now: float) -> Record:
    """The record after steps without progress for `idle_s` seconds have failed. Progress, not total time, is what counts."""
    if record.state != "running":
        return record
    late = [s for s in record.steps if s.state in ("ready", "working") and now - s.since > idle_s]
    for step in late:
        error = f"no progress for {idle_s:g} s"
        record = _with(record, msgspec.structs.replace(step, state="failed", error=error, timed_out=True, since=now), now)
    return _advance(record, now) if late else record


def cancel(record: Record, reason: str | None, now: float) -> Record:
    """The record after its asker called it off. Raises `plan_finished`."""
    if record.final:
        raise BadRequest("plan_finished", f"the plan is {record.state}")
    steps = [s if s.state in FINAL_STEPS else msgspec.structs.replace(s, state="canceled", since=now) for s in record.steps]
    return msgspec.structs.replace(record, state="canceled", steps=steps, updated=now, reason=reason or "canceled by the asker")


def ready(record: Record) -> list[StepMessage]:
    """The steps to publish: all that are ready and not yet reported on. Publishing one twice does no harm."""
    if record.state != "running":
        return []
    return [_message(record, step) for step in record.steps if step.state == "ready"]


def _message(record: Record, step: Step) -> StepMessage:
    needed = [s for s in record.steps if s.step_id in step.depends_on]
    return StepMessage(
        plan_id=record.plan_id,
        step_id=step.step_id,
        agent=step.agent,
        task=step.task,
        data_needed=step.data_needed,
        results={s.agent: StepInput(s.step_id, s.state, s.result, s.verdict) for s in needed},
        plan=msgspec.structs.replace(record.decision, state="running"),
        context=record.context,
    )


def _with(record: Record, step: Step, now: float) -> Record:
    steps = [step if s.step_id == step.step_id else s for s in record.steps]
    return msgspec.structs.replace(record, steps=steps, updated=now)


def _advance(record: Record, now: float) -> Record:
    """Release what became ready, skip what never can, and end the plan when every step has ended."""
    steps = {s.step_id: s for s in record.steps}
    moved = True
    while moved:
        moved = False
        for step in steps.values():
            if step.state != "waiting":
                continue
            states = [steps[d].state for d in step.depends_on]
            # The deciding step judges what there is, so it waits for every end, good or bad, and needs one good one;
            # any other step needs all of what it depends on.
            if step.step_id == DECIDE:
                over = all(s in FINAL_STEPS for s in states)
                new: StepState | None = ("ready" if "done" in states else "skipped") if over else None
            elif all(s == "done" for s in states):
                new = "ready"
            else:
                new = "skipped" if any(s in FINAL_STEPS and s != "done" for s in states) else None
            if new is not None:
                error = "a step it depends on did not finish" if new == "skipped" else None
                steps[step.step_id] = msgspec.structs.replace(step, state=new, since=now, error=error)
                moved = True
    record = msgspec.structs.replace(record, steps=list(steps.values()))
    if all(s.state in FINAL_STEPS for s in record.steps):
        bad = [s for s in record.steps if s.state != "done"]
        state: PlanState = "done" if not bad else "expired" if any(s.timed_out for s in bad) else "failed"
        reason = "; ".join(f"{s.agent}: {s.error}" for s in bad if s.error) or None
        record = msgspec.structs.replace(record, state=state, reason=reason, updated=now)
    return record


def resolve(record: Record) -> Resolution:
    """Settle differing verdicts by the plan's rule."""
    rule = record.decision.conflict_resolution
    done = [s for s in record.steps if s.state == "done" and s.verdict]
    verdicts = {s.agent: s.verdict for s in done if s.verdict and s.step_id != DECIDE}
    deciding = next((s for s in done if s.step_id == DECIDE), None)
    if rule == "ceo_decides" and deciding is not None:
        return Resolution(rule, "decided", deciding.verdict, CEO, verdicts)
    if not verdicts:
        return Resolution(rule, "none")
    if len({v.strip().casefold() for v in verdicts.values()}) == 1:
        return Resolution(rule, "agreed", next(iter(verdicts.values())), None, verdicts)
    if rule == "finance_priority" and FINANCE in verdicts:
        return Resolution(rule, "decided", verdicts[FINANCE], FINANCE, verdicts)
    return Resolution(rule, "open", None, None, verdicts)


def outcome(record: Record) -> Outcome:
    """How a final plan ended; the same record always gives the same bytes."""
    assert record.final
    return Outcome(
        plan_id=record.plan_id,
        requesting_agent=record.decision.requesting_agent,
        status=record.state,
        original_query=record.decision.original_query,
        steps=step_outcomes(record),
        conflict=resolve(record),
        finished_at=iso(record.updated),
        reason=record.reason,
    )


def step_outcomes(record: Record) -> list[StepOutcome]:
    return [StepOutcome(s.agent, s.step_id, s.state, s.task, s.result, s.verdict, s.error) for s in record.steps]


def status(record: Record) -> PlanStatus:
    return PlanStatus(
        plan=msgspec.structs.replace(record.decision, state=record.state),
        state=record.state,
        steps=step_outcomes(record),
        updated_at=iso(record.updated),
        outcome=outcome(record) if record.final else None,
    )


def summary(record: Record) -> PlanSummary:
    decision = record.decision
    return PlanSummary(
        decision.plan_id,
        record.state,
        decision.workflow_type,
        [s.agent for s in decision.agents],
        decision.original_query,
        decision.routed_at,
    )
