"""The teacher: all-MiniLM-L6-v2, checked by hash, tuned on our labels, then asked for the vectors the student is to reproduce.

Only its vectors leave this module; nothing of it is needed once the student is trained.
"""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from hubpeer.encoder.network import card_text
from training.data import Function, by_trade, draw

log = logging.getLogger("training.teacher")
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 128


class Teacher:
    """Texts in, unit vectors of 384 out."""

    def __init__(self, folder: Path) -> None:
        found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        if found != SHA256:
            raise SystemExit(f"{folder} is not the teacher we know: sha256 {found}, expected {SHA256}")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
        for parameter in [*self.model.embeddings.parameters(), *self.model.encoder.layer[:2].parameters()]:
            parameter.requires_grad = False

    def forward(self, texts: Sequence[str]) -> torch.Tensor:
        batch = self.tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][:, :, None].float()
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch: int = 64) -> np.ndarray:
        """Vectors of many texts, those of one length together. Logs how far it is."""
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
        found = np.empty((len(texts), 384), np.float32)
        began = time.monotonic()
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            found[chosen] = self.forward([texts[n] for n in chosen]).numpy()
            if start // batch % 100 == 0:
                log.info("encoded %d of %d texts in %.0f s", start, len(order), time.monotonic() - began)
        return found

    def tune(self, functions: Sequence[Function], seconds: float, seed: int) -> None:
        """Bring phrasings near their function's card and away from the other cards of the batch, within a time budget."""
        rng, torch_rng = random.Random(seed), torch.manual_seed(seed)
        del torch_rng
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=4e-5, weight_decay=0.01)
        trades = by_trade(functions)
        began, step = time.monotonic(), 0
        while (used := time.monotonic() - began) < seconds:
            for group in optimizer.param_groups:
                group["lr"] = 4e-5 * min(1.0, (step + 1) / 20) * max(0.05, 1 - used / seconds)
            batch = draw(functions, trades, rng, 40)
            texts = [rng.choice(f.phrasings) for f in batch] + [card_text(f.card(rng)) for f in batch]
            vectors = self.forward(texts)
            asked, cards = vectors[: len(batch)], vectors[len(batch) :]
            scores = asked @ cards.T / 0.05
            target = torch.arange(len(batch))
            loss = torch.nn.functional.cross_entropy(scores, target) + 0.5 * torch.nn.functional.cross_entropy(scores.T, target)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            step += 1
            if step % 20 == 0:
                log.info("tuning: step %d, %.0f s, loss %.3f", step, used, loss.item())
