"""llama.cpp beside us, where `llama-cpp-python` and `gguf` are installed: the same weights as a GGUF file, the same work.

The unchanged part of the prompt stays in its KV cache, as its users would have it. A plan is read through it token by token,
which is what sampling under a grammar does; the time of grammar and sampler is left out, in its favour.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch

from bench.clock import Clock

#: Tokens of a route: the part of the prompt that stays, the part that is new, the plan of two agents as JSON.
PREFIX, NEW, PLAN = 640, 60, 136
#: Of a plan's tokens, those that are measured; the others take as long.
MEASURED = 24


def write_gguf(folder: Path, path: Path, kind: str) -> None:
    """A Llama folder as GGUF, matrices as `kind` (the embedding as Q8_0). Tokens go in as numbers: no vocabulary is written."""
    import gguf
    from safetensors import safe_open

    shape = json.loads((folder / "config.json").read_text("utf-8"))
    heads, keys = shape["num_attention_heads"], shape["num_key_value_heads"]
    writer = gguf.GGUFWriter(path.with_suffix(".part"), "llama", use_temp_file=False)
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_rope_freq_base(shape["rope_theta"])
    writer.add_rope_dimension_count(shape["head_dim"])
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("none")
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  not a dict
            value = file.get_tensor(name).float().numpy()
            if name in whole:
                target = whole[name]
            else:
                _, _, layer, part = name.removesuffix(".weight").split(".", 3)
                target = f"blk.{layer}.{names[part]}.weight"
                if part in ("self_attn.q_proj", "self_attn.k_proj"):  # llama.cpp rotates neighbours, not halves
                    n = heads if part.startswith("self_attn.q") else keys
                    value = value.reshape(n, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            if value.ndim == 1:
                writer.add_tensor(target, value)
                continue
            quant = gguf.GGMLQuantizationType["Q8_0" if name in whole else kind]
            writer.add_tensor(target, gguf.quantize(value, quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".part").replace(path)


def measure(figures: dict[str, Any], clock: Clock, folder: Path, cache: Path, kind: str, document: tuple[int, int]) -> None:
    """The figures of one quantization; `document` is its prompt's and its answer's tokens."""
    try:
        import gguf  # noqa: F401
        from llama_cpp import Llama
    except ModuleNotFoundError as missing:
        figures["route_s"] = f"{missing.name} is not installed"
        return
    path = cache / f"{hashlib.blake2b(str(folder.resolve()).encode(), digest_size=6).hexdigest()}.{kind}.gguf"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        write_gguf(folder, path, kind)
    began = time.perf_counter()
    model = Llama(str(path), n_ctx=2304, n_threads=2, n_threads_batch=2, n_batch=512, verbose=False)
    figures["load_s"] = clock.since(began).given
    most = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"]
    ids = torch.randint(0, most, (sum(document),), generator=torch.Generator().manual_seed(0)).tolist()

    def read(start: int, count: int) -> float:
        """Seconds for so many tokens behind the first `start`, which stay as they are."""
        model.n_tokens = start
        return clock.time(lambda: model.eval(ids[start : start + count])).given

    def write(start: int, count: int) -> float:
        """The same, token by token."""

        def work() -> None:
            for at in range(start, start + count):
                model.n_tokens = at
                model.eval(ids[at : at + 1])

        return clock.time(work).given

    figures["prefill_s"] = read(0, PREFIX)
    new, one = read(PREFIX, NEW), write(PREFIX + NEW, MEASURED) / MEASURED
    figures["scaled_from_tokens"] = MEASURED
    figures["route_s"] = new + PLAN * one
    figures["route_cold_s"] = figures["prefill_s"] + figures["route_s"]
    figures["prefill_tokens_per_s"] = round(PREFIX / figures["prefill_s"])
    figures["decode_tokens_per_s"] = round(1 / one, 1)
    figures["document_s"] = read(0, document[0]) + document[1] * one
    model.close()
