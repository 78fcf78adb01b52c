"""What follows a prompt: tokens that are given, and greedy decoding."""

from __future__ import annotations

from typing import Any

import torch

from .methods import Prefilled
from .models import Loaded


def feed(
    loaded: Loaded, prefilled: Prefilled, tokens: torch.Tensor, position: int, **kwargs: Any
) -> Any:
    """A forward of `tokens` [1, n] behind the prompt; logits of all of them: [1, n, vocabulary]."""
    if prefilled.uniform or tokens.shape[1] == 1:
        output = loaded.forward(tokens, prefilled.cache, position, logits_to_keep=0, **kwargs)
        return output.logits
    # Layers of several lengths: no one mask fits several queries, and one query needs none.
    steps = [
        loaded.forward(
            tokens[:, at : at + 1], prefilled.cache, position + at, logits_to_keep=0, **kwargs
        ).logits
        for at in range(tokens.shape[1])
    ]
    return torch.cat(steps, 1)


def answer(loaded: Loaded, prefilled: Prefilled, question: torch.Tensor, limit: int) -> list[int]:
    """At most `limit` tokens, greedily, after `question` [1, n]; ends before an end token."""
    ends = loaded.model.generation_config.eos_token_id
    stop = set(ends if isinstance(ends, list) else [ends])
    position, tokens, given = prefilled.tokens, question, list[int]()
    while len(given) < limit:
        logits = feed(loaded, prefilled, tokens, position)
        position += tokens.shape[1]
        token = int(logits[0, -1].argmax())
        if token in stop:
            break
        given.append(token)
        tokens = torch.tensor([[token]], device=question.device)
    return given
