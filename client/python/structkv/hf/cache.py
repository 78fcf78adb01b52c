"""The compacted cache as layers of transformers' `Cache`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer


class CompactedLayer(DynamicLayer):
    """One layer's cache, `keys` and `values` [batch, kv_heads, entries, dim]: the kept rows of the
    prompt, then one entry for each token since. A batch's rows keep different numbers of tokens:
    they end together, and what is before them is not attended to (`valid()`).

    To the model it is as long as what it stands for (`get_seq_length()`), so that positions go on
    at the prompt's length.
    """

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.prefilling = True
        self.logical_length = 0  # tokens of the padded prompt, and those since
        self.kept: tuple[int, ...] = ()  # entries of the prompt, by row of the batch
        self.room = 0  # the largest of these

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """In the prefill: takes the states as they are, without a copy; afterwards as in
        DynamicLayer. Returns all states."""
        if self.prefilling:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        self.logical_length += key_states.shape[-2]
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def fill(
        self, keys: torch.Tensor, values: torch.Tensor, kept: Sequence[int], logical_length: int
    ) -> None:
        """Ends the prefill with these entries, [batch, kv_heads, max(kept), dim]."""
        self.keys, self.values = keys, values
        self.kept, self.room = tuple(kept), max(kept)
        self.logical_length = logical_length
        self.prefilling = False

    def get_seq_length(self) -> int:
        """Tokens that the cache stands for, the batch's padding among them."""
        return self.logical_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Entries that the next attention sees, and what is missing before them."""
        if self.prefilling:
            return query_length, 0
        entries = self.keys.shape[-2]
        return entries + query_length, self.logical_length - entries

    def valid(self, recent: torch.Tensor | None, query_length: int) -> torch.Tensor | None:
        """Bool [batch, entries + query_length]: what may be attended to; None: everything.
        `recent`: the same of the tokens since the prompt; None: all of them."""
        ragged = min(self.kept) < self.room
        if not ragged and (recent is None or bool(recent.all())):
            return None
        device = self.keys.device
        kept = torch.tensor(self.kept, device=device)[:, None]
        prompt = torch.arange(self.room, device=device)[None] >= self.room - kept
        if recent is None:
            since = self.keys.shape[-2] - self.room + query_length
            recent = torch.ones(len(self.kept), since, dtype=torch.bool, device=device)
        return torch.cat([prompt, recent.to(device=device, dtype=torch.bool)], dim=1)

    def crop(self, tokens_to_remove: int) -> None:
        """Of tokens since the prompt alone: a compacted prompt cannot be cut again."""
        since = self.keys.shape[-2] - self.room
        if -tokens_to_remove > since:
            raise ValueError(
                f"crop: {-tokens_to_remove} tokens; {since} came since the compacted prompt"
            )
        super().crop(tokens_to_remove)
        self.logical_length += tokens_to_remove

    def reset(self) -> None:
        super().reset()
        self.prefilling, self.logical_length, self.kept, self.room = True, 0, (), 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.kept = tuple(self.kept[i] for i in beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.kept = tuple(kept for kept in self.kept for _ in range(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.kept = tuple(torch.tensor(self.kept)[indices.cpu()].tolist())


def gather(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of `states` [kv_heads, tokens, dim]: [kept] for all heads or [kv_heads, kept]."""
    if rows.dim() == 1:
        return states.index_select(1, rows)
    return states.gather(1, rows[..., None].expand(-1, -1, states.shape[-1]))


def align(rows: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    """A batch of rows that differ in length along `axis`, with zeros before the shorter ones."""
    longest = max(row.shape[axis] for row in rows)
    if all(row.shape[axis] == longest for row in rows):
        return torch.stack(list(rows)) if len(rows) > 1 else rows[0][None]
    shape = list(rows[0].shape)
    shape[axis] = longest
    batch = rows[0].new_zeros([len(rows), *shape])
    for place, row in zip(batch, rows):
        place.narrow(axis, longest - row.shape[axis], row.shape[axis]).copy_(row)
    return batch
