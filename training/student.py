"""The student: `hubpeer.encoder.network` in torch, and how it is trained.

Three lessons at once, on one trunk:
1. distillation: the vector of a text is to be the (tuned) teacher's, and texts are to be as alike as the teacher finds them;
2. labels: a phrasing is nearest to its own function's card among the cards of a batch;
3. tags: where a composed question's clauses begin, which can start when, who decides.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F  # noqa: N812

from hubpeer.encoder.network import TAGS, WINDOW, Shape, card_text, quantized
from training.data import Asked, Composer, Function, by_trade, draw

log = logging.getLogger("training.student")


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        return x * (self.gain * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5))


class Layer(nn.Module):
    """What it adds starts at zero: the untrained network is the mean of its words."""

    def __init__(self, shape: Shape, inner: int) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm1, self.norm2 = Norm(shape.width), Norm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.up = nn.Linear(shape.width, inner)
        self.down = nn.Linear(inner, shape.width, bias=False)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor, hide: torch.Tensor) -> torch.Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5 + hide
        mixed = (torch.softmax(scores.float(), -1).to(v.dtype) @ v).transpose(1, 2).reshape(n, length, width)
        x = x + self.out(mixed)
        return x + self.down(F.relu(self.up(self.norm2(x))))


class Student(nn.Module):
    def __init__(self, shape: Shape, words: np.ndarray) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("words", torch.from_numpy(words))
        self.positions = nn.Parameter(torch.zeros(WINDOW, shape.width), requires_grad=shape.layers > 0)
        self.layers = nn.ModuleList(Layer(shape, shape.inner) for _ in range(shape.layers))
        self.project = nn.Linear(shape.width, shape.width, bias=False)
        nn.init.eye_(self.project.weight)
        self.tagger_norm0 = Norm(shape.width)
        self.tagger_mix = nn.Linear(5 * shape.width, shape.width, bias=False)
        self.tagger_positions = nn.Parameter(torch.randn(WINDOW, shape.width) * 0.1)
        self.tagger = Layer(shape, shape.inner // 2)
        self.tagger_norm = Norm(shape.width)
        self.tagger_heads = nn.Linear(shape.width, 1 + len(TAGS))

    def trunk(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.words[ids] + self.positions[: ids.shape[1]]
        hide = torch.where(mask, 0.0, -1e4)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, hide)
        return x, hide

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x, _ = self.trunk(ids, mask)
        weights = mask[..., None].float()
        return F.normalize(self.project((x * weights).sum(1) / weights.sum(1)).float(), dim=-1)

    def tag(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x, hide = self.trunk(ids, mask)
        x = F.pad(self.tagger_norm0(x) * mask[..., None], (0, 0, 2, 2))
        x = self.tagger_mix(torch.cat([x[:, n : n + ids.shape[1]] for n in range(5)], -1)).float()
        x = x + self.tagger_positions[: ids.shape[1]]
        return self.tagger_heads(self.tagger_norm(self.tagger(x, hide))).float()

    def weights(self) -> dict[str, np.ndarray]:
        """As the runtime keeps them: matrices (in, out) as int8 with a scale per row, the rest as it is."""
        found: dict[str, np.ndarray] = {}

        def keep(name: str, matrix: torch.Tensor) -> None:
            found[name], found[f"{name}.scale"] = quantized(matrix.detach().float().numpy())

        keep("words", self.words)
        keep("positions", self.positions)
        keep("project", self.project.weight.T)
        for name, layer in [*((f"layers.{n}", one) for n, one in enumerate(self.layers)), ("tagger", self.tagger)]:
            for part in ("qkv", "out", "up", "down"):
                keep(f"{name}.{part}", getattr(layer, part).weight.T)
            found[f"{name}.norm1"] = layer.norm1.gain.detach().numpy()
            found[f"{name}.norm2"] = layer.norm2.gain.detach().numpy()
            found[f"{name}.up_bias"] = layer.up.bias.detach().numpy()
        keep("tagger.mix", self.tagger_mix.weight.T)
        keep("tagger.positions", self.tagger_positions)
        found["tagger.norm0"] = self.tagger_norm0.gain.detach().numpy()
        found["tagger.norm"] = self.tagger_norm.gain.detach().numpy()
        found["tagger.heads"] = np.ascontiguousarray(self.tagger_heads.weight.detach().numpy().T)
        found["tagger.bias"] = self.tagger_heads.bias.detach().numpy()
        return found


# ── batches ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(1, *map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[n, : max(1, len(row))] = True
    return ids, mask


def tag_targets(asked: Sequence[Asked], tokenizer: Tokenizer) -> tuple[list[list[int]], torch.Tensor]:
    """Token ids, and per token whether a span begins there and its tag; -1 where there is no token."""
    encoded = tokenizer.encode_batch([one.text for one in asked], add_special_tokens=False)
    ids = [e.ids[:WINDOW] for e in encoded]
    targets = torch.full((len(ids), max(1, *map(len, ids)), 2), -1, dtype=torch.long)
    for n, (one, e) in enumerate(zip(asked, encoded, strict=True)):
        at, before = 0, -1
        for t, (start, _) in enumerate(e.offsets[:WINDOW]):
            while at < len(one.spans) - 1 and start >= one.spans[at].end:
                at += 1
            targets[n, t, 0] = int(at != before)
            targets[n, t, 1] = TAGS.index(one.spans[at].tag)
            before = at
    return ids, targets


class Texts:
    """Texts with the teacher's vectors, in batches of about one length."""

    def __init__(self, ids: Sequence[Sequence[int]], vectors: np.ndarray, rng: random.Random) -> None:
        self.ids, self.vectors, self.rng = ids, torch.from_numpy(vectors.astype(np.float32)), rng
        self._queue: list[list[int]] = []

    def batch(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not self._queue:
            order = sorted(range(len(self.ids)), key=lambda n: len(self.ids[n]) + 3 * self.rng.random())
            row: list[int] = []
            for n in order:
                if row and (len(row) + 1) * max(4, len(self.ids[n])) > tokens:
                    self._queue.append(row)
                    row = []
                row.append(n)
            self._queue.append(row)
            self.rng.shuffle(self._queue)
        chosen = self._queue.pop()
        return *padded([self.ids[n] for n in chosen]), self.vectors[chosen]


def train(
    student: Student,
    texts: Texts,
    functions: Sequence[Function],
    tokenizer: Tokenizer,
    seconds: float,
    seed: int,
    checkpoint: Path,
    validate: Any = None,
) -> None:
    """Train for a time; continue from `checkpoint` where there is one, and leave the newest state there."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    learning = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-3, weight_decay=0.01, betas=(0.9, 0.98))
    used, step = 0.0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        used, step = state["used"], state["step"]
        rng.seed(seed + step)
        log.info("continuing at step %d after %.0f s", step, used)
    composer = Composer(functions, rng, held=False)
    trades = by_trade(functions)
    clock, saved, tokens = time.monotonic(), time.monotonic(), 0
    tokenized = lambda lines: [e.ids[:WINDOW] for e in tokenizer.encode_batch(lines, add_special_tokens=False)]  # noqa: E731
    while used < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1.0, (step + 1) / 40) * max(0.02, 1 - used / seconds)
        with torch.autocast("cpu", torch.bfloat16):
            loss = distilled = labeled = tagged = torch.zeros(())
            if student.layers:
                ids, mask, wanted = texts.batch(1024)
                got = student(ids, mask)
                distilled = (1 - (got * wanted).sum(-1)).mean() + 4 * F.mse_loss(got @ got.T, wanted @ wanted.T)
                tokens += ids.numel()
                loss = 10 * distilled
            if student.layers and step % 2 == 0:
                batch = draw(functions, trades, rng, 16)
                lines = [rng.choice(f.phrasings) for f in batch] + [card_text(f.card(rng)) for f in batch]
                ids, mask = padded(tokenized(lines))
                vectors = student(ids, mask)
                scores = vectors[: len(batch)] @ vectors[len(batch) :].T / 0.07
                labeled = F.cross_entropy(scores, torch.arange(len(batch)))
                loss = loss + 0.5 * labeled
                tokens += ids.numel()
            else:
                ids, targets = tag_targets([composer.ask() for _ in range(16)], tokenizer)
                got = student.tag(*padded(ids))
                real = targets[..., 0] >= 0
                tagged = F.binary_cross_entropy_with_logits(got[..., 0][real], targets[..., 0][real].float()) * 3
                tagged = tagged + F.cross_entropy(got[..., 1:][real], targets[..., 1][real])
                loss = loss + 0.7 * tagged
                tokens += targets.shape[0] * targets.shape[1]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        step += 1
        now = time.monotonic()
        # A paused process does not use up its time.
        used += min(now - clock, 20.0)
        clock = now
        if step % 50 < 2:
            figures = [float(one.detach()) for one in (distilled, labeled, tagged)]
            log.info("step %d, %.0f s, %d tokens: distilled %.4f labels %.3f tags %.3f", step, used, tokens, *figures)
        if now - saved > 240 or used >= seconds:
            saved = now
            torch.save(
                {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "used": used, "step": step}, checkpoint
            )
            if validate is not None:
                log.info("step %d, %.0f s: %s", step, used, validate())
