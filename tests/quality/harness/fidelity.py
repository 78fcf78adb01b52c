"""Layer by layer: what a compacted cache changes for the tokens that follow, and how well its sets
were chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .accuracy import split
from .generate import feed
from .methods import Method, find_kept, full
from .models import Loaded
from .tasks import Sample


@contextmanager
def recorded(loaded: Loaded) -> Iterator[dict[str, list[torch.Tensor]]]:
    """The outputs of each layer and of its attention, [tokens, hidden] f32 each, forward after
    forward in order.
    """
    outputs: dict[str, list[torch.Tensor]] = {}
    handles = []

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            outputs.setdefault(name, []).append(tensor.detach()[0].float())

        return hook

    for number, layer in enumerate(loaded.model.get_decoder().layers):
        handles.append(layer.register_forward_hook(keep(f"hidden.{number}")))
        handles.append(layer.self_attn.register_forward_hook(keep(f"attention.{number}")))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def eager(loaded: Loaded) -> Iterator[None]:
    """Attention that returns its weights."""
    before = loaded.model.config._attn_implementation
    loaded.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        loaded.model.set_attn_implementation(before)


def oracle(
    loaded: Loaded, prompt: torch.Tensor, rest: torch.Tensor
) -> tuple[list[torch.Tensor], Any]:
    """The attention that the tokens after the prompt pay to each of its tokens: [kv_heads, prompt]
    for each layer, and the full cache.
    """
    with full().prefill(loaded, prompt) as prefilled, eager(loaded):
        keep = prefilled.tokens
        attention = loaded.forward(rest, prefilled.cache, keep, output_attentions=True).attentions
    heads = loaded.model.config.num_key_value_heads
    return [
        weights[0, :, :, :keep].float().sum(1).unflatten(0, (heads, -1)).sum(1)
        for weights in attention
    ], prefilled.cache


def overlap(kept: torch.Tensor, wanted: torch.Tensor) -> float:
    """The share of the kept tokens that an oracle would keep: as many of the highest `wanted`
    [kv_heads, prompt]; of their sum where one set stands for all heads.
    """
    rows, scores = (kept[None], wanted.sum(0)[None]) if kept.dim() == 1 else (kept, wanted)
    if rows.shape[-1] == 0:
        return 1.0
    hits = [
        torch.isin(row.cpu(), score.topk(rows.shape[-1]).indices.cpu())
        for row, score in zip(rows, scores)
    ]
    return float(torch.stack(hits).float().mean())


def measure(
    loaded: Loaded, samples: Iterable[Sample], methods: list[Method], awareness: Iterable[bool]
) -> Iterator[dict[str, Any]]:
    """For each sample and method that it is long enough for, over the question and its right answer
    behind the prompt's cache: the cosine with the full cache's outputs, mean over the tokens, and
    the overlap with the oracle, for each layer.
    """
    for sample in samples:
        target = loaded.tokenizer.encode(sample.question.target)
        for aware in awareness:
            prompt, question = split(loaded, sample, aware)
            rest = torch.cat([question, torch.tensor([target], device=question.device)], 1)
            wanted, full_cache = oracle(loaded, prompt, rest)
            with full().prefill(loaded, prompt) as prefilled, recorded(loaded) as reference:
                feed(loaded, prefilled, rest, prefilled.tokens)
            for method in methods:
                if not method.fits(sample.tokens):
                    continue
                with method.prefill(loaded, prompt) as prefilled:
                    # Before the tokens that follow are added to the cache.
                    kept = prefilled.kept or find_kept(full_cache, prefilled.cache)
                    with recorded(loaded) as outputs:
                        feed(loaded, prefilled, rest, prefilled.tokens)
                yield {
                    "task": sample.task,
                    "tokens": sample.tokens,
                    "number": sample.number,
                    "aware": aware,
                    "method": method.name,
                    "budget": method.budget,
                    **prefilled.measures(),
                    "overlap": [overlap(a, b) for a, b in zip(kept, wanted)],
                    **{
                        kind: _cosines(kind, outputs, reference, len(kept))
                        for kind in ("hidden", "attention")
                    },
                }


def _cosines(
    kind: str,
    outputs: dict[str, list[torch.Tensor]],
    reference: dict[str, list[torch.Tensor]],
    layers: int,
) -> list[float]:
    names = [f"{kind}.{layer}" for layer in range(layers)]
    return [
        torch.nn.functional.cosine_similarity(
            torch.cat(outputs[name]), torch.cat(reference[name]), dim=-1
        )
        .mean()
        .item()
        for name in names
    ]
