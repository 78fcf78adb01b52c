"""Methods of compression behind one seam: the full cache, the service's by structkv.hf, and
kvpress's presses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from transformers import DynamicCache

from .models import Loaded


@dataclass(frozen=True)
class Prefilled:
    """A prompt's cache.

    kept_share: of the prompt's tokens, mean over the layers; layers that computed on a skeleton
        keep none beyond it, whatever the budget.
    cache_bytes: of its keys and values.
    kept: for each layer the positions that it holds, i64 [kept] or [kv_heads, kept], where the
        method tells.
    pivot_layer, cut_layer: where there is a pivot, and the first layer on the skeleton alone.
    uniform: whether a forward of several tokens may follow, as after a whole cache.
    """

    cache: Any
    tokens: int
    kept_share: float
    cache_bytes: int
    kept: list[torch.Tensor] | None = None
    pivot_layer: int | None = None
    cut_layer: int | None = None
    uniform: bool = True

    @classmethod
    def of(cls, cache: Any, tokens: int, **rest: Any) -> Prefilled:
        """Of a cache as the prefill leaves it."""
        entries = [layer.keys.shape[2] for layer in cache.layers]
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return cls(cache, tokens, sum(entries) / len(entries) / tokens, size, **rest)

    def measures(self) -> dict[str, Any]:
        """What each record has of it."""
        return {
            "kept_share": self.kept_share,
            "cache_bytes": self.cache_bytes,
            "pivot_layer": self.pivot_layer,
            "cut_layer": self.cut_layer,
        }


@dataclass(frozen=True)
class Method:
    """`name`, or `name:field=value,...` with parameters of the method; kvpress's are
    `kvpress:name` and `kvpress:name:field=value,...`.

    budget: share of the prompt's tokens that is kept; 1 for the full cache.
    window: tokens at the prompt's end that are kept whatever they are.
    """

    name: str
    budget: float
    prefill: Callable[
        [Loaded, torch.Tensor], Any
    ]  # a context manager, in which a Prefilled is used
    window: int = 0

    def fits(self, tokens: int) -> bool:
        """Whether its window leaves it something to choose in a prompt of this length."""
        return self.window < self.budget * tokens


@contextmanager
def _full(loaded: Loaded, tokens: torch.Tensor) -> Iterator[Prefilled]:
    cache = DynamicCache(config=loaded.model.config)
    loaded.forward(tokens, cache, 0)
    everything = torch.arange(tokens.shape[1])
    yield Prefilled.of(cache, tokens.shape[1], kept=[everything] * len(cache.layers))


def full() -> Method:
    return Method("full", 1.0, _full)


def value(text: str) -> Any:
    """A parameter's value: a number where it is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def parse(name: str) -> tuple[str, dict[str, Any]]:
    """`snapkv:window_tokens=8,...`: the method and its parameters."""
    kind, _, rest = name.partition(":")
    fields = (field.partition("=") for field in rest.split(",") if field)
    return kind, {key: value(text) for key, _, text in fields}


WINDOWS = {"structkv": 8, "snapkv": 32, "pyramidkv": 32, "fastkv": 8}
"""Of the service's methods that have one, without `window_tokens`."""
SKELETON = 0.2
"""Of those that have one, unless it is given or the budget is larger."""


def service_method(name: str, budget: float, client: Any) -> Method:
    """A method of the service, `structkv:decay=0.5` for instance; fields as structkv.hf.compress()
    takes them. Its skeleton is at least the budget, unless it is given. `pivot=exact` prefills
    twice: to find the pivot, which EXACT answers too late to cut, and with that pivot fixed.

    ImportError where structkv.hf does not load.
    """
    import structkv.hf

    kind, parameters = parse(name)
    if kind in ("structkv", "fastkv"):
        parameters.setdefault("skeleton", max(SKELETON, budget))

    @contextmanager
    def compressed(
        loaded: Loaded, tokens: torch.Tensor, parameters: dict[str, Any]
    ) -> Iterator[Prefilled]:
        with structkv.hf.compress(
            loaded.model,
            client,
            cast(Any, kind),
            kv_budget=budget,
            on_failure="raise",
            continuation=True,
            **parameters,
        ) as run:
            cache = DynamicCache(config=loaded.model.config)
            loaded.forward(tokens, cache, 0)
            assert run.last is not None
            kept = [positions.long() for positions in run.last.prompts[0].kept]
            yield Prefilled.of(
                cache,
                tokens.shape[1],
                kept=kept,
                pivot_layer=run.last.pivot_layer,
                cut_layer=run.last.cut_layer,
            )

    @contextmanager
    def prefill(loaded: Loaded, tokens: torch.Tensor) -> Iterator[Prefilled]:
        given = parameters
        if given.get("pivot") == "exact":
            with compressed(loaded, tokens, given) as found:
                given = {**given, "pivot": found.pivot_layer}
        with compressed(loaded, tokens, given) as prefilled:
            yield prefilled

    window = parameters.get("window_tokens", WINDOWS.get(kind, 0))
    return Method(name, budget, prefill, window)


PRESSES = {
    "snapkv": "SnapKVPress",
    "pyramidkv": "PyramidKVPress",
    "streaming_llm": "StreamingLLMPress",
    "tova": "TOVAPress",
    "knorm": "KnormPress",
    "expected_attention": "ExpectedAttentionPress",
}


def kvpress_method(name: str, budget: float) -> Method:
    """One of kvpress's presses, `kvpress:snapkv:window_size=8` for instance; fields are the press's
    own. ImportError where kvpress does not load.
    """
    import kvpress

    kind, parameters = parse(name.removeprefix("kvpress:"))
    if kind not in PRESSES:
        names = ", ".join(f"kvpress:{press}" for press in PRESSES)
        raise ValueError(f"method: {name!r}; one of {names} is expected")
    make = partial(getattr(kvpress, PRESSES[kind]), compression_ratio=1 - budget, **parameters)

    @contextmanager
    def prefill(loaded: Loaded, tokens: torch.Tensor) -> Iterator[Prefilled]:
        cache = DynamicCache()
        with make()(loaded.model):
            loaded.forward(tokens, cache, 0)
        lengths = {layer.get_seq_length() for layer in cache.layers}
        yield Prefilled.of(cache, tokens.shape[1], uniform=len(lengths) == 1)

    return Method(name, budget, prefill, getattr(make(), "window_size", 0))


def make_method(name: str, budget: float, client: Any) -> Method:
    """The method of that name; ImportError where what it needs is not installed."""
    if name == "full":
        return full()
    if name.startswith("kvpress:"):
        return kvpress_method(name, budget)
    return service_method(name, budget, client)


def find_kept(full_cache: Any, cache: Any) -> list[torch.Tensor]:
    """The positions whose keys a cache holds, by comparison with the whole one: i64 [kv_heads,
    kept], ascending.

    For methods that say nothing of their sets and change no key.
    """
    result = []
    for whole, part in zip(full_cache.layers, cache.layers):
        heads = []
        for keys, rows in zip(whole.keys[0], part.keys[0]):
            places = {row.tobytes(): at for at, row in enumerate(keys.float().cpu().numpy())}
            heads.append(sorted(places[row.tobytes()] for row in rows.float().cpu().numpy()))
        result.append(torch.tensor(heads))
    return result
