"""Why sets are as good as they are: each layer's kept tokens alone, behind the full cache's own
queries, keys and values, so that nothing of other layers is in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .accuracy import split
from .fidelity import eager
from .methods import Method, find_kept, full
from .models import Loaded
from .tasks import Sample

WINDOW = 8
MEASURES = ("mass", "output", "answer")


class Reference:
    """The tokens that follow a prompt, up to the right answer, behind its full cache."""

    def __init__(self, loaded: Loaded, sample: Sample, aware: bool) -> None:
        self.prompt, question = split(loaded, sample, aware)
        target = torch.tensor([loaded.tokenizer.encode(sample.question.target)])
        self._rest = torch.cat([question, target.to(question.device)], 1)
        self._asking = question.shape[1] - 1
        with full().prefill(loaded, self.prompt) as prefilled, eager(loaded):
            self.cache = prefilled.cache
            self._attention = self._weights(loaded, self._rest, self.cache, self.tokens)
        self._projections = [
            layer.self_attn.o_proj for layer in loaded.model.get_decoder().layers
        ]
        self._answers = (self.prompt[0] == target[0, 0]).nonzero()[:, 0]

    @property
    def tokens(self) -> int:
        """Of the prompt."""
        return int(self.prompt.shape[1])

    @property
    def layers(self) -> int:
        return len(self._attention)

    @staticmethod
    def _weights(loaded: Loaded, tokens: torch.Tensor, cache: Any, position: int) -> Any:
        """Of each layer: [query_heads, tokens, all before and these], f32."""
        outputs = loaded.forward(tokens, cache, position, output_attentions=True)
        return [layer[0].float() for layer in outputs.attentions]

    def looked_at(self, loaded: Loaded) -> list[float] | None:
        """The saliency of the answer's first token over the mean token's, by layer: what the
        prompt's last WINDOW tokens pay it. 1: no more than any other. None where it lies among
        them.
        """
        places = self._answers[self._answers < self.tokens - WINDOW]
        if places.numel() == 0:
            return None
        window = self.prompt[:, -WINDOW:]
        with full().prefill(loaded, self.prompt[:, :-WINDOW]) as prefilled, eager(loaded):
            layers = self._weights(loaded, window, prefilled.cache, prefilled.tokens)
        saliency = [weights.sum((0, 1))[:-WINDOW] for weights in layers]
        return [(each[places].mean() / each.mean()).item() for each in saliency]

    def sought(self) -> list[float]:
        """The attention that the token before the answer pays to its first token, by layer, of the
        query head that pays it most.
        """
        return [
            weights[:, self._asking, self._answers].sum(-1).max().item()
            for weights in self._attention
        ]

    def oracle(self, count: int) -> list[torch.Tensor]:
        """The tokens to which those that follow pay most, by layer."""
        return [
            weights[:, :, : self.tokens].sum((0, 1)).topk(count).indices
            for weights in self._attention
        ]

    def measure(self, kept: list[torch.Tensor]) -> dict[str, list[float]]:
        """MEASURES of sets, i64 [kept] or [kv_heads, kept], by layer: the share of the attention on
        the prompt that they have; the cosine of the attention's output where they are all that
        there is; the share of the KV heads that keep the answer's first token.
        """
        result: dict[str, list[float]] = {name: [] for name in MEASURES}
        for layer, positions in enumerate(kept):
            values = self.cache.layers[layer].values[0].float()
            weights = self._attention[layer]
            there = torch.zeros(values.shape[0], weights.shape[-1], dtype=torch.bool)
            there[:, self.tokens :] = True
            there.scatter_(1, positions.cpu().expand(values.shape[0], -1), True)
            groups = weights.shape[0] // values.shape[0]
            seen = weights * there.to(weights.device).repeat_interleave(groups, 0)[:, None]
            on_prompt = seen[:, :, : self.tokens].sum() / weights[:, :, : self.tokens].sum()
            outputs = [
                self._projections[layer](
                    (each @ values.repeat_interleave(groups, 0))
                    .transpose(0, 1)
                    .flatten(1)
                    .to(self._projections[layer].weight.dtype)
                )
                for each in (weights, seen / seen.sum(-1, keepdim=True))
            ]
            cosine = torch.nn.functional.cosine_similarity(*outputs, dim=-1)
            result["mass"].append(on_prompt.item())
            result["output"].append(cosine.float().mean().item())
            result["answer"].append(there[:, self._answers.cpu()].float().mean().item())
        return result


def measure(
    loaded: Loaded, samples: Iterable[Sample], methods: list[Method], awareness: Iterable[bool]
) -> Iterator[dict[str, Any]]:
    """For each sample and method that it is long enough for: MEASURES of its sets; and for each
    budget of `random` sets of as many tokens and of the `oracle`'s. The full cache's record has
    `sought` and, unless that is None, `looked_at` as well.
    """
    for sample in samples:
        for aware in awareness:
            with torch.inference_mode():
                reference = Reference(loaded, sample, aware)
                told = {"sought": reference.sought()}
                if looked_at := reference.looked_at(loaded):
                    told["looked_at"] = looked_at
                chosen = list(_compared(reference, methods, sample.number))
                for method in methods:
                    if not method.fits(sample.tokens):
                        continue
                    with method.prefill(loaded, reference.prompt) as prefilled:
                        kept = prefilled.kept or find_kept(reference.cache, prefilled.cache)
                    chosen.append((method.name, method.budget, kept))
                for name, budget, kept in chosen:
                    yield {
                        "task": sample.task,
                        "tokens": sample.tokens,
                        "number": sample.number,
                        "aware": aware,
                        "method": name,
                        "budget": budget,
                        **reference.measure(kept),
                        **(told if name == "full" else {}),
                    }


def _compared(
    reference: Reference, methods: list[Method], seed: int
) -> Iterator[tuple[str, float, list[torch.Tensor]]]:
    for budget in dict.fromkeys(method.budget for method in methods if method.name != "full"):
        count = math.ceil(budget * reference.tokens - 1e-9)
        random = torch.Generator().manual_seed(seed)
        yield (
            "random",
            budget,
            [
                torch.randperm(reference.tokens, generator=random)[:count]
                for _ in range(reference.layers)
            ],
        )
        yield "oracle", budget, reference.oracle(count)
