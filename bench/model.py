"""One part of the model's benchmarks; prints each figure as a JSON object on a line. Started by bench/__main__.py."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch.nn import functional as F  # noqa: N812  its usual name

from bench import llama_cpp
from bench.clock import Clock, Lap

torch.set_num_threads(min(2, os.cpu_count() or 1))

QUERY = (
    "Should we acquire Company X? I need comprehensive analysis of financial impact, market implications, "
    "and integration complexity"
)
ROUTE_PROMPT, ROUTE_NEW = 700, 400  # tokens of the specification's way
DOCUMENT_PROMPT, DOCUMENT_NEW = 2000, 100


class Figures(dict[str, Any]):
    """What was measured; each figure is a line of JSON at once, so that a part that is stopped keeps what it had."""

    def __setitem__(self, name: str, value: Any) -> None:
        value = round(value, 3) if isinstance(value, float) else value
        super().__setitem__(name, value)
        print(json.dumps({name: value}), flush=True)

    def put(self, more: dict[str, Any]) -> None:
        for name, value in more.items():
            self[name] = value

    def lap(self, name: str, lap: Lap) -> None:
        self[f"{name}_s"], self[f"{name}_wall_s"] = lap.given, lap.wall


def memory() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) // 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return {"resident_mib": found["VmRSS"], "peak_mib": found["VmHWM"]}


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def best(clock: Clock, times: int, work: Callable[[], Any]) -> float:
    """Seconds of the fastest of so many: of short work, the one that nothing came between."""
    return min(clock.time(work).given for _ in range(times))


def ceilings(figures: Figures, clock: Clock) -> None:
    big = torch.ones(128 << 20)  # 512 MiB
    figures["memory_read_GB_per_s"] = round(big.nbytes / best(clock, 15, big.sum) / 1e9, 1)
    del big
    operations = 2 * 700 * 2048 * 8192
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x, w = torch.randn(700, 2048, dtype=dtype), torch.randn(8192, 2048, dtype=dtype)
        figures[f"{name}_GFLOP_per_s"] = round(operations / best(clock, 15, lambda x=x, w=w: F.linear(x, w)) / 1e9)
    from hubpeer.model.load import Int8Linear, quantize_rows

    linear = Int8Linear(*quantize_rows(torch.randn(8192, 2048)))
    x = torch.randn(700, 2048)
    figures["int8_with_quantization_GOP_per_s"] = round(operations / best(clock, 15, lambda: linear(x)) / 1e9)


# ── ours ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def load(figures: Figures, clock: Clock, folder: Path) -> None:
    """From the model's own files, quantized on the way."""
    from hubpeer import settings as config
    from hubpeer.model.local import LocalModel

    began = time.perf_counter()
    model = LocalModel(config.Model(name=str(folder), threads=2), folder)
    figures.lap("load", clock.since(began))
    asyncio.run(model.close())
    figures.put(memory())


def ours(figures: Figures, clock: Clock, folder: Path, cache: Path) -> None:
    from hubpeer import settings as config
    from hubpeer import taxonomy
    from hubpeer.model import DocAsk, PlanAsk
    from hubpeer.model.local import LocalModel

    began = time.perf_counter()
    model = LocalModel(config.Model(name=str(folder), threads=2, cache=str(cache)), folder)
    figures.lap("load_cached", clock.since(began))
    figures["loaded_mib"] = memory()["resident_mib"]
    cards = config.DEFAULT_AGENTS
    rules = ["finance_priority", "consensus_required", "ceo_decides"]
    text = "The quarterly revenue of the company was 12 million, and the marketing budget is under review. "
    numbers = itertools.count()

    def ask(asker: str) -> PlanAsk:
        others = {name: card for name, card in cards.items() if name != asker}
        return PlanAsk(asker, f"{QUERY} ({next(numbers)})", others, rules, 2)

    async def route(asker: str) -> Lap:
        began = time.perf_counter()
        await model.plan(ask(asker), time.monotonic() + 600)
        return clock.since(began)

    def document() -> DocAsk:
        prefix = len(model._categorizer.task(DocAsk("acme", "", taxonomy.DEFAULT, ["finance", "sales"])).prefix)
        times = (DOCUMENT_PROMPT - prefix) // len(model._words.data(text))
        return DocAsk("acme", f"{text * times}{next(numbers)}", taxonomy.DEFAULT, ["finance", "sales"])

    async def measure() -> None:
        figures["prompt_tokens_kept"] = len(model._planner.prefix(ask("ceo")))
        figures.lap("route_cold", await route("ceo"))
        steps = model._engine.counts.steps
        idle = [await route("ceo")]
        figures["route_steps"] = model._engine.counts.steps - steps
        idle.append(await route("ceo"))
        figures.lap("route", min(idle, key=lambda lap: lap.given))
        steps = model._engine.counts.steps
        figures.lap("document", await categorized())
        figures["document_steps"] = model._engine.counts.steps - steps
        began = time.perf_counter()
        await asyncio.gather(*(route(asker) for _ in range(2) for asker in ("ceo", "sales", "finance", "marketing")))
        figures.lap("eight_routes", clock.since(began))
        figures.put(memory())
        # Routes one after another, for as long as a document takes.
        other = asyncio.create_task(categorized())
        beside = []
        while not other.done():
            beside.append(await route("ceo"))
        idle.append(await route("ceo"))
        figures["routes_idle"], figures["routes_beside_documents"] = len(idle), len(beside)
        figures["route_p95_idle_s"], figures["route_p95_beside_s"] = p95(idle), p95(beside)
        figures["document_beside_routes_s"] = other.result().given

    async def categorized() -> Lap:
        began = time.perf_counter()
        await model.categorize(document(), None)
        return clock.since(began)

    figures["weights_mib"] = round(model.status()["memory"]["weights_bytes"] / 2**20)
    figures["kv_mib"] = round(model.status()["memory"]["kv_bytes"] / 2**20)
    asyncio.run(measure())
    figures.put(memory())
    figures.put(model.status()["prefix_cache"])
    single_steps(model, figures)
    asyncio.run(model.close())


def p95(laps: list[Lap]) -> float:
    return sorted(lap.given for lap in laps)[math.ceil(0.95 * len(laps)) - 1]


def single_steps(model: Any, figures: Figures) -> None:
    """Straight from the forward pass, a layer at a time: rows that decode, a chunk that is read. A layer is over before a
    shared machine stands still, and all others are read before it comes again, so no cache holds it; the figures are sums of
    the best of each layer, with what a pass does once counted once. And one mask of a grammar."""
    from hubpeer.model.engine import CHUNK
    from hubpeer.model.forward import Feed, Forward, Memory, Node
    from hubpeer.model.grammar import Line, line_grammar

    weights = model._weights
    shape = msgspec.structs.replace(weights.shape, layers=1)
    layers = []
    for layer in weights.layers:
        one = msgspec.structs.replace(weights, layers=[layer], shape=shape)
        layers.append(Forward(one, Memory(one, 2048)))
    none = msgspec.structs.replace(weights, layers=[], shape=msgspec.structs.replace(weights.shape, layers=0))
    once = Forward(none, layers[0].memory)

    def fastest(times: int, feeds: Callable[[Node], list[Feed]]) -> float:
        """Milliseconds of a step behind 640 tokens."""
        passes = [*layers, once]
        found = [math.inf] * len(passes)
        for _ in range(times):
            for n, layer in enumerate(passes):
                node = Node(0, 640)
                node.used = 640
                ready = feeds(node)
                began = time.perf_counter()
                layer.run(ready)
                found[n] = min(found[n], time.perf_counter() - began)
        return 1000 * (sum(found) - len(layers) * found[-1])

    with torch.inference_mode():
        for layer in layers:
            layer.run([Feed(Node(0, 640), list(range(640)), False)])
        head = 1000 * min(timed(lambda: weights.head(torch.randn(1, shape.hidden))) for _ in range(20))
        for rows in (1, 4, 8):
            step = fastest(30, lambda node, n=rows: [Feed(Node(640 + 64 * i, 64, node), [7], False) for i in range(n)])
            figures[f"step_ms_{rows}_rows"] = round(step + head, 1)
        chunk = fastest(8, lambda node: [Feed(Node(640, CHUNK, node), [7] * CHUNK, False)])
    figures["prefill_tokens_per_s"] = round(1000 * CHUNK / chunk)
    figures["decode_tokens_per_s"] = round(1000 / figures["step_ms_1_rows"], 1)
    line, masks = Line(model._words, line_grammar()), []
    for token in model._words.data(QUERY):
        masks.append(timed(line.mask))
        line.take(token)
    figures["mask_us"], figures["mask_most_us"] = round(statistics.median(masks) * 1e6), round(max(masks) * 1e6)


def logits(figures: Figures, folder: Path, cache: Path) -> None:
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
    figures.put(memory())


# ── the specification's way ─────────────────────────────────────────────────────────────────────────────────────────────


def generate(figures: Figures, clock: Clock, folder: Path, dtype: torch.dtype, tokens: int = 8) -> None:
    """transformers' generate: prefill and a few tokens measured, the rest scaled from the time of one token."""
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    figures.lap("load", clock.since(began))

    class Ticks(BaseStreamer):
        """When each token was there; the first call brings the prompt."""

        def __init__(self) -> None:
            self.at: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.at.append(time.perf_counter())

        def end(self) -> None:
            pass

    def run(prompt: int, new: int) -> tuple[Lap, list[Lap]]:
        """The prompt until its first token, and each token after it."""
        ids = torch.randint(0, 100_000, (1, prompt), generator=torch.Generator().manual_seed(0))
        ticks = Ticks()
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=True,
                           temperature=0.7, pad_token_id=0, streamer=ticks)  # fmt: skip
        first, *others = clock.laps(ticks.at)
        return first, others

    run(32, 2)  # whatever happens only once
    read, written = run(ROUTE_PROMPT, tokens + 1)
    long, _ = run(DOCUMENT_PROMPT, 2)
    one = statistics.median(lap.given for lap in written)
    figures["scaled_from_tokens"] = tokens
    figures["prefill_tokens_per_s"] = round(ROUTE_PROMPT / read.given)
    figures["decode_tokens_per_s"] = round(1 / one, 1)
    figures["route_s"] = figures["route_cold_s"] = read.given + (ROUTE_NEW - 1) * one
    figures["document_s"] = long.given + (DOCUMENT_NEW - 1) * one
    figures.put(memory())


def main() -> None:
    part, folder, cache = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    figures = Figures()
    with Clock() as clock:
        began = time.perf_counter()
        match part:
            case "ceilings":
                ceilings(figures, clock)
            case "load":
                load(figures, clock, folder)
            case "ours":
                ours(figures, clock, folder, cache)
            case "logits":
                logits(figures, folder, cache)
            case "generate_bf16":
                generate(figures, clock, folder, torch.bfloat16)
            case "generate_fp32":
                generate(figures, clock, folder, torch.float32)
            case "llama_cpp_q8" | "llama_cpp_q4":
                kind = "Q8_0" if part.endswith("q8") else "Q4_0"
                llama_cpp.measure(figures, clock, folder, cache, kind, (DOCUMENT_PROMPT, DOCUMENT_NEW))
                figures.put(memory())
            case _:
                sys.exit(f"no such part: {part}")
        figures.lap("part", clock.since(began))


if __name__ == "__main__":
    main()
