"""The built-in text encoder: routes and categorizes with nothing to download, in milliseconds, with numpy and tokenizers.

    PlanAsk -> BuiltIn.plan       -> Draft (checked by `hubpeer.plan`) or Declined
    DocAsk  -> BuiltIn.categorize -> wire.Categorization

`network` turns texts into vectors and tags, `decide` turns those into a draft, `reading` into a category. MODEL_CARD.md beside
this file says how the weights came about and how good they are.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from tokenizers import Tokenizer

from hubpeer.encoder import reading
from hubpeer.encoder.decide import Calibration, Clause, Declined, Likeness, Weighed, clauses, decide, evidence, joined, requests
from hubpeer.encoder.network import RULES, Floats, Network, Shape, card_text, card_words, read_weights, unit
from hubpeer.encoder.reading import Heads, no_heads
from hubpeer.model import DocAsk, PlanAsk
from hubpeer.plan import Draft
from hubpeer.wire import Card, Categorization, Sensitivity

__all__ = ["BuiltIn", "Declined"]

HERE: Final = Path(__file__).parent
#: Cards and definitions whose vectors are kept.
_KEPT: Final = 4096


class About(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`encoder.json`: what belongs to the weights."""

    shape: Shape
    fitted: Calibration
    categories: list[str] = []  #: the columns of the tensor "categories"
    sensitivities: list[Sensitivity] = []  #: the columns of the tensor "sensitivities"


def card_texts(cards: Iterable[Card]) -> tuple[list[str], list[list[str]]]:
    """What is read of cards: each as a whole, and each of its words."""
    some = list(cards)
    return [card_text(card) for card in some], [card_words(card) for card in some]


class BuiltIn:
    """The encoder with its weights. Synchronous; threads may share one."""

    name: Final = "builtin"

    def __init__(self, network: Network, fitted: Calibration, heads: Heads | None = None, revision: str = "") -> None:
        self.network = network
        self.fitted = fitted
        self.heads = heads or no_heads(network.shape.width)
        self.revision = revision
        self._vectors: OrderedDict[str, Floats] = OrderedDict()
        self._lock = threading.Lock()
        self._answered = self._declined = self._categorized = 0

    @classmethod
    def open(cls, folder: Path = HERE) -> BuiltIn:
        """Load a folder with `model.safetensors`, `tokenizer.json` and `encoder.json`; by default the one we ship."""
        about = msgspec.json.decode((folder / "encoder.json").read_bytes(), type=About)
        weights = read_weights(folder / "model.safetensors")
        network = Network(about.shape, weights, Tokenizer.from_file(str(folder / "tokenizer.json")))
        with (folder / "model.safetensors").open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=6))
        heads = None
        if about.categories:
            heads = Heads(weights["categories"], about.categories, weights["sensitivities"], about.sensitivities)
        return cls(network, about.fitted, heads, digest.hexdigest())

    # ── questions ───────────────────────────────────────────────────────────────────────────────────────────────────

    def plan(self, ask: PlanAsk) -> Draft | Declined:
        """Who does what, in which order, who decides; or that nobody fits."""
        if not ask.cards or not ask.query.strip():
            return Declined("empty", 0.0, [])
        weighed = self.weigh(ask)
        draft = decide(ask.query, weighed, list(ask.cards), ask.max_agents, self.fitted)
        if isinstance(draft, Declined):
            self._declined += 1
        else:
            self._answered += 1
        return draft

    def weigh(self, ask: PlanAsk) -> Weighed:
        """What is asked, and what speaks for each agent."""
        windows, question = self.network.read(ask.query)
        said = clauses(ask.query, windows, self.fitted.boundary)

        def weigh(asked: Sequence[Clause]) -> list[list[float]]:
            return [evidence(like, self.fitted) for like in self.likeness(asked, question, ask.cards)]

        asked, speaks = joined(requests(said), weigh, self.fitted)
        rule = next((clause.tag for clause in said if clause.tag in RULES and clause.tag in ask.rules), None)
        return Weighed(asked, speaks, rule)

    def likeness(self, asked: Sequence[Clause], question: Floats, cards: dict[str, Card]) -> list[Likeness]:
        """Per clause, how like the cards it and the whole question (a vector) are."""
        vectors = unit(np.stack([clause.state for clause in asked]))
        wholes, words = card_texts(cards.values())
        known = self.known([*wholes, *itertools.chain(*words)])
        by_card = vectors @ known[: len(cards)].T
        by_word = vectors @ known[len(cards) :].T
        begins = np.cumsum([0, *map(len, words)])[:-1]
        by_term = np.maximum.reduceat(by_word, begins, axis=1)
        overall = (known[: len(cards)] @ question).tolist()
        many = [math.log(max(1, len(some))) for some in words]
        return [
            Likeness(card.tolist(), term.tolist(), overall, many, clause.talk)
            for card, term, clause in zip(by_card, by_term, asked, strict=True)
        ]

    def unread(self, cards: Iterable[Card]) -> list[str]:
        """What of these cards was not read yet, as far as it can be kept: for `known`, before a question needs it."""
        wholes, words = card_texts(cards)
        with self._lock:
            return [text for text in dict.fromkeys([*wholes, *itertools.chain(*words)]) if text not in self._vectors][:_KEPT]

    def known(self, texts: list[str]) -> Floats:
        """Vectors of texts that come again and again, each encoded once (or twice, where two ask for it at the same time)."""
        with self._lock:
            found = {text: self._vectors[text] for text in texts if text in self._vectors}
        if new := [text for text in dict.fromkeys(texts) if text not in found]:
            found |= zip(new, self.network.encode(new), strict=True)
        with self._lock:
            self._vectors |= found
            for text in found:
                self._vectors.move_to_end(text)
            while len(self._vectors) > _KEPT:
                self._vectors.popitem(last=False)
        return np.stack([found[text] for text in texts])

    # ── documents ───────────────────────────────────────────────────────────────────────────────────────────────────

    def categorize(self, ask: DocAsk) -> Categorization:
        """What a document is about, from its parts."""
        self._categorized += 1
        return reading.categorize(ask, self.network.encode, self.known, self.heads, self.fitted)

    def status(self) -> dict[str, Any]:
        """Figures for `hub.status`."""
        return {
            "model_name": self.name,
            "loaded": True,
            "revision": self.revision,
            "questions": {"answered": self._answered, "declined": self._declined},
            "documents": self._categorized,
            "cached_texts": len(self._vectors),
        }
