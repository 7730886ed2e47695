"""The figures of `hubpeer eval`, on rows small enough to count by hand."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from hubpeer import evaluate
from hubpeer.cli.commands import cli
from hubpeer.errors import SettingsError
from hubpeer.evaluate import DocGuess, DocRow, Gold, RouteGuess, RouteRow
from hubpeer.plan import Draft, DraftStep
from hubpeer.wire import Alternative, Card

ROOT = Path(__file__).parents[2]
REGISTRY = {"finance": Card(["budget_planning"]), "sales": Card(["deal_analysis"]), "ceo": Card(["board_reporting"])}


def row(number: int, gold: Gold, name: str = "default") -> RouteRow:
    return RouteRow(f"{name}-{number:03}", REGISTRY, "ceo", "what does the deal cost", gold)


ONE = Gold(["finance"], "single")
TWO = Gold(["finance", "sales"], "sequential", [("sales", "finance")], "ceo_decides")
NOBODY = Gold([])
ROWS = [row(1, ONE), row(2, TWO), row(3, ONE), row(4, NOBODY), row(5, NOBODY)]
GUESSES = [
    RouteGuess("default-001", ["finance"], "single", confidence=0.9, ms=1.0),
    RouteGuess(
        "default-002", ["sales", "finance"], "sequential", [("sales", "finance")], "ceo_decides", confidence=0.7, ms=2.0
    ),
    RouteGuess("default-003", ["sales"], "single", confidence=0.6, ms=3.0, alternatives=["finance"]),
    RouteGuess("default-004", ms=4.0),
    RouteGuess("default-005", ["finance"], "single", confidence=0.2, ms=5.0),
]


def test_routes_are_counted_as_by_hand():
    found = evaluate.score_routes(ROWS, GUESSES)
    wanted = {
        "questions": 5,
        "in_scope": 3,
        "exact_set": 0.6667,
        "nodes": {"f1": 0.75, "precision": 0.75, "recall": 0.75},
        "edges": {"f1": 1.0, "precision": 1.0, "recall": 1.0},
        "whole_plan": 0.6667,
        "workflow": 1.0,
        "workflow_majority": 0.6667,
        "conflict": 1.0,
        "conflict_invented": 0.0,
        "out_of_scope": 2,
        "out_of_scope_recall": 0.5,
        "false_declines": 0.0,
        "self_route": 0,
        "unknown_agent": 0,
        "malformed": 0,
        "ms_p50": 3.0,
        "ms_p95": 5.0,
        "calibration_error": 0.3,  # (0.1 + 0.3 + 0.6 + 0.2) / 4
        "alternatives_hold_the_answer": 1.0,
    }
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"), [(0, 0, 0.0, 1.0), (0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)]
)
def test_wilson_interval(hits, n, low, high):
    assert evaluate.wilson(hits, n) == pytest.approx((low, high), abs=1e-4)


def test_a_planner_that_breaks_the_rules_is_seen():
    drafts = {
        1: Draft([DraftStep("ceo", "x")]),
        2: Draft([DraftStep("nobody", "x")]),
        3: Draft([DraftStep("finance", "x", ["sales"]), DraftStep("sales", "y", ["finance"])]),
        4: None,
        5: Draft([DraftStep("sales", "x")], alternatives=[Alternative("finance", 0.4)]),
    }
    answers = iter(drafts.values())
    guesses = evaluate.predict_routes(ROWS, lambda ask: (next(answers), "test", ["sales"], 0.5))
    assert [g.malformed for g in guesses] == ["self_route", "unknown_agent", "cycle", None, None]
    assert guesses[3].alternatives == ["sales"]
    assert guesses[4].alternatives == ["finance"]
    found = evaluate.score_routes(ROWS, guesses)
    assert (found["self_route"], found["unknown_agent"], found["malformed"]) == (1, 1, 3)
    assert found["exact_set"] == 0


def test_a_planner_never_sees_the_askers_card():
    seen = []
    evaluate.predict_routes(ROWS[:1], lambda ask: (seen.append(sorted(ask.cards)), None, [], None)[1:] and (None, "", [], None))
    assert seen == [["finance", "sales"]]


def test_groups_are_the_first_set_all_others_and_each():
    rows = [*ROWS, row(1, ONE, "ferry"), row(1, TWO, "ski")]
    guesses = [*GUESSES, RouteGuess("ferry-001", ["finance"], "single"), RouteGuess("ski-001")]
    found = evaluate.per_set(evaluate.score_routes, rows, guesses)
    assert found["default"]["questions"] == 5
    assert found["others"]["exact_set"] == 0.5
    assert found["others"]["false_declines"] == 0.5
    assert list(found["sets"]) == ["default", "ferry", "ski"]


def test_documents_are_counted_as_by_hand():
    rows = [
        DocRow("doc-1", "x", "invoice", "internal", ["finance"]),
        DocRow("doc-2", "y", "contract", "restricted", []),
        DocRow("doc-3", "z", "hr"),
    ]
    guesses = [
        DocGuess("doc-1", "invoice", "internal", ["finance"], confidence=0.8),
        DocGuess("doc-2", "hr", "public", ["sales"], confidence=0.6, alternatives=["contract"]),
        DocGuess("doc-3", "hr", "internal", confidence=1.0),
    ]
    found = evaluate.score_documents(rows, guesses)
    assert found["top1"] == 0.6667
    assert found["sensitivity"] == 0.5
    assert found["agents"] == {"f1": 0.6667, "precision": 0.5, "recall": 1.0}
    assert found["alternatives_hold_the_answer"] == 1.0


def test_runs_are_compared_row_by_row():
    a = {str(n): n < 8 for n in range(20)}
    b = {str(n): n < 14 for n in range(20)}
    assert evaluate.compare(a, b) == {
        "rows": 20, "a": 0.4, "b": 0.7, "only_a_right": 0, "only_b_right": 6, "p_value": 0.03125,
    }  # fmt: skip
    assert evaluate.compare(a, a)["p_value"] == 1.0


def test_what_cannot_be_read_names_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a-1", "text": "x", "category": "hr"}\n{"id": "a-2"}\n', "utf-8")
    with pytest.raises(SettingsError, match="line 2"):
        evaluate.read_rows(path, DocRow)
    with pytest.raises(SettingsError, match="no prediction for default-001"):
        evaluate.score_routes(ROWS, GUESSES[1:])


# ── the sets we ship, and the command ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "kind", "rows", "sets"), [("routes", RouteRow, 300, 10), ("documents", DocRow, 200, 1)])
def test_the_shipped_sets_are_whole(name, kind, rows, sets):
    found = evaluate.read_rows(ROOT / "evals" / f"{name}.jsonl", kind)
    assert len(found) >= rows
    assert len({one.id for one in found}) == len(found)
    assert len({one.set_name for one in found}) >= sets


def test_gold_plans_keep_the_rules():
    for one in evaluate.read_rows(ROOT / "evals" / "routes.jsonl", RouteRow):
        assert one.requesting_agent not in one.gold.agents, one.id
        assert set(one.gold.agents) <= set(one.registry), one.id
        assert {agent for edge in one.gold.edges for agent in edge} <= set(one.gold.agents), one.id


def test_the_command_measures_writes_and_compares(tmp_path):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    lines = (ROOT / "evals" / "routes.jsonl").read_bytes().splitlines()[:30]
    rows.write_bytes(b"\n".join(lines))
    runner = CliRunner()
    said = runner.invoke(cli, ["eval", "routes", str(rows), "--model", "none", "--predictions", str(out), "--json"])
    assert said.exit_code == 0, said.output
    figures = json.loads(said.output)
    assert figures["all"]["questions"] == 30
    assert figures["all"]["methods"] == {"fallback_keywords": 30}
    first = msgspec.json.decode(out.read_bytes().splitlines()[0])
    assert {"id", "agents", "workflow_type", "edges", "conflict_resolution", "method", "confidence", "ms"} <= first.keys()
    said = runner.invoke(cli, ["eval", "compare", str(rows), str(out), str(out), "--json"])
    assert json.loads(said.output)["p_value"] == 1.0


def test_the_keyword_rule_is_measured_as_before():
    """The anchor every other figure is read against."""
    rows = evaluate.read_rows(ROOT / "evals" / "routes.jsonl", RouteRow)
    found = evaluate.per_set(evaluate.score_routes, rows, evaluate.predict_routes(rows, evaluate.by_keywords))
    assert found["default"]["exact_set"] == pytest.approx(0.188, abs=0.01)
    assert found["others"]["exact_set"] == pytest.approx(0.0305, abs=0.01)
    assert (found["all"]["self_route"], found["all"]["unknown_agent"], found["all"]["malformed"]) == (0, 0, 0)
