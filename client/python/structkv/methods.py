"""Methods of the service by their names."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from .messages import (
    Budget,
    FastKvMethod,
    FullMethod,
    GemFilterMethod,
    H2oMethod,
    Method,
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


def build_method(
    method: MethodName | Method,
    layers: int,
    kv_budget: float | Budget | None,
    skeleton: float | Budget | None,
    pivot: str | int | Pivot | None,
    parameters: dict[str, Any],
) -> Method:
    """The method's message; ValueError names an argument that the method does not have.

    Without `pivot`, FastKV's layer is the one before the middle (the authors' 15 of 32),
    GemFilter's 13/32 of the depth, and StructKV looks for it ONLINE.
    """
    if not isinstance(method, str):
        given = {"kv_budget": kv_budget, "skeleton": skeleton, "pivot": pivot, **parameters}
        extra = [name for name, value in given.items() if value is not None]
        if extra:
            raise ValueError(
                f"{', '.join(extra)}: the method came as a message, which has them all"
            )
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
