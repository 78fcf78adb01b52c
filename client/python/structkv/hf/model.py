"""The models that compress() takes, and what the service is told of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..messages import GemFilterMethod, Method, ModelGeometry, Open

DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}

MODEL_TYPES = ("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "qwen3_moe")
"""`config.model_type` of what compress() takes."""


def check_model(model: Any) -> None:
    """TypeError where `model` is of a class that this package does not know."""
    kind = model.config.get_text_config(decoder=True).model_type
    if kind not in MODEL_TYPES:
        raise TypeError(
            f"model: {type(model).__name__} is of the type {kind!r};"
            f" one of {', '.join(MODEL_TYPES)} is expected"
        )


def build_open(model: Any, method: Method, output: str, model_id: str | None) -> Open:
    """`Open` of a prompt of `model`, but for its length. ValueError where the model's weights or
    attention are nothing that the service takes."""
    config = model.config.get_text_config(decoder=True)
    attention = [layer.self_attn for layer in model.get_decoder().layers]
    dtype = attention[0].k_proj.weight.dtype
    if dtype not in DTYPES:
        raise ValueError(f"model: weights of {dtype}; {', '.join(map(str, DTYPES))} is expected")
    scales = {float(each.scaling) for each in attention}
    if len(scales) > 1:
        raise ValueError(f"model: layers scale attention by {sorted(scales)}; one is expected")
    head_dim = attention[0].head_dim
    (scale,) = scales
    if isinstance(method, GemFilterMethod) and (method.filter_layer or 0) > len(attention) - 2:
        raise ValueError(
            f"filter_layer: {method.filter_layer}; at most {len(attention) - 2} is allowed, so"
            " that a layer is left to begin the second prefill at"
        )
    name = model_id if model_id is not None else config.name_or_path or type(model).__name__
    open = Open(
        geometry=ModelGeometry(
            layer_count=len(attention),
            query_head_count=config.num_attention_heads,
            kv_head_count=config.num_key_value_heads,
            key_dim=head_dim,
        ),
        dtype=DTYPES[dtype],  # type: ignore[arg-type]
        layout="token_head_dim",
        method=method,
        output="plan" if isinstance(method, GemFilterMethod) else output,  # type: ignore[arg-type]
        model_id=name[-256:],
    )
    return open if scale == head_dim**-0.5 else replace(open, attention_scale=scale)
