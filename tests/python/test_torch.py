"""The same with torch; skipped where it is missing (python_test.sh)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import structkv
from conftest import Prompt, same, small_layer, small_open
from test_tensors import wait_until_dead

torch = pytest.importorskip("torch")

TYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f8_e4m3": torch.float8_e4m3fn,
    "f8_e5m2": torch.float8_e5m2,
}


@pytest.mark.parametrize("dtype", TYPES)
def test_types(client: structkv.Client, dtype: str) -> None:
    queries = torch.bfloat16 if dtype.startswith("f8") else TYPES[dtype]
    references: list[weakref.ref[Any]] = []

    def source(layer: int) -> structkv.LayerTensors:
        tensors = {n: torch.from_numpy(a)[None] for n, a in small_layer(layer).items()}
        kinds = {"keys": TYPES[dtype], "values": TYPES[dtype], "window_queries": queries}
        typed = {name: tensor.to(kinds[name]) for name, tensor in tensors.items()}
        references.extend(weakref.ref(tensor) for tensor in typed.values())
        return structkv.LayerTensors(**typed)

    got = client.compress(small_open(dtype=dtype), source)
    for layer in got.layers:
        keys = torch.from_dlpack(layer.keys)
        assert keys.dtype == TYPES[dtype] and keys.shape == (2, 10, 32)
        assert keys.data_ptr() == torch.from_dlpack(layer.keys).data_ptr()
        full = torch.from_numpy(small_layer(layer.layer)["keys"]).to(TYPES[dtype])
        kept = full[:, torch.from_dlpack(layer.positions).long()]
        assert torch.equal(keys.view(torch.uint8), kept.contiguous().view(torch.uint8))
    wait_until_dead(references)


def test_the_bundled_prompt(client: structkv.Client, capture: Prompt) -> None:
    def source(layer: int) -> structkv.LayerTensors:
        tensors = capture.layers[layer]
        as_torch = {
            name: torch.from_numpy(getattr(tensors, name).view("i2").copy()).view(torch.bfloat16)
            for name in ("keys", "values", "window_queries")
        }
        return structkv.LayerTensors(**as_torch)

    same(client.compress(capture.open, source), client.compress(capture.open, capture.source))


def test_arenas(client: structkv.Client) -> None:
    arena = structkv.Arena(structkv.Region(1 << 20))
    keys = torch.from_dlpack(arena.empty((2, 100, 16), "bf16"))
    assert keys.dtype == torch.bfloat16 and keys.is_contiguous()
    held = arena.free_bytes
    keys.fill_(1)
    del keys
    assert arena.free_bytes > held


def test_refusals(client: structkv.Client) -> None:
    tensors = {n: torch.from_numpy(a) for n, a in small_layer(0).items()}
    with client.open_prompt(small_open()) as session:
        changes: tuple[tuple[Callable[[Any], Any], str], ...] = (
            (lambda keys: keys.transpose(0, 1), "strides"),
            (lambda keys: keys.to("meta"), "Cannot pack tensors on meta"),
            (lambda keys: keys.to_sparse(), "layout other than torch.strided"),
            (lambda keys: keys.to(torch.complex64), "type 5 of 64 bits"),
        )
        for change, text in changes:
            bad = {**tensors, "keys": change(tensors["keys"].clone())}
            with pytest.raises(structkv.errors.InvalidArgument, match=text):
                session.send_layer(0, structkv.LayerTensors(**bad))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_tensor_on_a_gpu_is_refused(client: structkv.Client) -> None:
    tensors = {n: torch.from_numpy(a).cuda() for n, a in small_layer(0).items()}
    with client.open_prompt(small_open()) as session:
        with pytest.raises(structkv.errors.InvalidArgument, match="copy it to the host"):
            session.send_layer(0, structkv.LayerTensors(**tensors))
