"""Methods of compression behind one seam: the full cache, the service's by structkv.hf, and
kvpress's presses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from .models import Loaded


@dataclass(frozen=True)
class Prefilled:
    """A prompt's cache.

    kept: for each layer the positions that it holds, i64 [kept] or [kv_heads, kept], where the
        method tells.
    pivot_layer: where there is one.
    uniform: whether a forward of several tokens may follow, as after a whole cache.
    """

    cache: Any
    tokens: int
    kept: list[torch.Tensor] | None = None
    pivot_layer: int | None = None
    uniform: bool = True


@dataclass(frozen=True)
class Method:
    """`name`, or `name:field=value,...` with parameters of the method; kvpress's are
    `kvpress:name`.

    budget: share of the prompt's tokens that is kept; 1 for the full cache.
    """

    name: str
    budget: float
    prefill: Callable[
        [Loaded, torch.Tensor], Any
    ]  # a context manager, in which a Prefilled is used


@contextmanager
def _full(loaded: Loaded, tokens: torch.Tensor) -> Iterator[Prefilled]:
    cache = DynamicCache(config=loaded.model.config)
    loaded.forward(tokens, cache, 0)
    everything = torch.arange(tokens.shape[1])
    yield Prefilled(cache, tokens.shape[1], [everything] * len(cache.layers))


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


def service_method(name: str, budget: float, client: Any) -> Method:
    """A method of the service, `structkv:decay=0.5` for instance; fields as structkv.hf.compress()
    takes them.

    ImportError where structkv.hf does not load.
    """
    import structkv.hf

    kind, _, rest = name.partition(":")
    parameters = {
        key: value(text)
        for key, _, text in (field.partition("=") for field in rest.split(",") if field)
    }

    @contextmanager
    def prefill(loaded: Loaded, tokens: torch.Tensor) -> Iterator[Prefilled]:
        with structkv.hf.compress(
            loaded.model,
            client,
            kind,
            kv_budget=budget,
            on_failure="raise",
            continuation=True,
            **parameters,
        ) as run:
            cache = DynamicCache(config=loaded.model.config)
            loaded.forward(tokens, cache, 0)
            assert run.last is not None
            kept = [positions.long() for positions in run.last.prompts[0].kept]
            yield Prefilled(cache, tokens.shape[1], kept, run.last.pivot_layer)

    return Method(name, budget, prefill)


PRESSES = {
    "snapkv": "SnapKVPress",
    "pyramidkv": "PyramidKVPress",
    "streaming_llm": "StreamingLLMPress",
    "tova": "TOVAPress",
    "knorm": "KnormPress",
    "expected_attention": "ExpectedAttentionPress",
}


def kvpress_method(name: str, budget: float) -> Method:
    """One of kvpress's presses, `kvpress:snapkv` for instance. ImportError where kvpress does not
    load.
    """
    import kvpress

    kind = name.removeprefix("kvpress:")
    if kind not in PRESSES:
        names = ", ".join(f"kvpress:{press}" for press in PRESSES)
        raise ValueError(f"method: {name!r}; one of {names} is expected")
    make = getattr(kvpress, PRESSES[kind])

    @contextmanager
    def prefill(loaded: Loaded, tokens: torch.Tensor) -> Iterator[Prefilled]:
        press = make(compression_ratio=1 - budget)
        if getattr(press, "window_size", 0) >= tokens.shape[1]:
            raise ValueError(
                f"{name}: {tokens.shape[1]} tokens;"
                f" more than its window, {press.window_size}, are expected"
            )
        cache = DynamicCache()
        with press(loaded.model):
            loaded.forward(tokens, cache, 0)
        lengths = {layer.get_seq_length() for layer in cache.layers}
        yield Prefilled(cache, tokens.shape[1], uniform=len(lengths) == 1)

    return Method(name, budget, prefill)


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
