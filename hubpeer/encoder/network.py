"""The network: texts in, unit vectors and tags out. The only importer of numpy and tokenizers in this package.

    token ids -> word table and positions -> `Shape.layers` post-LN BERT layers -> states, one per token
    states -> mean over a text or a clause of it -> unit vector
          `-> tagger -> how likely a clause begins here, and what the token's clause does

Post-LN BERT after Devlin et al. 2018 (arXiv 1810.04805), mean pooling after Reimers and Gurevych 2019 (arXiv 1908.10084).
Matrices are stored as int8 with one scale per row and become float32 at load. The word table is stored in four bits; of it
only the rows a text needs are ever unpacked. Texts are packed one behind the other, so nothing is spent on padding.
`training/bert.py` is the same network in torch; a test holds the two together.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from msgspec import Struct
from tokenizers import Tokenizer

from hubpeer.wire import Card

Floats: TypeAlias = npt.NDArray[np.float32]

#: What the tagger says of a token: glue between clauses, a request (and when it can start), or a statement of who decides.
TAGS: Final = ("none", "first", "second", "third", "finance_priority", "consensus_required", "ceo_decides")
LEVELS: Final = TAGS[1:4]
RULES: Final = TAGS[4:]
#: Longest text the network reads at once, in tokens.
WINDOW: Final = 128


class Shape(Struct, frozen=True, forbid_unknown_fields=True):
    """How large the network is."""

    width: int = 384
    heads: int = 12
    layers: int = 6
    inner: int = 1536


class Tagged(NamedTuple):
    """A text's n tokens: where each stands, how likely a clause begins there, its logits over `TAGS`, its state (n, width)."""

    offsets: list[tuple[int, int]]
    boundary: Floats
    tags: Floats
    states: Floats


def card_words(card: Card) -> list[str]:
    """Its capabilities and specialties, as one would say them."""
    return [name.replace("_", " ") for name in [*card.capabilities, *card.specialties]]


def card_text(card: Card) -> str:
    """What of a card is compared with a question. Its agent's name is not: it may be anything."""
    words = ", ".join(card_words(card))
    return f"{words}. {card.description}" if card.description else words


class Network:
    """Weights and tokenizer, ready to read. Holds no state between calls, so threads may share it."""

    def __init__(self, shape: Shape, weights: dict[str, npt.NDArray[Any]], tokenizer: Tokenizer) -> None:
        self.shape = shape
        self._words = weights["words"]
        self._word_scale = weights["words.scale"]
        self._dense = {
            name: _widened(name, weights)
            for name in weights
            if name not in ("words", "categories", "sensitivities") and not name.endswith(".scale")
        }
        self._tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._begin, self._end = (tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))

    def encode(self, texts: Sequence[str]) -> Floats:
        """One unit vector per text, from its first `WINDOW` tokens. A text without tokens gets zeros."""
        found = np.zeros((len(texts), self.shape.width), np.float32)
        ids = [e.ids[:WINDOW] for e in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        full = [n for n, one in enumerate(ids) if one]
        if full:
            states, cuts = self._states([ids[n] for n in full])
            for n, start, end in zip(full, cuts, cuts[1:], strict=False):
                found[n] = unit(states[start:end].mean(0))
        return found

    def read(self, text: str) -> tuple[list[Tagged], Floats]:
        """The tokens of a text, window by window, with offsets in characters; and its vector, as `encode` gives it."""
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        windows = [slice(n, n + WINDOW) for n in range(0, len(encoded.ids), WINDOW)]
        if not windows:
            return [], np.zeros(self.shape.width, np.float32)
        states, cuts = self._states([encoded.ids[window] for window in windows])
        logits = self._tags(states, cuts)
        tagged = []
        for window, (start, end) in zip(windows, itertools.pairwise(cuts), strict=True):
            inside = slice(start + 1, end - 1)  # without [CLS] and [SEP]
            tagged.append(Tagged(encoded.offsets[window], _sigmoid(logits[inside, 0]), logits[inside, 1:], states[inside]))
        return tagged, unit(states[: cuts[1]].mean(0))

    def _states(self, ids: Sequence[Sequence[int]]) -> tuple[Floats, list[int]]:
        """States of all tokens with [CLS] and [SEP], one text behind the other, and where each begins (and the last ends)."""
        cuts = [0, *np.cumsum([len(one) + 2 for one in ids]).tolist()]
        flat = np.array([token for one in ids for token in (self._begin, *one, self._end)])
        x = unpacked(self._words[flat], self._word_scale[flat])
        x += np.concatenate([self._dense["positions"][: len(one) + 2] for one in ids])
        self._norm("norm", x)
        for number in range(self.shape.layers):
            self._layer(f"layers.{number}", x, cuts)
        return x, cuts

    def _tags(self, states: Floats, cuts: list[int]) -> Floats:
        """Logits (tokens, 1 + tags): linear in the state, plus what a hidden layer makes of it, of the state before it and of
        the mean of its text."""
        dense = self._dense
        lengths = np.diff(cuts)
        texts = np.add.reduceat(states, cuts[:-1]) / lengths[:, None].astype(np.float32)
        inner = self._linear("tags.now", states)
        inner[1:] += (states @ dense["tags.before"])[:-1]  # only [CLS], which has no tag, gets that of another text
        inner += np.repeat(texts @ dense["tags.text"], lengths, 0)
        found: Floats = states @ dense["tags"] + gelu(inner) @ dense["tags.out"] + dense["tags.bias"]
        return found

    def _layer(self, name: str, x: Floats, cuts: list[int]) -> None:
        """Attention within each text, then a two-layer net; after each the sum with what came in is normalised. In place."""
        heads, size = self.shape.heads, self.shape.width // self.shape.heads
        mixed = np.empty_like(x)
        qkv = self._linear(f"{name}.qkv", x)
        for start, end in itertools.pairwise(cuts):
            q, k, v = qkv[start:end].reshape(-1, 3, heads, size).transpose(1, 2, 0, 3)
            scores = q @ k.transpose(0, 2, 1)
            scores *= np.float32(size**-0.5)
            scores -= scores.max(-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(-1, keepdims=True)
            mixed[start:end] = (scores @ v).transpose(1, 0, 2).reshape(end - start, -1)
        x += self._linear(f"{name}.out", mixed)
        self._norm(f"{name}.norm1", x)
        x += self._linear(f"{name}.down", gelu(self._linear(f"{name}.up", x)))
        self._norm(f"{name}.norm2", x)

    def _linear(self, name: str, x: Floats) -> Floats:
        found: Floats = x @ self._dense[name]
        found += self._dense[f"{name}.bias"]
        return found

    def _norm(self, name: str, x: Floats) -> None:
        """LayerNorm (Ba et al. 2016), in place."""
        x -= x.mean(-1, keepdims=True)
        x /= np.sqrt(np.einsum("nd,nd->n", x, x)[:, None] / np.float32(x.shape[1]) + np.float32(1e-12))
        x *= self._dense[f"{name}.gain"]
        x += self._dense[f"{name}.bias"]


def gelu(x: Floats) -> Floats:
    """x times the normal distribution's integral up to x (Hendrycks and Gimpel 2016), by tanh, to within 5e-4."""
    inner = x * x
    inner *= np.float32(0.044715 * math.sqrt(2 / math.pi))
    inner += np.float32(math.sqrt(2 / math.pi))
    inner *= x
    np.tanh(inner, out=inner)
    inner += np.float32(1)
    inner *= x
    inner *= np.float32(0.5)
    return inner


def unit(x: Floats) -> Floats:
    """Scaled to length one."""
    scaled: Floats = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.float32(1e-9))
    return scaled


def _sigmoid(x: Floats) -> Floats:
    return np.float32(1) / (np.float32(1) + np.exp(-x))


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def quantized(matrix: Floats) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """A matrix as int8 and one scale per row."""
    scale = (np.abs(matrix).max(1) / 127 + 1e-8).astype(np.float16)
    return np.clip(np.rint(matrix / scale.astype(np.float32)[:, None]), -127, 127).astype(np.int8), scale


#: Numbers of a word's vector that share a scale.
GROUP: Final = 32


def packed(matrix: Floats) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16]]:
    """A matrix (rows, width) in four bits, -7 to 7, two numbers a byte (column n with column n + width / 2), and the scales of
    `GROUP` columns each, those with the least squared error. What was unpacked before is packed without loss."""
    rows, width = matrix.shape
    groups = matrix.reshape(rows, -1, GROUP)
    top = np.abs(groups).max(-1) / 7 + 1e-8
    best, scale = np.full(top.shape, np.inf, np.float32), np.zeros(top.shape, np.float16)
    for part in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7):
        tried = (part * top).astype(np.float16)
        wide = tried.astype(np.float32)[..., None]
        error = np.square(np.clip(np.rint(groups / wide), -7, 7) * wide - groups).sum(-1)
        scale = np.where(error < best, tried, scale)
        best = np.minimum(error, best)
    whole = np.clip(np.rint(groups / scale.astype(np.float32)[..., None]), -7, 7).astype(np.int8).reshape(rows, width)
    nibbles = (whole + 8).astype(np.uint8)
    return nibbles[:, : width // 2] | nibbles[:, width // 2 :] << 4, scale


def unpacked(pairs: npt.NDArray[np.uint8], scale: npt.NDArray[np.float16]) -> Floats:
    """Rows of a matrix that `packed` made smaller."""
    whole = np.concatenate([pairs & 15, pairs >> 4], -1).astype(np.float32) - np.float32(8)
    return whole * np.repeat(scale.astype(np.float32), GROUP, -1)


def _widened(name: str, weights: dict[str, npt.NDArray[Any]]) -> Floats:
    value = weights[name].astype(np.float32)
    scale = weights.get(f"{name}.scale")
    return value if scale is None else value * scale.astype(np.float32)[:, None]


_DTYPES: Final = {"I8": np.int8, "U8": np.uint8, "F16": np.float16, "F32": np.float32}


def read_weights(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Tensors of a safetensors file, mapped, not copied: 8 bytes of length, a JSON header, the data."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    size = int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8 : 8 + size])
    return {
        name: np.frombuffer(
            mapped, _DTYPES[about["dtype"]], int(np.prod(about["shape"])), 8 + size + about["data_offsets"][0]
        ).reshape(about["shape"])
        for name, about in header.items()
        if name != "__metadata__"
    }


def write_weights(path: Path, weights: dict[str, npt.NDArray[Any]]) -> None:
    """The same kind of file, written. The widest numbers come first, so that every tensor is aligned without gaps."""
    labels = {np.dtype(kind): label for label, kind in _DTYPES.items()}
    header, blobs, at = {}, [], 0
    for name, value in sorted(weights.items(), key=lambda item: -item[1].itemsize):
        raw = np.ascontiguousarray(value).tobytes()
        header[name] = {"dtype": labels[value.dtype], "shape": list(value.shape), "data_offsets": [at, at + len(raw)]}
        blobs.append(raw)
        at += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    fresh = path.with_suffix(".part")  # whoever has the old file mapped keeps it
    fresh.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
    fresh.replace(path)
