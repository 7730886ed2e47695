"""The network: texts in, unit vectors and tags out. The only importer of numpy and tokenizers in this package.

    token ids -> word table -> trunk (`Shape.layers` transformer layers) -> mean over the text -> unit vector
                                                                    `-> tagger (one layer) -> boundary and tag of each token

Weights are stored as int8 with one scale per row and become float32 at load, all but the word table: of it only the rows a
text needs are ever unpacked. Texts are packed one behind the other, so nothing is spent on padding. `training/student.py`
is the same network in torch; a test holds the two together.
"""

from __future__ import annotations

import itertools
import json
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

    width: int = 256
    heads: int = 4
    layers: int = 2
    inner: int = 1024


class Tagged(NamedTuple):
    """A text's tokens: where each stands, how likely a clause begins there, and its logits over `TAGS`."""

    offsets: list[tuple[int, int]]
    boundary: Floats
    tags: Floats


def card_text(card: Card) -> str:
    """What of a card is compared with a question. Its agent's name is not: it may be anything."""
    words = ", ".join(name.replace("_", " ") for name in [*card.capabilities, *card.specialties])
    return f"{words}. {card.description}" if card.description else words


class Network:
    """Weights and tokenizer, ready to read. Holds no state between calls, so threads may share it."""

    def __init__(self, shape: Shape, weights: dict[str, npt.NDArray[Any]], tokenizer: Tokenizer) -> None:
        self.shape = shape
        self._words = weights["words"]
        self._word_scale = weights["words.scale"]
        self._dense = {
            name: _unpacked(name, weights)
            for name in weights
            if not name.startswith(("words", "examples")) and not name.endswith(".scale")
        }
        self._tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()

    def encode(self, texts: Sequence[str]) -> Floats:
        """One unit vector per text, from its first `WINDOW` tokens. A text without tokens gets zeros."""
        found = np.zeros((len(texts), self.shape.width), np.float32)
        ids = [e.ids[:WINDOW] for e in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        full = [n for n, one in enumerate(ids) if one]
        if full:
            states, cuts = self._trunk([ids[n] for n in full])
            for n, start, end in zip(full, cuts, cuts[1:], strict=False):
                found[n] = states[start:end].mean(0)
            found[full] = _unit(found[full] @ self._dense["project"])
        return found

    def read(self, text: str) -> tuple[list[Tagged], Floats]:
        """The tags of a text, window by window, with offsets in characters of `text`; and its vector, as `encode` gives it."""
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        windows = [slice(n, n + WINDOW) for n in range(0, len(encoded.ids), WINDOW)]
        if not windows:
            return [], np.zeros(self.shape.width, np.float32)
        states, cuts = self._trunk([encoded.ids[window] for window in windows])
        vector = _unit(states[: cuts[1]].mean(0) @ self._dense["project"])
        states = self._layer("tagger", self._beside(states, cuts), cuts)
        logits = _norm(states, self._dense["tagger.norm"]) @ self._dense["tagger.heads"] + self._dense["tagger.bias"]
        tagged = [
            Tagged(encoded.offsets[window], _sigmoid(logits[start:end, 0]), logits[start:end, 1:])
            for window, (start, end) in zip(windows, itertools.pairwise(cuts), strict=True)
        ]
        return tagged, vector

    def _trunk(self, ids: Sequence[Sequence[int]]) -> tuple[Floats, list[int]]:
        """States of all tokens, one text behind the other, and where each text begins (with the end of the last)."""
        cuts = [0, *np.cumsum([len(one) for one in ids]).tolist()]
        flat = np.fromiter((token for one in ids for token in one), np.int64, cuts[-1])
        states = self._words[flat].astype(np.float32) * self._word_scale[flat].astype(np.float32)[:, None]
        states += np.concatenate([self._dense["positions"][: len(one)] for one in ids])
        for number in range(self.shape.layers):
            states = self._layer(f"layers.{number}", states, cuts)
        return states, cuts

    def _beside(self, states: Floats, cuts: list[int]) -> Floats:
        """What the tagger starts from: every token with the two before and the two behind it, and its place."""
        normed = _norm(states, self._dense["tagger.norm0"])
        found = np.empty_like(states)
        for start, end in itertools.pairwise(cuts):
            wide = np.pad(normed[start:end], ((2, 2), (0, 0)))
            near = np.concatenate([wide[n : n + end - start] for n in range(5)], axis=1)
            found[start:end] = near @ self._dense["tagger.mix"] + self._dense["tagger.positions"][: end - start]
        return found

    def _layer(self, name: str, states: Floats, cuts: list[int]) -> Floats:
        """Attention, then a two-layer net, each added to what came in."""
        heads, dense = self.shape.heads, self._dense
        size = self.shape.width // heads
        mixed = np.empty_like(states)
        qkv = _norm(states, dense[f"{name}.norm1"]) @ dense[f"{name}.qkv"]
        for start, end in itertools.pairwise(cuts):
            q, k, v = qkv[start:end].reshape(-1, 3, heads, size).transpose(1, 2, 0, 3)
            scores = q @ k.transpose(0, 2, 1) * np.float32(size**-0.5)
            scores -= scores.max(-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(-1, keepdims=True)
            mixed[start:end] = (scores @ v).transpose(1, 0, 2).reshape(end - start, -1)
        states = states + mixed @ dense[f"{name}.out"]
        inner = _norm(states, dense[f"{name}.norm2"]) @ dense[f"{name}.up"] + dense[f"{name}.up_bias"]
        states += np.maximum(inner, 0, out=inner) @ dense[f"{name}.down"]
        return states


def _norm(x: Floats, gain: Floats) -> Floats:
    """Root-mean-square normalisation (Zhang and Sennrich 2019)."""
    scaled: Floats = x * (gain / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(1e-5)))
    return scaled


def _unit(x: Floats) -> Floats:
    scaled: Floats = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.float32(1e-9))
    return scaled


def _sigmoid(x: Floats) -> Floats:
    return np.float32(1) / (np.float32(1) + np.exp(-x))


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def quantized(matrix: Floats) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """A matrix as int8 and one scale per row."""
    scale = (np.abs(matrix).max(1) / 127 + 1e-8).astype(np.float16)
    return np.clip(np.rint(matrix / scale.astype(np.float32)[:, None]), -127, 127).astype(np.int8), scale


def _unpacked(name: str, weights: dict[str, npt.NDArray[Any]]) -> Floats:
    value = weights[name].astype(np.float32)
    scale = weights.get(f"{name}.scale")
    return value if scale is None else value * scale.astype(np.float32)[:, None]


_DTYPES: Final = {"I8": np.int8, "F16": np.float16, "F32": np.float32}


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
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
