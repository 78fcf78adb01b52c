"""What a compression gives back. Tensors are views of the library's memory, never copies; keys and
values are on a GPU (Tensor.device) where they were written to an arena of its memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ._core import Tensor
from .messages import CacheInfo, LayerMetrics, Opened, PivotMode, Summary


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """One layer's answer.

    kept_tokens: tokens kept in each KV head; of a layer of skeleton rows at most the skeleton.
    kept_blocks: blocks of keys where they are paged, else 0.
    metrics: where the method has statistics.
    positions: i32 [kept_tokens] or, selected per KV head, [kv_heads, kept_tokens]; ascending in
        each row. None where no token is kept.
    keys, values: [kv_heads, kept_tokens, dim], or the layout and the blocks of Open, of its dtype;
        None for a plan, where the cache is held, and for values that are a part of the keys. Rows
        for several decode ranks (ShardGroup.decode_shard_count) are one axis.
    key_scales, value_scales: f32 [1] or [kv_heads], as they were sent.
    saliency: f32 [tokens] or [kv_heads, tokens], on request; of a layer of skeleton rows of the
        skeleton's tokens.
    """

    layer: int
    kept_tokens: int
    kept_blocks: int
    metrics: LayerMetrics | None
    positions: Tensor | None
    keys: Tensor | None
    values: Tensor | None
    key_scales: Tensor | None
    value_scales: Tensor | None
    saliency: Tensor | None


@dataclass(frozen=True, kw_only=True)
class PivotResult:
    """The pivot layer and the skeleton.

    mode: what really answered.
    decided_at_layer: the layer whose statistics made the decision.
    skeleton_from_layer: the first layer that may be sent as skeleton rows; None: no layer is left.
    profiled_prompts: prompts behind the profile, where the mode "profiled" answered.
    layers: metrics and scores of every layer that the decision saw, in layer order.
    skeleton: i32 [skeleton_tokens], ascending.
    centrality: f32 [tokens], on request.
    """

    pivot_layer: int
    transition_layer: int | None
    mode: PivotMode | None
    decided_at_layer: int
    skeleton_from_layer: int | None
    profiled_prompts: int
    layers: tuple[LayerMetrics, ...]
    skeleton: Tensor | None
    centrality: Tensor | None


@dataclass(frozen=True, kw_only=True)
class RowPull:
    """Rows of a layer that the server asks for (Open.pull).

    kept_tokens: rows of each KV head.
    keys: whether rows of keys are asked for beside those of values.
    positions: i32 [kept_tokens] or [kv_heads, kept_tokens]: tokens of the prompt.
    """

    layer: int
    kept_tokens: int
    keys: bool
    positions: Tensor


Event: TypeAlias = LayerResult | PivotResult | Summary
"""One step of a session; the summary comes last."""


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """A whole compressed prompt; `layers` in layer order."""

    opened: Opened
    layers: tuple[LayerResult, ...]
    pivot: PivotResult | None
    summary: Summary


@dataclass(frozen=True, kw_only=True)
class FetchedCache:
    """What was asked for of a held cache: layers in order, with the heads that were asked for,
    without saliency; empty where FetchOptions.on_layer took them. `attempts` that it took."""

    info: CacheInfo
    layers: tuple[LayerResult, ...]
    attempts: int
