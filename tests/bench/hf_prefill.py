#!/usr/bin/env python3
"""What structkv.hf costs and saves: prefills of a random-weight Llama, plain and compressed.

    python3 tests/bench/hf_prefill.py [--tokens 8192] [--target HOST:PORT] [--json]

Needs the package with its extra `hf` (pip install './client/python[hf]'). Without --target the
engine runs in this process. Prefills are compressed twice: cut at the pivot, and not cut (EXACT),
where all that differs from the plain one is what the client and the service take. The pivot is
given, since random weights have none; half of the layers in full are the paper's 16 of 32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import structkv
import structkv.hf
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sizes = {
        "layers": 16,
        "hidden": 1024,
        "intermediate": 3584,
        "heads": 16,
        "kv_heads": 4,
        "tokens": 8192,
        "repeats": 3,
        "threads": torch.get_num_threads(),
    }
    for name, size in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    parser.add_argument("--kv-budget", type=float, default=0.1)
    parser.add_argument("--skeleton", type=float, default=0.2)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--target", help="a server; default: the engine in this process")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def make_model(options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        vocab_size=4096,
        max_position_embeddings=options.tokens,
        dtype=getattr(torch, options.dtype),
    )
    return LlamaForCausalLM(config).to(getattr(torch, options.dtype)).eval()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    model = make_model(options)
    prompt = torch.randint(0, 4096, (1, options.tokens))
    client = (
        structkv.Client(options.target)
        if options.target
        else structkv.Engine(threads=options.threads, memory_budget="4GiB", log_sessions=False)
    )
    common: dict[str, Any] = {"kv_budget": options.kv_budget, "on_failure": "raise"}
    runs = {
        "plain": None,
        "not cut": structkv.hf.compress(model, client, pivot="exact", **common),
        "cut": structkv.hf.compress(
            model, client, skeleton=options.skeleton, pivot=options.layers // 2 - 1, **common
        ),
    }

    def prefill(run: structkv.hf.Run | None) -> float:
        begin = time.perf_counter()
        if run is None:
            model(prompt, use_cache=True, logits_to_keep=1)
        else:
            with run:
                model(prompt, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - begin

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    reports: dict[str, list[structkv.hf.Report]] = {name: [] for name in runs}
    with torch.no_grad():
        model(prompt[:, :512], use_cache=True)
        for _ in range(options.repeats):
            for name, run in runs.items():
                seconds[name].append(prefill(run))
                if run is not None and run.last is not None:
                    reports[name].append(run.last)
    plain = statistics.median(seconds["plain"])
    rows = []
    for name in runs:
        row: dict[str, Any] = {"prefill": name, "seconds": [round(s, 3) for s in seconds[name]]}
        row["of plain"] = round(
            statistics.median(a / b for a, b in zip(seconds[name], seconds["plain"])), 3
        )
        for report in reports[name][-1:]:
            row |= {
                "compute saved": round(report.compute_saved, 3),
                "cache bytes": report.cache_bytes,
                "full cache bytes": report.full_cache_bytes,
            }
        if reports[name]:
            for stage in ("open", "send", "wait", "compact"):
                spent = [getattr(report.seconds, stage) for report in reports[name]]
                row[f"{stage} ms"] = round(1000 * statistics.median(spent), 1)
            client_seconds = [
                r.seconds.open + r.seconds.send + r.seconds.compact for r in reports[name]
            ]
            server = [r.prompts[0].summary.timing for r in reports[name]]
            row["client, of plain"] = round(statistics.median(client_seconds) / plain, 5)
            row["server ms"] = round(
                statistics.median(t.compute_micros for t in server if t is not None) / 1000, 1
            )
        rows.append(row)
    if options.json:
        print(json.dumps({"options": vars(options), "rows": rows}))
        return
    for row in rows:
        print("\n".join(f"{key:18} {value}" for key, value in row.items()), end="\n\n")


if __name__ == "__main__":
    main()
