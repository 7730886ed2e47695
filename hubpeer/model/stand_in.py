"""A Llama of any shape with random weights and a tokenizer of its own, as files in the Hugging Face layout.

Stands in for real weights where only speed, memory and correctness matter: in the tests (tiny) and in the benchmarks (the
exact shape of Llama-3.2-1B). Real files on disk, read by the same loading code as any other model.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIALS: Final = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

#: Llama-3.2-1B-Instruct's config.json, as far as it matters.
ONE_B: Final[dict[str, Any]] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
}
TINY: Final[dict[str, Any]] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 1024,
    "max_position_embeddings": 16_384,
}
_COMMON: Final[dict[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "bfloat16",
}
_WORDS: Final = (
    "the of and to in for is a plan agent task budget campaign marketing sales finance board strategy customer revenue cost "
    "pipeline deal quota forecast risk analysis report invoice contract policy question answer data needed first then after "
    "before quarter year market product price growth margin channel review compare estimate check decide priority document "
    "category summary sensitivity public internal confidential client email meeting holiday allocation return investment"
).split()


def make(folder: Path, config: dict[str, Any] | None = None, seed: int = 0, spread: float = 0.02) -> Path:
    """Write the model into `folder` (made where missing). `spread` is the weights' standard deviation."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = _COMMON | (TINY if config is None else config)
    tokenizer = make_tokenizer(shape["vocab_size"], seed)
    tokenizer.save(str(folder / "tokenizer.json"))
    stop = [tokenizer.token_to_id("<|end_of_text|>"), tokenizer.token_to_id("<|eot_id|>")]
    shape |= {"bos_token_id": tokenizer.token_to_id("<|begin_of_text|>"), "eos_token_id": stop}
    (folder / "config.json").write_text(json.dumps(shape, indent=1), "utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}), "utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIALS[0], "eos_token": SPECIALS[4]}), "utf-8"
    )
    _write_weights(folder / "model.safetensors", shape, seed, spread)
    return folder


def make_tokenizer(vocab: int, seed: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab` entries: trained merges, then random ones, then Llama 3's special tokens."""
    rng = random.Random(seed)  # noqa: S311  not secrecy
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = [" ".join(rng.choices(_WORDS, k=12)) + "." for _ in range(400)]
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab - len(SPECIALS), 1500),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    model = json.loads(tokenizer.to_str())
    entries, merges = model["model"]["vocab"], model["model"]["merges"]
    parts = list(entries)
    while len(entries) < vocab - len(SPECIALS):
        # As in a real vocabulary, every entry is merged from two others, and every mask covers it; few occur in any text.
        left, right = rng.choice(parts), rng.choice(parts)
        if len(left + right) <= 20 and left + right not in entries:
            entries[left + right] = len(entries)
            merges.append([left, right])
            parts.append(left + right)
    tokenizer = Tokenizer.from_str(json.dumps(model))
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def _tensors(shape: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, width = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    queries, keys = shape["num_attention_heads"] * width, shape["num_key_value_heads"] * width
    yield "model.embed_tokens.weight", (shape["vocab_size"], hidden)
    for i in range(shape["num_hidden_layers"]):
        p = f"model.layers.{i}."
        yield p + "input_layernorm.weight", (hidden,)
        yield p + "self_attn.q_proj.weight", (queries, hidden)
        yield p + "self_attn.k_proj.weight", (keys, hidden)
        yield p + "self_attn.v_proj.weight", (keys, hidden)
        yield p + "self_attn.o_proj.weight", (hidden, queries)
        yield p + "post_attention_layernorm.weight", (hidden,)
        yield p + "mlp.gate_proj.weight", (inner, hidden)
        yield p + "mlp.up_proj.weight", (inner, hidden)
        yield p + "mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not shape["tie_word_embeddings"]:
        yield "lm_head.weight", (shape["vocab_size"], hidden)


def _write_weights(path: Path, shape: dict[str, Any], seed: int, spread: float) -> None:
    header: dict[str, Any] = {}
    at = 0
    for name, size in _tensors(shape):
        nbytes = 2 * torch.Size(size).numel()
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [at, at + nbytes]}
        at += nbytes
    header["__metadata__"] = {"format": "pt"}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    generator = torch.Generator().manual_seed(seed)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for _, size in _tensors(shape):
            for start in range(0, size[0], 4096):
                block = torch.randn(min(4096, size[0] - start), *size[1:], generator=generator) * spread
                if len(size) == 1:
                    block += 1
                file.write(block.bfloat16().view(torch.uint8).numpy().data)
