"""What a story may ask of the engine, and how each request is answered from the logits of its rows.

A request becomes rows: tokens on their way through the model. Behind the last token of a row its `settle` gets the logits and
says what is to be fed next; when all rows of a request are done, its answer is ready. Nothing here runs the model.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from hubpeer.errors import Unavailable
from hubpeer.model import grammar
from hubpeer.model.forward import Node, units
from hubpeer.model.prompt import Words

# ── what stories ask for ────────────────────────────────────────────────────────────────────────────────────────────────


class Branch:
    """A line of text: what the model has read of it (`node`), and what is still to be read (`pending`)."""

    __slots__ = ("logits", "node", "pending")

    def __init__(self, node: Node, pending: Iterable[int] = ()) -> None:
        self.node = node
        self.pending = list(pending)
        self.logits: Tensor | None = None  # [vocab], behind the last token, where that has been asked for

    def add(self, tokens: Iterable[int]) -> None:
        """Nothing runs yet: the tokens ride along with the next request on this branch."""
        self.pending += tokens


class Read(msgspec.Struct, frozen=True):
    """Read what is pending. Answer: None."""

    branch: Branch


class Choose(msgspec.Struct, frozen=True):
    """Which option comes behind `branch` and `lead`? Answer: `Choice`. The branch itself stays as it is."""

    branch: Branch
    options: list[list[int]]
    lead: list[int] = []
    ends: list[int] = []  # tokens that may come behind an option: they tell "sales" from the beginning of "sales-eu"


class Choice(msgspec.Struct, frozen=True):
    index: int
    probabilities: list[float]  # of all options, adding up to 1


class Write(msgspec.Struct, frozen=True):
    """A text behind `branch` and `lead`, under a grammar, of at most `limit` tokens. Answer: `Text`."""

    branch: Branch
    lead: list[int]
    grammar: str
    limit: int


class Text(msgspec.Struct, frozen=True):
    tokens: list[int]  # what the model wrote and nothing else: never a token of the prompt
    complete: bool  # it ended by itself, not at the limit


Request = Read | Choose | Write
Story = Generator[list[Request], list[Any], Any]


class Task(msgspec.Struct, frozen=True):
    """All the engine needs for one job."""

    prefix: list[int]  # shared with every task that starts with the same tokens
    line: int  # tokens the job's own line may grow to
    beside: int  # tokens its branches would like; with less they run one after the other
    widest: int  # the largest single branch
    story: Callable[[Branch], Story]


# ── on the way ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Space:
    """Which parts of a range are free; first fit, whole units."""

    def __init__(self, first: int, size: int) -> None:
        self._free = [(first, size)] if size else []
        self.size = size

    @property
    def free(self) -> int:
        return sum(size for _, size in self._free)

    def take(self, tokens: int) -> int | None:
        need = units(tokens)
        for i, (first, size) in enumerate(self._free):
            if size >= need:
                self._free[i : i + 1] = [(first + need, size - need)] if size > need else []
                return first
        return None

    def give(self, first: int, tokens: int) -> None:
        self._free.append((first, units(tokens)))
        merged: list[tuple[int, int]] = []
        for start, size in sorted(self._free):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((start, size))
        self._free = merged


class Row:
    """Tokens on their way through the model, and what to do with the logits behind the last of them."""

    def __init__(
        self,
        tokens: Iterable[int],
        node: Node | None = None,
        parent: Branch | None = None,
        more: int = 0,
        settle: Callable[[Tensor], list[int]] | None = None,
    ) -> None:
        self.node, self.parent = node, parent
        self.feed = list(tokens)
        self.more = more  # tokens that may be written behind them
        self.settle = settle  # logits [vocab] -> tokens to feed next; none: this row is done
        self.done = False
        self.place: tuple[int, int] | None = None  # what of the job's room it has taken

    def begin(self, room: Space) -> bool:
        """Find a place in memory; False where other branches of the job must end first."""
        if self.node is not None:
            return True
        assert self.parent is not None
        need = len(self.parent.pending) + len(self.feed) + self.more
        if units(need) > room.size:
            raise Unavailable("model_unavailable", "a branch grew past the room its job has asked for")
        first = room.take(need)
        if first is None:
            return False
        self.place = first, need
        self.node = Node(first, units(need), self.parent.node)
        self.feed = [*self.parent.pending, *self.feed]
        return True

    def end(self, room: Space) -> None:
        self.done = True
        if self.place is not None:
            room.give(*self.place)
            self.place = None


# ── answers ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def reading(branch: Branch) -> Row:
    def settle(logits: Tensor) -> list[int]:
        branch.logits = logits.clone()  # a row of a step's logits would keep those of all its rows
        branch.pending = []
        return []

    return Row(branch.pending, node=branch.node, settle=settle)


class Draw:
    """Greedy, or random with numbers that depend on the seed, the prompt and the request only: never on who else runs."""

    def __init__(self, temperature: float, salt: str, prompt: Sequence[int]) -> None:
        self.temperature = temperature
        self._random = None
        if temperature:
            digest = hashlib.sha256(f"{salt} {prompt}".encode()).digest()
            self._random = random.Random(digest)  # noqa: S311  sampling, not secrecy

    def pick(self, scores: Tensor) -> int:
        """An index of `scores` [n]; -inf is never picked. Raises where nothing can be."""
        best = int(scores.argmax())
        if not scores[best].isfinite():
            raise Unavailable("model_unavailable", "the model's figures are not numbers")
        if self._random is None:
            return best
        upto = ((scores - scores[best]) / self.temperature).exp_().double().cumsum(0)
        drawn = int(torch.searchsorted(upto, self._random.random() * float(upto[-1]), right=True))
        return drawn if drawn < len(scores) and scores[drawn].isfinite() else best


class Writing:
    """One text."""

    def __init__(self, words: Words, request: Write, draw: Draw) -> None:
        self.forced = 0  # tokens the grammar left no choice about
        self._line = grammar.Line(words, request.grammar)
        self._limit, self._draw = request.limit, draw
        self._tokens: list[int] = []
        self._complete = False

    def settle(self, logits: Tensor) -> list[int]:
        token = self._draw.pick(logits.masked_fill(self._line.mask(), float("-inf")))
        new = self._line.take(token)[: self._limit - len(self._tokens)]
        self.forced += max(0, len(new) - 1)
        self._tokens += new
        self._complete = not new or self._line.ended
        return [] if self._complete or len(self._tokens) >= self._limit else new

    def answer(self) -> Text:
        return Text(self._tokens, self._complete)


class Choosing:
    """One choice. Where options begin alike, the model is asked at every fork of the way, at all of them side by side."""

    def __init__(self, request: Choose, draw: Draw) -> None:
        self._trie = grammar.options_trie(request.options)
        self._request, self._draw = request, draw
        self._scores: dict[tuple[int, ...], Tensor] = {}  # path of a fork -> logits of the ways on, [ways]

    def rows(self) -> list[Row]:
        """What must be read for it. They know this choice; it does not know them, so no step's logits wait in a cycle."""
        request, rows = self._request, []
        branch = request.branch
        if len(self._trie.children) > 1:
            if request.lead:
                rows.append(Row(request.lead, parent=branch, settle=self._at(self._trie)))
            elif branch.pending:
                read = reading(branch)
                at, inner = self._at(self._trie), read.settle
                assert inner is not None
                read.settle = lambda logits: at(logits) + inner(logits)
                rows.append(read)
            else:
                assert branch.logits is not None, "nothing was read before this choice"
                self._at(self._trie)(branch.logits)
        forks = self._trie.forks()
        return rows + [Row([*request.lead, *fork.path], parent=branch, settle=self._at(fork)) for fork in forks]

    def _at(self, node: grammar.Trie) -> Callable[[Tensor], list[int]]:
        """Take what is asked at a fork from the logits [vocab] there."""
        ends = [token for token in self._request.ends if token not in node.children]

        def settle(logits: Tensor) -> list[int]:
            if node.option is not None and not ends:
                raise Unavailable("model_unavailable", "an option is the beginning of another, and nothing tells them apart")
            self._scores[tuple(node.path)] = torch.stack(
                [logits[ends].logsumexp(0) if way == grammar.END else logits[way] for way in node.ways]
            )
            return []

        return settle

    def answer(self) -> Choice:
        probabilities = [0.0] * len(self._request.options)
        self._share(self._trie, 1.0, probabilities)
        node = self._trie
        while True:
            ways = node.ways
            way = ways[self._draw.pick(self._scores[tuple(node.path)]) if len(ways) > 1 else 0]
            if way == grammar.END:
                break
            node = node.children[way]
        assert node.option is not None
        return Choice(node.option, probabilities)

    def _share(self, node: grammar.Trie, mass: float, into: list[float]) -> None:
        """Spread `mass` over the options below `node` by what the model thinks of each way on."""
        ways = node.ways
        shares = self._scores[tuple(node.path)].softmax(0).tolist() if len(ways) > 1 else [1.0]
        for way, share in zip(ways, shares, strict=True):
            if way == grammar.END:
                assert node.option is not None
                into[node.option] = mass * share
            else:
                self._share(node.children[way], mass * share, into)
