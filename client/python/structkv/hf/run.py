"""The hooks by which a model's prefills are compressed while a context lasts."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from .attention import IMPLEMENTATIONS, PREFIX, causal_mask
from .cache import CompactedLayer
from .prefill import Prefill, Setup
from .report import Report


@dataclass
class _Decode:
    """One forward on a compacted cache."""

    cache: Any
    recent: torch.Tensor | None  # bool [batch, tokens since the prompt and now]
    masks: dict[Any, torch.Tensor | None] = field(default_factory=dict)  # alike layers share one


class Run:
    """What compress() returns: a context manager, which hooks the model's decoder as long as it
    lasts. One forward of the model at a time.

    last: of the latest prefill.
    """

    def __init__(self, model: PreTrainedModel, setup: Setup, continuation: bool) -> None:
        self._model, self._setup, self._continuation = model, setup, continuation
        self._decoder = model.get_decoder()
        self._config = self._decoder.config
        windows = [
            getattr(layer, "sliding_window", None)
            for layer in DynamicCache(config=self._config).layers
        ]
        self._sliding_window = min((w for w in windows if w is not None), default=None)
        arguments = inspect.signature(self._decoder.forward).parameters
        self._cache_name = "cache" if "cache" in arguments else "past_key_values"  # of older ones
        self._active: Prefill | _Decode | None = None
        self._filled: Any = None  # the cache of a prefill
        self._handles: list[Any] = []
        self._implementation = ""
        self.last: Report | None = None

    def __enter__(self) -> Run:
        self._implementation = self._config._attn_implementation
        if self._implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"model: attn_implementation={self._implementation!r};"
                f" one of {', '.join(IMPLEMENTATIONS)} is expected"
            )
        self._model.set_attn_implementation(PREFIX + self._implementation)
        self._handles = [
            self._decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            self._decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        self._handles += [
            layer.register_forward_pre_hook(partial(self._before_layer, i), with_kwargs=True)
            for i, layer in enumerate(self._decoder.layers)
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._drop()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._model.set_attn_implementation(self._implementation)

    def _drop(self) -> None:
        """Of a forward that ended without _after(): PyTorch calls it after an Exception, but not
        after a KeyboardInterrupt."""
        active, self._active = self._active, None
        self._filled = None
        if isinstance(active, Prefill):
            active.cancel()

    def _before(self, decoder: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What a forward of the decoder is: a prefill, one on a compacted cache, or neither."""
        self._drop()
        if args:  # as input_ids, which is what models are called with
            kwargs = {"input_ids": args[0], **kwargs}
            if len(args) > 1:
                raise TypeError("the decoder's arguments after input_ids must come by name")
        if "past_key_values" in kwargs:  # the old name, which is still taken
            kwargs[self._cache_name] = kwargs.pop("past_key_values")
        cache = kwargs.get(self._cache_name)
        inputs = kwargs.get("input_ids")
        inputs = kwargs["inputs_embeds"] if inputs is None else inputs
        use_cache = kwargs.get("use_cache")
        if not (self._config.use_cache if use_cache is None else use_cache):
            return (), kwargs
        if cache is None:
            cache = kwargs[self._cache_name] = DynamicCache(config=self._config)
        if not isinstance(cache, DynamicCache) or cache.offloading:
            raise ValueError(f"cache: {type(cache).__name__}; a DynamicCache is expected")
        mask = kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
            raise ValueError("attention_mask: one of the shape [batch, tokens] is expected")
        length, width = cache.get_seq_length(), inputs.shape[1]
        compacted = length > 0 and isinstance(cache.layers[0], CompactedLayer)
        if compacted or length == 0:
            if self._sliding_window is not None and length + width > self._sliding_window:
                raise ValueError(
                    f"{length + width} tokens; at most {self._sliding_window}, the sliding window"
                    " of the model's attention, can be compressed and gone on with"
                )
        if compacted:
            self._continue(cache, mask, width, inputs.device, kwargs)
        elif length == 0:
            tokens = _lengths(mask, inputs.shape[0], width)
            layers = [CompactedLayer() for _ in self._decoder.layers]
            cache.layers, cache.layer_class_to_replicate = layers, None
            cache.structkv_shifts, self._filled = None, cache
            self._active = Prefill(self._setup, decoder, layers, tokens, width)
        elif width > 1:
            raise ValueError(
                f"cache: it has {length} tokens that were not compressed here; a prompt is"
                " compressed as a whole (no chunked prefill)"
            )
        return (), kwargs

    def _continue(
        self,
        cache: Any,
        mask: torch.Tensor | None,
        width: int,
        device: Any,
        kwargs: dict[str, Any],
    ) -> None:
        if width > 1 and not self._continuation:
            raise ValueError(
                f"{width} tokens for a compacted cache: prefill in chunks (prefill_chunk_size) is"
                " not supported; compress(continuation=True) takes tokens that follow the prompt"
            )
        length, first = cache.get_seq_length(), cache.layers[0]
        prompt = length - (first.keys.shape[-2] - first.room)
        self._active = _Decode(cache, None if mask is None else mask[:, prompt:])
        if cache.structkv_shifts is not None:
            positions = kwargs.get("position_ids")
            if positions is None:
                positions = torch.arange(length, length + width, device=device)[None]
            shifts = torch.tensor(cache.structkv_shifts, device=device)[:, None]
            kwargs["position_ids"] = positions - shifts

    def _before_layer(self, layer: int, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        active = self._active
        if isinstance(active, Prefill):
            return (active.before_layer(layer, args[0], kwargs),), kwargs
        if isinstance(active, _Decode):
            cache, hidden = active.cache.layers[layer], args[0]
            like = (cache.keys.shape[-2], cache.kept)
            if like not in active.masks:
                valid = cache.valid(active.recent, hidden.shape[1])
                active.masks[like] = causal_mask(
                    self._config, hidden.shape[1], cache.keys.shape[-2], valid, hidden
                )
            kwargs["attention_mask"] = active.masks[like]
        return args, kwargs

    def _after(self, decoder: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Called whether the forward returned or raised (then without an output)."""
        active, self._active = self._active, None
        if isinstance(active, Prefill):
            try:
                if output is not None:
                    self.last, shifts = active.finish()
                    if any(shifts):
                        self._filled.structkv_shifts = shifts
            finally:
                self._filled = None
                active.cancel()


def _lengths(mask: torch.Tensor | None, batch: int, width: int) -> list[int]:
    """Tokens of each row of a prompt that is padded on the left."""
    if mask is None:
        return [width] * batch
    if mask.shape != (batch, width):
        raise ValueError(f"attention_mask: {list(mask.shape)}; {[batch, width]} is expected")
    ones = mask.bool()
    lengths = ones.sum(1)
    left = torch.arange(width, device=mask.device)[None] >= width - lengths[:, None]
    if not torch.equal(ones, left) or int(lengths.min()) == 0:
        raise ValueError("attention_mask: padding is expected on the left alone")
    result: list[int] = lengths.tolist()
    return result
