"""The forward pass: tokens in, keys and values kept, logits out. No scheduling, no text.

Tokens of several rows go through the matrices together, one line per token. What a row has read lies in `Node`s, stretches of
one large buffer that form a tree: rows that begin alike share the nodes they have in common, and nothing is ever copied.
Comments beside tensors give their shapes: T tokens in this pass, H query heads, K key heads, G = H / K, D head width.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
from collections.abc import Sequence
from typing import Final

import msgspec
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  its usual name

from hubpeer.model.load import Weights, rope_frequencies

#: Nodes take whole units of this many tokens, so that attention sees few different lengths: each has kernels of its own.
UNIT: Final = 16
#: Rows that feed at most this many tokens are attended to together; longer ones one by one.
SHORT: Final = 16


def units(tokens: int) -> int:
    """`tokens` rounded up to whole units."""
    return -(-tokens // UNIT) * UNIT


class Node:
    """A stretch of tokens that has been read: `used` tokens from `first` in the buffer, behind `seen` tokens of `parent`."""

    __slots__ = ("capacity", "first", "number", "parent", "position", "seen", "used")
    position: int
    _numbers = itertools.count()

    def __init__(self, first: int, capacity: int, parent: Node | None = None, seen: int | None = None) -> None:
        self.first, self.capacity, self.used = first, capacity, 0
        self.parent = parent
        self.seen = seen if seen is not None else parent.used if parent else 0
        self.position = parent.position + self.seen if parent else 0  # of the first token, counted from the root
        self.number = next(self._numbers)

    @property
    def end(self) -> int:
        return self.position + self.used

    def path(self) -> list[tuple[Node, int]]:
        """The nodes from the root to this one, each with how many of its tokens this one sees."""
        steps = [(self, self.used)]
        node = self
        while node.parent is not None:
            steps.append((node.parent, node.seen))
            node = node.parent
        return steps[::-1]


class Feed(msgspec.Struct, frozen=True):
    """One row of a pass: tokens that go behind what `node` holds. `wants`: its last token's logits are asked for."""

    node: Node
    tokens: list[int]
    wants: bool


class Memory:
    """Keys and values of everything that is read, reserved once."""

    def __init__(self, weights: Weights, tokens: int) -> None:
        shape = weights.shape
        dtype = torch.float32 if weights.kind == "fp32" else torch.bfloat16
        size = (shape.layers, shape.kv_heads, units(tokens), shape.head_dim)
        self.k, self.v = _pages(size, dtype), _pages(size, dtype)
        self.tokens = size[2]

    @property
    def nbytes(self) -> int:
        return int(self.k.nbytes + self.v.nbytes)


def _pages(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in pages that take no memory before something is written to them: resident is what was ever used at once.

    Zeros, not garbage: lengths are rounded up to whole units, and 0 * NaN is NaN. No huge pages: one would hold 16,384 tokens
    of one head, and be filled by the first.
    """
    # Private: of a shared mapping reading takes pages, too, and attention reads whole units.
    pages = mmap.mmap(-1, math.prod(size) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # Linux
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(size)


class Forward:
    """The model as a function over `Memory`."""

    def __init__(self, weights: Weights, memory: Memory) -> None:
        self.weights, self.memory = weights, memory
        self._frequencies = rope_frequencies(weights.shape)

    def run(self, feeds: Sequence[Feed]) -> Tensor:
        """Read every feed into its node. Returns the logits of those that want them, in order: [wanting, vocab] fp32."""
        shape, memory = self.weights.shape, self.memory
        # Short rows first, those with a common path side by side: then each shared node is one slice of the rows.
        order = sorted(range(len(feeds)), key=lambda i: self._place(feeds[i]))
        ids: list[int] = []
        positions: list[int] = []
        where: list[int] = []
        last: dict[int, int] = {}
        for i in order:
            feed = feeds[i]
            node, count = feed.node, len(feed.tokens)
            assert 0 < count <= node.capacity - node.used, "a node is given more than it was made for"
            ids += feed.tokens
            positions += range(node.end, node.end + count)
            where += range(node.first + node.used, node.first + node.used + count)
            node.used += count
            last[i] = len(ids) - 1
        x = self.weights.embed(ids)  # [T, hidden] fp32; the stream between the layers stays fp32
        at = torch.tensor(where)
        angles = torch.tensor(positions, dtype=torch.float32)[:, None] * self._frequencies  # [T, D/2]
        cos, sin = angles.cos()[:, None, :], angles.sin()[:, None, :]  # [T, 1, D/2]
        attend = _Attention([feeds[i] for i in order], shape.heads // shape.kv_heads, memory.k.dtype)
        query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        for i, layer in enumerate(self.weights.layers):
            qkv = layer.qkv(_norm(x, layer.norm1, shape.eps))  # [T, (H + 2K) * D]
            turned = _rope(qkv[:, : query + key].view(len(ids), -1, shape.head_dim), cos, sin).to(
                memory.k.dtype
            )  # [T, H + K, D]
            value = qkv[:, query + key :].view(len(ids), shape.kv_heads, shape.head_dim).to(memory.v.dtype)
            memory.k[i].index_copy_(1, at, turned[:, shape.heads :].transpose(0, 1))
            memory.v[i].index_copy_(1, at, value.transpose(0, 1))
            mixed = attend(turned[:, : shape.heads], memory.k[i], memory.v[i])  # [T, H * D]
            x += layer.out(mixed)
            gate_up = layer.gate_up(_norm(x, layer.norm2, shape.eps))  # [T, 2 * inner]
            gate, up = gate_up[:, : shape.inner], gate_up[:, shape.inner :]
            x += layer.down(F.silu(gate, inplace=True).mul_(up))  # in place: these are the largest tensors of a pass
        rows = [last[i] for i in range(len(feeds)) if feeds[i].wants]
        if not rows:
            return x.new_empty(0, shape.vocab)
        return self.weights.head(_norm(x[rows], self.weights.norm, shape.eps))

    @staticmethod
    def _place(feed: Feed) -> tuple[bool, list[tuple[int, int]]]:
        return len(feed.tokens) > SHORT, [(node.number, seen) for node, seen in feed.node.path()]


class _Together(msgspec.Struct, frozen=True):
    """Rows of a pass that are attended to at once: `rows` of the folded queries, the keys they may see, stretch by stretch, and
    an additive mask [rows, keys]."""

    rows: slice
    keys: list[slice]
    mask: Tensor


class _Attention:
    """Who sees what in one pass, worked out once and used by every layer.

    Short rows with a common root go together: the keys of all their nodes stand side by side, each node once, and the mask says
    which of them are on a row's own path. A long row goes alone.
    """

    def __init__(self, feeds: Sequence[Feed], group: int, dtype: torch.dtype) -> None:
        self._group, self._dtype = group, dtype
        self._parts: list[_Together] = []
        first = 0
        for _, some in itertools.groupby(feeds, self._company):
            together = list(some)
            self._parts.append(self._sees(together, first))
            first += sum(len(feed.tokens) for feed in together)

    @staticmethod
    def _company(feed: Feed) -> tuple[bool, int]:
        node = feed.node
        if len(feed.tokens) > SHORT:
            return True, node.number
        while node.parent is not None:
            node = node.parent
        return False, node.number

    def _sees(self, feeds: Sequence[Feed], first: int) -> _Together:
        sizes: dict[Node, int] = {}
        for feed in feeds:
            for node, seen in feed.node.path():
                sizes[node] = max(sizes.get(node, 0), min(units(seen), node.capacity))
        columns = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))
        hidden = torch.ones(sum(len(feed.tokens) for feed in feeds), sum(sizes.values()), dtype=torch.bool)
        row = 0
        for feed in feeds:
            count = len(feed.tokens)
            for node, seen in feed.node.path():
                of_node = hidden[row : row + count, columns[node] : columns[node] + seen]
                if node is feed.node:  # its own new tokens see each other in order
                    of_node.copy_(torch.ones_like(of_node).triu_(seen - count + 1))
                else:
                    of_node.zero_()
            row += count
        mask = torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, float("-inf"))
        keys = [slice(node.first, node.first + size) for node, size in sizes.items()]
        rows = slice(first * self._group, (first + row) * self._group)
        return _Together(rows, keys, mask.repeat_interleave(self._group, 0))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, H, D], k and v [K, buffer, D] -> [T, H * D] fp32."""
        tokens, heads, width = q.shape
        kv = k.shape[0]
        folded = q.view(tokens, kv, self._group, width).transpose(0, 1).reshape(kv, tokens * self._group, width)
        out = torch.empty_like(folded)  # [K, T * G, D]
        for part in self._parts:
            keys, values = (
                kept[:, part.keys[0]] if len(part.keys) == 1 else torch.cat([kept[:, keys] for keys in part.keys], 1)
                for kept in (k, v)
            )
            out[:, part.rows] = F.scaled_dot_product_attention(
                folded[None, :, part.rows], keys[None], values[None], attn_mask=part.mask
            )[0]
        return out.view(kv, tokens, self._group, width).transpose(0, 1).reshape(tokens, heads * width).float()


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn [T, heads, D]: the first half of each head against the second, as transformers does."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
