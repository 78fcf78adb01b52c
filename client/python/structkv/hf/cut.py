"""The cut at the pivot: from full hidden states to those of the skeleton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .attention import causal_mask
from .cache import align


@dataclass(frozen=True)
class Cut:
    """What the layers from `layer` on compute on. A batch's rows end together; those that are
    shorter have places before them that nobody attends to.

    skeletons: i32 [skeleton_tokens] of each row of the batch.
    places: i64 [batch, rows], where the rows were among the padded prompt's tokens.
    mask, position_ids, position_embeddings: what the layers get in place of the prompt's.
    """

    layer: int
    skeletons: tuple[torch.Tensor, ...]
    places: torch.Tensor
    mask: torch.Tensor | None
    position_ids: torch.Tensor
    position_embeddings: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def of_prompt(
        cls,
        layer: int,
        skeletons: Sequence[torch.Tensor],
        padding: Sequence[int],
        decoder: Any,
        kwargs: dict[str, Any],
    ) -> Cut:
        """Positions stay those of the prompt, as kwargs of `layer` have them."""
        places = _places(skeletons, padding, kwargs["position_ids"].device)
        batch = places.shape[0]
        cos, sin = (
            _rows(each.expand(batch, -1, -1), places) for each in kwargs["position_embeddings"]
        )
        positions = kwargs["position_ids"].expand(batch, -1).gather(1, places)
        mask = causal_mask(decoder.config, places.shape[1], 0, _valid(skeletons, places), cos)
        return cls(layer, tuple(skeletons), places, mask, positions, (cos, sin))

    @classmethod
    def anew(
        cls,
        layer: int,
        skeletons: Sequence[torch.Tensor],
        padding: Sequence[int],
        decoder: Any,
        embeddings: torch.Tensor,
    ) -> Cut:
        """The skeleton as a prompt of its own, from position 0 on (GemFilter)."""
        places = _places(skeletons, padding, embeddings.device)
        rows = places.shape[1]
        first = torch.tensor([rows - len(each) for each in skeletons], device=places.device)
        positions = (torch.arange(rows, device=places.device) - first[:, None]).clamp(min=0)
        rotary = decoder.rotary_emb(embeddings, position_ids=positions)
        mask = causal_mask(decoder.config, rows, 0, _valid(skeletons, places), rotary[0])
        return cls(layer, tuple(skeletons), places, mask, positions, rotary)

    def apply(self, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """The skeleton's rows of `hidden`, [batch, tokens or rows, hidden]; kwargs is changed."""
        kwargs["attention_mask"] = self.mask
        kwargs["position_ids"] = self.position_ids
        kwargs["position_embeddings"] = self.position_embeddings
        whole = hidden.shape[1] != self.places.shape[1]
        return _rows(hidden, self.places) if whole else hidden


def _places(
    skeletons: Sequence[torch.Tensor], padding: Sequence[int], device: Any
) -> torch.Tensor:
    shifted = [skeleton.long() + before for skeleton, before in zip(skeletons, padding)]
    return align(shifted, 0).to(device)


def _valid(skeletons: Sequence[torch.Tensor], places: torch.Tensor) -> torch.Tensor | None:
    """Bool [batch, rows]: what is no padding; None: everything."""
    rows = places.shape[1]
    lengths = torch.tensor([len(skeleton) for skeleton in skeletons], device=places.device)
    if int(lengths.min()) == rows:
        return None
    return torch.arange(rows, device=places.device) >= rows - lengths[:, None]


def _rows(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Rows `places` of [batch, tokens, dim]."""
    return states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))
