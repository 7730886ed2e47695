"""What the model may write: one of some options, or a line of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import llguidance
import msgspec
import numpy as np
import torch
from torch import Tensor

from hubpeer.errors import Unavailable
from hubpeer.model.prompt import Words

#: One line that starts with a letter, a digit or an opening sign and holds nothing unprintable. The line's end ends it.
LINE: Final = r"[ ]?[\p{L}\p{N}(\"'][^\p{C}\p{Zl}\p{Zp}]*\n?"


class Trie(msgspec.Struct):
    """Options as tokens, those that begin alike folded together."""

    path: list[int] = []
    children: dict[int, Trie] = {}
    option: int | None = None  # the option that ends here; longer ones may go on ("sales", "sales-eu")

    @property
    def ways(self) -> list[int]:
        """The tokens that lead on; END stands for ending here."""
        return [*self.children, *([END] if self.option is not None else [])]

    def forks(self) -> list[Trie]:
        """The inner nodes below the root at which the model must be asked."""
        below = [fork for child in self.children.values() for fork in child.forks()]
        return [self, *below] if self.path and len(self.ways) > 1 else below


END: Final = -1


def options_trie(options: Sequence[Sequence[int]]) -> Trie:
    root = Trie()
    for number, tokens in enumerate(options):
        node = root
        for depth, token in enumerate(tokens, 1):
            node = node.children.setdefault(token, Trie(list(tokens[:depth])))
        if node.option is not None or not tokens:
            raise ValueError("two options are the same tokens, or one is empty")
        node.option = number
    return root


class Line:
    """One text under a grammar: what may come next, what must."""

    def __init__(self, words: Words, grammar: str) -> None:
        self._words = words
        # Compiled once per grammar; a copy starts where the original stands, at the beginning.
        if grammar not in words.compiled:
            words.compiled[grammar] = llguidance.LLMatcher(words.grammar, grammar, log_level=0)
        self._matcher = words.compiled[grammar].deep_copy()
        self._check()
        self._vocabulary = words.grammar.vocab_size

    def mask(self) -> Tensor:
        """[vocab] True where a token is not allowed now."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return torch.from_numpy(np.unpackbits(bits, count=self._vocabulary, bitorder="little") == 0)

    def take(self, token: int) -> list[int]:
        """The model wrote `token`; returns it and what is forced to follow. Empty where the text is at its end."""
        if token in self._words.stops:
            return []
        self._matcher.consume_token(token)
        self._check()
        return [token, *self.forced()]

    def forced(self) -> list[int]:
        tokens: list[int] = self._matcher.compute_ff_tokens()
        if tokens:
            self._matcher.consume_tokens(tokens)
            self._check()
        return tokens

    @property
    def ended(self) -> bool:
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        # llguidance never raises; a matcher in error allows nothing any more, and a step would wait for it for ever.
        if self._matcher.is_error():
            raise Unavailable("model_unavailable", f"the grammar failed: {self._matcher.get_error()[:200]}")


def line_grammar() -> str:
    grammar: str = llguidance.LLMatcher.grammar_from_regex(LINE)
    return grammar
