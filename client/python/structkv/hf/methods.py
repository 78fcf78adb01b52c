"""What a caller of compress() names becomes the service's `Method` and `Open`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch

from ..messages import (
    Budget,
    FastKvMethod,
    FullMethod,
    GemFilterMethod,
    H2oMethod,
    Method,
    ModelGeometry,
    Open,
    Pivot,
    PyramidKvMethod,
    SnapKvMethod,
    StreamingLlmMethod,
    StructKvMethod,
)

MethodName: TypeAlias = Literal[
    "structkv", "snapkv", "pyramidkv", "fastkv", "gemfilter", "h2o", "streaming_llm", "full"
]

METHODS: dict[str, Any] = {
    "structkv": StructKvMethod,
    "snapkv": SnapKvMethod,
    "pyramidkv": PyramidKvMethod,
    "fastkv": FastKvMethod,
    "gemfilter": GemFilterMethod,
    "h2o": H2oMethod,
    "streaming_llm": StreamingLlmMethod,
    "full": FullMethod,
}

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


def build_method(
    method: MethodName | Method,
    layers: int,
    kv_budget: float | Budget | None,
    skeleton: float | Budget | None,
    pivot: str | int | Pivot | None,
    parameters: dict[str, Any],
) -> Method:
    """The method's message; ValueError names an argument that the method does not have.

    Without `pivot`, FastKV's layer is the one before the middle (the authors' 15 of 32), GemFilter's
    13/32 of the depth, and StructKV looks for it ONLINE.
    """
    if not isinstance(method, str):
        given = {"kv_budget": kv_budget, "skeleton": skeleton, "pivot": pivot, **parameters}
        extra = [name for name, value in given.items() if value is not None]
        if extra:
            raise ValueError(f"{', '.join(extra)}: the method came as a message, which has them all")
        return method
    if method not in METHODS:
        raise ValueError(f"method: {method!r}; one of {', '.join(METHODS)} is expected")
    fields = dict(parameters)
    if kv_budget is not None:
        if method == "full":
            raise ValueError("kv_budget: the method 'full' keeps everything")
        fields["kv_budget"] = _budget(kv_budget)
    if skeleton is not None:
        if method not in ("structkv", "fastkv"):
            raise ValueError(f"skeleton: the method {method!r} has none")
        fields["skeleton_budget"] = _budget(skeleton)
    if method == "structkv":
        fields["pivot"] = _pivot("online" if pivot is None else pivot)
    elif method in ("fastkv", "gemfilter"):
        if pivot is not None and not isinstance(pivot, int):
            raise ValueError(f"pivot: {pivot!r}; the method {method!r} takes a layer")
        name, default = (
            ("tsp_layer", max(0, layers // 2 - 1))
            if method == "fastkv"
            else ("filter_layer", min(13 * layers // 32, max(0, layers - 2)))
        )
        fields.setdefault(name, default if pivot is None else pivot)
    elif pivot is not None:
        raise ValueError(f"pivot: the method {method!r} has none")
    message: Method = METHODS[method](**fields)
    return message


def _budget(budget: float | Budget) -> Budget:
    return budget if isinstance(budget, Budget) else Budget(ratio=budget)


def _pivot(pivot: str | int | Pivot) -> Pivot:
    if isinstance(pivot, Pivot):
        return pivot
    if isinstance(pivot, int):
        return Pivot(mode="fixed", fixed_layer=pivot)
    modes = ("online", "profiled", "exact")
    if pivot not in modes:
        raise ValueError(f"pivot: {pivot!r}; a layer, a Pivot or one of {modes} is expected")
    return Pivot(mode=pivot)  # type: ignore[arg-type]


def decides_after(method: Method, layer: int) -> bool:
    """Whether the answer of `layer` may bring a pivot in mid-prefill."""
    if isinstance(method, FastKvMethod):
        return layer == method.tsp_layer
    if isinstance(method, GemFilterMethod):
        return layer == method.filter_layer
    if isinstance(method, StructKvMethod) and method.pivot is not None:
        if method.pivot.mode == "fixed":
            return layer == method.pivot.fixed_layer
        return method.pivot.mode in ("online", "profiled")
    return False


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
            f"filter_layer: {method.filter_layer}; at most {len(attention) - 2} is allowed, so that a"
            " layer is left to begin the second prefill at"
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
