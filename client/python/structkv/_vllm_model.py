"""What vLLM's configuration says of a model, in the service's words."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from .messages import (
    FastKvMethod,
    Hold,
    ModelGeometry,
    Open,
    RotaryParameters,
    ShardGroup,
    SnapKvMethod,
    StructKvMethod,
)
from .methods import build_method

METHODS = {"structkv": 8, "snapkv": 32, "fastkv": 8, "streaming_llm": 0, "full": 0}
"""Those that keep the same number of tokens in every layer and need nothing but queries, with the
default of their window."""

DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


PARALLEL = (
    "pipeline_parallel_size",
    "prefill_context_parallel_size",
    "decode_context_parallel_size",
)
"""Kinds of parallelism that there must be none of."""


@dataclass(frozen=True)
class Shard:
    """A tensor-parallel rank, and the KV heads of the whole model."""

    rank: int
    ranks: int
    kv_heads: int

    @classmethod
    def of(cls, vllm_config: Any) -> Shard:
        """This process's."""
        parallel = vllm_config.parallel_config
        ranks = parallel.tensor_parallel_size
        kv_heads = vllm_config.model_config.get_total_num_kv_heads()
        return cls(parallel.rank % ranks, ranks, kv_heads)

    def group(self, group_id: str) -> ShardGroup | None:
        """Its place in a prompt; None where it has all of it."""
        if self.ranks == 1:
            return None
        return ShardGroup(group_id=group_id, shard_count=self.ranks, shard_index=self.rank)

    def heads(self) -> range:
        """KV heads that the rank has: its share or, of more ranks than heads, one of them."""
        if self.ranks > self.kv_heads:
            head = self.rank * self.kv_heads // self.ranks
            return range(head, head + 1)
        each = self.kv_heads // self.ranks
        return range(self.rank * each, (self.rank + 1) * each)

    def parts(self, holders: int) -> list[tuple[int, range]]:
        """Which of `holders` ranks, that hold a prompt, have the heads that this one has: each with
        those to be fetched, ascending. ValueError where so many cannot have them."""
        if holders < 1 or (self.kv_heads % holders and holders % self.kv_heads):
            raise ValueError(
                f"handles: {holders}; a divisor or a multiple of the model's {self.kv_heads} KV"
                " heads is expected"
            )
        parts, next_head = list[tuple[int, range]](), self.heads().start
        for holder in range(holders):
            theirs = Shard(holder, holders, self.kv_heads).heads()
            if theirs.start <= next_head < min(theirs.stop, self.heads().stop):
                end = min(theirs.stop, self.heads().stop)
                parts.append((holder, range(next_head, end)))
                next_head = end
        return parts


def check(vllm_config: Any, kv_cache_config: Any) -> None:
    """ValueError names what the connector does not support."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    for name in PARALLEL:
        if (size := getattr(parallel, name, 1)) != 1:
            raise ValueError(f"{name}: {size}; 1 is supported")
    if model.use_mla:
        raise ValueError("model: MLA is not supported")
    if model.get_sliding_window() is not None:
        raise ValueError(
            f"model: sliding windows ({model.get_sliding_window()}) are not supported"
        )
    if vllm_config.cache_config.cache_dtype != "auto":
        raise ValueError(
            f"kv_cache_dtype: {vllm_config.cache_config.cache_dtype}; 'auto' is supported"
        )
    if model.dtype not in DTYPES:
        raise ValueError(f"dtype: {model.dtype}; {', '.join(map(str, DTYPES))} is expected")
    if len(kv_cache_config.kv_cache_groups) != 1:
        raise ValueError(
            f"{len(kv_cache_config.kv_cache_groups)} groups of cache layers; 1 is supported"
        )
    transfer = vllm_config.kv_transfer_config
    if transfer.is_kv_consumer and transfer.kv_load_failure_policy != "fail":
        raise ValueError(
            f"kv_load_failure_policy: {transfer.kv_load_failure_policy!r}; 'fail' is expected: the"
            " tokens that stand in for a compacted prompt must not be computed"
        )


def build_open(vllm_config: Any, extra: dict[str, Any], lease: float | None) -> tuple[Open, int]:
    """`Open` of a prompt but for its length, and the window's tokens."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    name = extra.pop("method", "structkv")
    if name not in METHODS:
        raise ValueError(f"method: {name!r}; one of {', '.join(METHODS)} is expected")
    layers = model.get_num_layers(parallel)
    kv_budget = extra.pop("kv_budget", None)
    method = build_method(name, layers, kv_budget, None, None, extra)
    window = METHODS[name]
    if isinstance(method, StructKvMethod | SnapKvMethod | FastKvMethod):
        window = method.window_tokens or window
        method = replace(method, window_tokens=window)
    open = Open(
        geometry=ModelGeometry(
            layer_count=layers,
            query_head_count=model.get_num_attention_heads(parallel)
            * parallel.tensor_parallel_size,
            kv_head_count=model.get_total_num_kv_heads(),
            key_dim=model.get_head_size(),
        ),
        dtype=DTYPES[model.dtype],  # type: ignore[arg-type]
        layout="token_head_dim",
        method=method,
        output="hold",
        hold=Hold(lease_millis=None if lease is None else round(lease * 1000)),
        model_id=model.model[-256:],
        rotary=_rotary(model.hf_text_config, model.get_head_size()),
    )
    return open, window


def _rotary(config: Any, head_dim: int) -> RotaryParameters:
    """The model's rotation, as its configuration has it."""
    given = dict(config.rope_parameters)
    share = given.pop("partial_rotary_factor", None) or 1.0
    known = {each.name for each in fields(RotaryParameters)}
    values = {name: value for name, value in given.items() if name in known and value is not None}
    return RotaryParameters(**values, rotary_dim=None if share == 1.0 else round(head_dim * share))
