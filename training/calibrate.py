"""After training: turn likenesses into probabilities, and measure, with the runtime itself, on functions never trained on.

The held functions are cut in two: one half fits the calibration, the other tells how good the whole is. `evals/` has no part
in either.
"""

from __future__ import annotations

import functools
import logging
import operator
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hubpeer import evaluate, taxonomy
from hubpeer.encoder import About, BuiltIn
from hubpeer.encoder.decide import Calibration, Clause, Weighed, clauses, decide, doubts, evidence, probabilities, requests
from hubpeer.encoder.network import read_weights, write_weights
from hubpeer.encoder.reading import Heads, extended, no_heads, parts, whole
from hubpeer.encoder.reading import evidence as evidence_of_document
from hubpeer.evaluate import Gold, RouteGuess, RouteRow
from hubpeer.model import PlanAsk
from training.data import Asked, Composer, Function, Natural, damaged, split, split_documents, split_questions

log = logging.getLogger("training.calibrate")


def halves_of(held: list[Function], seed: int) -> tuple[list[Function], list[Function]]:
    """To calibrate on, and to report on."""
    mixed = sorted(held, key=lambda f: f.id)
    random.Random(seed).shuffle(mixed)
    return mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]


def questions(among: list[Function], whole: list[Natural], seed: int, count: int) -> list[Asked]:
    """Composed questions with templates that training never saw, and natural ones it never saw."""
    composer = Composer(among, random.Random(seed), held=True)
    return [*(composer.natural(one) for one in whole), *(composer.ask() for _ in range(count))]


def as_row(number: int, one: Asked) -> RouteRow:
    agents = sorted(one.agents)
    depends = {agent: {a for a, b in one.edges if b == agent} for agent in agents}
    starts = sum(not before for before in depends.values())
    kind = None if not agents else "single" if len(agents) == 1 else "parallel" if starts > 1 else "sequential"
    gold = Gold(agents, kind, list(one.edges), one.rule)
    return RouteRow(f"{'natural' if one.natural else 'composed'}-{number}", one.cards, "nobody", one.text, gold)


def agent_of(one: Asked, clause: Clause) -> str | None:
    """Whose a clause the tagger cut is: that of the written clause it shares most with."""
    return max(one.spans, key=lambda span: min(span.end, clause.end) - max(span.start, clause.start)).agent


def samples(builtin: BuiltIn, asked: list[Asked]) -> list[tuple[np.ndarray, int]]:
    """Per request clause: its likenesses (5, agents), and whose it is (-1: nobody's)."""
    found = []
    for one in asked:
        windows, question = builtin.network.read(one.text)
        wanted = requests(clauses(one.text, windows, 0.5))
        names = list(one.cards)
        for clause, like in zip(wanted, builtin.likeness(wanted, question, one.cards), strict=True):
            agent = agent_of(one, clause)
            rows = [like.card, like.term, like.question, like.many, [like.talk] * len(names)]
            found.append((np.array(rows), names.index(agent) if agent else -1))
    return found


def fit(data: list[tuple[np.ndarray, int]], start: Calibration, steps: int = 1500) -> Calibration:
    """Maximum likelihood of `evidence` and `probabilities`, a little pulled towards where it began."""
    width = max(likeness.shape[1] for likeness, _ in data)
    x = np.zeros((len(data), 6, width))
    real = np.zeros((len(data), width), bool)
    target = np.full(len(data), width)
    for n, (likeness, agent) in enumerate(data):
        k = likeness.shape[1]
        x[n, :5, :k], x[n, 5, :k], real[n, :k] = likeness, 1, True
        target[n] = agent if agent >= 0 else width
    theta = first = np.array([start.card, start.term, start.question, start.many, start.talk, start.bias])
    m = v = np.zeros(6)
    for step in range(1, steps + 1):
        scores = np.where(real, np.einsum("d,ndk->nk", theta, x), -1e9)
        scores = np.concatenate([scores, np.zeros((len(data), 1))], 1)
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(data)), target] -= 1
        slope = np.einsum("nk,ndk->d", p[:, :-1], x) / len(data) + 1e-4 * (theta - first)
        m, v = 0.9 * m + 0.1 * slope, 0.99 * v + 0.01 * slope**2
        theta = theta - 0.1 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.99**step)) + 1e-8)
    card, term, question, many, talk, bias = (round(float(value), 3) for value in theta)
    return msgspec.structs.replace(start, card=card, term=term, question=question, many=many, talk=talk, bias=bias)


def logistic(x: np.ndarray, y: np.ndarray, first: Sequence[float], pull: float = 0.05) -> tuple[float, ...]:
    """Weights of "y is true", by Newton's method with shorter steps where a whole one makes it worse, a little pulled towards
    `first`."""
    theta = start = np.array(first, float)

    def loss(theta: np.ndarray) -> float:
        return float(np.logaddexp(0, x @ theta).sum() - y @ (x @ theta) + pull / 2 * np.square(theta - start).sum())

    for _ in range(40):
        p = 1 / (1 + np.exp(-np.clip(x @ theta, -30, 30)))
        hessian = x.T @ (x * (p * (1 - p))[:, None]) + pull * np.eye(len(theta))
        step = np.linalg.solve(hessian, x.T @ (p - y) + pull * (theta - start))
        while loss(theta - step) > loss(theta) + 1e-9:
            step = step / 2
        theta = theta - step
    return tuple(round(float(value), 4) for value in theta)


def fit_apart(builtin: BuiltIn, asked: list[Asked]) -> tuple[float, ...]:
    """When two neighbours are two agents': from the neighbours that a low threshold cuts."""
    x, y = [], []
    for one in asked:
        windows, question = builtin.network.read(one.text)
        found = requests(clauses(one.text, windows, builtin.fitted.boundary))
        speaks = [evidence(like, builtin.fitted) for like in builtin.likeness(found, question, one.cards)]
        for (first, second), (a, b) in zip(pairwise(found), pairwise(speaks), strict=True):
            x.append(doubts(second.boundary, a, b))
            y.append(agent_of(one, first) != agent_of(one, second))
    return logistic(np.array(x), np.array(y, float), (0.0, 1.0, 0.1, 0.1), 0.5)


def ask_of(row: RouteRow) -> PlanAsk:
    return PlanAsk(row.requesting_agent, row.query, row.registry, evaluate.RULES, evaluate.MAX_AGENTS)


def decided(rows: list[RouteRow], weighed: list[Weighed], fitted: Calibration) -> list[RouteGuess]:
    """What comes out for questions already weighed."""
    waiting = iter(weighed)

    def plan(ask: PlanAsk) -> Any:
        return evaluate.by_encoder(decide(ask.query, next(waiting), list(ask.cards), ask.max_agents, fitted))

    return evaluate.predict_routes(rows, plan)


def fit_decisions(
    rows: list[RouteRow], weighed: list[Weighed], fitted: Calibration, false_declines: float = 0.03
) -> Calibration:
    """`in_scope` so that this share of questions somebody fits is declined; `weak` so that most sets are right; and how
    likely they then are right: logistic regression on what `confidence` looks at."""
    best = [
        max(max(probabilities(row)) for row in one.speaks)
        for row, one in zip(rows, weighed, strict=True)
        if row.gold.agents and one.speaks
    ]
    fitted = msgspec.structs.replace(fitted, in_scope=round(float(np.quantile(best, false_declines)), 3), sure=(0.0, 1.0, 0.0))

    def right(weak: float) -> int:
        guesses = decided(rows, weighed, msgspec.structs.replace(fitted, weak=weak))
        return sum(evaluate.exactly(row, guess) for row, guess in zip(rows, guesses, strict=True))

    fitted = msgspec.structs.replace(fitted, weak=max((0.0, 0.2, 0.3, 0.4, 0.5, 0.6), key=right))
    x, y = [], []
    for row, guess in zip(rows, decided(rows, weighed, fitted), strict=True):
        if guess.agents and guess.confidence is not None:
            odds = min(max(guess.confidence, 1e-6), 1 - 1e-6)
            x.append([1.0, np.log(odds / (1 - odds)), len(guess.agents) - 1])
            y.append(evaluate.exactly(row, guess))
    return msgspec.structs.replace(fitted, sure=logistic(np.array(x), np.array(y, float), (0.0, 1.0, 0.0)))


def ridge(x: np.ndarray, labels: list[str], pull: float = 1.0) -> tuple[np.ndarray, list[str], np.ndarray]:
    """A linear head by least squares: weights (width, labels), the labels, what a head without a row says of that row."""
    names = sorted(set(labels))
    y = np.eye(len(names))[[names.index(label) for label in labels]]
    inverse = np.linalg.inv(x.T @ x + pull * np.eye(x.shape[1]))
    said, leverage = x @ inverse @ x.T @ y, np.einsum("nd,de,ne->n", x, inverse, x)[:, None]
    return (inverse @ x.T @ y).astype(np.float32), names, (said - leverage * y) / (1 - leverage)


def fit_worth(x: np.ndarray, target: np.ndarray, first: Sequence[float], steps: int = 3000) -> tuple[float, ...]:
    """Weights of what speaks for each category, (documents, kinds, categories), by maximum likelihood."""
    theta = start = np.array(first)
    for _ in range(steps):
        scores = np.einsum("d,ndk->nk", theta, x)
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(x)), target] -= 1
        theta = theta - 3.0 * (np.einsum("nk,ndk->d", p, x) / len(x) + 1e-4 * (theta - start))
    return tuple(round(float(value), 3) for value in theta)


def fit_documents(builtin: BuiltIn, seed: int) -> tuple[Heads, Calibration]:
    """The heads from all examples, every other one damaged; and what definition, words and head are worth, from those
    the network never saw, each judged by a head that did not see it either."""
    trained, held = split_documents(seed)
    rng = random.Random(seed)
    held, trained = (
        [replace(one, text=damaged(one.text, rng)) if n % 2 else one for n, one in enumerate(some)] for some in (held, trained)
    )
    every = [*held, *trained]
    vectors = [builtin.network.encode(parts(one.text)) for one in every]
    x = np.stack([extended(whole(v)) for v in vectors])
    category, categories, said = ridge(x, [one.category for one in every])
    sensitivity, sensitivities, marked = ridge(x, [one.sensitivity for one in every])
    known = {name: taxonomy.DEFAULT[name] for name in categories}
    speaks = []
    for one, read, judged in zip(held, vectors, said, strict=False):
        rules = taxonomy.by_rules(one.text, "", "", [], taxonomy.DEFAULT, [])
        plain = evidence_of_document(read, rules, known, builtin.known, no_heads(builtin.network.shape.width))
        speaks.append(np.concatenate([plain, judged[None]]))
    found, target = np.array(speaks), np.array([categories.index(one.category) for one in held])
    start = Calibration()
    fitted = msgspec.structs.replace(
        builtin.fitted,
        category=fit_worth(found, target, start.category),
        own_category=fit_worth(found[:, :2], target, start.own_category),
    )
    for name, kinds, worth in (("all", 3, fitted.category), ("no head", 2, fitted.own_category)):
        right = (np.einsum("d,ndk->nk", np.array(worth), found[:, :kinds]).argmax(1) == target).mean()
        log.info(
            "%d documents (half of them damaged) seen by neither network nor head, with %s: top-1 %.3f, worth %s",
            len(found),
            name,
            right,
            worth,
        )
    secret = np.mean([sensitivities[n] == one.sensitivity for n, one in zip(marked.argmax(1), held, strict=False)])
    log.info("their sensitivity by the head: %.3f", secret)
    return Heads(category, categories, sensitivity, sensitivities), fitted  # type: ignore[arg-type]


def figures(rows: list[RouteRow], guesses: list[RouteGuess]) -> dict[str, dict[str, Any]]:
    """Every figure, for natural and for composed questions."""
    kinds = {row.set_name for row in rows}
    return {
        kind: evaluate.score_routes([row for row in rows if row.set_name == kind], guesses)
        for kind in sorted(kinds, reverse=True)
    }


def calibrate(folder: Path, seed: int, count: int = 200) -> dict[str, dict[str, Any]]:
    """Fit `encoder.json` in a folder with weights; the figures on the other half of the held functions and questions."""
    held = split(seed)[1]
    whole = split_questions(held, seed)[1]
    builtin = BuiltIn.open(folder)
    read = functools.cache(builtin.network.read)
    builtin.network.read = read  # type: ignore[method-assign]  # each question is read once
    halves = [questions(some, whole[n::2], seed + 100 + n, count) for n, some in enumerate(halves_of(held, seed))]
    fitted = fit(samples(builtin, halves[0]), Calibration())
    builtin.fitted = fitted
    rows = [as_row(n, one) for n, one in enumerate(halves[0])]

    def joining(boundary: float) -> tuple[int, Calibration]:
        """How many sets are right with cuts from this probability on, and all that is fitted with it."""
        builtin.fitted = msgspec.structs.replace(fitted, boundary=boundary)
        builtin.fitted = msgspec.structs.replace(builtin.fitted, apart=fit_apart(builtin, halves[0]))
        weighed = [builtin.weigh(ask_of(row)) for row in rows]
        found = fit_decisions(rows, weighed, builtin.fitted)
        return sum(map(evaluate.exactly, rows, decided(rows, weighed, found))), found

    _, fitted = max((joining(boundary) for boundary in (0.1, 0.2, 0.3, 0.5)), key=operator.itemgetter(0))
    builtin.fitted = fitted
    log.info("fitted on %d questions: %s", len(rows), fitted)
    heads, fitted = fit_documents(builtin, seed)
    about = About(builtin.network.shape, fitted, heads.categories, heads.sensitivities)
    (folder / "encoder.json").write_bytes(msgspec.json.format(msgspec.json.encode(about), indent=1) + b"\n")
    weights = {name: np.array(value) for name, value in read_weights(folder / "model.safetensors").items()}
    write_weights(folder / "model.safetensors", weights | {"categories": heads.category, "sensitivities": heads.sensitivity})
    rows = [as_row(n, one) for n, one in enumerate(halves[1])]
    found = figures(rows, decided(rows, [builtin.weigh(ask_of(row)) for row in rows], fitted))
    for kind, scores in found.items():
        log.info("%s, neither trained nor fitted on: %s", kind, scores)
    return found
