"""One part of the model's benchmarks; prints one JSON object. Started by bench/__main__.py."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from bench import llama_cpp

torch.set_num_threads(min(2, os.cpu_count() or 1))

QUERY = (
    "Should we acquire Company X? I need comprehensive analysis of financial impact, market implications, "
    "and integration complexity"
)
ROUTE_PROMPT, ROUTE_NEW = 700, 400  # tokens of the specification's way
DOCUMENT_PROMPT, DOCUMENT_NEW = 2000, 100


class Figures(dict[str, Any]):
    """What was measured; said at once, since the next figure may be minutes away."""

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        print(f"  {name} {value:.3f}" if isinstance(value, float) else f"  {name} {value}", file=sys.stderr, flush=True)


def memory() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) // 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return {"resident_mib": found["VmRSS"], "peak_mib": found["VmHWM"]}


def timed(work: Callable[[], Any], times: int) -> list[float]:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return sorted(taken)


def ceilings() -> dict[str, float]:
    big = torch.ones(128 << 20)  # 512 MiB
    read = 0.5 * 1.073741824 / timed(big.sum, 7)[0]
    del big
    figures = {"memory_read_GB_per_s": round(read, 1)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x, w = torch.randn(700, 2048, dtype=dtype), torch.randn(8192, 2048, dtype=dtype)
        best = timed(lambda x=x, w=w: torch.nn.functional.linear(x, w), 9)[0]
        figures[f"{name}_GFLOP_per_s"] = round(2 * 700 * 2048 * 8192 / best / 1e9)
    from hubpeer.model.load import Int8Linear, quantize_rows

    linear = Int8Linear(*quantize_rows(torch.randn(8192, 2048)))
    x = torch.randn(700, 2048)
    figures["int8_with_quantization_GOP_per_s"] = round(2 * 700 * 2048 * 8192 / timed(lambda: linear(x), 9)[0] / 1e9)
    return figures


# ── ours ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def ours(folder: Path, cache: Path) -> dict[str, Any]:
    from hubpeer import settings as config
    from hubpeer import taxonomy
    from hubpeer.jobs import Kind
    from hubpeer.model import DocAsk, PlanAsk
    from hubpeer.model.engine import Job
    from hubpeer.model.grammar import Line, line_grammar
    from hubpeer.model.local import LocalModel

    figures = Figures()
    if os.environ.get("HUBPEER_BENCH_COLD"):
        began = time.perf_counter()
        cold = LocalModel(config.Model(name=str(folder), threads=2), folder)
        figures["load_s"] = time.perf_counter() - began
        figures["load_peak_mib"] = memory()["peak_mib"]
        asyncio.run(cold.close())
        del cold
    began = time.perf_counter()
    model = LocalModel(config.Model(name=str(folder), threads=2, cache=str(cache)), folder)
    figures["load_cached_s"] = time.perf_counter() - began
    figures["loaded_mib"] = memory()["resident_mib"]
    cards = config.DEFAULT_AGENTS
    rules = ["finance_priority", "consensus_required", "ceo_decides"]

    def ask(asker: str, query: str = QUERY, agents: int = 2) -> PlanAsk:
        return PlanAsk(asker, query, {n: c for n, c in cards.items() if n != asker}, rules, agents)

    text = "The quarterly revenue of the company was 12 million, and the marketing budget is under review. "

    def document(tokens: int) -> DocAsk:
        words = model._words
        per = len(words.data(text))
        prefix = len(model._categorizer.task(DocAsk("acme", "", taxonomy.DEFAULT, ["finance", "sales"])).prefix)
        return DocAsk("acme", text * max(1, (tokens - prefix) // per), taxonomy.DEFAULT, ["finance", "sales"])

    async def measure() -> None:
        async def route(asker: str, query: str = QUERY) -> float:
            began = time.perf_counter()
            await model.plan(ask(asker, query), time.monotonic() + 300)
            return time.perf_counter() - began

        figures["route_prompt_tokens"] = len(model._planner.prefix(ask("ceo")))
        figures["route_cold_s"] = await route("ceo")
        idle = sorted([await route("ceo", f"{QUERY} ({i})") for i in range(9)])
        draft = await model.plan(ask("ceo"), time.monotonic() + 300)
        figures["route_agents"] = len(draft.agents)
        figures["route_s"], figures["route_median_s"] = idle[0], statistics.median(idle)
        before = model.status()["tokens_per_s"]
        figures["written_tokens_per_s_side_by_side"] = before["written"]
        for asker in ("sales", "finance", "marketing"):
            await route(asker)
        began = time.perf_counter()
        await asyncio.gather(*(route(a, f"{QUERY} {i}") for i in range(2) for a in ("ceo", "sales", "finance", "marketing")))
        figures["eight_routes_s"] = time.perf_counter() - began
        taken = []
        for i in range(3):
            began = time.perf_counter()
            record = await model.categorize(document(2000 + i), None)
            taken.append(time.perf_counter() - began)
        figures["document_s"], figures["document_chars"] = min(taken), record.read_chars
        documents = [asyncio.create_task(model.categorize(document(2000 + i), None)) for i in range(6)]
        beside = []
        while not all(d.done() for d in documents):
            await asyncio.sleep(0.3)
            beside.append(await route("ceo", f"{QUERY} [{len(beside)}]"))
        idle = sorted(idle + [await route("ceo", f"{QUERY} {{{i}}}") for i in range(6)])
        beside.sort()
        figures["routes_beside_documents"] = len(beside)
        figures["route_p95_idle_s"] = idle[int(0.95 * (len(idle) - 1))]
        figures["route_p95_beside_s"] = beside[int(0.95 * (len(beside) - 1))]

    asyncio.run(measure())
    figures |= memory()

    # Single figures, straight from the forward pass: one row that decodes, and a long stretch that is read.
    from hubpeer.model.forward import Feed, Forward, Memory, Node

    forward = Forward(model._weights, Memory(model._weights, 2048))
    with torch.inference_mode():
        node = Node(0, 1024)
        read = timed(lambda: forward.run([Feed(Node(0, 1024), list(range(512)), True)]), 4)[0]
        forward.run([Feed(node, list(range(640)), False)])
        for rows in (1, 4, 8):
            nodes = [Node(1024 + 64 * i, 64, node) for i in range(rows)]
            best = timed(lambda nodes=nodes: forward.run([Feed(n, [7], True) for n in nodes]), 40)
            figures[f"step_ms_{rows}_rows"] = round(best[4] * 1000, 1)
        figures["prefill_tokens_per_s"] = round(512 / read)
        figures["decode_tokens_per_s"] = round(1000 / figures["step_ms_1_rows"], 1)
    line = Line(model._words, line_grammar())
    figures["mask_us"] = round(statistics.median(timed(line.mask, 200)) * 1e6)
    floor = model._weights.nbytes
    figures["weights_mib"] = round(floor / 2**20)
    figures["kv_mib"] = round(model.status()["memory"]["kv_bytes"] / 2**20)
    asyncio.run(model.close())
    del Kind, Job
    return figures


def logits(folder: Path, cache: Path) -> dict[str, Any]:
    """The last logits of 200 tokens, ours against transformers' in fp32: relative L2 distance, and whether the most likely
    token is the same. Random weights exaggerate: nothing in them is redundant."""
    from transformers import AutoModelForCausalLM

    from hubpeer.model.forward import Feed, Forward, Memory, Node, units
    from hubpeer.model.load import load_weights

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(0, model.config.vocab_size, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        theirs = model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1]
    del model
    figures = Figures()
    kinds: tuple[Literal["fp32", "bf16", "int8"], ...] = ("fp32", "bf16", "int8")
    for kind in kinds:
        weights = load_weights(folder, kind, cache if kind == "int8" else None)
        for name, sizes in (("whole", [200]), ("in_pieces", [90, 1, 60, 49])):
            forward = Forward(weights, Memory(weights, 1024))
            node, first, at, ours = None, 0, 0, theirs
            with torch.inference_mode():
                for size in sizes:
                    node = Node(first, size, node)
                    first += units(size)
                    [ours] = forward.run([Feed(node, ids[at : at + size], True)])
                    at += size
            figures[f"{kind}_{name}_error"] = f"{float((ours - theirs).norm() / theirs.norm()):.1e}"
            figures[f"{kind}_{name}_same_token"] = bool(ours.argmax() == theirs.argmax())
        del weights, forward
    return figures | memory()


# ── the specification's way ─────────────────────────────────────────────────────────────────────────────────────────────


def generate(folder: Path, dtype: torch.dtype, tokens: int = 12) -> dict[str, Any]:
    """transformers' generate: prefill and a few tokens measured, the rest scaled from the time of one token."""
    from transformers import AutoModelForCausalLM

    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    figures = Figures()
    figures["load_s"] = time.perf_counter() - began

    def run(prompt: int, new: int) -> float:
        ids = torch.randint(0, 100_000, (1, prompt), generator=torch.Generator().manual_seed(0))
        began = time.perf_counter()
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=True,
                           temperature=0.7, pad_token_id=0)  # fmt: skip
        return time.perf_counter() - began

    first = min(run(ROUTE_PROMPT, 1) for _ in range(2))
    one = (min(run(ROUTE_PROMPT, tokens + 1) for _ in range(2)) - first) / tokens
    long = run(DOCUMENT_PROMPT, 1)
    figures["scaled_from_tokens"] = tokens
    figures["prefill_tokens_per_s"] = round(ROUTE_PROMPT / first)
    figures["decode_tokens_per_s"] = round(1 / one, 1)
    figures["route_s"] = first + (ROUTE_NEW - 1) * one
    figures["route_cold_s"] = figures["route_s"]
    figures["document_s"] = long + (DOCUMENT_NEW - 1) * one
    return figures | memory()


def main() -> None:
    part, folder, cache = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    figures: dict[str, Any]
    match part:
        case "ceilings":
            figures = ceilings()
        case "ours":
            figures = ours(folder, cache)
        case "logits":
            figures = logits(folder, cache)
        case "generate_bf16":
            figures = generate(folder, torch.bfloat16)
        case "generate_fp32":
            figures = generate(folder, torch.float32)
        case "llama_cpp_q8" | "llama_cpp_q4":
            kind = "Q8_0" if part.endswith("q8") else "Q4_0"
            figures = llama_cpp.measure(folder, cache, kind, (DOCUMENT_PROMPT, DOCUMENT_NEW)) | memory()
        case _:
            sys.exit(f"no such part: {part}")
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()}))


if __name__ == "__main__":
    main()
