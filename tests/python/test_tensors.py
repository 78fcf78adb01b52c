"""Tensors cross without copies, live as long as they are needed, and bad ones are named."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy
import pytest
import structkv
from conftest import Server, same, small_layer, small_open


class Owner(numpy.ndarray[Any, Any]):
    """An array that can be watched."""


def owned(array: Any) -> Any:
    return array.view(Owner)


def wait_until_dead(references: list[weakref.ref[Any]]) -> None:
    end = time.monotonic() + 10
    while any(reference() is not None for reference in references):
        gc.collect()
        assert time.monotonic() < end, "an owner is still alive"
        time.sleep(0.01)


def source(layer: int) -> structkv.LayerTensors:
    return structkv.LayerTensors(**small_layer(layer))


@pytest.mark.parametrize(
    ("dtype", "numpy_type"),
    [
        ("f16", numpy.float16),
        ("bf16", ml_dtypes.bfloat16),
        ("f8_e4m3", ml_dtypes.float8_e4m3fn),
        ("f8_e5m2", ml_dtypes.float8_e5m2),
    ],
)
def test_types(client: structkv.Client, dtype: str, numpy_type: Any) -> None:
    query_type = ml_dtypes.bfloat16 if dtype.startswith("f8") else numpy_type

    def typed(layer: int) -> structkv.LayerTensors:
        tensors = small_layer(layer, numpy_type)
        queries = small_layer(layer, query_type)["window_queries"]
        return structkv.LayerTensors(
            keys=tensors["keys"], values=tensors["values"], window_queries=queries
        )

    def as_bits(layer: int) -> structkv.LayerTensors:
        tensors: Any = typed(layer)
        return structkv.LayerTensors(
            keys=tensors.keys.view(f"u{tensors.keys.itemsize}")[None],
            values=tensors.values.tobytes(),
            window_queries=memoryview(tensors.window_queries.view("u2")),
        )

    got = client.compress(small_open(dtype=dtype), typed)
    same(client.compress(small_open(dtype=dtype), as_bits), got)
    for layer in got.layers:
        assert layer.keys is not None and layer.keys.dtype == dtype
        kept = small_layer(layer.layer, numpy_type)["keys"][:, numpy.asarray(layer.positions)]
        assert layer.keys.numpy().dtype == kept.dtype
        assert layer.keys.numpy().tobytes() == kept.tobytes()


def test_scales(client: structkv.Client) -> None:
    def scaled(layer: int) -> structkv.LayerTensors:
        tensors = small_layer(layer, ml_dtypes.float8_e4m3fn)
        return structkv.LayerTensors(
            keys=tensors["keys"],
            values=tensors["values"],
            window_queries=small_layer(layer, ml_dtypes.bfloat16)["window_queries"],
            key_scales=numpy.array([0.5, 2], numpy.float32),
            value_scales=numpy.array([1, 3], numpy.float32),
        )

    got = client.compress(small_open(dtype="f8_e4m3", kv_scales="per_kv_head"), scaled)
    assert numpy.asarray(got.layers[0].key_scales).tolist() == [0.5, 2]
    assert numpy.asarray(got.layers[1].value_scales).tolist() == [1, 3]


def test_results_keep_their_memory(client: structkv.Client) -> None:
    layer = client.compress(small_open(), source).layers[1]
    assert layer.keys is not None
    view = numpy.asarray(layer.keys)
    other = numpy.from_dlpack(layer.keys)
    bytes_view = memoryview(layer.keys)  # type: ignore[arg-type]
    wanted = small_layer(1)["keys"][:, numpy.asarray(layer.positions)]
    assert numpy.shares_memory(view, other) and bytes_view.nbytes == view.nbytes
    dead = weakref.ref(layer.keys)
    del layer
    gc.collect()
    client.compress(small_open(), source)  # would take the memory, were it free
    assert (view == wanted).all() and bytes_view.shape == (2, 10, 32)
    del view, other, bytes_view
    wait_until_dead([dead])


def test_owners_live_until_they_are_sent_and_no_longer(client: structkv.Client) -> None:
    references: list[weakref.ref[Any]] = []

    def watched(layer: int) -> structkv.LayerTensors:
        tensors = {name: owned(array) for name, array in small_layer(layer).items()}
        references.extend(weakref.ref(array) for array in tensors.values())
        return structkv.LayerTensors(**tensors)

    same(client.compress(small_open(), watched), client.compress(small_open(), source))
    assert len(references) == 6
    wait_until_dead(references)


def test_owners_of_sessions_that_fail_or_are_dropped(client: structkv.Client) -> None:
    references: list[weakref.ref[Any]] = []
    for end in ("cancel", "drop", "fail"):
        session = client.open_prompt(small_open(layers_in_flight=1, pull="values"))
        tensors = {name: owned(array) for name, array in small_layer(0).items()}
        if end == "fail":
            tensors["window_queries"][:] = numpy.nan
        references += [weakref.ref(array) for array in tensors.values()]
        references.append(weakref.ref(session))
        session.send_layer(0, structkv.LayerTensors(**tensors))
        if end == "cancel":
            session.cancel()
            with pytest.raises(structkv.errors.Cancelled):
                session.send_layer(1, source(1))
        elif end == "fail":
            with pytest.raises(structkv.errors.InvalidArgument, match="layer 0"):
                session.collect()
        del session, tensors
    wait_until_dead(references)


def in_arena(arena: structkv.Arena, layer: int) -> structkv.LayerTensors:
    """The layer's tensors in blocks of the arena."""
    blocks = {}
    for name, array in small_layer(layer).items():
        blocks[name] = arena.empty(array.shape, "f32")
        numpy.asarray(blocks[name])[:] = array
    return structkv.LayerTensors(**blocks)


def test_arenas(server: Server) -> None:
    client = structkv.Client(server.target)
    region = structkv.Region(1 << 20)
    arena = structkv.Arena(region)
    assert region.size_bytes == 1 << 20 and arena.free_bytes == 1 << 20
    client.register(region)
    options = structkv.SessionOptions(regions=[region], results=arena, transport="shared_memory")

    got = client.compress(small_open(), lambda layer: in_arena(arena, layer), options)
    assert got.opened.transport == "shared_memory"
    same(got, client.compress(small_open(), source))
    held = arena.free_bytes
    assert held < 1 << 20  # by the results
    keys = numpy.asarray(got.layers[0].keys)
    del got
    gc.collect()
    assert arena.free_bytes == held and keys.shape == (2, 10, 32)
    del keys
    end = time.monotonic() + 10
    while arena.free_bytes < 1 << 20:
        assert time.monotonic() < end, "a block did not come back"
        gc.collect()
        time.sleep(0.01)
    with pytest.raises(structkv.errors.ResourceExhausted, match="free"):
        arena.empty([2 << 20], "u8")
    # What lies elsewhere is copied to the staging arena, or refused by name.
    staged = structkv.SessionOptions(regions=[region], staging=arena, transport="shared_memory")
    same(client.compress(small_open(), source, staged), client.compress(small_open(), source))
    bare = structkv.SessionOptions(regions=[region], transport="shared_memory")
    with pytest.raises(structkv.errors.InvalidArgument, match="KEYS"):
        client.compress(small_open(), source, bare)


def test_fetches_into_an_arena(client: structkv.Client) -> None:
    wanted = client.compress(small_open(), source)
    held = client.compress(small_open(output="hold"), source).summary.held
    assert held is not None
    arena = structkv.Arena(structkv.Region(1 << 20))
    transports: list[structkv.options.Transport] = ["shared_memory", "inline"]
    for transport in transports:
        options = structkv.FetchOptions(results=arena, transport=transport)
        fetched = client.fetch(held.handle, options)
        assert fetched.info.transport == transport
        for a, b in zip(fetched.layers, wanted.layers):
            for name in ("keys", "values", "positions"):
                assert (numpy.asarray(getattr(a, name)) == numpy.asarray(getattr(b, name))).all()
        if transport == "shared_memory":
            assert arena.free_bytes < 1 << 20
    with pytest.raises(structkv.errors.InvalidArgument, match="no region was given"):
        client.fetch(held.handle, structkv.FetchOptions(transport="shared_memory"))
    with pytest.raises(structkv.errors.ResourceExhausted, match="max_bytes"):
        client.fetch(held.handle, structkv.FetchOptions(max_bytes=1000))
    client.release(held.handle)


def test_the_engine_reads_and_writes_in_place(tmp_path: Path) -> None:
    arena = structkv.Arena(structkv.Region(1 << 20))
    options = structkv.SessionOptions(regions=[arena.region], results=arena)

    with structkv.Engine(region_socket=str(tmp_path / "s"), log_sessions=False) as engine:
        got = engine.compress(small_open(), lambda layer: in_arena(arena, layer), options)
        assert got.summary.transport == "shared_memory"
        same(got, engine.compress(small_open(), source))


def test_results_in_messages_into_an_arena(client: structkv.Client) -> None:
    arena = structkv.Arena(structkv.Region(1 << 20))
    got = client.compress(small_open(), source, structkv.SessionOptions(allocate=arena))
    assert arena.free_bytes < 1 << 20
    same(got, client.compress(small_open(), source))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda keys: keys[:, :99], r"layer 0: keys: f32 .* has the strides \[3200, 32, 1\]"),
        (lambda keys: keys[:, :99].copy(), r"keys: f32 \[2, 99, 32\] came; f32 \[2, 100, 32\]"),
        (lambda keys: keys.astype(numpy.float64), r"keys: float64 \[2, 100, 32\] came"),
        (lambda keys: keys.swapaxes(0, 1), r"keys: f32 \[100, 2, 32\] has the strides"),
        (lambda keys: b"123", r"keys: u8 \[3\] came; f32 \[2, 100, 32\] on the CPU"),
        (lambda keys: "text", r"keys: <class 'str'> has neither DLPack nor the buffer protocol"),
        (lambda keys: keys.astype(ml_dtypes.bfloat16), r"keys: uint16 \[2, 100, 32\] came"),
    ],
)
def test_bad_tensors_are_named(client: structkv.Client, change: Any, text: str) -> None:
    tensors: dict[str, Any] = dict(small_layer(0))
    tensors["keys"] = change(tensors["keys"])
    with client.open_prompt(small_open()) as session:
        with pytest.raises(structkv.errors.InvalidArgument, match=text) as refused:
            session.send_layer(0, structkv.LayerTensors(**tensors))
        assert isinstance(refused.value, ValueError)
        session.send_layer(0, source(0))  # nothing happened to the session


class OnDevice:
    """What a tensor on a GPU says of itself."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **arguments: Any) -> Any:
        raise BufferError("memory of cuda:0")


def test_a_tensor_that_cannot_be_taken_says_why(client: structkv.Client) -> None:
    with client.open_prompt(small_open()) as session:
        with pytest.raises(structkv.errors.InvalidArgument, match="memory of cuda:0"):
            session.send_layer(0, structkv.LayerTensors(keys=OnDevice()))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt_tokens": -1}, "Open.prompt_tokens is -1; an int from 0 to 4294967295"),
        ({"prompt_tokens": 1.5}, "Open.prompt_tokens is 1.5"),
        ({"dtype": "f64"}, "Open.dtype is 'f64'; one of f32, f16, bf16, f8_e4m3, f8_e5m2"),
        ({"method": structkv.Budget()}, "Method is Budget.*; an object of the class StructKvMethod"),
        ({"geometry": 3}, "ModelGeometry is 3"),
        ({"transports": "inline"}, "Open.transports is 'inline'; a sequence is expected"),
        ({"model_id": b"x"}, "Open.model_id is b'x'; a str"),
        ({"method": structkv.StructKvMethod(decay=2)}, "decay"),
    ],
)
def test_bad_fields_are_named(client: structkv.Client, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(structkv.errors.InvalidArgument, match=text):
        client.open_prompt(small_open(**fields))


def test_the_interpreters_end_with_tensors_of_a_region_under_way(server: Server) -> None:
    code = f"""
import numpy, structkv
from conftest import small_layer, small_open
from test_tensors import in_arena
arena = structkv.Arena(structkv.Region(1 << 20))
options = structkv.SessionOptions(regions=[arena.region])
session = structkv.Client({server.target!r}).open_prompt(small_open(), options)
session.send_layer(0, in_arena(arena, 0))
print(session.opened.transport)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "shared_memory\n"), done.stderr
