"""From scores to a plan. Pure: what the network said of a question's clauses and cards comes in, a draft goes out.

A clause is whose card it is nearest to, or nobody's; the calibration (made on functions the network never saw) turns nearness
into probabilities. Nothing here knows a trade, an agent or a cue word.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from msgspec import Struct

from hubpeer.encoder.network import LEVELS, RULES, TAGS, Tagged
from hubpeer.plan import Draft, DraftStep
from hubpeer.wire import Alternative


class Calibration(Struct, frozen=True, forbid_unknown_fields=True):
    """What was fitted after training, on functions that never occurred in it."""

    card: float = 14.0  #: worth of a clause's likeness to a whole card
    term: float = 6.0  #: to the nearest of its capabilities and specialties
    question: float = 4.0  #: worth of the whole question's likeness to the card
    bias: float = -9.0  #: below this much evidence a clause is nobody's
    boundary: float = 0.5  #: from this probability on a clause begins
    in_scope: float = 0.3  #: a question none of whose clauses is somebody's with this probability is declined
    sure: tuple[float, float, float] = (0.0, 1.0, 0.0)  #: confidence = sigmoid(a + b log(p) + c (agents - 1))
    category: tuple[float, float, float] = (12.0, 4.0, 6.0)  #: of a document: worth of definition, words, examples


class Clause(Struct, frozen=True):
    """A stretch of a question that belongs together, and what it does there (one of `TAGS`)."""

    text: str
    tag: str


class Likeness(NamedTuple):
    """How like each agent's card a clause is (cosines): the whole card, the nearest of its words; and the whole question."""

    card: list[float]
    term: list[float]
    question: list[float]


class Declined(Struct, frozen=True):
    """No agent fits well enough; the next rung of the ladder may know better. `reason` is "nobody_fits" or "empty"."""

    reason: str
    confidence: float
    alternatives: list[Alternative]


def clauses(text: str, windows: Sequence[Tagged], boundary: float) -> list[Clause]:
    """Cut a question where the tagger says a clause begins; the tag of a clause is what its tokens say together."""
    found: list[Clause] = []
    for window in windows:
        starts = [0, *(n for n in range(1, len(window.offsets)) if window.boundary[n] >= boundary), len(window.offsets)]
        for start, end in itertools.pairwise(starts):
            words = text[window.offsets[start][0] : window.offsets[end - 1][1]].strip(" \t\n.,;:-–—")
            if words:
                found.append(Clause(words, TAGS[int(window.tags[start:end].mean(0).argmax())]))
    return found


def requests(text: str, found: Sequence[Clause]) -> list[Clause]:
    """The clauses somebody is to answer; where the tagger saw none, the whole question is one."""
    return [clause for clause in found if clause.tag in LEVELS] or [Clause(text.strip(), LEVELS[0])]


def probabilities(evidence: Sequence[float]) -> list[float]:
    """Per agent, how likely the clause is its; what is missing to 1 is nobody's."""
    top = max(0.0, *evidence)
    weights = [math.exp(e - top) for e in evidence]
    total = sum(weights) + math.exp(-top)
    return [w / total for w in weights]


def decide(
    asked: Sequence[Clause],
    said: Sequence[Clause],
    evidence: Sequence[Sequence[float]],
    agents: Sequence[str],
    rules: Sequence[str],
    max_agents: int,
    fitted: Calibration,
) -> Draft | Declined:
    """The draft: each request goes to the agent it fits best, in the order the tagger read, or nobody fits.

    `evidence[n][m]` is how much speaks for request n being of agent m; `said` are all clauses, for who decides.
    """
    likely = [probabilities(row) for row in evidence]
    best_of = {agent: max(row[m] for row in likely) for m, agent in enumerate(agents)}
    chosen: dict[str, tuple[int, float, list[str]]] = {}
    for clause, row in zip(asked, likely, strict=True):
        m = max(range(len(agents)), key=row.__getitem__)
        if row[m] < fitted.in_scope:
            continue
        level, p, texts = chosen.get(agents[m], (LEVELS.index(clause.tag), 0.0, []))
        chosen[agents[m]] = (level, max(p, row[m]), [*texts, clause.text])
    ranked = sorted(agents, key=lambda agent: (-best_of[agent], agent))
    if not chosen:
        nearest = [Alternative(agent, round(best_of[agent], 3)) for agent in ranked[:3]]
        return Declined("nobody_fits", round(1 - max(best_of.values(), default=0.0), 3), nearest)
    kept = sorted(chosen, key=lambda agent: -chosen[agent][1])[:max_agents]
    levels = sorted({chosen[agent][0] for agent in kept})
    before = {level: [a for a in kept if chosen[a][0] == earlier] for earlier, level in itertools.pairwise(levels)}
    return Draft(
        agents=[
            DraftStep(agent, ". ".join(texts), before.get(level, []), named(texts))
            for agent, (level, _, texts) in chosen.items()
            if agent in kept
        ],
        conflict_resolution=next((c.tag for c in said if c.tag in RULES and c.tag in rules), None),
        reasoning="; ".join(f"{a}: \u201c{'. '.join(chosen[a][2])[:200]}\u201d ({chosen[a][1]:.2f})" for a in kept),
        confidence=confidence([chosen[agent][1] for agent in kept], fitted),
        alternatives=[Alternative(agent, round(best_of[agent], 3)) for agent in ranked if agent not in kept][:3],
    )


def confidence(parts: Sequence[float], fitted: Calibration) -> float:
    """How likely the whole set of agents is right, by the calibration."""
    a, b, c = fitted.sure
    z = a + b * sum(math.log(max(p, 1e-6)) for p in parts) + c * (len(parts) - 1)
    return round(1 / (1 + math.exp(-max(-30.0, min(30.0, z)))), 3)


def evidence(like: Likeness, fitted: Calibration) -> list[float]:
    """What speaks for each agent."""
    return [
        fitted.card * card + fitted.term * term + fitted.question * question + fitted.bias
        for card, term, question in zip(*like, strict=True)
    ]


_NAMED: Final = (
    re.compile(r"[\"\u201c]([^\"\u201d]{2,60})[\"\u201d]"),
    re.compile(r"(?<![.!?] )(?<!^)\b([A-Z][\w'-]+(?: (?:& )?[A-Z][\w'-]+){0,3})"),
    re.compile(r"(?:[$€£] ?)?\b\d[\d.,]*(?: ?%|(?: [a-z]{3,})?)"),
)


def named(texts: Sequence[str]) -> list[str]:
    """What the clauses name and the agent will have to look up: quotations, names, figures with their unit."""
    found: dict[str, None] = {}
    for text in texts:
        for pattern in _NAMED:
            found |= dict.fromkeys(match.group(match.lastindex or 0).strip(" .,") for match in pattern.finditer(text))
    return [name for name in found if len(name) > 1][:6]


def shares(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores as probabilities."""
    top = max(scores.values())
    weights = {name: math.exp(score - top) for name, score in scores.items()}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}
