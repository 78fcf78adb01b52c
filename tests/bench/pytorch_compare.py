#!/usr/bin/env python3
"""Compares one layer's compression with PyTorch on the same CPU, with the same threads, in one run.

The work: bf16 keys and values of Llama-3.1-8B's geometry (8 KV heads of 128), window queries of 8 tokens in 32 query
heads; softmax of the window's queries over all keys, summed over the heads and averaged over the window; the best 10 %
of the tokens with the window among them, in ascending order; their keys and values gathered. The engine also computes
the layer's metrics and adds to the centrality; PyTorch is not asked to.

PyTorch does it in several ways, the fastest of which counts. The engine and the variants take turns; medians of the
rounds are compared. Both get the same tensors, and what they keep is compared as well.

    python3 -m venv VENV && VENV/bin/pip install -r tests/bench/pytorch_requirements.txt
    cmake --build --preset release --target structkv_layer_bench
    VENV/bin/python tests/bench/pytorch_compare.py             # --help; --json; --check fails below 3 times

Needs 3 GB of memory and 0.6 GB in the temporary directory. No part of scripts/test.
"""
import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch

QUERY_HEADS, KV_HEADS, DIM, WINDOW = 32, 8, 128, 8
GROUP = QUERY_HEADS // KV_HEADS
SCALE = 1 / math.sqrt(DIM)
BAR = 3.0
ROOT = pathlib.Path(__file__).resolve().parents[2]


class Layer:
    """Keys and values [KV head, token, dim], window queries [KV head, group * window, dim]."""

    def __init__(self, tokens, seed):
        generator = torch.Generator().manual_seed(seed)
        shape = (KV_HEADS, tokens, DIM)
        self.tokens = tokens
        self.keys = torch.randn(shape, generator=generator).bfloat16()
        self.values = torch.randn(shape, generator=generator).bfloat16()
        self.queries = torch.randn((KV_HEADS, GROUP * WINDOW, DIM), generator=generator).bfloat16()
        # Added to the scores of the window's own keys: a query sees no later token.
        mask = torch.full((WINDOW, WINDOW), -math.inf).triu(1)
        self.mask = mask.repeat(GROUP, 1)
        self.mask_bf16 = self.mask.bfloat16()

    def write(self, path):
        with open(path, "wb") as file:
            for tensor in (self.keys, self.values, self.queries):
                file.write(tensor.view(torch.int16).numpy().tobytes())


def scores(layer, queries, keys, mask):
    """[.., rows, token], scaled and masked, in the type of the tensors."""
    out = torch.empty((*queries.shape[:-1], keys.shape[-2]), dtype=queries.dtype)
    torch.baddbmm(out, queries, keys.transpose(-2, -1), beta=0, alpha=SCALE, out=out)
    out[..., -WINDOW:] += mask
    return out


def softmax(layer):
    """All heads at once: batched matmul over the GQA groups, softmax in float32, a sum."""
    s = scores(layer, layer.queries, layer.keys, layer.mask_bf16)
    return torch.softmax(s, dim=-1, dtype=torch.float32).sum(dim=(0, 1)) / WINDOW


def softmax_per_head(layer):
    """The same, one KV head after the other, so that the probabilities stay closer to the cores."""
    total = torch.zeros(layer.tokens)
    for h in range(KV_HEADS):
        s = scores(layer, layer.queries[h : h + 1], layer.keys[h : h + 1], layer.mask_bf16)[0]
        total += torch.softmax(s, dim=-1, dtype=torch.float32).sum(dim=0)
    return total / WINDOW


def weighted(layer):
    """Exponentials in place, and one product in place of normalising and summing."""
    s = scores(layer, layer.queries, layer.keys, layer.mask_bf16).float()
    s.sub_(s.amax(dim=-1, keepdim=True)).exp_()
    weights = (WINDOW * s.sum(dim=-1)).reciprocal_()
    return torch.mv(s.view(-1, layer.tokens).t(), weights.view(-1))


def weighted_per_head(layer):
    """The same, one KV head after the other."""
    total = torch.zeros(layer.tokens)
    for h in range(KV_HEADS):
        s = scores(layer, layer.queries[h : h + 1], layer.keys[h : h + 1], layer.mask_bf16)[0].float()
        s.sub_(s.amax(dim=-1, keepdim=True)).exp_()
        total.addmv_(s.t(), (WINDOW * s.sum(dim=-1)).reciprocal_())
    return total


def linear_per_head(layer):
    """Keys as the rows of a linear layer whose weights are the queries: they need no packing."""
    total = torch.zeros(layer.tokens)
    for h in range(KV_HEADS):
        s = torch.nn.functional.linear(layer.keys[h], layer.queries[h]).float().mul_(SCALE)
        s[-WINDOW:] += layer.mask.t()
        s.sub_(s.amax(dim=0)).exp_()
        total.addmv_(s, (WINDOW * s.sum(dim=0)).reciprocal_())
    return total


def linear(layer):
    """The same, all heads at once."""
    s = torch.bmm(layer.keys, layer.queries.transpose(1, 2)).float().mul_(SCALE)
    s[:, -WINDOW:] += layer.mask.t()
    s.sub_(s.amax(dim=1, keepdim=True)).exp_()
    weights = (WINDOW * s.sum(dim=1)).reciprocal_()
    return torch.bmm(s, weights.unsqueeze(-1)).sum(dim=0).squeeze(-1)


def reference(layer):
    """In float32 from the start: not timed, but what the engine's choice is compared with."""
    total = torch.zeros(layer.tokens)
    for h in range(KV_HEADS):
        s = scores(layer, layer.queries[h : h + 1].float(), layer.keys[h : h + 1].float(), layer.mask)
        total += torch.softmax(s[0], dim=-1).sum(dim=0)
    return total / WINDOW


VARIANTS = (softmax, softmax_per_head, weighted, weighted_per_head, linear, linear_per_head)


def select(saliency, keep):
    best = torch.topk(saliency[:-WINDOW], keep - WINDOW, sorted=False).indices
    window = torch.arange(saliency.numel() - WINDOW, saliency.numel())
    return torch.cat((best, window)).sort().values


def compress(layer, statistic, keep):
    positions = select(statistic(layer), keep)
    return positions, layer.keys.index_select(1, positions), layer.values.index_select(1, positions)


class Engine:
    """The benchmark program, waiting for its turns."""

    def __init__(self, program, tokens, threads, tensors, out):
        command = [program, "--turns", "--tokens", str(tokens), "--threads", str(threads)]
        command += ["--tensors", tensors, "--out", out]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.device = self.read()["device"]

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"pytorch_compare: the engine's program ended with {self.process.wait()}")
        return json.loads(line)

    def run(self, layers):
        self.process.stdin.write(f"{layers}\n")
        self.process.stdin.flush()
        return self.read()["seconds"]

    def finish(self):
        self.process.stdin.close()
        if self.process.wait() != 0:
            sys.exit("pytorch_compare: the engine's program failed")


def timed(run, layers):
    seconds = []
    for _ in range(layers):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return seconds


def read_result(path, keep):
    data = torch.from_file(path, size=os.path.getsize(path) // 2, dtype=torch.int16)
    positions = data[: 2 * keep].view(torch.int32).long()
    rows = data[2 * keep :].view(torch.bfloat16).view(2, KV_HEADS, keep, DIM)
    return positions, rows[0], rows[1]


def overlap(a, b):
    return torch.isin(a, b).float().mean().item()


def compare_results(layer, keep, path):
    """What the engine kept, beside float32 and beside bf16 scores as PyTorch's variants have them."""
    positions, keys, values = read_result(path, keep)
    exact = select(reference(layer), keep)
    if not torch.equal(keys, layer.keys[:, positions]) or not torch.equal(values, layer.values[:, positions]):
        sys.exit("pytorch_compare: the engine's rows are not those of its positions")
    shared = {"float32": overlap(positions, exact), "pytorch": overlap(select(softmax(layer), keep), exact)}
    if shared["float32"] < 0.999:
        sys.exit(f"pytorch_compare: the engine shares only {shared['float32']:.4f} of its tokens with float32")
    return shared


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=5, help="layers in each turn")
    parser.add_argument("--compile", action="store_true", help="torch.compile's versions too (needs g++)")
    parser.add_argument("--engine", default=str(ROOT / "build/release/bin/structkv_layer_bench"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help=f"fail below {BAR:g} times")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    torch.set_grad_enabled(False)

    # As the service counts: the ceiling, but a tenth of 1,000 is 100.
    keep = max(WINDOW, math.ceil(0.1 * flags.tokens - 1e-9))
    layer = Layer(flags.tokens, seed=1)
    variants = {f.__name__: f for f in VARIANTS}
    if flags.compile:
        for f in VARIANTS:
            variants["compiled_" + f.__name__] = torch.compile(f)
    with tempfile.TemporaryDirectory() as folder:
        tensors, out = os.path.join(folder, "tensors"), os.path.join(folder, "out")
        layer.write(tensors)
        engine = Engine(flags.engine, flags.tokens, flags.threads, tensors, out)
        for statistic in variants.values():  # warms up, compiles
            compress(layer, statistic, keep)
        seconds = {name: [] for name in ["structkv", *variants]}
        for _ in range(flags.rounds):
            seconds["structkv"].append(statistics.median(engine.run(flags.layers)))
            for name, statistic in variants.items():
                run = timed(lambda: compress(layer, statistic, keep), flags.layers)
                seconds[name].append(statistics.median(run))
        engine.finish()
        shared = compare_results(layer, keep, out)

    medians = {name: statistics.median(rounds) for name, rounds in seconds.items()}
    best = min(variants, key=medians.get)
    ratios = [theirs / ours for theirs, ours in zip(seconds[best], seconds["structkv"])]
    ratio = statistics.median(ratios)
    report = {
        "device": engine.device, "threads": flags.threads, "torch": torch.__version__, "tokens": flags.tokens,
        "median_seconds": medians, "best_pytorch": best, "ratio": ratio, "lowest_ratio": min(ratios),
        "bar": BAR, "shared_with_float32": shared, "passed": ratio >= BAR,
    }
    if flags.json:
        print(json.dumps(report, indent=2))
    else:
        print(f"{flags.threads} threads, {engine.device}; PyTorch {torch.__version__}; {flags.tokens:,} tokens")
        for name, median in medians.items():
            print(f"  {name:26} {median * 1e3:8.1f} ms a layer")
        print(f"StructKV is {ratio:.1f} times as fast as '{best}' (lowest round {min(ratios):.1f}; bar {BAR:g})")
        print(f"tokens shared with float32: {shared['float32']:.4f}, PyTorch in bf16 {shared['pytorch']:.4f}")
    return 1 if flags.check and not report["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
