#!/usr/bin/env python3
"""Times a layer in PyTorch on the same GPU, for tests/gpu/run.sh. Prints JSON; skips in sight where torch or CUDA is not.

The work is that of tests/gpu/layer_bench.h: bf16 keys and values of 8 KV heads of 128, window queries of 8 tokens in 32
query heads, 10 % kept, the log-sum-exp not given. In two ways:
  sum      softmax over the GQA groups at once, summed over heads and averaged over the window; top-k; the same rows of
           all heads gathered
  kvpress  the arithmetic of the kvpress package's SnapKVPress: keys repeated for the query heads, softmax in float32,
           rounded, mean over the window, average pooling by 5, mean over the group; top-k and rows for each KV head
The engine's figures are read from the benchmark's JSON (--bench) and compared with the faster of the two.
"""
import argparse
import json
import math
import sys

QUERY_HEADS, KV_HEADS, DIM, WINDOW = 32, 8, 128, 8
GROUP = QUERY_HEADS // KV_HEADS
TOKENS = (8192, 32768, 131072)
WARM_UP, ROUNDS = 3, 20


def skip(why):
    print(json.dumps({"skipped": why}))
    sys.exit(0)


def weights(torch, queries, keys):
    """[heads, rows, token]: softmax of the window's queries over the keys before each."""
    scores = torch.matmul(queries, keys.transpose(-2, -1)) / math.sqrt(DIM)
    mask = torch.full((WINDOW, WINDOW), -math.inf, device=keys.device, dtype=scores.dtype).triu(1)
    scores[..., -WINDOW:] += mask.repeat(queries.shape[-2] // WINDOW, 1)
    return torch.softmax(scores, dim=-1, dtype=torch.float32)


def by_sum(torch, keys, values, queries, keep):
    grouped = queries.reshape(KV_HEADS, GROUP * WINDOW, DIM)
    saliency = weights(torch, grouped, keys).sum(dim=(0, 1)) / WINDOW
    best = torch.topk(saliency[:-WINDOW], keep - WINDOW, sorted=False).indices
    window = torch.arange(saliency.numel() - WINDOW, saliency.numel(), device=keys.device)
    positions = torch.cat((best, window)).sort().values
    return keys.index_select(1, positions), values.index_select(1, positions)


def by_kvpress(torch, keys, values, queries, keep):
    repeated = keys.repeat_interleave(GROUP, dim=0)
    attention = weights(torch, queries, repeated).to(keys.dtype)[..., :-WINDOW]
    scores = attention.mean(dim=-2)
    scores = torch.nn.functional.avg_pool1d(scores, kernel_size=5, padding=2, stride=1)
    scores = scores.view(KV_HEADS, GROUP, -1).mean(dim=1)
    scores = torch.nn.functional.pad(scores, (0, WINDOW), value=scores.max().item())
    rows = scores.topk(keep, dim=-1).indices.unsqueeze(-1).expand(-1, -1, DIM)
    return keys.gather(1, rows).contiguous(), values.gather(1, rows).contiguous()


def micros(torch, work):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for i in range(WARM_UP + ROUNDS):
        begin.record()
        work(i)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return 1e3 * sorted(times[WARM_UP:])[ROUNDS // 2]


def measure(torch, tokens):
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    # In turns, larger than the L2 cache several times over.
    l2_bytes = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
    count = max(2, math.ceil(4 * l2_bytes / (KV_HEADS * tokens * DIM * 2)))
    layers = [(normal(KV_HEADS, tokens, DIM), normal(KV_HEADS, tokens, DIM)) for _ in range(count)]
    queries = normal(QUERY_HEADS, WINDOW, DIM)
    keep = math.ceil(tokens / 10)
    ways = {"sum": by_sum, "kvpress": by_kvpress}
    return {
        name: micros(torch, lambda i, way=way: way(torch, *layers[i % count], queries, keep))
        for name, way in ways.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", help="JSON of structkv_gpu_bench", required=True)
    parser.add_argument("--table", help="file that a table is added to", required=True)
    flags = parser.parse_args()
    try:
        import torch
    except (ImportError, OSError) as error:  # the latter of a library of torch that does not load
        skip(f"no torch: {error}")
    if not torch.cuda.is_available():
        skip("torch has no CUDA")
    with open(flags.bench) as file:
        rows = json.load(file)["rows"]
    ours = {row["tokens"]: row["micros"] for row in rows if row["step"] == "32 layers"}
    measured = []
    for tokens in TOKENS:
        row = {"tokens": tokens, "structkv_micros": ours[tokens]}
        row.update({f"{name}_micros": value for name, value in measure(torch, tokens).items()})
        row["times_as_fast"] = min(row["sum_micros"], row["kvpress_micros"]) / ours[tokens]
        measured.append(row)
    print(json.dumps({"torch": torch.__version__, "rows": measured}))
    with open(flags.table, "a") as table:
        print(f"\nPyTorch {torch.__version__}, us a layer\n", file=table)
        print("| tokens | structkv | sum | kvpress | times as fast |\n|---|---|---|---|---|", file=table)
        for row in measured:
            print(
                f"| {row['tokens']} | {row['structkv_micros']:.1f} | {row['sum_micros']:.1f} | "
                f"{row['kvpress_micros']:.1f} | {row['times_as_fast']:.2f} |",
                file=table,
            )


if __name__ == "__main__":
    main()
