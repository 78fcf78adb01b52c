#!/usr/bin/env python3
"""Writes golden-tiny-llama-1000.json: what the methods keep of the captured prompt.

Computed from the definitions in docs/method.md, in float64, with numpy alone and none of the
project's code, so that the engine has something independent to agree with. Run it again after a
change of the definitions:

    python3 tests/data/make_golden.py    # README.md has the packages

Where two scores at the cut are closer than float32 can tell apart, `close` lists the positions on
which an implementation may differ.
"""

import json
import math
import pathlib
import struct

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
CAPTURE = HERE / "capture-tiny-llama-1000.safetensors"
GOLDEN = HERE / "golden-tiny-llama-1000.json"

# Relative distance from the cut within which float32 arithmetic may decide otherwise.
CLOSE = 1e-4


def read_capture(path):
    """The metadata and the tensors, as float64."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        if entry["dtype"] == "BF16":
            bits = np.frombuffer(raw[begin:end], dtype="<u2").astype(np.uint32) << 16
            tensors[name] = bits.view(np.float32).astype(np.float64).reshape(entry["shape"])
    return metadata, tensors


def saliency(queries, keys, window):
    """S_g[j], the mean over the window of the attention of the group's query heads."""
    query_heads, _, dim = queries.shape
    kv_heads, tokens, _ = keys.shape
    group = query_heads // kv_heads
    per_head = np.zeros((kv_heads, tokens))
    for head in range(query_heads):
        for row in range(window):
            token = tokens - window + row
            query = queries[head, queries.shape[1] - window + row]
            scores = keys[head // group, : token + 1] @ query / math.sqrt(dim)
            weights = np.exp(scores - scores.max())
            per_head[head // group, : token + 1] += weights / weights.sum() / window
    return per_head


def smooth(scores, pooling, kernel):
    half = kernel // 2
    out = scores.copy()
    for j in range(len(scores)):
        around = scores[max(0, j - half) : j + half + 1]
        if pooling == "avg":
            out[j] = around.sum() / kernel
        elif pooling == "max":
            out[j] = around.max()
    return out


def budget(ratio, window, tokens, on_top=False):
    share = math.ceil(ratio * tokens - 1e-9)
    if on_top:
        return min(tokens, share + window)
    return min(tokens, max(window, share))


def select(scores, window, keep):
    """The window and the best of the tokens before it; and the positions that are too close to call."""
    before = len(scores) - window
    room = keep - window
    order = sorted(range(before), key=lambda j: (-scores[j], j))
    positions = sorted(order[:room]) + list(range(before, len(scores)))
    close = []
    if 0 < room < before:
        last, first_out = scores[order[room - 1]], scores[order[room]]
        # Scores that are equal to the bit come from one source value (maximum) and stay equal.
        if last != first_out and (last - first_out) / last < CLOSE:
            close = [j for j in range(before) if abs(scores[j] - last) / last < 2 * CLOSE]
    return positions, close


def metrics(scores, share):
    p = scores / scores.sum()
    tokens = len(p)
    top = max(1, math.ceil(share * tokens - 1e-9))
    positive = p[p > 0]
    return {
        "entropy": float(-(positive * np.log(positive)).sum()),
        "sparsity": float(np.sort(p)[::-1][:top].sum()),
        "variance": float(((tokens * p - 1) ** 2).mean()),
    }


def transitions(layers, weights=(0.2, 0.3, 0.5)):
    """T(l); None for layer 0."""
    scores = [None] + [0.0] * (len(layers) - 1)
    signed = (("entropy", -1.0), ("sparsity", 1.0), ("variance", 1.0))
    for (name, sign), weight in zip(signed, weights):
        gradients = [
            sign * (layers[i][name] - layers[i - 1][name]) for i in range(1, len(layers))
        ]
        largest = max((abs(g) for g in gradients), default=0.0)
        for i, gradient in enumerate(gradients):
            if largest > 0:
                scores[i + 1] += weight * gradient / largest
    return scores


def pivot(case, layer_metrics, sums):
    count = len(sums)
    seen = layer_metrics
    if case["fixed_layer"] is None:
        scores = transitions(layer_metrics)
        first = max(1, math.ceil(0.25 * count))
        last = min(math.floor(0.75 * count), count - 2)
        transition_layer = max(range(first, last + 1), key=lambda i: (scores[i], -i))
        layer = transition_layer + 1
    else:
        layer, transition_layer = case["fixed_layer"], None
        seen = layer_metrics[: layer + 1]
        scores = transitions(seen)
    centrality = np.zeros_like(sums[0])
    for current in range(layer + 1):
        centrality = 0.9 * centrality + sums[current]
    keep = budget(0.20, case["window"], len(centrality), case["on_top"])
    positions, close = select(centrality, case["window"], keep)
    return {
        "layer": layer,
        "transition_layer": transition_layer,
        "transition": scores,
        "skeleton": positions,
        "close": close,
        "centrality_total": float(centrality.sum()),
    }


def run(case, captured, count):
    result = dict(case, layers=[])
    if case["method"] == "streaming_llm":
        tokens = captured["layer.0.k"].shape[1]
        keep = budget(case["ratio"], 4, tokens)
        positions = list(range(4)) + list(range(tokens - keep + 4, tokens))
        result["layers"] = [{"positions": [positions], "close": [[]]} for _ in range(count)]
        return result
    sums, layer_metrics = [], []
    for layer in range(count):
        keys = captured[f"layer.{layer}.k"]
        per_head = saliency(captured[f"layer.{layer}.q_window"], keys, case["window"])
        total = per_head.sum(axis=0)
        tokens = len(total)
        before = tokens - case["window"]
        keep = budget(case["ratio"], case["window"], tokens, case["on_top"])
        rows = per_head if case["per_kv_head"] else total[None]
        selected = []
        for row in rows:
            smoothed = row.copy()
            smoothed[:before] = smooth(row[:before], case["pooling"], case["kernel"])
            selected.append(select(smoothed, case["window"], keep))
        sums.append(total)
        layer_metrics.append(metrics(total, 0.1))
        result["layers"].append(
            {
                "positions": [positions for positions, _ in selected],
                "close": [close for _, close in selected],
                **layer_metrics[-1],
            }
        )
    if case["method"] == "structkv":
        result["pivot"] = pivot(case, layer_metrics, sums)
    return result


def cases():
    base = {
        "method": "structkv",
        "window": 8,
        "ratio": 0.10,
        "on_top": False,
        "per_kv_head": False,
        "pooling": "none",
        "kernel": 5,
        "fixed_layer": None,
    }
    yield dict(base, name="structkv_exact")
    yield dict(base, name="structkv_fixed", fixed_layer=5, ratio=0.05)
    yield dict(base, name="structkv_per_kv_head", per_kv_head=True)
    yield dict(base, name="structkv_max_pooling_on_top", pooling="max", kernel=7, on_top=True)
    snapkv = dict(base, method="snapkv", window=32, per_kv_head=True, pooling="avg")
    yield dict(snapkv, name="snapkv")
    yield dict(snapkv, name="snapkv_per_layer", per_kv_head=False, ratio=0.2)
    yield dict(base, method="streaming_llm", name="streaming_llm", window=0)


def rounded(value):
    """To 12 digits: what sums of floats have beyond depends on the machine."""
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.12g}") if isinstance(value, float) else value


def compact(value, indent=0):
    """JSON with one innermost list or number a line, so that a change can be read."""
    pad = " " * indent
    if isinstance(value, dict):
        inner = ",\n".join(
            f"{pad} {json.dumps(key)}: {compact(item, indent + 1)}" for key, item in value.items()
        )
        return "{\n" + inner + "\n" + pad + "}"
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        inner = ",\n".join(f"{pad} {compact(item, indent + 1)}" for item in value)
        return "[\n" + inner + "\n" + pad + "]"
    return json.dumps(rounded(value), separators=(",", ":"))


def order_metadata(path):
    """Sorts the metadata of a safetensors file, which the package writes in any order."""
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    path.write_bytes(data[:8] + text.ljust(size) + data[8 + size :])


def main():
    metadata, captured = read_capture(CAPTURE)
    results = [run(case, captured, int(metadata["layers"])) for case in cases()]
    golden = {"capture": CAPTURE.name, "close_within": CLOSE, "cases": results}
    GOLDEN.write_text(compact(golden) + "\n")
    for result in results:
        undecided = sum(1 for layer in result["layers"] for row in layer["close"] if row)
        print(f"{result['name']}: pivot {result.get('pivot', {}).get('layer')}, "
              f"{undecided} selections too close to call")


if __name__ == "__main__":
    main()
