"""From scores to a plan. Pure: what the network said of a question's clauses and cards comes in, a draft goes out.

A clause is whose card it is nearest to, or nobody's; neighbours that are not clearly two become one. The calibration (made on
functions the network never saw) turns nearness into probabilities. Nothing here knows a trade, an agent or a cue word.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from msgspec import Struct

from hubpeer.encoder.network import LEVELS, TAGS, Floats, Tagged
from hubpeer.plan import Draft, DraftStep
from hubpeer.wire import Alternative


class Calibration(Struct, frozen=True, forbid_unknown_fields=True):
    """What was fitted after training, on functions that never occurred in it."""

    card: float = 14.0  #: worth of a clause's likeness to a whole card
    term: float = 6.0  #: to the nearest of its capabilities and specialties
    question: float = 4.0  #: worth of the whole question's likeness to the card
    many: float = 0.0  #: of the logarithm of how many those are: one of many is near by chance
    talk: float = 0.0  #: worth of the tagger's doubt that it is a request at all
    bias: float = -9.0  #: below this much evidence a clause is nobody's
    boundary: float = 0.3  #: from this probability on a clause may begin
    #: Two neighbours are two agents' where a + b log odds(boundary) + c (what speaks against the other's agent in the first)
    #: + d (in the second) > 0.
    apart: tuple[float, float, float, float] = (0.0, 1.0, 0.0, 0.0)
    in_scope: float = 0.3  #: a question none of whose clauses is somebody's with this probability is declined
    weak: float = 0.3  #: beside others, a clause that is somebody's with less is left out
    sure: tuple[float, float, float] = (0.0, 1.0, 0.0)  #: confidence = sigmoid(a + b log(p) + c (agents - 1))
    category: tuple[float, float, float] = (6.0, 4.0, 6.0)  #: of a document: worth of definition, words, head
    own_category: tuple[float, float] = (12.0, 4.0)  #: the same in a taxonomy there is no head for


class Clause(NamedTuple):
    """A stretch of a question that belongs together: where it stands, and sums over its tokens."""

    start: int
    end: int
    tokens: int
    boundary: float  #: how likely it begins where it does
    tags: Floats  #: logits over `TAGS`
    state: Floats

    @property
    def tag(self) -> str:
        return TAGS[int(self.tags.argmax())]

    @property
    def level(self) -> int:
        """When it can start, if it is a request."""
        return int(self.tags[_LEVELS].argmax())

    @property
    def talk(self) -> float:
        """How much more the tagger sees none in it than a request."""
        return float(self.tags[0] - self.tags[_LEVELS].max()) / self.tokens

    def text(self, question: str) -> str:
        return question[self.start : self.end].strip(" \t\n.,;:-–—")

    def __add__(self, other: tuple[Any, ...]) -> Clause:
        """Both as one."""
        assert isinstance(other, Clause)
        return Clause(
            self.start,
            other.end,
            self.tokens + other.tokens,
            self.boundary,
            self.tags + other.tags,
            self.state + other.state,
        )


_LEVELS: Final = slice(TAGS.index(LEVELS[0]), TAGS.index(LEVELS[-1]) + 1)


class Likeness(NamedTuple):
    """How like each agent's card a clause is (cosines): the whole card, the nearest of its words, the logarithm of how many
    there are; and the whole question."""

    card: list[float]
    term: list[float]
    question: list[float]
    many: list[float]
    talk: float = 0.0  #: `Clause.talk`


class Declined(Struct, frozen=True):
    """No agent fits well enough; the next rung of the ladder may know better. `reason` is "nobody_fits" or "empty"."""

    reason: str
    confidence: float
    alternatives: list[Alternative]


def clauses(text: str, windows: Sequence[Tagged], boundary: float) -> list[Clause]:
    """Cut a question where the tagger says a clause may begin."""
    found: list[Clause] = []
    for window in windows:
        n = len(window.offsets)
        starts = [0, *(t for t in range(1, n) if window.boundary[t] >= boundary), n]
        for a, b in itertools.pairwise(starts):
            clause = Clause(
                window.offsets[a][0],
                window.offsets[b - 1][1],
                b - a,
                float(window.boundary[a]) if found else 1.0,
                window.tags[a:b].sum(0),
                window.states[a:b].sum(0),
            )
            if clause.text(text):
                found.append(clause)
    return found


def requests(found: Sequence[Clause]) -> list[Clause]:
    """The clauses somebody is to answer; where the tagger saw none, all that was said is one."""
    asked = [clause for clause in found if clause.tag in LEVELS]
    return asked or [functools.reduce(operator.add, found)] if found else []


#: What speaks for each agent, per clause.
Weigh: TypeAlias = Callable[[Sequence[Clause]], list[list[float]]]


def joined(asked: Sequence[Clause], weigh: Weigh, fitted: Calibration) -> tuple[list[Clause], list[list[float]]]:
    """The requests after neighbours that are not clearly two agents' have become one, the least clear first; and what speaks
    for each agent."""
    found, speaks = list(asked), weigh(asked)
    while len(found) > 1:
        apart = [
            sum(map(operator.mul, fitted.apart, doubts(second.boundary, a, b)))
            for (_, second), (a, b) in zip(itertools.pairwise(found), itertools.pairwise(speaks), strict=True)
        ]
        n = min(range(len(apart)), key=apart.__getitem__)
        if apart[n] > 0:
            break
        found[n : n + 2] = [found[n] + found[n + 1]]
        speaks[n : n + 2] = weigh(found[n : n + 1])
    return found, speaks


def doubts(boundary: float, first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float, float]:
    """What `Calibration.apart` weighs: 1, the boundary's log odds, and by how much each of two clauses prefers its own agent to
    the other's (at most 10)."""
    p = min(max(boundary, 1e-4), 1 - 1e-4)
    a, b = (max(range(len(row)), key=row.__getitem__) for row in (first, second))
    return 1.0, math.log(p / (1 - p)), min(first[a] - first[b], 10.0), min(second[b] - second[a], 10.0)


def probabilities(evidence: Sequence[float]) -> list[float]:
    """Per agent, how likely the clause is its; what is missing to 1 is nobody's."""
    top = max(0.0, *evidence)
    weights = [math.exp(e - top) for e in evidence]
    total = sum(weights) + math.exp(-top)
    return [w / total for w in weights]


class Weighed(NamedTuple):
    """What is asked; how much speaks for each request n being of agent m, as `speaks[n][m]`; who decides, where it is said."""

    asked: list[Clause]
    speaks: list[list[float]]
    rule: str | None = None


def decide(question: str, weighed: Weighed, agents: Sequence[str], max_agents: int, fitted: Calibration) -> Draft | Declined:
    """The draft: each request goes to the agent it fits best, in the order the tagger read, or nobody fits."""
    asked, speaks, rule = weighed
    if not asked:
        return Declined("empty", 0.0, [])
    likely = [probabilities(row) for row in speaks]
    best_of = {agent: max(row[m] for row in likely) for m, agent in enumerate(agents)}
    ranked = sorted(agents, key=lambda agent: (-best_of[agent], agent))
    if best_of[ranked[0]] < fitted.in_scope:
        nearest = [Alternative(agent, round(best_of[agent], 3)) for agent in ranked[:3]]
        return Declined("nobody_fits", round(1 - best_of[ranked[0]], 3), nearest)
    chosen: dict[str, tuple[int, float, list[str]]] = {}
    for clause, row in zip(asked, likely, strict=True):
        m = max(range(len(agents)), key=row.__getitem__)
        if row[m] < fitted.weak and row[m] < best_of[ranked[0]]:
            continue
        level, p, texts = chosen.get(agents[m], (clause.level, 0.0, []))
        chosen[agents[m]] = (level, max(p, row[m]), [*texts, clause.text(question)])
    kept = sorted(chosen, key=lambda agent: -chosen[agent][1])[:max_agents]
    levels = sorted({chosen[agent][0] for agent in kept})
    before = {level: [a for a in kept if chosen[a][0] == earlier] for earlier, level in itertools.pairwise(levels)}
    return Draft(
        agents=[
            DraftStep(agent, ". ".join(texts), before.get(level, []), named(texts))
            for agent, (level, _, texts) in chosen.items()
            if agent in kept
        ],
        conflict_resolution=rule,
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
    common = fitted.bias + fitted.talk * like.talk
    return [
        fitted.card * card + fitted.term * term + fitted.question * question + fitted.many * many + common
        for card, term, question, many in zip(like.card, like.term, like.question, like.many, strict=True)
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
