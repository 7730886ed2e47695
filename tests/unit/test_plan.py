from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from hubpeer import plan, wire
from hubpeer.errors import BadRequest
from hubpeer.plan import Draft, DraftStep, Question, Record, Rejected
from hubpeer.wire import Alternative, RoutingDecision, StepResult

NOW = 1_700_000_000.0
AT = "2023-11-14T22:13:20.000+00:00"
KNOWN = {"finance", "marketing", "sales", "ceo", "legal"}
QUESTION = Question("hr", "Should we buy Company X?", ["finance_priority", "consensus_required", "ceo_decides"],
                    "consensus_required", max_agents=4)  # fmt: skip


def draft(graph: str, **fields) -> Draft:
    """A draft from "finance, sales < finance, marketing < finance sales": who, and behind whom."""
    steps = []
    for part in filter(None, graph.split(",")):
        agent, _, needs = part.partition("<")
        steps.append(DraftStep(agent.strip(), f"do {agent.strip()}", needs.split()))
    return Draft(steps, **fields)


def built(drafted: Draft | str, question: Question = QUESTION, known=KNOWN) -> RoutingDecision | Rejected:
    drafted = draft(drafted) if isinstance(drafted, str) else drafted
    return plan.build(drafted, question, known, "llm_intelligent", "p1", AT)


def running(graph: str, rule: str = "consensus_required", asker: str = "hr", *, ceo: bool = True, context=None) -> Record:
    decision = built(draft(graph, conflict_resolution=rule), replace(QUESTION, asker=asker))
    assert isinstance(decision, RoutingDecision), decision
    return plan.start(plan.propose(decision, context, [asker], NOW, ceo_available=ceo), NOW)


def said(record: Record, agent: str, status: str = "done", step: str | None = None, now: float = NOW + 1, **fields) -> Record:
    step = step if step is not None else next(s.step_id for s in record.steps if s.agent == agent)
    return plan.report(record, step, agent, StepResult(status, **fields), now)


def states(record: Record) -> str:
    return " ".join(f"{s.agent}:{s.state}" for s in record.steps)


def due(record: Record) -> list[str]:
    return [message.agent for message in plan.ready(record)]


# ── from draft to decision ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("drafted", "reason", "detail"),
    [
        ("", "empty", ""),
        ("finance, marketing, sales, ceo, legal", "too_many_agents", "5 > 4"),
        ("hr", "self_route", "hr"),
        ("finance, hr < finance", "self_route", "hr"),
        ("nobody, finance, ghost", "unknown_agent", "ghost, nobody"),
        ("finance, sales, finance", "agent_twice", "finance"),
        ("finance < sales", "unknown_dependency", "sales"),
        ("finance < hr", "unknown_dependency", "hr"),
        ("finance < finance", "cycle", ""),
        ("finance < sales, sales < finance", "cycle", ""),
        ("legal, finance < sales, sales < marketing, marketing < finance", "cycle", ""),
        (draft("finance", conflict_resolution="loudest_wins"), "unknown_rule", "loudest_wins"),
        (draft("finance", conflict_resolution=""), "unknown_rule", ""),
    ],
)
def test_a_rejected_draft_says_why(drafted, reason, detail):
    assert built(drafted) == Rejected(reason, detail)


def test_a_rule_the_operator_did_not_allow_is_rejected():
    strict = replace(QUESTION, rules=["ceo_decides"], default_rule="ceo_decides")
    assert built(draft("finance", conflict_resolution="finance_priority"), strict) == Rejected(
        "unknown_rule", "finance_priority"
    )


@pytest.mark.parametrize(
    ("graph", "kind", "priorities"),
    [
        ("finance", "single", {"finance": 1}),
        ("finance, sales < finance", "sequential", {"finance": 1, "sales": 2}),
        ("finance, sales < finance, legal < finance", "sequential", {"finance": 1, "sales": 2, "legal": 2}),
        ("finance, sales", "parallel", {"finance": 1, "sales": 1}),
        # The specification's acquisition scenario: finance and sales at once, marketing after sales.
        ("finance, sales, marketing < sales", "parallel", {"finance": 1, "sales": 1, "marketing": 2}),
        ("marketing < sales finance, sales < finance, finance", "sequential", {"finance": 1, "sales": 2, "marketing": 3}),
        ("ceo < finance sales, finance, sales < legal, legal", "parallel", {"finance": 1, "legal": 1, "sales": 2, "ceo": 3}),
    ],
)
def test_workflow_type_and_priority_follow_from_the_graph(graph, kind, priorities):
    decision = built(graph)
    assert decision.workflow_type == kind
    assert {step.agent: step.priority for step in decision.agents} == priorities
    assert [step.priority for step in decision.agents] == sorted(priorities.values())
    assert decision.estimated_time_minutes == 3 * len(priorities)


def test_levels_leave_out_what_is_on_or_behind_a_cycle():
    graph = {"a": [], "b": ["a"], "c": ["d"], "d": ["c"], "e": ["d", "a"]}
    assert plan.levels(graph) == {"a": 0, "b": 1}


def test_a_dependency_named_twice_counts_once():
    assert built("finance, sales < finance finance").agents[1].depends_on == ["finance"]


def test_the_default_rule_is_taken_where_the_draft_names_none():
    assert built("finance").conflict_resolution == "consensus_required"
    assert built(draft("finance", conflict_resolution="ceo_decides")).conflict_resolution == "ceo_decides"


def test_texts_are_data_cut_and_without_control_characters():
    step = DraftStep("finance", "read\x1b[2J\nthis \u202e" + "x" * 3000, [], ["", "\x00", "a\tb", "y" * 300, *["z"] * 20])
    decision = built(Draft([step], reasoning="because\r\n\u200bof this"))
    (planned,) = decision.agents
    assert planned.task.startswith("read [2J this xxx")
    assert (len(planned.task), planned.task[-1]) == (2000, "…")
    assert planned.data_needed[:2] == ["a b", "y" * 199 + "…"]
    assert len(planned.data_needed) == 14  # of the first sixteen, two were empty
    assert decision.reasoning == "because of this"


def test_a_step_without_a_task_gets_the_question():
    assert built(Draft([DraftStep("finance", " \n")])).agents[0].task == QUESTION.query


@pytest.mark.parametrize(("given", "kept"), [(0.4, 0.4), (-1.0, 0.0), (1.0001, 1.0), (float("nan"), 0.0)])
def test_confidence_is_a_probability(given, kept):
    assert built(draft("finance", confidence=given)).confidence == kept


def test_alternatives_are_known_agents_that_were_not_chosen_each_with_a_probability():
    scores = {"finance": 0.9, "hr": 0.8, "ghost": 0.7, "sales": 1.0000001, "legal": -0.1, "ceo": 0.2}
    found = built(draft("finance", alternatives=[Alternative(a, s) for a, s in scores.items()])).alternatives
    assert [(a.agent, a.score) for a in found] == [("sales", 1.0), ("legal", 0.0), ("ceo", 0.2)]


def test_a_fallback_says_so_and_why_and_an_answer_of_the_model_does_neither():
    fell = plan.build(draft("finance"), QUESTION, KNOWN, "fallback_keywords", "p1", AT, "queue_full")
    assert (fell.fallback_used, fell.fallback_reason) == (True, "queue_full")
    assert "fallback" not in wire.encode(built("finance")).decode()


AGENTS = st.sampled_from([*sorted(KNOWN), "hr", "ghost"])
TEXTS = st.text(alphabet="ab \n\0\u200b\u202e\ud800é😀", max_size=8)
DRAFTS = st.builds(
    Draft,
    st.lists(
        st.builds(DraftStep, AGENTS, TEXTS, st.lists(AGENTS, max_size=3), st.lists(TEXTS, max_size=3)),
        max_size=6,
    ),
    st.sampled_from([None, *QUESTION.rules, "dice"]),
    TEXTS,
    st.none() | st.floats(),
    st.lists(st.builds(Alternative, AGENTS, st.floats()), max_size=7),
)


@st.composite
def graphs(pick: st.DrawFn) -> str:
    """A random directed acyclic graph over two to four of the known agents."""
    names = pick(st.permutations(sorted(KNOWN)))[: pick(st.integers(1, 4))]
    parts = [f"{name} < {' '.join(pick(st.sets(st.sampled_from(names[:i]))) if i else [])}" for i, name in enumerate(names)]
    return ", ".join(pick(st.permutations(parts)))


def obeys_the_rules(decision: RoutingDecision) -> bool:
    place = {step.agent: step.priority for step in decision.agents}
    return (
        set(place) <= KNOWN
        and len(place) == len(decision.agents) <= QUESTION.max_agents
        and all(place[d] < step.priority for step in decision.agents for d in step.depends_on)
        and all(
            step.priority == 1 + max((place[d] for d in step.depends_on), default=0) and step.task for step in decision.agents
        )
        and decision.conflict_resolution in QUESTION.rules
    )


@given(DRAFTS)
def test_any_draft_becomes_a_plan_that_obeys_every_rule_or_is_rejected(drafted):
    decision = built(drafted)
    if isinstance(decision, Rejected):
        assert decision.reason in (plan.Rejected.__doc__ or "").replace(".", ",")
    else:
        assert obeys_the_rules(decision)
        assert wire.decode(RoutingDecision, wire.encode(decision)) == decision  # the wire's limits hold too


@given(graphs(), st.sampled_from(QUESTION.rules))
def test_every_acyclic_graph_of_known_agents_becomes_a_plan(graph, rule):
    decision = built(draft(graph, conflict_resolution=rule))
    assert isinstance(decision, RoutingDecision)
    assert obeys_the_rules(decision)
    assert {s.agent: set(s.depends_on) for s in decision.agents} == {s.agent: set(s.depends_on) for s in draft(graph).agents}


# ── the life of a plan ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_proposed_plan_publishes_nothing_and_believes_no_result():
    record = plan.propose(built("finance"), None, ["hr"], NOW, ceo_available=True)
    assert (record.state, plan.ready(record)) == ("proposed", [])
    assert said(record, "finance") == record


def test_a_started_plan_has_its_first_steps_ready_and_starting_it_again_changes_nothing():
    record = running("finance, sales, marketing < sales", context={"region": "EU"})
    assert states(record) == "finance:ready sales:ready marketing:waiting"
    assert due(record) == ["finance", "sales"]
    assert plan.start(record, NOW + 9) == record
    first = plan.ready(record)[0]
    assert (first.plan_id, first.step_id, first.task, first.results, first.context) == (
        "p1", "1", "do finance", {}, {"region": "EU"},
    )  # fmt: skip
    assert first.plan.state == "running"


def test_a_step_is_released_with_the_results_it_depends_on():
    record = running("finance, sales, marketing < sales finance")
    record = said(record, "sales", result={"deals": 3}, verdict="approve")
    assert due(record) == ["finance"]
    record = said(record, "finance", result="fine")
    (message,) = plan.ready(record)
    assert message.agent == "marketing"
    assert {a: (r.step_id, r.status, r.result, r.verdict) for a, r in message.results.items()} == {
        "finance": ("1", "done", "fine", None),
        "sales": ("2", "done", {"deals": 3}, "approve"),
    }


def test_progress_makes_a_step_working_so_that_it_is_not_published_again():
    record = said(running("finance, sales"), "finance", "progress", note="half")
    assert states(record) == "finance:working sales:ready"
    assert due(record) == ["sales"]


def test_a_plan_is_done_when_its_last_step_is():
    record = said(running("finance, sales < finance"), "finance", result=1)
    assert record.state == "running"
    record = said(record, "sales", result=2, now=NOW + 7)
    assert (record.state, record.final, record.updated, record.reason, plan.ready(record)) == ("done", True, NOW + 7, None, [])
    assert [(s.agent, s.status, s.result) for s in plan.outcome(record).steps] == [("finance", "done", 1), ("sales", "done", 2)]


def test_what_depends_on_a_failed_step_is_skipped_and_the_rest_goes_on():
    record = running("finance, sales, marketing < sales, ceo < marketing")
    record = said(record, "sales", "failed", error="no access")
    assert states(record) == "finance:ready sales:failed marketing:skipped ceo:skipped"
    assert record.state == "running"
    record = said(record, "finance")
    assert record.state == "failed"
    assert record.reason.startswith("sales: no access; marketing: ")


@pytest.mark.parametrize("late", ["progress", "done", "failed"])
@pytest.mark.parametrize("ended", ["done", "failed"])
def test_what_is_final_stays_final_whatever_is_reported_late_or_twice(ended, late):
    record = said(running("finance, sales"), "finance", ended, result="first", error="e")
    assert said(record, "finance", late, result="second", error="other", now=NOW + 9) == record


@pytest.mark.parametrize(("step", "agent"), [("1", "sales"), ("2", "finance"), ("3", "finance"), ("decide", "ceo"), ("", "hr")])
def test_a_result_for_a_step_that_is_not_the_senders_is_not_found(step, agent):
    with pytest.raises(BadRequest, match="not_found"):
        said(running("finance, sales"), agent, step=step)


def test_a_result_for_a_step_that_is_not_ready_yet_is_ignored():
    record = running("finance, sales < finance")
    assert said(record, "sales") == record


def test_a_step_without_progress_expires_and_progress_keeps_it_alive():
    record = said(running("finance, sales"), "finance", "progress", now=NOW + 50)
    assert plan.expire(record, 60, NOW + 60) == record
    record = plan.expire(record, 60, NOW + 61)
    assert states(record) == "finance:working sales:failed"
    assert record.steps[1].error == "no progress for 60 s"
    record = said(record, "finance", now=NOW + 100)
    assert (record.state, record.reason) == ("expired", "sales: no progress for 60 s")


def test_a_step_that_waits_for_others_does_not_expire():
    record = said(running("finance, sales < finance"), "finance", "progress", now=NOW + 100)
    assert plan.expire(record, 60, NOW + 160) == record


def test_the_idle_time_of_a_step_begins_when_it_is_released():
    record = said(running("finance, sales < finance"), "finance", now=NOW + 1000)
    assert plan.expire(record, 60, NOW + 1060).state == "running"
    assert plan.expire(record, 60, NOW + 1061).state == "expired"


def test_a_canceled_plan_keeps_what_is_done_and_hears_no_more():
    record = plan.cancel(said(running("finance, sales"), "finance", result=1), "changed my mind", NOW + 2)
    assert (record.state, record.reason, states(record)) == ("canceled", "changed my mind", "finance:done sales:canceled")
    assert said(record, "sales") == record
    assert plan.expire(record, 1, NOW + 1000) == record
    assert plan.ready(record) == []


@pytest.mark.parametrize("change", [lambda r: plan.start(r, NOW), lambda r: plan.cancel(r, None, NOW)])
def test_a_plan_that_ended_can_neither_start_nor_be_canceled(change):
    with pytest.raises(BadRequest, match="plan_finished: the plan is done"):
        change(said(running("finance"), "finance"))


# ── who is right ────────────────────────────────────────────────────────────────────────────────────────────────────────


def settled(rule: str, verdicts: dict[str, str | None], *, ceo: bool = False) -> tuple[str, str | None, str | None]:
    record = running(", ".join(verdicts), rule, ceo=ceo)
    for agent, verdict in verdicts.items():
        record = said(record, agent, verdict=verdict)
    found = plan.outcome(record).conflict
    assert found.rule == rule
    assert found.verdicts == {agent: v for agent, v in verdicts.items() if v}
    return found.status, found.verdict, found.decided_by


@pytest.mark.parametrize(
    ("rule", "verdicts", "expected"),
    [
        ("consensus_required", {"finance": None, "sales": None}, ("none", None, None)),
        ("consensus_required", {"finance": "approve", "sales": None}, ("agreed", "approve", None)),
        ("consensus_required", {"finance": "approve", "sales": "Approve "}, ("agreed", "approve", None)),
        ("consensus_required", {"finance": "approve", "sales": "reject"}, ("open", None, None)),
        ("finance_priority", {"sales": "approve", "finance": "reject"}, ("decided", "reject", "finance")),
        ("finance_priority", {"sales": "approve", "finance": "approve"}, ("agreed", "approve", None)),
        ("finance_priority", {"sales": "approve", "finance": None}, ("agreed", "approve", None)),
        ("finance_priority", {"sales": "approve", "legal": "reject"}, ("open", None, None)),
        ("ceo_decides", {"sales": "approve", "legal": "reject"}, ("open", None, None)),  # no ceo can be asked
    ],
)
def test_verdicts_are_settled_by_the_plans_rule(rule, verdicts, expected):
    assert settled(rule, verdicts) == expected


def test_the_verdict_of_a_failed_step_does_not_count():
    record = said(running("finance, sales", "finance_priority"), "sales", verdict="approve")
    record = said(record, "finance", "failed", verdict="reject", error="no access")
    assert plan.resolve(record).verdicts == {"sales": "approve"}


def test_the_ceo_decides_in_a_last_step_over_all_results():
    record = running("finance, sales", "ceo_decides")
    assert states(record) == "finance:ready sales:ready ceo:waiting"
    record = said(record, "finance", verdict="reject", result="too dear")
    record = said(record, "sales", verdict="approve", result="more deals")
    (message,) = plan.ready(record)
    assert (message.agent, message.step_id, message.task) == ("ceo", plan.DECIDE, f"Decide from all results: {QUESTION.query}")
    assert {a: (r.result, r.verdict) for a, r in message.results.items()} == {
        "finance": ("too dear", "reject"),
        "sales": ("more deals", "approve"),
    }
    conflict = plan.outcome(said(record, "ceo", verdict="reject")).conflict
    assert (conflict.status, conflict.verdict, conflict.decided_by) == ("decided", "reject", "ceo")
    assert conflict.verdicts == {"finance": "reject", "sales": "approve"}


def test_a_ceo_that_has_a_part_of_the_plan_decides_in_a_step_of_its_own():
    record = said(said(running("finance, ceo", "ceo_decides"), "finance", verdict="reject"), "ceo", verdict="approve", step="2")
    assert [(m.agent, m.step_id) for m in plan.ready(record)] == [("ceo", plan.DECIDE)]
    record = said(record, "ceo", verdict="wait", step=plan.DECIDE)
    assert plan.resolve(record).verdict == "wait"
    assert plan.resolve(record).verdicts == {"finance": "reject", "ceo": "approve"}


@pytest.mark.parametrize(
    ("graph", "asker", "ceo", "why"),
    [
        ("finance", "hr", True, "one agent cannot disagree"),
        ("finance, sales", "ceo", True, "the ceo asks, and is never handed its own question"),
        ("finance, sales", "hr", False, "the ceo cannot be asked"),
    ],
)
def test_there_is_no_deciding_step_where_the_ceo_cannot_or_need_not_decide(graph, asker, ceo, why):
    assert plan.DECIDE not in [s.step_id for s in running(graph, "ceo_decides", asker, ceo=ceo).steps], why


def test_the_deciding_step_judges_what_there_is_though_a_step_failed():
    record = said(running("finance, sales", "ceo_decides"), "finance", "failed", error="no access")
    assert due(record) == ["sales"]
    record = said(record, "sales", verdict="approve")
    (message,) = plan.ready(record)
    assert {agent: found.status for agent, found in message.results.items()} == {"finance": "failed", "sales": "done"}


def test_there_is_nothing_to_decide_where_every_step_failed():
    record = running("finance, sales", "ceo_decides")
    for agent in ("finance", "sales"):
        record = said(record, agent, "failed", error="no access")
    assert (record.state, states(record)) == ("failed", "finance:failed sales:failed ceo:skipped")


# ── any order of events ─────────────────────────────────────────────────────────────────────────────────────────────────

MOVES = {
    "waiting": {"waiting", "ready", "skipped", "canceled"},
    "ready": {"ready", "working", "done", "failed", "canceled"},
    "working": {"working", "done", "failed", "canceled"},
    **{state: {state} for state in plan.FINAL_STEPS},
}
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["progress", "done", "failed", "expire", "cancel"]),
        st.integers(0, 5),  # which step
        st.sampled_from([0.0, 5.0, 70.0]),  # how long after the event before
    ),
    max_size=16,
)


def is_legal(record: Record) -> bool:
    by_id = {s.step_id: s for s in record.steps}
    for step in record.steps:
        needs = [by_id[d].state for d in step.depends_on]
        if step.state in ("ready", "working", "done", "failed") and step.step_id != plan.DECIDE and set(needs) - {"done"}:
            return False  # it ran before what it needs was done
        if step.state == "waiting" and record.state == "running" and all(n == "done" for n in needs):
            return False  # it was forgotten
    ended = all(s.state in plan.FINAL_STEPS for s in record.steps)
    return record.final == ended and (record.state != "done" or all(s.state == "done" for s in record.steps))


@given(graphs(), st.sampled_from(QUESTION.rules), EVENTS)
def test_no_sequence_of_reports_reaches_an_illegal_state(graph, rule, events):
    record, now = running(graph, rule), NOW
    for what, number, pause in events:
        now += pause
        step = record.steps[number % len(record.steps)]
        before = record
        if what == "expire":
            record = plan.expire(record, 60, now)
        elif what == "cancel":
            if not record.final and number == 0:
                record = plan.cancel(record, None, now)
        else:
            record = said(record, step.agent, what, step.step_id, now, error="no" if what == "failed" else None)
        assert is_legal(record), states(record)
        assert all(new.state in MOVES[old.state] for old, new in zip(before.steps, record.steps, strict=True))
        assert not before.final or record == before
        to_publish = [s.step_id for s in record.steps if s.state == "ready"] if record.state == "running" else []
        assert [message.step_id for message in plan.ready(record)] == to_publish
        assert msgspec.json.decode(msgspec.json.encode(record), type=Record) == record
        assert wire.decode(wire.PlanStatus, wire.encode(plan.status(record))).state == record.state


@given(graphs(), st.sampled_from(QUESTION.rules), st.lists(st.sampled_from(["done", "failed"]), min_size=5, max_size=5))
def test_every_plan_ends_once_every_step_that_was_published_is_answered(graph, rule, answers):
    record, published = running(graph, rule), []
    while messages := plan.ready(record):
        message = messages[-1]
        published.append(message.step_id)
        record = said(record, message.agent, answers[len(published) - 1], message.step_id, error="no")
    assert record.final
    assert sorted(published) == sorted(s.step_id for s in record.steps if s.state in ("done", "failed"))
    assert record.state == ("done" if all(s.state == "done" for s in record.steps) else "failed")


# ── what is kept, and what is told ──────────────────────────────────────────────────────────────────────────────────────


def test_a_record_is_the_same_after_it_was_stored():
    record = running("finance, sales < finance", "ceo_decides", context={"a": [1, None, {"b": 0.5}], "ü": "\u202e"})
    record = said(record, "finance", result={"x": [1.5, "é", None, True]}, verdict="approve", now=NOW + 0.123456)
    assert msgspec.json.decode(msgspec.json.encode(record), type=Record) == record


def test_the_same_record_always_gives_the_same_outcome():
    record = plan.cancel(running("finance, sales"), None, NOW + 1)
    again = msgspec.json.decode(msgspec.json.encode(record), type=Record)
    found = plan.outcome(record)
    assert wire.encode(found) == wire.encode(plan.outcome(again))
    assert (found.requesting_agent, found.status, found.reason) == ("hr", "canceled", "canceled by the asker")
    assert found.finished_at == "2023-11-14T22:13:21.000+00:00"


def test_the_status_of_a_plan_tells_each_step_and_the_outcome_once_there_is_one():
    record = running("finance, sales < finance")
    found = plan.status(record)
    assert (found.state, found.plan.state, found.outcome) == ("running", "running", None)
    assert [(s.agent, s.status) for s in found.steps] == [("finance", "ready"), ("sales", "waiting")]
    assert plan.status(plan.cancel(record, None, NOW)).outcome.status == "canceled"


def test_the_summary_of_a_plan_names_its_agents_and_its_question():
    found = plan.summary(running("sales < finance, finance", "ceo_decides"))
    assert (found.plan_id, found.state, found.agents, found.original_query) == (
        "p1", "running", ["finance", "sales"], QUESTION.query,
    )  # fmt: skip


def test_two_decisions_differ_in_their_choices_not_in_their_words():
    one = built("finance, sales < finance")
    assert isinstance(one, RoutingDecision)
    assert plan.differences(one, replace(one, reasoning="other words", plan_id="p2")) == []
    assert plan.differences(one, replace(one, agents=[replace(s, task="other words") for s in one.agents])) == []
    assert plan.differences(one, built("finance, sales")) == ["order"]
    assert plan.differences(one, built("finance")) == ["agents", "order"]
    assert plan.differences(one, replace(one, conflict_resolution="ceo_decides")) == ["conflict_resolution"]
    assert plan.differences(one, replace(one, routing_method="builtin_encoder")) == ["routing_method"]
    assert plan.differences(one, None) == ["agents"]
