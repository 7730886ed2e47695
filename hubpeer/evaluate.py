"""How well questions are routed and documents are categorized: rows in, predictions, figures out. Pure but for the clock.

A *row* has gold; a *prediction* is what one planner said of it. Every figure is computed from the two alone, so a file of
predictions made anywhere can be judged and two of them compared.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec
from msgspec import Struct

from hubpeer import keywords, plan, taxonomy
from hubpeer.errors import SettingsError
from hubpeer.model import DocAsk, PlanAsk
from hubpeer.plan import Draft, Question, Rejected
from hubpeer.settings import Category
from hubpeer.wire import Card, ConflictRule, RoutingDecision

if TYPE_CHECKING:
    from hubpeer.encoder import Declined

RULES: Final[list[ConflictRule]] = ["finance_priority", "consensus_required", "ceo_decides"]
MAX_AGENTS: Final = 6


class Gold(Struct, frozen=True):
    agents: list[str]
    workflow_type: str | None = None
    edges: list[tuple[str, str]] = []  #: (a, b): b depends on a
    conflict_resolution: str | None = None


class RouteRow(Struct, frozen=True):
    id: str
    registry: dict[str, Card]
    requesting_agent: str
    query: str
    gold: Gold

    @property
    def set_name(self) -> str:
        """The registry's name: what stands before the id's last `-`."""
        return self.id.rpartition("-")[0] or self.id


class RouteGuess(Struct, frozen=True):
    """One line of `--predictions`. No agents: declined."""

    id: str
    agents: list[str] = []
    workflow_type: str | None = None
    edges: list[tuple[str, str]] = []
    conflict_resolution: str | None = None
    method: str = ""
    confidence: float | None = None
    ms: float = 0.0
    alternatives: list[str] = []
    malformed: str | None = None  #: why it is no plan: the `reason` of `plan.Rejected`


class DocRow(Struct, frozen=True):
    id: str
    text: str
    category: str
    sensitivity: str | None = None
    agents: list[str] | None = None
    filename: str = ""
    title: str = ""
    taxonomy: dict[str, Category] | None = None

    @property
    def set_name(self) -> str:
        return self.id.rpartition("-")[0] or self.id


class DocGuess(Struct, frozen=True):
    id: str
    category: str
    sensitivity: str = ""
    agents: list[str] = []
    method: str = ""
    confidence: float | None = None
    ms: float = 0.0
    alternatives: list[str] = []


Row = TypeVar("Row", bound=Struct)


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """A .jsonl file. Raises `SettingsError` that names the line."""
    rows: list[Row] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            try:
                rows.append(msgspec.json.decode(line, type=kind))
            except msgspec.DecodeError as exc:
                raise SettingsError(f"{path}, line {number}: {exc}") from None
    return rows


# ── predicting ──────────────────────────────────────────────────────────────────────────────────────────────────────────

#: A planner: the draft with the method's name; no draft: it declines, with whom it would have asked and how sure it is.
Planner = Callable[[PlanAsk], tuple[Draft | None, str, list[str], float | None]]


def by_keywords(ask: PlanAsk) -> tuple[Draft | None, str, list[str], float | None]:
    """The last rung: the specification's keyword rule, with `finance` and `ceo` as the default agents."""
    draft = keywords.draft(ask.query, ask.asker, ask.cards, ["finance", "ceo"], ask.max_agents)
    near = [a.agent for a in keywords.runners_up(ask.query, ask.cards)]
    return draft, "fallback_keywords", near, None


def by_encoder(found: Draft | Declined) -> tuple[Draft | None, str, list[str], float | None]:
    """What the built-in encoder said, as a `Planner` answers."""
    if isinstance(found, Draft):
        return found, "builtin_encoder", [], found.confidence
    return None, "builtin_encoder", [a.agent for a in found.alternatives], found.confidence


def predict_routes(rows: Iterable[RouteRow], planner: Planner) -> list[RouteGuess]:
    """What a planner says of each row, checked by the same rules as in the hub."""
    found = []
    for row in rows:
        cards = {name: card for name, card in row.registry.items() if name != row.requesting_agent}
        ask = PlanAsk(row.requesting_agent, row.query, cards, RULES, MAX_AGENTS)
        began = time.perf_counter()
        draft, method, near, sure = planner(ask)
        ms = (time.perf_counter() - began) * 1000
        found.append(_guess(row, draft, method, near, sure, ms))
    return found


def _guess(row: RouteRow, draft: Draft | None, method: str, near: list[str], sure: float | None, ms: float) -> RouteGuess:
    if draft is None:
        return RouteGuess(row.id, method=method, confidence=sure, ms=ms, alternatives=near)
    question = Question(row.requesting_agent, row.query, RULES, "consensus_required", MAX_AGENTS)
    made = plan.build(draft, question, row.registry, "builtin_encoder", "p0", "1970-01-01T00:00:00Z")
    agents = [step.agent for step in draft.agents]
    if isinstance(made, Rejected):
        return RouteGuess(row.id, agents, method=method, confidence=draft.confidence, ms=ms, malformed=made.reason)
    assert isinstance(made, RoutingDecision)
    edges = [(before, step.agent) for step in made.agents for before in step.depends_on]
    near = [a.agent for a in draft.alternatives] or [name for name in near if name not in agents]
    return RouteGuess(
        row.id, agents, made.workflow_type, edges, draft.conflict_resolution, method, draft.confidence, round(ms, 3), near
    )


# ── figures ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p, zz = hits / n, z * z
    middle, half = p + zz / (2 * n), z * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return (middle - half) / (1 + zz / n), (middle + half) / (1 + zz / n)


def share(hits: int, n: int) -> float | None:
    return round(hits / n, 4) if n else None


def f1(found: Iterable[set[Any]], wanted: Iterable[set[Any]]) -> dict[str, float | None]:
    """Micro precision, recall and F1 over rows."""
    hits = made = there = 0
    for a, b in zip(found, wanted, strict=True):
        hits, made, there = hits + len(a & b), made + len(a), there + len(b)
    return {"f1": share(2 * hits, made + there), "precision": share(hits, made), "recall": share(hits, there)}


def calibration_error(pairs: Sequence[tuple[float, bool]], bins: int = 10) -> float | None:
    """Expected calibration error: how far confidence and accuracy are apart, over bins of equal width."""
    if not pairs:
        return None
    by_bin: dict[int, list[tuple[float, bool]]] = {}
    for sure, right in pairs:
        by_bin.setdefault(min(bins - 1, int(sure * bins)), []).append((sure, right))
    gaps = (abs(sum(s for s, _ in some) - sum(r for _, r in some)) for some in by_bin.values())
    return round(sum(gaps) / len(pairs), 4)


def percentile(values: Sequence[float], q: float) -> float | None:
    """The smallest value that at least a share `q` of the values do not exceed."""
    ordered = sorted(values)
    return round(ordered[max(0, math.ceil(q * len(ordered)) - 1)], 3) if ordered else None


def _paired(rows: Sequence[Any], guesses: Sequence[Any]) -> list[tuple[Any, Any]]:
    by_id = {guess.id: guess for guess in guesses}
    if missing := [row.id for row in rows if row.id not in by_id]:
        raise SettingsError(f"no prediction for {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""))
    return [(row, by_id[row.id]) for row in rows]


def score_routes(rows: Sequence[RouteRow], guesses: Sequence[RouteGuess]) -> dict[str, Any]:
    """Every figure of a run.

    Exact set, F1, workflow and edges are over questions somebody fits; questions nobody fits have figures of their own.
    """
    pairs: list[tuple[RouteRow, RouteGuess]] = _paired(rows, guesses)
    inside = [(r, g) for r, g in pairs if r.gold.agents]
    outside = [(r, g) for r, g in pairs if not r.gold.agents]
    exact = sum(exactly(r, g) for r, g in inside)
    low, high = wilson(exact, len(inside))
    misses = [(r, g) for r, g in inside if not exactly(r, g)]
    ruled = [(r, g) for r, g in inside if r.gold.conflict_resolution]
    unruled = [(r, g) for r, g in inside if not r.gold.conflict_resolution]
    types = Counter(r.gold.workflow_type for r, _ in inside)
    return {
        "questions": len(pairs),
        "in_scope": len(inside),
        "exact_set": share(exact, len(inside)),
        "exact_set_interval": [round(low, 4), round(high, 4)],
        "nodes": f1((set(g.agents) for _, g in inside), (set(r.gold.agents) for r, _ in inside)),
        "edges": f1((set(g.edges) for _, g in inside), (set(r.gold.edges) for r, _ in inside)),
        "whole_plan": share(sum(exactly(r, g) and set(r.gold.edges) == set(g.edges) for r, g in inside), len(inside)),
        "workflow": share(sum(r.gold.workflow_type == g.workflow_type for r, g in inside), len(inside)),
        "workflow_majority": share(max(types.values(), default=0), len(inside)),
        "conflict": share(sum(r.gold.conflict_resolution == g.conflict_resolution for r, g in ruled), len(ruled)),
        "conflict_invented": share(sum(g.conflict_resolution is not None for _, g in unruled), len(unruled)),
        "out_of_scope": len(outside),
        "out_of_scope_recall": share(sum(not g.agents for _, g in outside), len(outside)),
        "false_declines": share(sum(not g.agents for _, g in inside), len(inside)),
        "self_route": sum(r.requesting_agent in g.agents for r, g in pairs),
        "unknown_agent": sum(bool(set(g.agents) - set(r.registry)) for r, g in pairs),
        "malformed": sum(g.malformed is not None for _, g in pairs),
        "ms_p50": percentile([g.ms for _, g in pairs], 0.5),
        "ms_p95": percentile([g.ms for _, g in pairs], 0.95),
        "calibration_error": calibration_error(
            [(g.confidence, exactly(r, g)) for r, g in pairs if g.agents and g.confidence is not None]
        ),
        "alternatives_hold_the_answer": share(
            sum(set(r.gold.agents) <= {*g.agents, *g.alternatives} for r, g in misses), len(misses)
        ),
        "methods": dict(Counter(g.method for _, g in pairs)),
    }


def exactly(row: RouteRow, guess: RouteGuess) -> bool:
    return guess.malformed is None and set(row.gold.agents) == set(guess.agents)


def score_documents(rows: Sequence[DocRow], guesses: Sequence[DocGuess]) -> dict[str, Any]:
    pairs: list[tuple[DocRow, DocGuess]] = _paired(rows, guesses)
    hits = sum(r.category == g.category for r, g in pairs)
    low, high = wilson(hits, len(pairs))
    marked = [(r, g) for r, g in pairs if r.sensitivity]
    cared = [(r, g) for r, g in pairs if r.agents is not None]
    missed = [(r, g) for r, g in pairs if r.category != g.category]
    sure = [(g.confidence, r.category == g.category) for r, g in pairs if g.confidence is not None]
    return {
        "documents": len(pairs),
        "top1": share(hits, len(pairs)),
        "top1_interval": [round(low, 4), round(high, 4)],
        "sensitivity": share(sum(r.sensitivity == g.sensitivity for r, g in marked), len(marked)),
        "agents": f1((set(g.agents) for _, g in cared), (set(r.agents or []) for r, _ in cared)),
        "calibration_error": calibration_error(sure),
        "alternatives_hold_the_answer": share(sum(r.category in g.alternatives for r, g in missed), len(missed)),
        "ms_p50": percentile([g.ms for _, g in pairs], 0.5),
        "ms_p95": percentile([g.ms for _, g in pairs], 0.95),
        "methods": dict(Counter(g.method for _, g in pairs)),
    }


def per_set(
    score: Callable[[Sequence[Any], Sequence[Any]], dict[str, Any]], rows: Sequence[Any], guesses: Sequence[Any]
) -> dict[str, Any]:
    """All figures over everything, over the default set, over all others, and for each set."""
    by_set: dict[str, list[Any]] = {}
    for row in rows:
        by_set.setdefault(row.set_name, []).append(row)
    first, *rest = by_set
    groups: dict[str, Mapping[str, Any]] = {"all": score(rows, guesses)}
    if rest:
        groups[first] = score(by_set[first], guesses)
        groups["others"] = score([row for name in rest for row in by_set[name]], guesses)
    return {**groups, "sets": {name: score(some, guesses) for name, some in by_set.items()}}


def compare(right_a: Mapping[str, bool], right_b: Mapping[str, bool]) -> dict[str, Any]:
    """Two runs on the same rows: who is right where the other is not, and how likely that is by chance (sign test)."""
    ids = right_a.keys() & right_b.keys()
    only_a = sum(right_a[i] and not right_b[i] for i in ids)
    only_b = sum(right_b[i] and not right_a[i] for i in ids)
    n, k = only_a + only_b, min(only_a, only_b)
    p = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n) if n else 1.0
    return {
        "rows": len(ids),
        "a": share(sum(right_a[i] for i in ids), len(ids)),
        "b": share(sum(right_b[i] for i in ids), len(ids)),
        "only_a_right": only_a,
        "only_b_right": only_b,
        "p_value": round(p, 5),
    }


# ── documents ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def predict_documents(rows: Iterable[DocRow], categorize: Callable[[DocAsk], Any], agents: Sequence[str]) -> list[DocGuess]:
    found = []
    for row in rows:
        known = row.taxonomy if row.taxonomy is not None else taxonomy.DEFAULT
        names = sorted({*agents, *(agent for category in known.values() for agent in category.agents)})
        ask = DocAsk("eval", row.text, dict(known), names, row.title, row.filename)
        began = time.perf_counter()
        said = categorize(ask)
        ms = (time.perf_counter() - began) * 1000
        near = [str(a["category"]) for a in said.alternatives]
        found.append(
            DocGuess(
                row.id, said.category, said.sensitivity, said.relevant_agents, said.method, said.confidence, round(ms, 3), near
            )
        )
    return found


def by_rules(ask: DocAsk) -> Any:
    return taxonomy.by_rules(ask.text, ask.title, ask.filename, ask.headings, ask.taxonomy, ask.agents)
