"""`python -m bench [PART ...]`: runs the benchmarks and keeps their table in docs/benchmarks.md.

Each part runs in a process of its own, so that its memory is its own. The model is the exact Llama-3.2-1B shape with random
weights, made on demand in $HUBPEER_BENCH_DIR (default ~/.cache/hubpeer/bench; 2.5 GB, and 1.2 GB of quantized weights);
HUBPEER_BENCH_MODEL=FOLDER measures another one, real weights for example. llama.cpp is measured beside us where
`pip install llama-cpp-python gguf` was done. Seconds are those that the machine gave (bench/clock.py).
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCH_DIR = Path(os.environ.get("HUBPEER_BENCH_DIR", Path.home() / ".cache/hubpeer/bench"))
MODEL = Path(os.environ.get("HUBPEER_BENCH_MODEL", BENCH_DIR / "1b"))
PARTS = ["ceilings", "load", "ours", "logits", "generate_bf16", "generate_fp32", "llama_cpp_q8", "llama_cpp_q4"]
PAGE = ROOT / "docs" / "benchmarks.md"
START, END = "<!-- model: written by python -m bench -->", "<!-- /model -->"


def prepare() -> None:
    if (MODEL / "model.safetensors").is_file() or (MODEL / "model.safetensors.index.json").is_file():
        return
    from hubpeer.model import stand_in

    print(f"making a random model of the 1B shape in {MODEL} (once, 2.5 GB) ...", flush=True)
    stand_in.make(MODEL, stand_in.ONE_B)


def run(part: str) -> dict[str, float | str]:
    """The figures of a part. One that fails or is stopped keeps those it had."""
    print(f"{part} ...", flush=True)
    began = time.monotonic()
    command = [sys.executable, "-m", "bench.model", part, str(MODEL), str(BENCH_DIR / "cache")]
    figures: dict[str, float | str] = {}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            figures |= json.loads(line)
            print(f"  {line.strip()}", flush=True)
    if process.returncode:
        figures["ended"] = f"exit {process.returncode} after {time.monotonic() - began:.0f} s"
        print(f"  {figures['ended']}", flush=True)
    return figures


def machine() -> str:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?"
    )
    flags = Path("/proc/cpuinfo").read_text()
    has = [name for name in ("avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16") if name in flags]
    import torch

    return f"{os.cpu_count()} cores, {cpu} ({', '.join(has)}), torch {torch.__version__}, Python {platform.python_version()}"


def seconds(value: object) -> str:
    return f"{value:.2f} s" if isinstance(value, float) else str(value if value is not None else "not measured")


def times(a: object, b: object) -> str:
    return f"{a / b:.2f}x" if isinstance(a, float) and isinstance(b, float) and b else "-"


def table(all_figures: dict[str, dict[str, float | str]]) -> str:
    ours, ceilings = all_figures.get("ours", {}), all_figures.get("ceilings", {})
    columns = all_figures | {"ours": ours | {k: v for k, v in all_figures.get("load", {}).items() if k == "load_s"}}
    names = {
        "ours": "hubpeer int8",
        "generate_bf16": "generate bf16",
        "generate_fp32": "generate fp32",
        "llama_cpp_q8": "llama.cpp Q8_0",
        "llama_cpp_q4": "llama.cpp Q4_0",
    }
    others = [name for name in names if name in all_figures]
    lines = [
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, {machine()}.",
        "",
        f"Ceilings: {json.dumps(ceilings)}",
        "",
        "| | " + " | ".join(names[name] for name in others) + " |",
        "|---" * (len(others) + 1) + "|",
    ]
    for key, label in (
        ("route_s", "one route, prefix cached, plan of two agents (generate: 400 new tokens)"),
        ("route_cold_s", "one route, nothing cached"),
        ("document_s", "one 2,000-token document (generate: 100 new tokens)"),
        ("eight_routes_s", "eight routes at once, two of each asker"),
        ("load_s", "load from the model's files (ours: quantizing)"),
        ("load_cached_s", "load, quantized cache"),
    ):
        lines.append(f"| {label} | " + " | ".join(seconds(columns[name].get(key)) for name in others) + " |")
    for key, label in (
        ("prefill_tokens_per_s", "prefill, tokens/s"),
        ("decode_tokens_per_s", "decode one row, tokens/s"),
        ("resident_mib", "resident, MiB"),
        ("peak_mib", "peak, MiB"),
    ):
        lines.append(f"| {label} | " + " | ".join(str(all_figures[name].get(key, "-")) for name in others) + " |")
    lines += ["", "| ratio | reached | aimed at |", "|---|---|---|"]
    for label, key, other, aim in (
        ("route against generate fp32", "route_s", "generate_fp32", ">= 60x"),
        ("route against generate bf16", "route_s", "generate_bf16", ">= 30x"),
        ("document against generate fp32", "document_s", "generate_fp32", ">= 15x"),
        ("document against generate bf16", "document_s", "generate_bf16", ">= 6x"),
        ("route against llama.cpp Q8_0", "route_s", "llama_cpp_q8", ">= 2x"),
        ("route against llama.cpp Q4_0", "route_s", "llama_cpp_q4", "> 1x"),
    ):
        lines.append(f"| {label} | {times(all_figures.get(other, {}).get(key), ours.get(key))} | {aim} |")
    beside = times(ours.get("route_p95_beside_s"), ours.get("route_p95_idle_s"))
    lines.append(f"| route beside documents against idle, p95 | {beside} | <= 1.5x |")
    if "step_ms_1_rows" in ours and "memory_read_GB_per_s" in ceilings:
        floor = float(ours["weights_mib"]) * 2**20 / 1e6 / float(ceilings["memory_read_GB_per_s"])
        lines.append(f"| one token against reading all weights once | {float(ours['step_ms_1_rows']) / floor:.2f}x | <= 1.5x |")
    lines.append(f"| peak of the model's process, load included | {ours.get('peak_mib', '-')} MiB | <= 2048 MiB |")
    if errors := all_figures.get("logits"):
        lines += ["", "Our logits against those of transformers in fp32, relative L2 distance, read whole and in pieces:", ""]
        lines += ["| " + " | ".join(["", "fp32", "bf16", "int8"]) + " |", "|---" * 4 + "|"]
        for way in ("whole", "in_pieces"):
            row = [str(errors.get(f"{kind}_{way}_error", "-")) for kind in ("fp32", "bf16", "int8")]
            lines.append(f"| {way.replace('_', ' ')} | " + " | ".join(row) + " |")
    lines += ["", "Everything measured:", "", "```json", json.dumps(all_figures, indent=1), "```"]
    return "\n".join(lines)


def keep(text: str) -> None:
    page = PAGE.read_text("utf-8") if PAGE.is_file() else f"# Benchmarks\n\n{START}\n{END}\n"
    if START not in page:
        page += f"\n{START}\n{END}\n"
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{START}\n{text}\n{END}{after}", "utf-8")


def main() -> None:
    prepare()
    parts = sys.argv[1:] or PARTS
    store = BENCH_DIR / "figures.json"
    figures = json.loads(store.read_text()) if sys.argv[1:] and store.is_file() else {}
    for part in parts:
        figures[part] = run(part)
        store.write_text(json.dumps(figures))
    text = table(figures)
    print(text)
    keep(text)
    print(f"kept in {PAGE}")


if __name__ == "__main__":
    main()
