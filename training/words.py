"""The word table: a text's vector is the mean of its words' vectors, fitted so that this comes near the teacher's.

Where the table begins, a word's vector is what the teacher says of the word alone. Then it learns, by hand-written gradients (a
bag of words needs no more), two things at once: texts get the teacher's vectors, and phrasings are nearest to their own cards.
This costs a few minutes on one slow core; it is the best start for a trunk, and already a model.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence

import numpy as np
from tokenizers import Tokenizer

from hubpeer.encoder.network import WINDOW, card_text
from training.data import Function, by_trade, draw

log = logging.getLogger("training.words")


class Bags:
    """Texts as bags of token ids."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        rows = [row or [100] for row in rows]
        self.flat = np.fromiter((n for row in rows for n in row), np.int64)
        self.size = np.array([len(row) for row in rows])
        self.start = np.cumsum(self.size) - self.size

    def take(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For some texts: all their token ids, where each text begins, how long it is."""
        size = self.size[chosen]
        begin = np.cumsum(size) - size
        return self.flat[np.repeat(self.start[chosen] - begin, size) + np.arange(size.sum())], begin, size


def forward(table: np.ndarray, ids: np.ndarray, begin: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of bags, and their lengths before."""
    mean = np.add.reduceat(table[ids], begin, axis=0) / size[:, None]
    length = np.linalg.norm(mean, axis=1, keepdims=True) + 1e-9
    return mean / length, length


def encode(table: np.ndarray, tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    bags = Bags([e.ids[:WINDOW] for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)])
    return forward(table, *bags.take(np.arange(len(texts))))[0]


def fit(
    table: np.ndarray,
    rows: Sequence[Sequence[int]],
    wanted: np.ndarray,
    functions: Sequence[Function],
    tokenizer: Tokenizer,
    seconds: float,
    seed: int,
    validate: Callable[[np.ndarray], float],
) -> np.ndarray:
    """The table that did best on `validate` (called with a table, higher is better) within a time."""
    rng, choose = random.Random(seed), np.random.default_rng(seed)
    texts = Bags(rows)
    # One linear map first: it moves the words no text of ours holds, too.
    mean, _ = forward(table, *texts.take(np.arange(len(rows))))
    pull = np.linalg.solve(mean.T @ mean + 50 * np.eye(mean.shape[1]), mean.T @ wanted + 50 * np.eye(mean.shape[1]))
    table = (table @ pull).astype(np.float32)
    ids_of = lambda lines: [e.ids[:WINDOW] for e in tokenizer.encode_batch(lines, add_special_tokens=False)]  # noqa: E731
    phrasings = [Bags(ids_of(list(f.phrasings))) for f in functions]
    cards = [Bags(ids_of([card_text(f.card(rng)) for _ in range(8)])) for f in functions]
    number = {f.id: n for n, f in enumerate(functions)}
    trades = by_trade(functions)
    best, best_table = validate(table), table.copy()
    log.info("word table after the linear map: %.3f", best)
    squares = np.full(len(table), 1e-8, np.float32)
    began, step, used = time.monotonic(), 0, 0.0
    while used < seconds:
        rate = 0.02 * max(0.1, 1 - used / seconds)
        chosen = choose.integers(0, len(rows), 192)
        parts = [texts.take(chosen)]
        group = [number[f.id] for f in draw(functions, trades, rng, 48)]
        for source in (phrasings, cards):
            taken = [source[n].take(np.array([rng.randrange(len(source[n].size))])) for n in group]
            size = np.array([len(one[0]) for one in taken])
            parts.append((np.concatenate([one[0] for one in taken]), np.cumsum(size) - size, size))
        (a, la), (q, lq), (c, lc) = (forward(table, *bag) for bag in parts)
        scores = q @ c.T / 0.06
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        back = np.exp(scores - scores.max(0, keepdims=True))
        back /= back.sum(0, keepdims=True)
        slope = (p + back - 2 * np.eye(len(group), dtype=np.float32)) / 2 / len(group) / 0.06
        grads = [-wanted[chosen] / len(chosen) * 3, slope @ c, slope.T @ q]
        ids, values = [], []
        for (flat, _, size), unit, length, g in zip(parts, (a, q, c), (la, lq, lc), grads, strict=True):
            inner = (g - unit * (g * unit).sum(1, keepdims=True)) / length / size[:, None]
            ids.append(flat)
            values.append(np.repeat(inner, size, axis=0))
        flat = np.concatenate(ids)
        order = np.argsort(flat, kind="stable")
        rowids, first = np.unique(flat[order], return_index=True)
        total = np.add.reduceat(np.concatenate(values).astype(np.float32)[order], first, axis=0)
        squares[rowids] += (total**2).mean(1)
        table[rowids] -= rate * total / np.sqrt(squares[rowids])[:, None]
        step += 1
        used = time.monotonic() - began
        if step % 150 == 0 or used >= seconds:
            score = validate(table)
            labels = -np.log(np.diagonal(p) + 1e-9).mean()
            likeness = (a * wanted[chosen]).sum(1).mean()
            log.info("word table: step %d, %.0f s, likeness %.3f, labels %.3f, held %.3f", step, used, likeness, labels, score)
            if score >= best:
                best, best_table = score, table.copy()
    return best_table
