"""The network in torch: the teacher (six layers of all-MiniLM-L6-v2) and the student (some of them) are one class.

Post-LN BERT (Devlin et al. 2018) with mean pooling (Reimers and Gurevych 2019). Shapes: n texts, t tokens, w = 384.
`hubpeer/encoder/network.py` is the same in numpy; a test holds the two together.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn

from hubpeer.encoder.network import TAGS, WINDOW, Shape, packed, quantized, unpacked

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
EPSILON = 1e-12


class Layer(nn.Module):
    """Attention, then a two-layer net; after each, what came in is added and the sum normalised."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv, self.out = nn.Linear(shape.width, 3 * shape.width), nn.Linear(shape.width, shape.width)
        self.up, self.down = nn.Linear(shape.width, shape.inner), nn.Linear(shape.inner, shape.width)
        self.norm1, self.norm2 = nn.LayerNorm(shape.width, EPSILON), nn.LayerNorm(shape.width, EPSILON)

    def forward(self, x: torch.Tensor, hide: torch.Tensor) -> torch.Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)).float() * (width // self.heads) ** -0.5 + hide
        mixed = (torch.softmax(scores, -1).to(v.dtype) @ v).transpose(1, 2).reshape(n, length, width)
        x = self.norm1(x + self.out(mixed))
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))


class Tagger(nn.Module):
    """Logits (t, 1 + tags) of a text's states: linear, plus what a hidden layer makes of a state, the one before it and the
    mean of its text. Begins as the linear part alone."""

    def __init__(self, width: int, inner: int = 96) -> None:
        super().__init__()
        self.plain = nn.Linear(width, 1 + len(TAGS))
        self.now = nn.Linear(width, inner)
        self.before, self.text = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.out = nn.Linear(inner, 1 + len(TAGS), bias=False)
        self.drop = nn.Dropout(0.2)
        nn.init.zeros_(self.out.weight)

    def forward(self, states: torch.Tensor, cuts: Sequence[int]) -> torch.Tensor:
        lengths = torch.tensor([b - a for a, b in pairwise(cuts)])
        texts = torch.stack([states[a:b].mean(0) for a, b in pairwise(cuts)])
        before = nn.functional.pad(self.before(states)[:-1], (0, 0, 1, 0))
        inner = self.now(states) + before + self.text(texts).repeat_interleave(lengths, 0)
        found: torch.Tensor = self.plain(states) + self.out(self.drop(nn.functional.gelu(inner)))
        return found


class Bert(nn.Module):
    """Token ids, with [CLS] and [SEP], to states, vectors and tags."""

    def __init__(self, shape: Shape, vocabulary: int) -> None:
        super().__init__()
        self.shape = shape
        self.words = nn.Embedding(vocabulary, shape.width)
        self.positions = nn.Parameter(torch.zeros(WINDOW + 2, shape.width))
        self.norm = nn.LayerNorm(shape.width, EPSILON)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.tags = Tagger(shape.width)

    def states(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, list[int]]:
        """States (all tokens, w) of texts, one behind the other, and where each text begins (and the last ends).

        Texts are packed into blocks of one shape, each token seeing its own text alone: a new shape would cost the compilation
        of a dozen kernels, more than the block itself.
        """
        found: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        for block in blocks([len(row) for row in rows]):
            ids, places, texts = (torch.zeros(BLOCK, dtype=torch.long) for _ in range(3))
            for n, line, at in block:
                row = torch.tensor(rows[n])
                ids[line, at : at + len(row)] = row
                places[line, at : at + len(row)] = torch.arange(len(row))
                texts[line, at : at + len(row)] = n + 1
            hide = torch.where(texts[:, None, :, None] == texts[:, None, None, :], 0.0, -1e4)
            with torch.autocast("cpu", torch.bfloat16):
                x = self.norm(nn.functional.embedding(ids, self.words.weight) + self.positions[places])
                for layer in self.layers:
                    x = layer(x, hide)
            for n, line, at in block:
                found[n] = x[line, at : at + len(rows[n])]
        return torch.cat(found).float(), [0, *accumulate(map(len, rows))]

    def forward(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Unit vectors (n, w)."""
        states, cuts = self.states(rows)
        return means(states, list(pairwise(cuts)))

    @torch.no_grad()
    def encode(self, texts: Sequence[str], tokenizer: Tokenizer, some: int = 512) -> torch.Tensor:
        """Unit vectors of many texts."""
        rows = rows_of(texts, tokenizer)
        order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
        found = torch.zeros(len(rows), self.shape.width)
        for start in range(0, len(rows), some):
            chosen = order[start : start + some]
            found[chosen] = self([rows[n] for n in chosen])
        return found

    def student(self, keep: Sequence[int], rows: Sequence[int]) -> Bert:
        """A network of some of the layers and some rows of the word table, already as coarse as the runtime has them."""
        shape = Shape(self.shape.width, self.shape.heads, len(keep), self.shape.inner)
        found = Bert(shape, len(rows))
        found.words.weight.data = torch.from_numpy(unpacked(*packed(self.words.weight.data[list(rows)].numpy())))
        found.positions.data = self.positions.data.clone()
        found.norm.load_state_dict(self.norm.state_dict())
        found.layers = nn.ModuleList(copy.deepcopy(self.layers[n]) for n in keep)
        found.tags = copy.deepcopy(self.tags)
        return found

    def weights(self) -> dict[str, np.ndarray]:
        """As the runtime keeps them: words in four bits, matrices (in, out) as int8 with a scale per row, the rest as it is."""
        found: dict[str, np.ndarray] = {}

        def keep(name: str, matrix: torch.Tensor) -> None:
            found[name], found[f"{name}.scale"] = quantized(matrix.detach().float().numpy())

        def vector(name: str, value: torch.Tensor) -> None:
            found[name] = value.detach().float().numpy().copy()

        found["words"], found["words.scale"] = packed(self.words.weight.detach().numpy())
        keep("positions", self.positions)
        vector("norm.gain", self.norm.weight)
        vector("norm.bias", self.norm.bias)
        for number, layer in enumerate(self.layers):
            for part in ("qkv", "out", "up", "down"):
                keep(f"layers.{number}.{part}", getattr(layer, part).weight.T)
                vector(f"layers.{number}.{part}.bias", getattr(layer, part).bias)
            for part in ("norm1", "norm2"):
                vector(f"layers.{number}.{part}.gain", getattr(layer, part).weight)
                vector(f"layers.{number}.{part}.bias", getattr(layer, part).bias)
        for part in ("now", "before", "text"):
            keep(f"tags.{part}", getattr(self.tags, part).weight.T)
        vector("tags", self.tags.plain.weight.T)
        vector("tags.out", self.tags.out.weight.T)
        vector("tags.bias", self.tags.plain.bias)
        vector("tags.now.bias", self.tags.now.bias)
        return found


def average(networks: Sequence[Bert]) -> Bert:
    """One network in the middle of several that began as the same (model soups, Wortsman et al. 2022, arXiv 2203.05482)."""
    found = copy.deepcopy(networks[0])
    states = [network.state_dict() for network in networks]
    found.load_state_dict({name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]})
    return found


def means(states: torch.Tensor, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Means over stretches of states, of length one."""
    return nn.functional.normalize(torch.stack([states[a:b].mean(0) for a, b in spans]), dim=-1)


def teacher(folder: Path) -> Bert:
    """all-MiniLM-L6-v2, checked by hash. The one token-type row in use is added to the positions."""
    path = folder / "model.safetensors"
    if (digest := hashlib.sha256(path.read_bytes()).hexdigest()) != SHA256:
        raise SystemExit(f"{folder} is not the teacher we know: sha256 {digest}, expected {SHA256}")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    shape = Shape(
        config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"], config["intermediate_size"]
    )
    stored = load_file(path)
    found = Bert(shape, config["vocab_size"])
    found.words.weight.data = stored["embeddings.word_embeddings.weight"]
    kind = stored["embeddings.token_type_embeddings.weight"][0]
    found.positions.data = stored["embeddings.position_embeddings.weight"][: WINDOW + 2] + kind

    def load(into: nn.Linear | nn.LayerNorm, *names: str) -> None:
        into.weight.data = torch.cat([stored[f"{name}.weight"] for name in names])
        into.bias.data = torch.cat([stored[f"{name}.bias"] for name in names])

    load(found.norm, "embeddings.LayerNorm")
    for number, layer in enumerate(found.layers):
        at = f"encoder.layer.{number}"
        load(layer.qkv, *(f"{at}.attention.self.{name}" for name in ("query", "key", "value")))
        load(layer.out, f"{at}.attention.output.dense")
        load(layer.norm1, f"{at}.attention.output.LayerNorm")
        load(layer.up, f"{at}.intermediate.dense")
        load(layer.down, f"{at}.output.dense")
        load(layer.norm2, f"{at}.output.LayerNorm")
    return found


# ── tokens ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def open_tokenizer(path: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def pruned(tokenizer: Tokenizer, size: int, used: Sequence[str]) -> tuple[Tokenizer, list[int]]:
    """A tokenizer of `size` entries and which of the old ones they are: what our texts use, then by rank, Latin only.

    The vocabulary is in order of frequency; a word left out is read in pieces, of which every single letter stays.
    """
    state = json.loads(tokenizer.to_str())
    vocabulary = sorted(state["model"]["vocab"].items(), key=lambda item: item[1])
    special = {"[PAD]", "[UNK]", "[CLS]", "[SEP]"}
    ours = {n for e in tokenizer.encode_batch(list(used)) for n in e.ids}
    plain = [(word, n) for word, n in vocabulary if word in special or (word.isascii() and not word.startswith("["))]
    plain += [
        (word, n) for word, n in vocabulary if not word.isascii() and len(word.removeprefix("##")) == 1 and word < "\u2100"
    ]
    first = [n for word, n in plain if word in special or len(word.removeprefix("##")) == 1 or n in ours]
    kept = sorted({*first, *[n for _, n in plain if n not in set(first)][: max(0, size - len(set(first)))]})
    name = {n: word for word, n in vocabulary}
    state["model"]["vocab"] = {name[n]: number for number, n in enumerate(kept)}
    state["post_processor"] = state["truncation"] = state["padding"] = None
    state["added_tokens"] = [
        token | {"id": state["model"]["vocab"][token["content"]]}
        for token in state["added_tokens"]
        if token["content"] in state["model"]["vocab"]
    ]
    return Tokenizer.from_str(json.dumps(state)), kept


def rows_of(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids with [CLS] and [SEP], cut to what the network reads at once."""
    begin, end = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    return [[begin, *e.ids[:WINDOW], end] for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


#: Lines and tokens of a block.
BLOCK = (4, 160)


def blocks(lengths: Sequence[int]) -> list[list[tuple[int, int, int]]]:
    """Where each text goes, as (text, line, first token), block by block; the longest first, into the first gap."""
    lines: list[tuple[int, list[tuple[int, int]]]] = []
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        for number, (used, held) in enumerate(lines):
            if used + lengths[n] <= BLOCK[1]:
                lines[number] = (used + lengths[n], [*held, (n, used)])
                break
        else:
            lines.append((lengths[n], [(n, 0)]))
    return [
        [(n, line, at) for line, (_, held) in enumerate(lines[start : start + BLOCK[0]]) for n, at in held]
        for start in range(0, len(lines), BLOCK[0])
    ]
