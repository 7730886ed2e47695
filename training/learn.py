"""What teacher and student learn, a batch at a time. Every loss here takes vectors and returns a number; loops are in `run`.

*registry*: a phrasing among the cards of a small registry, with "nobody" as one more answer, scored as the runtime scores it.
*batch*: a phrasing among all cards of the batch (InfoNCE), half of them neighbours of the same trade.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from tokenizers import Tokenizer
from torch import nn

from hubpeer import taxonomy
from hubpeer.encoder.network import TAGS, WINDOW, card_text, card_words
from hubpeer.encoder.reading import meanings, parts
from training.bert import Bert, means, rows_of
from training.data import (
    RULES,
    VARIANTS,
    Asked,
    Composer,
    Example,
    Function,
    Natural,
    by_trade,
    damaged,
    draw,
    halves,
    joins,
    twins,
)

log = logging.getLogger("training")
MISSING = -1e4
#: What a document may be.
CATEGORIES = {name: category for name, category in taxonomy.DEFAULT.items() if name != taxonomy.OTHER}


@dataclass
class Labeled:
    """A batch of phrasings, cards and words of cards. `owner[m]` is the card of word m."""

    asked: list[str]
    cards: list[str]
    words: list[str]
    owner: torch.Tensor
    right: torch.Tensor  #: per phrasing, its card; -1: nobody's
    offered: torch.Tensor  #: per phrasing, which cards are in its registry


def labeled(functions: Sequence[Function], trades: dict[str, list[Function]], rng: random.Random, size: int) -> Labeled:
    """`size` functions with a card and a phrasing each, and half as many texts that are nobody's."""
    chosen = draw(functions, trades, rng, size)
    cards = [f.card(rng) for f in chosen]
    words, owner = [], []
    for n, card in enumerate(cards):
        names = card_words(card)
        for name in rng.sample(names, min(3, len(names))):
            words.append(name)
            owner.append(n)
    asked, right = [rng.choice([*f.phrasings, *f.said]) for f in chosen], list(range(size))
    talk = halves(joins()["small_talk"], held=False)
    for _ in range(size // 5):
        asked.append(rng.choice(talk))
        right.append(-1)
    wary = [f for f in chosen if f.decoys]
    for f in rng.sample(wary, min(len(wary), size // 5)):
        asked.append(rng.choice(f.decoys))
        right.append(-1 - size - chosen.index(f))
    offered = torch.zeros(len(asked), size, dtype=torch.bool)
    for n, answer in enumerate(right):
        own = answer if answer >= 0 else -1 - size - answer if answer < -1 else rng.randrange(size)
        near = [m for m, f in enumerate(chosen) if f.trade == chosen[own].trade and m != own]
        rest = [m for m in range(size) if m != own]
        offered[n, own] = True
        for _ in range(rng.randint(2, 6)):
            offered[n, rng.choice(near if near and rng.random() < 0.6 else rest)] = True
        if answer >= 0 and rng.random() < 0.2:  # its card is not there: a near miss
            offered[n, own] = False
            right[n] = -1
    return Labeled(asked, [card_text(c) for c in cards], words, torch.tensor(owner), torch.tensor(right).clamp(min=-1), offered)


class Worth(nn.Module):
    """What likeness to the whole card and to the nearest of its words is worth; the runtime fits its own numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.card, self.word, self.bias = (nn.Parameter(torch.tensor(v)) for v in (12.0, 3.0, -5.0))

    def forward(self, asked: torch.Tensor, cards: torch.Tensor, words: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        """Logits (asked, cards)."""
        near = torch.full((len(asked), len(cards)), -1.0)
        near = near.scatter_reduce(1, owner.expand(len(asked), -1), asked @ words.T, "amax", include_self=False)
        return self.card * (asked @ cards.T) + self.word * near + self.bias


def registry_loss(one: Labeled, worth: Worth, asked: torch.Tensor, cards: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Whose a text is among the cards of its registry, or nobody's."""
    scores = worth(asked, cards, words, one.owner)
    inside = torch.cat([torch.where(one.offered, scores, torch.tensor(MISSING)), torch.zeros(len(asked), 1)], 1)
    return F.cross_entropy(inside, torch.where(one.right >= 0, one.right, len(cards)))


def judge(one: Labeled, worth: Worth, asked: torch.Tensor, cards: torch.Tensor, words: torch.Tensor) -> dict[str, torch.Tensor]:
    """The losses of a labeled batch, given its vectors."""
    registry = registry_loss(one, worth, asked, cards, words)
    alike = asked[: len(cards)] @ cards.T / 0.05
    own = torch.arange(len(cards))
    batch = F.cross_entropy(alike, own) + 0.5 * F.cross_entropy(alike.T, own)
    all_words = asked[: len(cards)] @ words.T / 0.05
    mine = one.owner[None, :] == own[:, None]
    words_loss = (all_words.logsumexp(1) - torch.where(mine, all_words, torch.tensor(MISSING)).logsumexp(1)).mean()
    return {"registry": registry, "batch": 0.5 * batch, "words": 0.5 * words_loss}


def run(
    network: nn.Module,
    groups: list[dict[str, Any]],
    steps: int,
    loss_of: Callable[[int], dict[str, torch.Tensor]],
    checkpoint: Path | None = None,
) -> None:
    """AdamW over `steps` with a linear decay; carries on from `checkpoint` and leaves its state there."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    peak = [group["lr"] for group in optimizer.param_groups]
    step, used = 0, 0.0
    if checkpoint and checkpoint.exists():
        state = torch.load(checkpoint)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        step, used = state["step"], state["used"]
        log.info("carrying on at step %d", step)
    sums: dict[str, float] = {}
    saved = time.monotonic()
    while step < steps:
        began = time.process_time()
        for group, top in zip(optimizer.param_groups, peak, strict=True):
            group["lr"] = top * min(1.0, (step + 1) / 30, max(0.02, (steps - step) / (0.35 * steps)))
        losses = loss_of(step)
        optimizer.zero_grad()
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        optimizer.step()
        step += 1
        used += time.process_time() - began
        for name, value in losses.items():
            sums[name] = 0.95 * sums.get(name, float(value.detach())) + 0.05 * float(value.detach())
        if step % 20 == 0:
            log.info("step %d of %d, %.0f s: %s", step, steps, used, {name: round(value, 3) for name, value in sums.items()})
        if checkpoint and (step == steps or time.monotonic() - saved > 240):
            saved = time.monotonic()
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "used": used}
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)


# ── measuring ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def clause_to_card(network: Bert, tokenizer: Tokenizer, functions: Sequence[Function], seed: int = 7) -> dict[str, float]:
    """Share of phrasings whose own card is the nearest of five, at best 40 % of the others of the same trade: by the whole
    card, by the nearest word, by both. Every phrasing is asked three times."""
    rng, trades = random.Random(seed), by_trade(functions)
    cards = [f.card(rng) for f in functions]
    asked = network.encode([p for f in functions for p in f.phrasings], tokenizer)
    wholes = network.encode([card_text(c) for c in cards], tokenizer)
    names = [card_words(c) for c in cards]
    words = network.encode([n for some in names for n in some], tokenizer)
    owner = torch.tensor([n for n, some in enumerate(names) for _ in some])
    by_card = asked @ wholes.T
    by_word = torch.full_like(by_card, -1).scatter_reduce(1, owner.expand(len(asked), -1), asked @ words.T, "amax")
    number = {f.id: n for n, f in enumerate(functions)}
    right, count, at = [0, 0, 0], 0, 0
    for f in functions:
        near = [number[g.id] for g in trades[f.trade] if g.id not in twins(f.id)]
        rest = [number[g.id] for g in functions if g.id not in twins(f.id)]
        for row in range(at, at + len(f.phrasings)):
            for _ in range(3):
                others: set[int] = set()
                while len(others) < 4:
                    others.add(rng.choice(near if near and rng.random() < 0.4 else rest))
                for k, scores in enumerate((by_card, by_word, 0.6 * by_card + 0.4 * by_word)):
                    right[k] += int(scores[row, number[f.id]] > scores[row, list(others)].max())
                count += 1
        at += len(f.phrasings)
    return {name: round(r / count, 4) for name, r in zip(("card", "word", "both"), right, strict=True)}


# ── the teacher ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def tune(
    network: Bert, tokenizer: Tokenizer, functions: Sequence[Function], steps: int, seed: int, rate: float, **how: Any
) -> None:
    """Teach the teacher whose a phrasing is: its upper half moves, phrasings, cards and their words with it."""
    rng, trades, worth = random.Random(seed), by_trade(functions), Worth()
    freeze(network, len(network.layers) // 2)

    def loss_of(step: int) -> dict[str, torch.Tensor]:
        rng.seed(f"{seed} {step}")
        few = labeled(functions, trades, rng, 32)
        vectors = network(rows_of([*few.asked, *few.cards, *few.words], tokenizer))
        return judge(few, worth, *vectors.split([len(few.asked), len(few.cards), len(few.words)]))

    groups = [{"params": [p for p in network.layers.parameters() if p.requires_grad], "lr": rate}]
    run(nn.ModuleList([network, worth]), [*groups, {"params": list(worth.parameters()), "lr": 0.02}], steps, loss_of, **how)


def freeze(network: Bert, layers: int) -> None:
    """Keep the words, the positions and so many layers as they are."""
    network.positions.requires_grad_(False)
    for part in (network.words, network.norm, *network.layers[:layers]):
        part.requires_grad_(False)


# ── the student ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Known:
    """The teacher's vectors of some texts."""

    def __init__(self, texts: Sequence[str], vectors: torch.Tensor) -> None:
        self.texts, self.vectors = list(texts), vectors
        self._number = {text: n for n, text in enumerate(texts)}

    def __contains__(self, text: str) -> bool:
        return text in self._number

    def of(self, texts: Sequence[str]) -> torch.Tensor:
        return self.vectors[[self._number[text] for text in texts]]


def texts_to_imitate(functions: Sequence[Function], asked: Sequence[Natural], documents: Sequence[Example]) -> list[str]:
    """All we have on the training side: phrasings, cards, their words, whole questions, talk, documents."""
    found: dict[str, None] = {}
    for f in functions:
        found |= dict.fromkeys([*f.phrasings, *f.said, *f.decoys])
        found |= dict.fromkeys(card_text(f.variant(n)) for n in range(VARIANTS))
        found |= dict.fromkeys(word.replace("_", " ") for word in [*f.capabilities, *f.specialties])
        if f.description:
            found[f.description] = None
    found |= dict.fromkeys(halves(joins()["small_talk"], held=False))
    for phrases in joins()["decides"].values():
        found |= dict.fromkeys(halves(phrases, held=False))
    found |= dict.fromkeys(one.text for one in asked)
    found |= dict.fromkeys(meanings(CATEGORIES))
    found |= dict.fromkeys(parts(document.text)[0] for document in documents)
    return list(found)


def glimpse(document: Example, rng: random.Random, most: int = 300) -> str:
    """A stretch of a document, its beginning as often as any other."""
    start = max(0, rng.randrange(-most, max(1, len(document.text) - most)))
    stretch = document.text[start : start + most]
    return damaged(stretch, rng) if rng.random() < 0.5 else stretch


@dataclass
class Read:
    """A batch of composed questions: per token whether a clause begins there and what it does, per clause what it means."""

    rows: list[list[int]]
    begins: torch.Tensor  #: (all tokens), -1: none to be learned
    tags: torch.Tensor  #: (all tokens), -1: none to be learned
    spans: list[tuple[int, int]]  #: first and last token of a clause
    meant: torch.Tensor  #: the teacher's vectors of the clauses
    labels: Labeled
    card_vectors: torch.Tensor
    word_vectors: torch.Tensor


def read(asked: Sequence[Asked], tokenizer: Tokenizer, known: Known) -> Read:
    """Targets for questions. A question that is nobody's is not marked as talk where it could be somebody else's."""
    begin, end = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    encoded = tokenizer.encode_batch([one.text for one in asked], add_special_tokens=False)
    rows = [[begin, *e.ids[:WINDOW], end] for e in encoded]
    begins = torch.full((sum(map(len, rows)),), -1)
    tags = begins.clone()
    base = 0
    spans, said, right, owner_of = [], [], [], []
    cards: list[str] = []
    words: list[str] = []
    owner: list[int] = []
    for one, e in zip(asked, encoded, strict=True):
        first = len(cards)
        for card in one.cards.values():
            for name in card_words(card):
                words.append(name)
                owner.append(len(cards))
            cards.append(card_text(card))
        names = list(one.cards)
        offsets = [start for start, _ in e.offsets[:WINDOW]]
        at = 0
        for span in one.spans:
            last = at
            while last < len(offsets) and offsets[last] < span.end:
                last += 1
            if last == at:
                continue
            stretch = slice(base + at + 1, base + last + 1)
            begins[stretch] = 0
            begins[stretch.start] = 1
            if span.agent or span.tag in RULES or len(one.spans) > 1 or (span.tag == "none" and not one.foreign):
                tags[stretch] = TAGS.index(span.tag)
            if span.said in known:
                spans.append((stretch.start, stretch.stop))
                said.append(span.said)
                right.append(first + names.index(span.agent) if span.agent else -1)
                owner_of.append((first, len(cards)))
            at = last
        base += len(offsets) + 2
    offered = torch.zeros(len(spans), len(cards), dtype=torch.bool)
    for n, (a, b) in enumerate(owner_of):
        offered[n, a:b] = True
    labels = Labeled(said, cards, words, torch.tensor(owner), torch.tensor(right, dtype=torch.long), offered)
    return Read(rows, begins, tags, spans, known.of(said), labels, known.of(cards), known.of(words))


def imitation(got: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """How far vectors are from the teacher's, and how differently they stand to each other."""
    return 10 * (1 - (got * wanted).sum(-1)).mean() + 20 * F.mse_loss(got @ got.T, wanted @ wanted.T)


def distil(
    student: Bert,
    tokenizer: Tokenizer,
    known: Known,
    functions: Sequence[Function],
    asked: Sequence[Natural],
    documents: Sequence[Example],
    steps: int,
    seed: int,
    rate: float,
    **how: Any,
) -> None:
    """Teach the student the teacher's vectors of texts and of clauses within questions, our labels, and the tags."""
    rng, trades = random.Random(seed), by_trade(functions)
    composer, worth = Composer(functions, rng, held=False), Worth()
    spoken = {p for f in functions for p in f.phrasings}
    others = [text for text in known.texts if text not in spoken]
    number_of = {name: n for n, name in enumerate(CATEGORIES)}
    defined = known.of(meanings(CATEGORIES))
    freeze(student, len(student.layers) // 2)  # they are the teacher's, and see what they saw there
    tagger = list(student.tags.parameters())  # new, while all else begins as the teacher's
    trained = [p for p in student.layers.parameters() if p.requires_grad]

    def loss_of(step: int) -> dict[str, torch.Tensor]:
        rng.seed(f"{seed} {step}")  # the same step has the same texts and drops the same, interrupted or not
        torch.manual_seed(1_000_003 * seed + step)
        few = labeled(functions, trades, rng, 20)
        whole = [composer.natural(rng.choice(asked)) if n % 3 else composer.ask() for n in range(15)]
        asked_for = read(whole, tokenizer, known)
        plain = rng.sample(others, 10)
        filed = rng.sample(documents, 8)
        # All in one go: blocks are filled best that way.
        rows = [*asked_for.rows, *rows_of([*few.asked, *plain, *(glimpse(one, rng) for one in filed)], tokenizer)]
        states, cuts = student.states(rows)
        vectors = means(states, list(pairwise(cuts))[len(asked_for.rows) :])
        said, texts, papers = vectors.split([len(few.asked), len(plain), len(filed)])
        losses = judge(few, worth, said, known.of(few.cards), known.of(few.words))
        losses["texts"] = imitation(texts, known.of(plain))
        losses["said"] = 0.2 * imitation(said, known.of(few.asked))
        target = torch.tensor([number_of[one.category] for one in filed])
        losses["papers"] = 0.3 * F.cross_entropy(12 * papers @ defined.T, target)
        logits = student.tags(states[: len(asked_for.begins)], cuts[: len(asked_for.rows) + 1])
        real, marked = asked_for.begins >= 0, asked_for.tags >= 0
        losses["begins"] = 3 * F.binary_cross_entropy_with_logits(logits[:, 0][real], asked_for.begins[real].float())
        losses["tags"] = 3 * F.cross_entropy(logits[:, 1:][marked], asked_for.tags[marked])
        meant = means(states, asked_for.spans)
        losses["clauses"] = 0.2 * imitation(meant, asked_for.meant)
        losses["whose"] = 2 * registry_loss(asked_for.labels, worth, meant, asked_for.card_vectors, asked_for.word_vectors)
        return losses

    groups = [
        {"params": trained, "lr": rate},
        {"params": tagger, "lr": 10 * rate},
        {"params": list(worth.parameters()), "lr": 0.02},
    ]
    run(nn.ModuleList([student, worth]), groups, steps, loss_of, **how)
