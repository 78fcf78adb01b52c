"""Tensors in a GPU's memory, that of the fake CUDA (fake_cuda.py), and a server of it in a process
of its own: what comes back is what tensors of the host give, to the byte, and all memory is freed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy
import pytest
import structkv
from conftest import Server, small_layer, small_open
from fake_cuda import CudaArray, FakeCuda
from gpu_prompts import (  # noqa: F401: fixtures
    NAMES,
    NEEDS_FAKE,
    cuda,
    gpu_client,
    gpu_server,
    host,
    in_arena,
    new_arena,
    placed,
    same,
)

pytestmark = NEEDS_FAKE


@pytest.mark.parametrize("dtype", [numpy.float32, numpy.float16, ml_dtypes.bfloat16])
def test_prompts_in_place(cuda: FakeCuda, gpu_client: structkv.Client, dtype: Any) -> None:
    arena = new_arena()
    open = small_open(dtype=NAMES[numpy.dtype(dtype).name], return_saliency=True)
    wanted = gpu_client.compress(open, lambda layer: host(layer, dtype))
    assert wanted.opened.transport == "inline"
    in_place = in_arena(arena, transport="cuda_ipc")
    got = gpu_client.compress(open, lambda layer: placed(arena, host(layer, dtype)), in_place)
    # Keys and values were named where they lie: there is no staging that they were copied to.
    assert got.opened.transport == got.summary.transport == "cuda_ipc"
    same(cuda, got.layers, wanted.layers)
    for layer in got.layers:
        assert layer.keys is not None and layer.values is not None and layer.positions is not None
        assert layer.keys.device == layer.values.device == "cuda:0"
        assert arena.region.offset_of(layer.keys) is not None
        assert layer.positions.device == "cpu"
    # Without an arena for them results come in messages.
    got = gpu_client.compress(
        open, lambda layer: placed(arena, host(layer, dtype)), replace(in_place, results=None)
    )
    assert got.summary.transport == "cuda_ipc"
    assert {layer.keys.device for layer in got.layers if layer.keys} == {"cpu"}
    same(cuda, got.layers, wanted.layers)


def test_skeleton_rows_in_steps(cuda: FakeCuda, gpu_client: structkv.Client) -> None:
    method = structkv.StructKvMethod(pivot=structkv.Pivot(mode="fixed", fixed_layer=0))
    open = small_open(method=method)

    def source(layer: int, pivot: structkv.PivotResult | None) -> structkv.LayerTensors:
        tensors = host(layer)
        if pivot is None or layer == 0:
            return tensors
        assert tensors.keys is not None and tensors.values is not None
        rows = numpy.asarray(pivot.skeleton)
        return replace(
            tensors,
            keys=numpy.ascontiguousarray(tensors.keys[:, rows]),
            values=numpy.ascontiguousarray(tensors.values[:, rows]),
            positions=rows,
        )

    arena = new_arena()
    wanted = gpu_client.compress_in_steps(open, source)
    got = gpu_client.compress_in_steps(
        open, lambda layer, pivot: placed(arena, source(layer, pivot)), in_arena(arena)
    )
    assert got.summary.transport == "cuda_ipc"
    same(cuda, got.layers, wanted.layers)


def test_batches_and_asyncio(cuda: FakeCuda, gpu_client: structkv.Client, gpu_server: Server) -> None:
    arena = new_arena()
    wanted = gpu_client.compress(small_open(), host)
    # One has results in messages; the stream's regions are the other's too.
    options = [structkv.PromptOptions(results=arena), structkv.PromptOptions()]
    prompts = [structkv.BatchPrompt(small_open(), each) for each in options]
    stream = structkv.StreamOptions(regions=[arena.region])
    got = gpu_client.compress_batch(prompts, lambda _, layer: placed(arena, host(layer)), stream)
    for each, device in zip(got, ("cuda:0", "cpu")):
        assert isinstance(each, structkv.Compressed) and each.summary.transport == "cuda_ipc"
        assert each.layers[0].keys is not None and each.layers[0].keys.device == device
        same(cuda, each.layers, wanted.layers)
    aio = structkv.AsyncClient(gpu_server.target)
    both = aio.compress(small_open(), lambda layer: placed(arena, host(layer)), in_arena(arena))
    same(cuda, asyncio.run(both).layers, wanted.layers)


def test_fetches_into_a_gpu(cuda: FakeCuda, gpu_client: structkv.Client) -> None:
    wanted = gpu_client.compress(small_open(), host)
    held = gpu_client.compress(small_open(output="hold"), host).summary.held
    assert held is not None
    arena = new_arena()
    fetched = gpu_client.fetch(held.handle, structkv.FetchOptions(results=arena))
    assert fetched.info.transport == "cuda_ipc"
    same(cuda, fetched.layers, wanted.layers)
    devices = {layer.keys.device for layer in fetched.layers if layer.keys is not None}
    assert devices == {"cuda:0"}
    taken: list[structkv.LayerResult] = []
    one_by_one = structkv.FetchOptions(results=arena, on_layer=taken.append, transport="cuda_ipc")
    assert gpu_client.fetch(held.handle, one_by_one).layers == ()
    same(cuda, taken, wanted.layers)
    assert taken[1].values is not None and taken[1].values.device == "cuda:0"
    with pytest.raises(structkv.FailedPrecondition, match="memory of a GPU.*inline was asked for"):
        gpu_client.fetch(held.handle, structkv.FetchOptions(results=arena, transport="inline"))
    gpu_client.release(held.handle)


def test_what_is_elsewhere_is_copied_to_staging(
    cuda: FakeCuda, gpu_client: structkv.Client
) -> None:
    arena = new_arena()
    staged = structkv.SessionOptions(staging=arena)
    wanted = gpu_client.compress(small_open(), host)
    for gpu in (0, 1):
        arrays = [{n: CudaArray.of(cuda, a, gpu=gpu) for n, a in small_layer(i).items()} for i in (0, 1)]
        got = gpu_client.compress(
            small_open(), lambda layer: structkv.LayerTensors(**arrays[layer]), staged
        )
        assert got.summary.transport == "cuda_ipc"
        same(cuda, got.layers, wanted.layers)
        # Nothing is queued on a stream here, so none is to wait.
        assert {tuple(array.streams) for each in arrays for array in each.values()} == {(-1,)}
        del arrays, got
    got = gpu_client.compress(small_open(), host, staged)  # of the host, too
    assert got.summary.transport == "cuda_ipc"
    same(cuda, got.layers, wanted.layers)


def test_where_the_server_has_no_gpu(cuda: FakeCuda, client: structkv.Client) -> None:
    arena = new_arena()
    wanted = client.compress(small_open(), host)
    with pytest.raises(structkv.FailedPrecondition, match="no CUDA IPC.*copy_from_gpu would"):
        client.compress(small_open(), host, in_arena(arena))
    copied = in_arena(arena, copy_from_gpu=True)
    got = client.compress(small_open(), lambda layer: placed(arena, host(layer)), copied)
    assert got.summary.transport == "inline" and "no CUDA IPC" in got.opened.transport_reason
    assert got.layers[0].keys is not None and got.layers[0].keys.device == "cuda:0"
    same(cuda, got.layers, wanted.layers)
    # Any memory of a GPU is copied from, in chunks and in bytes as well.
    with client.open_prompt(small_open(), copied) as session:
        for layer in (0, 1):
            arrays = {name: CudaArray.of(cuda, a) for name, a in small_layer(layer).items()}
            session.send_chunk(layer, 0, 100, keys=arrays["keys"], values=arrays["values"])
            session.send(layer, "window_queries", arrays["window_queries"])
        session.commit()
        same(cuda, session.collect().layers, wanted.layers)


def test_a_stream_that_writes_later(cuda: FakeCuda, gpu_client: structkv.Client) -> None:
    arena = new_arena()
    wanted = gpu_client.compress(small_open(), host)
    stream = cuda.new_stream()
    for record in (False, True):
        with gpu_client.open_prompt(small_open(), in_arena(arena)) as session:
            for layer in (0, 1):
                late = small_layer(layer)
                tensors = placed(arena, host(layer + 10))  # of other bytes
                for name in ("keys", "values"):
                    at = getattr(tensors, name).__cuda_array_interface__["data"][0]
                    cuda.write(at, late[name], stream)
                tensors = replace(tensors, window_queries=late["window_queries"])
                if record:
                    arena.region.record(stream)
                    session.send_layer(layer, tensors)
                else:
                    session.send_layer(layer, replace(tensors, cuda_stream=stream))
                # The server waits for the stream, whose work begins when it is waited for here.
                arena.region.read(0, bytearray(1))
            session.commit()
            same(cuda, session.collect().layers, wanted.layers)
    cuda.end_stream(stream)
    with gpu_client.open_prompt(small_open()) as session:
        with pytest.raises(structkv.InvalidArgument, match="cuda_stream is set, and .* no memory"):
            session.send_layer(0, replace(host(0), cuda_stream=1))
        with pytest.raises(structkv.InvalidArgument, match="LayerTensors.cuda_stream is 'x'; a cuda"):
            session.send_layer(0, replace(host(0), cuda_stream="x"))
