"""What a prefill came to."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..messages import Summary
from ..results import PivotResult


@dataclass
class Seconds:
    """Where a prefill's wall-clock time went; what is left of `total` is the model's own.

    open: opening sessions, until the service has admitted them.
    send: making tensors dense, bringing them to the host and handing them over, with the waits
        where too many bytes are on their way.
    wait: for answers. The service computes in it.
    compact: cutting to the skeleton, and filling the cache.
    """

    total: float = 0
    open: float = 0
    send: float = 0
    wait: float = 0
    compact: float = 0


@dataclass(frozen=True, kw_only=True)
class PromptReport:
    """One row of the batch.

    tokens: of the prompt, without padding.
    kept: for each layer the tokens that its cache has, positions from 0: i32 [kept] or, selected
        per KV head, [kv_heads, kept]; ascending.
    skeleton: i32 [skeleton_tokens], where there is a pivot; with GemFilter the tokens that were
        prefilled again.
    fingerprint: the compacted cache's own identity.
    summary: the service's, with its times.
    """

    tokens: int
    kept: tuple[torch.Tensor, ...]
    pivot: PivotResult | None
    skeleton: torch.Tensor | None
    fingerprint: str
    summary: Summary

    @property
    def kept_tokens(self) -> tuple[int, ...]:
        """Tokens that each layer's cache has, in every KV head."""
        return tuple(int(kept.shape[-1]) for kept in self.kept)


@dataclass(frozen=True, kw_only=True)
class Report:
    """One prefill, of a prompt or a batch of them.

    prompts: a row each; empty where the prefill fell back to the full cache.
    failure: why it did.
    cut_layer: the first layer that computed on skeletons alone; None: none did.
    cache_bytes, full_cache_bytes: keys and values of all layers, padding included: as they are, and
        as they would be without compression.
    compute_saved: share of the prompt's token-layers that were not computed, padding aside.
    """

    prompts: tuple[PromptReport, ...]
    failure: Exception | None
    cut_layer: int | None
    cache_bytes: int
    full_cache_bytes: int
    compute_saved: float
    seconds: Seconds = field(default_factory=Seconds)

    @property
    def pivot_layer(self) -> int | None:
        """The first prompt's pivot layer."""
        pivot = self.prompts[0].pivot if self.prompts else None
        return None if pivot is None else pivot.pivot_layer
