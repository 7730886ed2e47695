from __future__ import annotations

import io
import json
import zipfile

import pypdf
import pytest
from rich.console import Console

from hubpeer import wire
from hubpeer.cli import samples, show

AT = "2026-01-01T00:00:00.000+00:00"
HOSTILE = "\x1b[2J\x9b31m[red]free[/red] [/] beer\r\n\u202eback\\"


@pytest.fixture
def printed(monkeypatch):
    """What was printed, as a terminal without colours gets it."""
    out = io.StringIO()
    monkeypatch.setattr(show, "console", Console(file=out, highlight=False, width=300, color_system=None))
    return out


def decision(steps: list[wire.PlannedStep], **fields) -> wire.RoutingDecision:
    return wire.RoutingDecision(
        "parallel", steps, "", 9, "ceo_decides", AT, "hr", "Should we?", "fallback_keywords", "p1", "running", **fields
    )


def test_a_plan_is_drawn_as_a_graph_with_each_step_under_the_latest_it_waits_for(printed):
    steps = [
        wire.PlannedStep("finance", "count", 1, [], []),
        wire.PlannedStep("sales", "sell", 2, ["finance"], []),
        wire.PlannedStep("marketing", "plan", 3, ["finance", "sales"], []),
    ]
    told = [
        wire.StepOutcome("finance", "1", "done", "count", {"sum": 5}, "approve"),
        wire.StepOutcome("sales", "2", "failed", "sell", error="no access"),
        wire.StepOutcome("marketing", "3", "done", "plan", verdict="reject"),
    ]
    show.plan(decision(steps, fallback_reason="no_model", confidence=0.5), told)
    assert printed.getvalue().splitlines() == [
        "parallel by fallback_keywords (no_model), confidence 0.50, ceo_decides, about 9 min  p1",
        "└── finance done  count",
        '    ├── {"sum":5} (verdict: approve)',
        "    └── sales failed  sell",
        "        ├── no access",
        "        └── marketing (after finance too) done  plan",
        "            └── (verdict: reject)",
    ]


@pytest.mark.parametrize(
    ("conflict", "status", "reason", "line"),
    [
        (wire.Resolution("ceo_decides", "none"), "done", None, "outcome: done"),
        (
            wire.Resolution("ceo_decides", "decided", "approve", "ceo"), "done", None,
            "outcome: done, verdicts decided: approve (by ceo)",
        ),
        (wire.Resolution("consensus_required", "open"), "failed", "sales: late", "outcome: failed, verdicts open, sales: late"),
    ],
)  # fmt: skip
def test_an_outcome_is_one_line(printed, conflict, status, reason, line):
    show.outcome(wire.Outcome("p1", "hr", status, "Should we?", [], conflict, AT, reason))
    assert printed.getvalue() == line + "\n"


def hostile_messages():
    step = wire.PlannedStep("sales", HOSTILE, 1, [], [])
    told = wire.StepOutcome("sales", "1", "done", HOSTILE, HOSTILE, HOSTILE)
    category = wire.Categorization("memo", 0.5, HOSTILE, "internal", ["sales"], [], "rules")
    document = wire.Document("d1", 1, "categorized", HOSTILE, "text/plain", None, 5, "0" * 64, HOSTILE, AT, 1, 5, "complete",
                             [], HOSTILE, category, {"code": "bad_pdf", "message": HOSTILE})  # fmt: skip
    verdict = wire.Resolution("ceo_decides", "decided", HOSTILE, "ceo")
    return {
        "plan": lambda: show.plan(decision([step]), [told]),
        "outcome": lambda: show.outcome(wire.Outcome("p1", "hr", "failed", "", [], verdict, AT, HOSTILE)),
        "documents": lambda: show.documents([document]),
        "document": lambda: show.document(document),
        "agents": lambda: show.agents([wire.AgentInfo("sales", "live", [HOSTILE], [HOSTILE], "", 1)]),
        "plans": lambda: show.plans([wire.PlanSummary("p1", "done", "single", ["sales"], HOSTILE, AT)]),
    }


@pytest.mark.parametrize("what", hostile_messages())
def test_other_peoples_text_moves_no_cursor_and_colours_nothing(printed, what):
    hostile_messages()[what]()
    text = printed.getvalue()
    assert "[red]free[/red] [/] beer back\\" in text  # shown as it was written, on one line
    assert [c for c in text if not c.isprintable() and c != "\n"] == []


def test_json_output_is_one_document(capsysbinary):
    show.emit(wire.Health("ok", {"bus": "ok"}))
    assert json.loads(capsysbinary.readouterr().out) == {"status": "ok", "checks": {"bus": "ok"}}


def test_the_status_names_problems_and_leaves_empty_lines_out(printed):
    checks = {"bus": "ok", "model": "none", "disk": "[full]"}
    show.status(
        wire.StatusReply("hubpeer", "0.1.0", "i1", 61.0, 80.4, 90.0, "none", False, 0, {}, {"requests": 0}, {"sales": "live"},
                         {}, [{"name": "PLANS", "messages": 3}], {}, {}, {"server": "2.15.1", "checks": checks}, {}, "degraded")
    )  # fmt: skip
    lines = dict(line.split(maxsplit=1) for line in printed.getvalue().splitlines())
    assert lines["problems"].strip() == "disk: [full]"
    assert lines["hub"].strip() == "hubpeer 0.1.0 degraded, up 61 s"
    assert "plans" not in lines


# ── the demo's own documents ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_sample_pdf_is_one_a_reader_reads():
    (page,) = pypdf.PdfReader(io.BytesIO(samples.pdf(r"Fees (net) \ gross. " * 20)), strict=True).pages
    assert r"Fees (net) \ gross." in page.extract_text()


def test_the_sample_docx_is_one_a_reader_reads():
    with zipfile.ZipFile(io.BytesIO(samples.docx(["Profit & loss <2026>"]))) as archive:
        assert archive.testzip() is None
        assert b"<w:t>Profit &amp; loss &lt;2026&gt;</w:t>" in archive.read("word/document.xml")


def test_the_samples_are_of_different_kinds_and_one_more_is_broken():
    made = samples.all_kinds()
    assert sorted(name.rsplit(".")[-1] for name in made) == ["csv", "docx", "eml", "md", "pdf", "txt"]
    assert made["services-agreement.pdf"].startswith(samples.broken_pdf())
    assert b"%%EOF" not in samples.broken_pdf()
