#!/usr/bin/env python3
"""Writes golden-methods-tiny-llama-1000.json: what other implementations keep of the captured prompt.

    venv/bin/python tests/data/make_method_golden.py    # README.md has the packages

Two kinds of cases:

* "kvpress": positions come out of the kvpress package's own code (`compress` of its presses), fed with
  the captured keys and with attention computed from the captured queries, in float64.
* "definition": positions are computed here, with PyTorch in float64, from the methods' publications.

The model that the prompt was captured from (tiny-llama) is run as well: it proves that the capture is its prefill, gives H2O's column sums
(column-sums-tiny-llama-1000.safetensors), and shows how far kvpress agrees with itself on keys that
were not rounded to BF16.

Where scores at the cut are closer than float32 can tell apart, `close` lists the positions on which an
implementation may differ; nothing else may.
"""

import argparse
import json
import math
import pathlib

import kvpress
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from make_golden import CLOSE, compact, order_metadata

HERE = pathlib.Path(__file__).resolve().parent
CAPTURE = HERE / "capture-tiny-llama-1000.safetensors"
GOLDEN = HERE / "golden-methods-tiny-llama-1000.json"
COLUMN_SUMS = HERE / "column-sums-tiny-llama-1000.safetensors"
MODEL = HERE / "tiny-llama"
TSP_LAYER, FILTER_LAYER = 6, 5


def attention(queries, keys, window):
    """[query_heads, window, N]: softmax over the keys up to each row's own token."""
    query_heads, rows, dim = queries.shape
    kv_heads, tokens, _ = keys.shape
    group = query_heads // kv_heads
    scores = queries[:, rows - window :].double() @ keys.double().repeat_interleave(
        group, 0
    ).transpose(1, 2)
    row_tokens = torch.arange(tokens - window, tokens)[:, None]
    scores = scores / math.sqrt(dim)
    scores = scores.masked_fill(torch.arange(tokens)[None] > row_tokens, float("-inf"))
    return scores.softmax(-1)


def by_group(per_query_head, kv_heads):
    return per_query_head.view(kv_heads, -1, *per_query_head.shape[1:])


def pooled(scores, kind, kernel):
    """Of the tokens before the window, [rows, tokens]."""
    if kind == "avg":
        return F.avg_pool1d(scores[None], kernel, 1, kernel // 2)[0]
    if kind == "max":
        return F.max_pool1d(scores[None], kernel, 1, kernel // 2)[0]
    return scores


def close_positions(scores, room):
    """Positions whose scores lie too close to the cut, where the cut is no exact tie."""
    if not 0 < room < len(scores):
        return []
    ordered = scores.sort(descending=True).values
    last, first_out = ordered[room - 1].item(), ordered[room].item()
    if last == first_out or (last - first_out) / last >= CLOSE:
        return []
    return ((scores - last).abs() / last < 2 * CLOSE).nonzero().flatten().tolist()


def best(scores, tokens, keep):
    """The best of scores[0 .. len), lower positions first at a tie, and all tokens after them."""
    room = keep - (tokens - len(scores))
    order = scores.sort(descending=True, stable=True).indices[:room]
    return sorted(order.tolist()) + list(range(len(scores), tokens)), close_positions(scores, room)


def share(ratio, tokens):
    return math.ceil(ratio * tokens - 1e-9)


class Prompt:
    def __init__(self, captured, layers):
        self.keys = [captured[f"layer.{i}.k"] for i in range(layers)]
        self.queries = [captured[f"layer.{i}.q_window"] for i in range(layers)]
        self.layers = layers
        self.kv_heads, self.tokens, _ = self.keys[0].shape

    def scores(self, layer, window):
        """Attention of the tokens before the window, mean over it, summed over the group."""
        a = attention(self.queries[layer], self.keys[layer], window).mean(1)
        return by_group(a, self.kv_heads).sum(1)[:, : self.tokens - window]


def rows_result(rows):
    return {"positions": [p for p, _ in rows], "close": [c for _, c in rows]}


# From the publications.


def pyramidkv(prompt, ratio, window, kernel, beta):
    keep = max(window, share(ratio, prompt.tokens))
    mean, most = keep - window, prompt.tokens - window
    bottom = mean / beta
    top = 2 * mean - bottom
    if top > most:
        top, bottom = most, 2 * mean - most
    exact = [top - i * (top - bottom) / (prompt.layers - 1) for i in range(prompt.layers)]
    budgets = [math.floor(e + 1e-9) for e in exact]
    room = [i for i in range(prompt.layers) if budgets[i] < most]
    for i in room[: mean * prompt.layers - sum(budgets)]:
        budgets[i] += 1
    result = []
    for layer in range(prompt.layers):
        scores = pooled(prompt.scores(layer, window), "avg", kernel)
        result.append(
            rows_result([best(row, prompt.tokens, window + budgets[layer]) for row in scores])
        )
    return result, None


def fastkv(prompt, ratio, skeleton_ratio, window, kernel, tsp_layer):
    result, skeleton = [], None
    for layer in range(prompt.layers):
        scores = pooled(prompt.scores(layer, window), "max", kernel)
        keep = max(window, share(ratio, prompt.tokens))
        result.append(rows_result([best(row, prompt.tokens, keep) for row in scores]))
        if layer == tsp_layer:
            keep = max(window, share(skeleton_ratio, prompt.tokens))
            positions, close = best(scores.sum(0), prompt.tokens, keep)
            skeleton = {"layer": layer, "skeleton": positions, "close": close}
    return result, skeleton


def gemfilter(prompt, ratio, kernel, filter_layer):
    scores = pooled(prompt.scores(filter_layer, 1).sum(0)[None], "avg", kernel)
    row = best(scores[0], prompt.tokens, share(ratio, prompt.tokens))
    empty = {"positions": [[]], "close": [[]]}
    result = [rows_result([row]) if i == filter_layer else empty for i in range(prompt.layers)]
    return result, {"layer": filter_layer, "skeleton": row[0], "close": row[1]}


def h2o(prompt, column_sums, ratio, recent_share):
    keep = share(ratio, prompt.tokens)
    before = prompt.tokens - math.floor(keep * recent_share + 1e-9)
    result = [
        rows_result([best(row[:before], prompt.tokens, keep) for row in sums.double()])
        for sums in column_sums
    ]
    return result, None


WINDOW_REDUCE = {"MEAN": torch.mean, "SUM": torch.sum, "MAX": torch.amax}
GROUP_REDUCE = {"SUM": torch.sum, "MEAN": torch.mean, "MAX": torch.amax}


def snapkv(prompt, ratio, window, kernel, over_window, over_group):
    """Reduced over the rows of the window first, then over the group."""
    result = []
    for layer in range(prompt.layers):
        a = attention(prompt.queries[layer], prompt.keys[layer], window)
        heads = WINDOW_REDUCE[over_window](a, 1)
        scores = GROUP_REDUCE[over_group](by_group(heads, prompt.kv_heads), 1)
        scores = scores[:, : prompt.tokens - window]
        keep = max(window, share(ratio, prompt.tokens))
        rows = pooled(scores, "avg", kernel)
        result.append(rows_result([best(row, prompt.tokens, keep) for row in rows]))
    return result, None


# Through kvpress.


def pressed(press, prompt, model):
    """Positions that `press.compress` keeps: it gathers values that are their own positions."""
    result = []
    for layer in range(prompt.layers):
        module = model.model.layers[layer].self_attn
        keys = prompt.keys[layer].double()[None]
        rows = prompt.queries[layer].shape[1]
        attentions = attention(prompt.queries[layer], prompt.keys[layer], rows)[None]
        values = torch.arange(prompt.tokens, dtype=torch.double)[None, None, :, None].expand(keys.shape)
        hidden = torch.zeros(1, prompt.tokens, model.config.hidden_size)
        _, kept = press.compress(module, hidden, keys, values, attentions, {})
        scores = press.score(module, hidden, keys, values, attentions, {})[0]
        found = []
        for head in range(prompt.kv_heads):
            positions = sorted(int(p) for p in kept[0, head, :, 0])
            ranked = scores[head]
            window = getattr(press, "window_size", 1)
            close = []
            if not isinstance(press, kvpress.StreamingLLMPress):
                close = close_positions(ranked[:-window], len(positions) - window)
            found.append((positions, close))
        result.append(rows_result(found))
    return result, None


def end_to_end(press, prompt, model, tokens):
    """The share of positions that the same press keeps in an ordinary run of the model."""
    full, cut = transformers.DynamicCache(), transformers.DynamicCache()
    with torch.no_grad():
        model(tokens[None], past_key_values=full)
        with press(model):
            model(tokens[None], past_key_values=cut)
    wanted, _ = pressed(press, prompt, model)
    same = total = 0
    for layer in range(prompt.layers):
        for head in range(prompt.kv_heads):
            all_keys = full.layers[layer].keys[0, head]
            kept = cut.layers[layer].keys[0, head]
            found = set(torch.cdist(kept, all_keys).argmin(1).tolist())
            same += len(found & set(wanted[layer]["positions"][head]))
            total += len(found)
    return same / total


def run_model(model, prompt, tokens):
    """Checks that the capture is this model's prefill; returns the column sums of its attention."""
    cache = transformers.DynamicCache()
    with torch.no_grad():
        out = model(tokens[None], past_key_values=cache, output_attentions=True)
    worst = 0.0
    for layer in range(prompt.layers):
        got, captured = cache.layers[layer].keys[0], prompt.keys[layer].float()
        worst = max(worst, ((got - captured).abs() / captured.abs().clamp(min=1)).max().item())
    assert worst < 2**-6, f"the capture's keys differ by {worst}: another model"
    print(f"captured keys lie within {worst:.5f} of the model's (BF16 rounds by {2**-8:.5f})")
    return [by_group(a[0].double().sum(1), prompt.kv_heads).sum(1).float() for a in out.attentions]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL, type=pathlib.Path)
    directory = parser.parse_args().model
    captured = load_file(CAPTURE)
    with safe_open(CAPTURE, "pt") as file:
        metadata = file.metadata()
    prompt = Prompt(captured, int(metadata["layers"]))
    tokens = captured["tokens"][: prompt.tokens].long()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    sums = run_model(model, prompt, tokens)
    save_file(
        {f"layer.{i}.column_sums": s.contiguous() for i, s in enumerate(sums)},
        COLUMN_SUMS,
        metadata={"model_id": metadata["model_id"], "prompt_tokens": metadata["prompt_tokens"]},
    )
    order_metadata(COLUMN_SUMS)

    cases = []

    def add(name, source, open_text, result, agreement=None):
        layers, pivot = result
        case = {"name": name, "source": source, "method": open_text, "layers": layers}
        if pivot is not None:
            case["pivot"] = pivot
        if agreement is not None:
            case["end_to_end_agreement"] = round(agreement, 4)
        cases.append(case)
        undecided = sum(1 for layer in layers for row in layer["close"] if row)
        print(f"{name}: {undecided} selections too close to call, end to end {agreement}")

    def press(name, made, open_text):
        agreement = end_to_end(made, prompt, model, tokens)
        add(name, "kvpress", open_text, pressed(made, prompt, model), agreement)

    def kv(removed):
        return f"kv_budget {{ ratio: {1 - removed!r} kind: BUDGET_KIND_KVPRESS }}"

    mean = "group_reduce: GROUP_REDUCE_MEAN"
    for removed, window, kernel in ((0.9, 64, 5), (0.5, 32, 7), (0.75, 16, 1)):
        press(
            f"snapkv_kvpress_{window}_{kernel}",
            kvpress.SnapKVPress(removed, window, kernel),
            f"snapkv {{ {kv(removed)} window_tokens: {window} pooling_kernel: {kernel} {mean} }}",
        )
    for removed, window, beta in ((0.9, 4, 20), (0.4, 64, 20), (0.7, 32, 8), (0.9, 64, 20)):
        press(
            f"pyramidkv_kvpress_{window}_{round(removed * 100)}",
            kvpress.PyramidKVPress(removed, window, 5, beta),
            f"pyramidkv {{ {kv(removed)} window_tokens: {window} beta: {beta} {mean} }}",
        )
    for removed, sinks in ((0.9, 4), (0.333, 16)):
        press(
            f"streaming_llm_kvpress_{sinks}",
            kvpress.StreamingLLMPress(removed, sinks),
            f"streaming_llm {{ {kv(removed)} sink_tokens: {sinks} }}",
        )
    press(
        "tova_kvpress",
        kvpress.TOVAPress(0.8),
        f"structkv {{ {kv(0.8)} window_tokens: 1 {mean} }}",
    )

    add("pyramidkv", "definition", "pyramidkv {}", pyramidkv(prompt, 0.10, 32, 5, 20))
    add(
        "pyramidkv_clamped",
        "definition",
        "pyramidkv { kv_budget { ratio: 0.6 } window_tokens: 8 beta: 10 }",
        pyramidkv(prompt, 0.6, 8, 5, 10),
    )
    add(
        "fastkv",
        "definition",
        f"fastkv {{ tsp_layer: {TSP_LAYER} }}",
        fastkv(prompt, 0.10, 0.20, 8, 7, TSP_LAYER),
    )
    add(
        "gemfilter",
        "definition",
        f"gemfilter {{ filter_layer: {FILTER_LAYER} }}",
        gemfilter(prompt, 0.10, 5, FILTER_LAYER),
    )
    add("h2o", "definition", "h2o {}", h2o(prompt, sums, 0.10, 0.5))
    add(
        "h2o_mostly_heavy",
        "definition",
        "h2o { kv_budget { ratio: 0.2 } recent_share: 0.1 }",
        h2o(prompt, sums, 0.2, 0.1),
    )
    add(
        "snapkv_group_max",
        "definition",
        "snapkv { group_reduce: GROUP_REDUCE_MAX }",
        snapkv(prompt, 0.10, 32, 5, "MEAN", "MAX"),
    )
    for over_window, over_group in (("SUM", "SUM"), ("MAX", "SUM"), ("MAX", "MAX")):
        add(
            f"snapkv_window_{over_window.lower()}_group_{over_group.lower()}",
            "definition",
            f"snapkv {{ window_reduce: WINDOW_REDUCE_{over_window} "
            f"group_reduce: GROUP_REDUCE_{over_group} }}",
            snapkv(prompt, 0.10, 32, 5, over_window, over_group),
        )

    golden = {
        "capture": CAPTURE.name,
        "column_sums": COLUMN_SUMS.name,
        "close_within": CLOSE,
        "versions": {
            "kvpress": kvpress_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "cases": cases,
    }
    GOLDEN.write_text(compact(golden) + "\n")


def kvpress_version():
    from importlib.metadata import version

    return version("kvpress")


if __name__ == "__main__":
    main()
