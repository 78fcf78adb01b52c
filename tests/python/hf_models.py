"""Tiny random models of each class that structkv.hf takes, and what docs/method.md says of a
prefill, computed from the models' own modules and attention weights."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import DynamicCache

torch.set_num_threads(1)  # models this small only lose by more
LAYERS = 8
VOCABULARY = 211

CACHE = "past_key_values"  # which newer transformers call "cache"
if "cache" in inspect.signature(transformers.LlamaModel.forward).parameters:
    CACHE = "cache"

_SHAPE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.15,  # attention that is not flat
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "llama_4_scaling_beta": 0.1,
}
_SLIDING = {"sliding_window": 1000, "layer_types": ["full_attention", "sliding_attention"] * 4}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "ministral": ("Ministral", _SLIDING),
    "ministral3": ("Ministral3", {"sliding_window": None, "rope_parameters": _YARN}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
}
MODELS = list(_MODELS)


def make_model(name: str, implementation: str = "sdpa", **changes: Any) -> Any:
    """A seeded model, f32."""
    kind, fields = _MODELS[name]
    torch.manual_seed(5)
    config = getattr(transformers, f"{kind}Config")(**{**_SHAPE, **fields, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.set_attn_implementation(implementation)
    return model


def make_prompt(tokens: int, seed: int = 0) -> torch.Tensor:
    """Token ids [1, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (1, tokens), generator=generator)


def pad_left(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch of prompts [1, tokens], as a tokenizer would give it."""
    width = max(prompt.shape[1] for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in zip(ids, prompts):
        row[width - prompt.shape[1] :] = prompt[0]
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def with_cache(cache: Any) -> dict[str, Any]:
    """The argument of a model that takes the cache."""
    return {CACHE: cache}


def cache_of(output: Any) -> Any:
    """A model's cache."""
    return getattr(output, CACHE)


def steps(model: Any, count: int = 4, **inputs: Any) -> torch.Tensor:
    """Logits of the greedy next tokens, [count, batch, vocabulary]."""
    result = model.generate(
        **inputs,
        max_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(result.logits)


@dataclass
class Reference:
    """A prefill: logits [1, vocabulary] of its last token, kept positions by layer, the skeleton,
    and the cache of kept rows."""

    logits: torch.Tensor
    kept: list[torch.Tensor]
    skeleton: torch.Tensor
    cache: DynamicCache

    def decode(self, model: Any, first: int, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [tokens, vocabulary] of `tokens`, one after the other, from position `first`."""
        logits = []
        for place, token in enumerate(tokens):
            position = torch.tensor([[first + place]])
            out = model(token.view(1, 1), **with_cache(self.cache), position_ids=position)
            logits.append(out.logits[0, -1])
        return torch.stack(logits)


def top(scores: torch.Tensor, count: int, window: int) -> torch.Tensor:
    """The window and the best of the others, the lower at a tie, ascending: [..., count] of
    [..., tokens]."""
    tokens = scores.shape[-1]
    ordered = scores[..., : tokens - window].sort(dim=-1, descending=True, stable=True).indices
    best = ordered[..., : count - window]
    last = torch.arange(tokens - window, tokens).expand(*scores.shape[:-1], window)
    return torch.cat([best, last], -1).sort(-1).values


def smooth(scores: torch.Tensor, window: int, kernel: int) -> torch.Tensor:
    """The maximum over `kernel` tokens, before the window."""
    result = scores.clone()
    before = scores[:, :-window]
    result[:, :-window] = torch.nn.functional.max_pool1d(before, kernel, 1, kernel // 2)
    return result


def reference(model: Any, ids: torch.Tensor, pivot: int, fastkv: bool = False) -> Reference:
    """StructKV with a fixed pivot, or FastKV, at 10 % and a skeleton of 20 %, of a model with
    eager attention: window 8, decay 0.9, kernel 7."""
    decoder, tokens, window = model.model, ids.shape[1], 8
    budget = -(-tokens // 10)
    hidden = decoder.embed_tokens(ids)
    positions = torch.arange(tokens)
    skeleton = positions
    centrality = torch.zeros(tokens)
    cache = DynamicCache()
    kept, weights = [], []
    hooks = [
        layer.self_attn.register_forward_hook(lambda _, __, output: weights.append(output[1]))
        for layer in decoder.layers
    ]
    for i, layer in enumerate(decoder.layers):
        rows = len(positions)
        causal = torch.full((rows, rows), float("-inf")).triu(1)[None, None]
        hidden = layer(
            hidden,
            attention_mask=causal,
            position_ids=positions[None],
            position_embeddings=decoder.rotary_emb(hidden, positions[None]),
            **with_cache(cache),
        )
        saliency = weights[-1][0, :, -window:].mean(1)  # [query_heads, rows]
        saliency = saliency.unflatten(0, (2, 3)).sum(1)
        if fastkv:
            saliency = smooth(saliency, window, 7)
            choice = top(saliency, budget, window)
        else:
            choice = top(saliency.sum(0), budget, window)
        kept.append(positions[choice])
        index = choice.expand(2, -1)[None, ..., None].expand(-1, -1, -1, 32)
        cache.layers[i].keys = cache.layers[i].keys.gather(2, index)
        cache.layers[i].values = cache.layers[i].values.gather(2, index)
        if i <= pivot:
            centrality = saliency.sum(0) if fastkv else 0.9 * centrality + saliency.sum(0)
        if i == pivot:
            skeleton = top(centrality, -(-tokens // 5), window)
            positions = positions[skeleton]
            hidden = hidden[:, skeleton]
    for hook in hooks:
        hook.remove()
    return Reference(model.lm_head(decoder.norm(hidden))[:, -1], kept, skeleton, cache)
