"""After training: turn likenesses into probabilities, and measure, with the runtime itself, on functions never trained on.

The held functions are cut in two: one half fits the calibration, the other tells how good the whole is. `evals/` has no part
in either.
"""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hubpeer import evaluate, taxonomy
from hubpeer.encoder import About, BuiltIn, Declined
from hubpeer.encoder.decide import Calibration, Likeness, clauses, evidence, probabilities, requests
from hubpeer.encoder.network import read_weights, write_weights
from hubpeer.encoder.reading import Examples, parts, whole
from hubpeer.encoder.reading import evidence as evidence_of_document
from hubpeer.evaluate import Gold, RouteRow
from training.data import Asked, Composer, Function, documents, split

log = logging.getLogger("training.calibrate")


def questions(among: list[Function], seed: int, count: int) -> list[Asked]:
    """Composed questions with templates that training never saw."""
    composer = Composer(among, random.Random(seed), held=True)
    return [composer.ask() for _ in range(count)]


def halves_of(held: list[Function], seed: int) -> tuple[list[Function], list[Function]]:
    """To calibrate on, and to report on."""
    mixed = sorted(held, key=lambda f: f.id)
    random.Random(seed).shuffle(mixed)
    return mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]


def as_row(number: int, one: Asked) -> RouteRow:
    agents = sorted(one.agents)
    depends = {agent: {a for a, b in one.edges if b == agent} for agent in agents}
    starts = sum(not before for before in depends.values())
    kind = None if not agents else "single" if len(agents) == 1 else "parallel" if starts > 1 else "sequential"
    gold = Gold(agents, kind, list(one.edges), one.rule)
    return RouteRow(f"held-{number}", one.cards, "nobody", one.text, gold)


def best_boundary(builtin: BuiltIn, asked: list[Asked]) -> float:
    """The threshold at which the number of request clauses is right most often."""
    read = [(one, builtin.network.read(one.text)[0]) for one in asked]
    wanted = [max(1, sum(span.agent is not None for span in one.spans)) for one, _ in read]

    def right(threshold: float) -> int:
        return sum(
            len(requests(one.text, clauses(one.text, windows, threshold))) == n
            for (one, windows), n in zip(read, wanted, strict=True)
        )

    return max((0.3, 0.4, 0.5, 0.6, 0.7), key=right)


def samples(builtin: BuiltIn, asked: list[Asked]) -> list[tuple[np.ndarray, int]]:
    """Per request clause: its likenesses (3, agents), and whose it is (-1: nobody's)."""
    found = []
    for one in asked:
        windows, question = builtin.network.read(one.text)
        said = clauses(one.text, windows, builtin.fitted.boundary)
        wanted = requests(one.text, said)
        names = list(one.cards)
        for clause, likeness in zip(wanted, builtin.likeness(wanted, question, one.cards), strict=True):
            start = one.text.find(clause.text)
            end = start + len(clause.text)
            inside = max(one.spans, key=lambda span: min(span.end, end) - max(span.start, start))
            found.append((np.array(likeness), names.index(inside.agent) if inside.agent else -1))
    return found


def fit(data: list[tuple[np.ndarray, int]], start: Calibration, steps: int = 1500) -> Calibration:
    """Maximum likelihood of `evidence` and `probabilities`, a little pulled towards where it began."""
    width = max(likeness.shape[1] for likeness, _ in data)
    x = np.zeros((len(data), 4, width))
    real = np.zeros((len(data), width), bool)
    target = np.full(len(data), width)
    for n, (likeness, agent) in enumerate(data):
        k = likeness.shape[1]
        x[n, :3, :k], x[n, 3, :k], real[n, :k] = likeness, 1, True
        target[n] = agent if agent >= 0 else width
    theta = first = np.array([start.card, start.term, start.question, start.bias])
    m = v = np.zeros(4)
    for step in range(1, steps + 1):
        scores = np.where(real, np.einsum("d,ndk->nk", theta, x), -1e9)
        scores = np.concatenate([scores, np.zeros((len(data), 1))], 1)
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(data)), target] -= 1
        slope = np.einsum("nk,ndk->d", p[:, :-1], x) / len(data) + 1e-4 * (theta - first)
        m, v = 0.9 * m + 0.1 * slope, 0.99 * v + 0.01 * slope**2
        theta = theta - 0.1 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.99**step)) + 1e-8)
    card, term, question, bias = (round(float(value), 3) for value in theta)
    return msgspec.structs.replace(start, card=card, term=term, question=question, bias=bias)


def fit_scope(data: list[tuple[np.ndarray, int]], fitted: Calibration, false_declines: float = 0.025) -> float:
    """The threshold under which that share of clauses which are somebody's would be declined."""
    best = [max(probabilities(evidence(Likeness(*likeness.tolist()), fitted))) for likeness, agent in data if agent >= 0]
    return round(float(np.quantile(best, false_declines)), 3)


def fit_confidence(builtin: BuiltIn, rows: list[RouteRow]) -> tuple[float, float, float]:
    """Logistic regression of "the agents are exactly right" on what `confidence` looks at."""
    plain = msgspec.structs.replace(builtin.fitted, sure=(0.0, 1.0, 0.0))
    probe = BuiltIn(builtin.network, plain)
    x, y = [], []
    for row, guess in zip(rows, evaluate.predict_routes(rows, planner(probe)), strict=True):
        if guess.agents and guess.confidence is not None:
            odds = min(max(guess.confidence, 1e-6), 1 - 1e-6)
            x.append([1.0, np.log(odds / (1 - odds)), len(guess.agents) - 1])
            y.append(evaluate.exactly(row, guess))
    data, target, theta = np.array(x), np.array(y, float), np.array([0.0, 1.0, 0.0])
    for _ in range(30):
        p = 1 / (1 + np.exp(-data @ theta))
        hessian = data.T @ (data * (p * (1 - p))[:, None]) + 0.05 * np.eye(3)
        theta = theta - np.linalg.solve(hessian, data.T @ (p - target) + 0.05 * (theta - [0, 1, 0]))
    return tuple(round(float(value), 4) for value in theta)  # type: ignore[return-value]


def fit_documents(builtin: BuiltIn, steps: int = 800) -> tuple[Examples, tuple[float, float, float]]:
    """Vectors of our example documents, and what definition, words and examples are worth: each document judged by the rest."""
    vectors = [builtin.network.encode(parts(one.text)) for one in documents()]
    labels: list[Any] = [(one.category, one.sensitivity) for one in documents()]
    stack = np.stack([whole(v) for v in vectors])
    known = {name: c for name, c in taxonomy.DEFAULT.items() if name != taxonomy.OTHER}
    names, speaks = list(known), []
    for n, one in enumerate(documents()):
        rest = Examples(np.delete(stack, n, 0), labels[:n] + labels[n + 1 :])
        rules = taxonomy.by_rules(one.text, "", "", [], taxonomy.DEFAULT, [])
        speaks.append(evidence_of_document(vectors[n], rules, known, builtin.known, rest))
    x, target = np.array(speaks), np.array([names.index(one.category) for one in documents()])
    theta = first = np.array(Calibration().category)
    for _ in range(steps):
        scores = np.einsum("d,ndk->nk", theta, x)
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(x)), target] -= 1
        theta = theta - 3.0 * (np.einsum("nk,ndk->d", p, x) / len(x) + 1e-3 * (theta - first))
    right = (np.einsum("d,ndk->nk", theta, x).argmax(1) == target).mean()
    log.info("documents, each judged by the others: top-1 %.3f, worth %s", right, theta.round(2))
    return Examples(stack, labels), tuple(round(float(value), 3) for value in theta)  # type: ignore[return-value]


def planner(builtin: BuiltIn) -> evaluate.Planner:
    def plan(ask: Any) -> Any:
        found = builtin.plan(ask)
        if isinstance(found, Declined):
            return None, "builtin_encoder", [a.agent for a in found.alternatives], found.confidence
        return found, "builtin_encoder", [], found.confidence

    return plan


def calibrate(folder: Path, seed: int, count: int = 300) -> dict[str, Any]:
    """Fit `encoder.json` in a folder with weights; the figures on the other half of the held functions."""
    fitting, reporting = halves_of(split(seed)[1], seed)
    builtin = BuiltIn.open(folder)
    asked = questions(fitting, seed + 100, count)
    fitted = msgspec.structs.replace(builtin.fitted, boundary=best_boundary(builtin, asked))
    builtin = BuiltIn(builtin.network, fitted)
    data = samples(builtin, asked)
    fitted = fit(data, fitted)
    fitted = msgspec.structs.replace(fitted, in_scope=fit_scope(data, fitted))
    builtin = BuiltIn(builtin.network, fitted)
    fitted = msgspec.structs.replace(fitted, sure=fit_confidence(builtin, [as_row(n, one) for n, one in enumerate(asked)]))
    log.info("fitted on %d questions over %d functions: %s", count, len(fitting), fitted)
    examples, category = fit_documents(builtin)
    fitted = msgspec.structs.replace(fitted, category=category)
    about = About(builtin.network.shape, fitted, examples.labels)
    (folder / "encoder.json").write_bytes(msgspec.json.format(msgspec.json.encode(about), indent=1) + b"\n")
    weights = {name: np.array(value) for name, value in read_weights(folder / "model.safetensors").items()}
    write_weights(folder / "model.safetensors", {**weights, "examples": examples.vectors.astype(np.float16)})
    final = BuiltIn.open(folder)
    rows = [as_row(n, one) for n, one in enumerate(questions(reporting, seed + 200, count))]
    figures = evaluate.score_routes(rows, evaluate.predict_routes(rows, planner(final)))
    log.info("on %d questions over %d other functions: %s", count, len(reporting), figures)
    return figures
