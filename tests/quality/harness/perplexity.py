"""How well a text goes on behind a compacted cache of its beginning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .generate import feed
from .methods import Method
from .models import Loaded


def measure(
    loaded: Loaded, text: str, length: int, continuation: int, samples: int, methods: list[Method]
) -> Iterator[dict[str, Any]]:
    """The mean negative log-likelihood (nats a token) of `continuation` tokens after each of
    `samples` pieces of `text` of `length` tokens, which lie evenly in it; a piece's number is the
    place that it begins at.
    """
    tokens = loaded.tokenizer.encode(text)
    spare = len(tokens) - length - continuation
    if spare < 0:
        raise ValueError(
            f"text: {len(tokens)} tokens; {length + continuation} are expected at least"
        )
    for number in range(samples):
        begin = spare * number // max(1, samples - 1)
        cut = begin + length
        piece = loaded.tokenizer.begin + tokens[begin:cut]
        prompt = torch.tensor([piece], device=loaded.model.device)
        rest = torch.tensor([tokens[cut : cut + continuation]], device=loaded.model.device)
        for method in methods:
            if not method.fits(length):
                continue
            with method.prefill(loaded, prompt) as prefilled:
                logits = feed(loaded, prefilled, rest[:, :-1], prefilled.tokens)
            loss = torch.nn.functional.cross_entropy(logits[0].float(), rest[0, 1:])
            yield {
                "tokens": length,
                "number": begin,
                "method": method.name,
                "budget": method.budget,
                "loss": loss.item(),
                **prefilled.measures(),
            }
