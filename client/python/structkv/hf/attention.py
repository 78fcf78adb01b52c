"""The package's attention functions: the model's own, which hand out what they are given."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "structkv_"

IMPLEMENTATIONS = ("sdpa", "eager")
"""`attn_implementation` that there is a function for."""

Tap = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Takes a layer's queries, keys and values, [batch, heads, tokens, dim], after RoPE."""


def _attention(
    name: str,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        structkv_tap: Tap | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if structkv_tap is not None:
            structkv_tap(query, key, value)
        if name == "eager":  # each model has its own
            function = sys.modules[type(module).__module__].eager_attention_forward
        else:
            function = ALL_ATTENTION_FUNCTIONS[name]
        result: tuple[torch.Tensor, torch.Tensor | None] = function(
            module, query, key, value, attention_mask, **kwargs
        )
        return result

    return forward


for _name in IMPLEMENTATIONS:
    AttentionInterface.register(PREFIX + _name, _attention(_name))
    AttentionMaskInterface.register(PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])


def causal_mask(
    config: Any,
    query_length: int,
    entries: int,
    valid: torch.Tensor | None,
    like: torch.Tensor,
) -> torch.Tensor | None:
    """The mask of `query_length` queries behind `entries` cached ones, in the form that the model's
    attention takes. `valid`: bool [batch, entries + query_length], None: all. `like`: the hidden
    states, [batch, query_length, hidden], for batch, type and device."""
    mask: torch.Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
        batch_size=like.shape[0],
        q_length=query_length,
        kv_length=entries + query_length,
        q_offset=entries,
        kv_offset=0,
        mask_function=causal_mask_function,
        attention_mask=valid,
        allow_is_causal_skip=True,
        dtype=like.dtype,
        config=config,
        device=like.device,
    )
    return mask


def attention_sums(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, rows: int = 256
) -> torch.Tensor:
    """What each token drew from all queries of the prompt, as H2O asks for: the causal attention
    summed over queries and over the query heads of a KV head, f32 [kv_heads, tokens].

    queries [query_heads, tokens, dim], keys [kv_heads, tokens, dim]. `rows` queries at a time, so
    that no [tokens, tokens] is ever held; as much work as the attention itself.
    """
    heads, tokens, _ = keys.shape
    grouped = queries.unflatten(0, (heads, -1)).float()
    transposed = keys.float().transpose(1, 2)[:, None]
    sums = torch.zeros(heads, tokens, device=keys.device)
    for begin in range(0, tokens, rows):
        end = min(begin + rows, tokens)
        scores = grouped[:, :, begin:end] @ transposed[..., :end] * scale
        future = torch.ones(end - begin, end, dtype=torch.bool, device=keys.device).triu(begin + 1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        sums[:, :end] += weights.sum((1, 2))
    return sums
