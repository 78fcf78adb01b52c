"""One prompt of the batch in its talk with the service."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..client import Client
from ..messages import Open
from ..options import LayerTensors, SessionOptions
from ..results import Compressed, LayerResult, PivotResult
from ..session import Gatherer
from .attention import attention_sums


def _devices(options: SessionOptions) -> set[str]:
    """Where the memory lies that the session shares with the service."""
    arenas = (options.staging, options.results)
    regions = (*options.regions, *(arena.region for arena in arenas if arena is not None))
    return {region.device for region in regions}


def _stream_of(tensor: torch.Tensor, devices: set[str]) -> int | None:
    """The stream on which a tensor is written, for memory of `devices` to wait for; None: it is
    written, which is waited for where it lies on another GPU than they."""
    if not tensor.is_cuda:
        return None
    stream = torch.cuda.current_stream(tensor.device)
    if str(tensor.device) in devices:
        handle: int = stream.cuda_stream
        return handle
    stream.synchronize()
    return None


class Prompt:
    """A session of `tokens` tokens, which end the row: `padding` places come before them."""

    def __init__(
        self, client: Client, open: Open, tokens: int, padding: int, options: SessionOptions
    ) -> None:
        self.tokens, self.padding = tokens, padding
        self._session = client.open_prompt(replace(open, prompt_tokens=tokens), options)
        self.opened = self._session.opened
        self._gatherer = Gatherer(self.opened)
        self._sent = [False] * len(self.opened.kept_tokens)
        self._scale = open.attention_scale
        self._devices = _devices(options)
        self._takes_gpu_tensors = bool(self._devices - {"cpu"})

    @property
    def pivot(self) -> PivotResult | None:
        """Once it was answered."""
        return self._gatherer.pivot

    def skeleton(self) -> torch.Tensor:
        """i32 [skeleton_tokens], of the pivot that was answered."""
        assert self.pivot is not None
        skeleton: torch.Tensor = torch.from_dlpack(self.pivot.skeleton)
        return skeleton

    def send(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        skeleton: bool,
    ) -> None:
        """Sends what the method wants of a layer: [heads, tokens, dim] each, after RoPE, of the
        prompt's tokens or, with `skeleton`, of the skeleton's."""
        if self.opened.kept_tokens[layer] == 0 or not self.opened.required_tensors:
            return
        tensors: dict[str, Any] = {}
        for name in self.opened.required_tensors:
            if name == "keys":
                tensors[name] = self._dense(keys.transpose(0, 1))
            elif name == "values":
                tensors[name] = self._dense(values.transpose(0, 1))
            elif name == "window_queries":
                tensors[name] = self._dense(queries[:, -self.opened.window_tokens :])
            else:  # H2O's saliency
                scale = self._scale or keys.shape[-1] ** -0.5
                sums = attention_sums(queries.detach(), keys.detach(), scale)
                if self.opened.statistic == "saliency":
                    sums = sums.sum(0)
                tensors[name] = self._dense(sums)
        if skeleton:
            assert self.pivot is not None
            tensors["positions"] = self.pivot.skeleton
        if self._takes_gpu_tensors:
            tensors["cuda_stream"] = _stream_of(keys, self._devices)
        self._session.send_layer(layer, LayerTensors(**tensors))
        self._sent[layer] = True

    def _dense(self, tensor: torch.Tensor) -> torch.Tensor:
        """Dense, and where the session can take it: from a GPU that it has no memory of, a copy on
        the CPU."""
        tensor = tensor.detach().contiguous()
        return tensor if self._takes_gpu_tensors else tensor.cpu()

    def wait_for(self, layer: int) -> None:
        """Waits for the answer of a layer that was sent."""
        if 0 <= layer and self._sent[layer]:
            while not self._gatherer.has(layer):
                self._gatherer.add(self._session.next_event())

    def answer(self, layer: int) -> LayerResult | None:
        """The layer's answer, if it was read."""
        return self._gatherer.answer(layer)

    def finish(self) -> Compressed:
        """Says that everything was sent, and waits for the rest."""
        self._session.commit()
        while (compressed := self._gatherer.add(self._session.next_event())) is None:
            pass
        return compressed

    def cancel(self) -> None:
        """Ends the session, unless it is over."""
        self._session.cancel()
