"""One prefill: layers go to the service as they are computed, the pivot cuts what follows, and the
cache gets what is kept."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..client import Client
from ..errors import Error, InvalidArgument, Unimplemented
from ..messages import GemFilterMethod, Method, Open
from ..methods import decides_after
from ..options import SessionOptions
from ..results import LayerResult
from .cache import CompactedLayer, align, gather
from .cut import Cut
from .prompt import Prompt
from .report import PromptReport, Report, Seconds


@dataclass(frozen=True)
class Setup:
    """What all prefills of a run have in common."""

    client: Client
    open: Open
    method: Method
    options: SessionOptions
    raises: bool  # at any failure


class Prefill:
    """Goes with one forward of the decoder, whose layers call before_layer() in their order."""

    def __init__(
        self,
        setup: Setup,
        decoder: Any,
        layers: list[CompactedLayer],
        tokens: list[int],
        width: int,
    ) -> None:
        """tokens: of each row, which end the padded prompt of `width`."""
        self._setup, self._decoder, self._layers = setup, decoder, layers
        self._tokens, self._width = tokens, width
        self._prompts: list[Prompt] = []
        self._cut: Cut | None = None
        self._embeddings: torch.Tensor | None = None
        self._kept: dict[int, list[torch.Tensor]] = {}
        self._begin = time.perf_counter()
        self._failure: Exception | None = None
        self.seconds = Seconds()
        try:
            with self._service("open"):
                for each in tokens:
                    self._prompts.append(
                        Prompt(setup.client, setup.open, each, width - each, setup.options)
                    )
        except BaseException:  # a KeyboardInterrupt too: nobody else has the rows before it
            self.cancel()
            raise

    @property
    def _gemfilter(self) -> bool:
        return isinstance(self._setup.method, GemFilterMethod)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begin
            setattr(self.seconds, stage, getattr(self.seconds, stage) + spent)

    @contextmanager
    def _service(self, stage: str) -> Iterator[None]:
        """Around what the service may fail in. Until the prefill was cut such a failure leaves it
        to go on in full, but for what the caller has asked for wrongly."""
        try:
            with self._timed(stage):
                yield
        except Error as error:
            self.cancel()
            wrong = stage == "open" and isinstance(error, InvalidArgument | Unimplemented)
            if self._setup.raises or wrong or self._kept or self._cut is not None:
                raise
            warnings.warn(f"structkv: the prompt keeps its full cache: {error}", stacklevel=2)
            self._failure = error

    def before_layer(self, layer: int, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        """What the layer computes on: its hidden states [batch, rows, hidden], and in kwargs all
        that goes with them."""
        if layer == 0 and self._gemfilter and self._embeddings is None:
            self._embeddings = hidden
        if self._failure is None and self._cut is None:
            with self._service("wait"):
                last = layer - (1 if decides_after(self._setup.method, layer - 1) else 2)
                for prompt in self._prompts:
                    prompt.wait_for(last)
            if self._setup.raises:
                self._compact_answered()
            if self._failure is None and self._cut_is_due(layer):
                with self._timed("compact"):
                    self._cut = self._make_cut(layer, kwargs)
                self._compact_answered()
                if self._gemfilter:
                    hidden = self._again(layer, kwargs)
        if self._cut is not None:
            hidden = self._cut.apply(hidden, kwargs)
        if self._failure is None and not (self._gemfilter and self._cut is not None):
            kwargs["structkv_tap"] = partial(self._send, layer)
        return hidden

    def _send(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        with self._service("send"):
            for row, prompt in enumerate(self._prompts):
                own = (row, slice(None), slice(keys.shape[2] - self._rows(row), None))
                prompt.send(layer, queries[own], keys[own], values[own], self._cut is not None)

    def _rows(self, row: int) -> int:
        """Rows of the layer that is being computed, of one row of the batch."""
        return self._tokens[row] if self._cut is None else len(self._cut.skeletons[row])

    def _cut_is_due(self, layer: int) -> bool:
        """Once every row of the batch has its pivot: they are cut together."""
        for prompt in self._prompts:
            if (pivot := prompt.pivot) is None:
                return False
            first = pivot.pivot_layer + 1 if self._gemfilter else pivot.skeleton_from_layer
            if first is None or layer < first:
                return False
        return True

    def _make_cut(self, layer: int, kwargs: dict[str, Any]) -> Cut:
        skeletons = [prompt.skeleton() for prompt in self._prompts]
        padding = [prompt.padding for prompt in self._prompts]
        if self._embeddings is None:
            return Cut.of_prompt(layer, skeletons, padding, self._decoder, kwargs)
        return Cut.anew(layer, skeletons, padding, self._decoder, self._embeddings)

    def _again(self, layer: int, kwargs: dict[str, Any]) -> torch.Tensor:
        """GemFilter's second prefill, up to `layer`."""
        assert self._cut is not None and self._embeddings is not None
        hidden = self._embeddings
        for each in self._decoder.layers[:layer]:
            hidden = each(hidden, **kwargs)
        return hidden

    def _compact_answered(self) -> None:
        """Fills the cache of the layers that were answered."""
        if self._gemfilter or self._failure is not None:
            return
        with self._timed("compact"):
            for layer in range(len(self._layers)):
                answers = [prompt.answer(layer) for prompt in self._prompts]
                if layer not in self._kept and all(answers) and self._layers[layer].is_initialized:
                    self._compact(layer, [answer for answer in answers if answer is not None])

    def _compact(self, layer: int, answers: Sequence[LayerResult]) -> None:
        cache = self._layers[layer]
        cut = self._cut is not None and layer >= self._cut.layer
        keys, values, kept = [], [], []
        for row, (prompt, answer) in enumerate(zip(self._prompts, answers)):
            positions = torch.from_dlpack(answer.positions)
            kept.append(positions)
            if answer.keys is not None:
                keys.append(torch.from_dlpack(answer.keys).transpose(0, 1).to(cache.keys.device))
                values.append(
                    torch.from_dlpack(answer.values).transpose(0, 1).to(cache.keys.device)
                )
                continue
            if cut:  # rows of the skeleton, which ends the layer's
                assert self._cut is not None
                skeleton = self._cut.skeletons[row]
                rows = torch.searchsorted(skeleton, positions)
                rows = rows + (cache.keys.shape[2] - len(skeleton))
            else:
                rows = positions.long() + prompt.padding
            rows = rows.to(cache.keys.device)
            keys.append(gather(cache.keys[row], rows))
            values.append(gather(cache.values[row], rows))
        lengths = [positions.shape[-1] for positions in kept]
        cache.fill(
            align(keys, 1).contiguous(), align(values, 1).contiguous(), lengths, self._width
        )
        self._kept[layer] = kept

    def finish(self) -> tuple[Report, list[int]]:
        """After the last layer. The report, and by how much the positions of each row that follow
        are smaller than the prompt's (GemFilter)."""
        compressed = []
        if self._failure is None:
            with self._service("wait"):
                compressed = [prompt.finish() for prompt in self._prompts]
        shifts = [0] * len(self._tokens)
        if self._failure is not None:
            for cache in self._layers:
                cache.fill(cache.keys, cache.values, self._tokens, self._width)
        elif self._gemfilter and self._cut is not None:
            lengths = [len(skeleton) for skeleton in self._cut.skeletons]
            shifts = [tokens - length for tokens, length in zip(self._tokens, lengths)]
            for layer, cache in enumerate(self._layers):
                cache.fill(cache.keys, cache.values, lengths, self._width)
                self._kept[layer] = list(self._cut.skeletons)
        else:
            self._compact_answered()
        self.seconds.total = time.perf_counter() - self._begin
        prompts = (
            []
            if self._failure is not None
            else [
                PromptReport(
                    tokens=prompt.tokens,
                    kept=tuple(self._kept[layer][row] for layer in range(len(self._layers))),
                    pivot=result.pivot,
                    skeleton=None if result.pivot is None else prompt.skeleton(),
                    fingerprint=result.summary.fingerprint,
                    summary=result.summary,
                )
                for row, (prompt, result) in enumerate(zip(self._prompts, compressed))
            ]
        )
        return self._report(tuple(prompts)), shifts

    def _report(self, prompts: tuple[PromptReport, ...]) -> Report:
        count = len(self._layers)
        saved = 0.0
        if self._cut is not None:
            share = sum(map(len, self._cut.skeletons)) / sum(self._tokens)
            saved = (1 - share) * (count - self._cut.layer) / count
            if self._gemfilter:
                saved -= self._cut.layer / count * share
        entry = [
            cache.keys.shape[1]
            * (cache.keys.shape[3] + cache.values.shape[3])
            * len(self._tokens)
            * cache.keys.element_size()
            for cache in self._layers
        ]
        return Report(
            prompts=prompts,
            failure=self._failure,
            cut_layer=None if self._cut is None else self._cut.layer,
            cache_bytes=sum(
                each * cache.keys.shape[2] for each, cache in zip(entry, self._layers)
            ),
            full_cache_bytes=sum(each * self._width for each in entry),
            compute_saved=saved,
            seconds=self.seconds,
        )

    def cancel(self) -> None:
        """Ends the sessions that are not over."""
        for prompt in self._prompts:
            prompt.cancel()
