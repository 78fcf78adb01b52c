"""What a tensor in a GPU's memory shows and refuses, which ones are taken, and how long memory
lives: on the fake CUDA, where the host's touch of it is a segmentation fault."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy
import pytest
import structkv
from conftest import Server, small_layer, small_open
from fake_cuda import CUDA_MANAGED, LIBRARY, CudaArray, FakeCuda, Held, described
from gpu_prompts import (  # noqa: F401: fixtures
    NEEDS_FAKE,
    SIZE,
    cuda,
    gpu_client,
    gpu_server,
    host,
    in_arena,
    new_arena,
    placed,
    put,
    same,
)

pytestmark = NEEDS_FAKE


@pytest.mark.parametrize("gpu", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "code", "bits", "typestr"),
    [
        ("f32", 2, 32, "<f4"),
        ("f16", 2, 16, "<f2"),
        ("bf16", 4, 16, None),
        ("f8_e4m3", 10, 8, None),
        ("i32", 0, 32, "<i4"),
        ("u8", 1, 8, "|u1"),
    ],
)
def test_what_a_tensor_shows(
    cuda: FakeCuda, gpu: int, dtype: str, code: int, bits: int, typestr: str | None
) -> None:
    arena = new_arena(gpu)
    first = arena.empty([5], "u8")
    tensor = arena.empty((2, 3, 4), dtype)
    assert tensor.device == arena.region.device == f"cuda:{gpu}"
    assert tensor.__dlpack_device__() == (2, gpu)
    assert repr(tensor) == f"structkv.Tensor({dtype}, [2, 3, 4], cuda:{gpu})"
    for arguments in ({}, {"stream": None}, {"stream": -1}, {"stream": 1}, {"stream": 1 << 40}):
        capsule = tensor.__dlpack__(**arguments, copy=None, dl_device=None)
        shown = described(capsule)
        assert (shown.device_type, shown.device_id, shown.byte_offset) == (2, gpu, 0)
        assert (shown.code, shown.bits, shown.lanes) == (code, bits, 1)
        assert shown.shape[: shown.ndim] == [2, 3, 4] and shown.strides[: shown.ndim] == [12, 4, 1]
        assert arena.region.offset_of(tensor) == 64 and arena.region.offset_of(first) == 0
    if typestr is None:
        with pytest.raises(AttributeError, match=f"of {dtype} on cuda:{gpu} has no __cuda_array"):
            tensor.__cuda_array_interface__
    else:
        interface = tensor.__cuda_array_interface__
        assert interface["data"] == (shown.data, False) and interface["typestr"] == typestr
        assert (interface["shape"], interface["version"]) == ((2, 3, 4), 3)
        assert interface["strides"] is interface["stream"] is None
    del capsule


def test_what_a_tensor_refuses(cuda: FakeCuda) -> None:
    tensor: Any = new_arena().empty((2, 3), "f32")
    text = r"structkv.Tensor on cuda:0 has no {}: torch.from_dlpack\(\) takes it where it is"
    for call, what in (
        (memoryview, "buffer"),
        (bytes, "buffer"),
        (numpy.asarray, "numpy array"),
        (numpy.array, "numpy array"),
        (structkv.Tensor.numpy, "numpy array"),
    ):
        with pytest.raises(BufferError, match=text.format(what)):
            call(tensor)
    with pytest.raises((BufferError, RuntimeError), match="(?i)device"):
        numpy.from_dlpack(tensor)
    for stream in (0, -2, "x", 1.0):
        with pytest.raises(structkv.InvalidArgument, match="__dlpack__: stream is .*; None, -1 or"):
            tensor.__dlpack__(stream=stream)
    with pytest.raises(BufferError, match="copy=True"):
        tensor.__dlpack__(copy=True)
    for device in ((1, 0), (2, 1)):
        with pytest.raises(BufferError, match="unsupported dl_device"):
            tensor.__dlpack__(dl_device=device)
    on_host = structkv.Arena(structkv.Region(4096)).empty((2, 3), "f32")
    assert (on_host.device, on_host.__dlpack_device__()) == ("cpu", (1, 0))
    assert not hasattr(on_host, "__cuda_array_interface__")
    assert numpy.asarray(on_host, numpy.float64).shape == (2, 3)


def test_reading_and_writing_a_region(cuda: FakeCuda) -> None:
    region = structkv.Region(1, gpu=0, cuda_library=str(LIBRARY))
    assert region.size_bytes == SIZE
    wanted = numpy.arange(100, dtype=numpy.int32)
    for each in (region, structkv.Region(SIZE)):
        each.write(64, wanted)
        got = numpy.zeros(100, numpy.int32)
        each.read(64, got)
        assert (got == wanted).all()
        with pytest.raises(structkv.InvalidArgument, match=f"400 bytes at {SIZE} do not lie in"):
            each.write(SIZE, wanted)
        with pytest.raises(structkv.InvalidArgument, match="400 bytes at .* do not lie in"):
            each.read(SIZE - 399, got)
        with pytest.raises(structkv.InvalidArgument, match="Region.read: into: .*read-only"):
            each.read(0, b"12")
    elsewhere = CudaArray(cuda, [4])
    assert region.offset_of(elsewhere) is None and region.offset_of(wanted) is None
    for call in (region.read, region.write):
        with pytest.raises(structkv.InvalidArgument, match=r"f32 \[4\] on cuda:0 came; copy it to"):
            call(0, elsewhere)
    with pytest.raises(structkv.FailedPrecondition, match="the region is memory of the host"):
        structkv.Region(4096).record(1)
    with pytest.raises(structkv.InvalidArgument, match="Region.record: stream is None; a cudaStr"):
        region.record(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"gpu": 0, "cuda_library": "libno-cuda.so"}, "FailedPrecondition", "no CUDA driver: libno"),
        ({"gpu": 0, "cuda_library": "libc.so.6"}, "FailedPrecondition", "libc.so.6 has no cuInit"),
        ({"gpu": 2}, "FailedPrecondition", "GPU 2: cuDeviceGet"),
        ({"gpu": 0, "size_bytes": 1 << 40}, "ResourceExhausted", "region of .* on GPU 0: cuMemAlloc"),
        ({"gpu": 0, "size_bytes": 0}, "InvalidArgument", "size_bytes is 0"),
        ({"gpu": 1, "named": True}, "InvalidArgument", "named is set and gpu is 1; it is of memory"),
        ({"gpu": 1, "prefault": True}, "InvalidArgument", "prefault is set and gpu is 1"),
        ({"gpu": 1, "huge_pages": False}, "InvalidArgument", "huge_pages is set and gpu is 1"),
        ({}, "InvalidArgument", "cuda_library is set and gpu is None"),
    ],
)
def test_bad_regions(cuda: FakeCuda, options: dict[str, Any], error: str, text: str) -> None:
    arguments = {"size_bytes": SIZE, "cuda_library": str(LIBRARY), **options}
    with pytest.raises(getattr(structkv, error), match=text):
        structkv.Region(**arguments)


def test_an_allocation_of_the_programs_own(cuda: FakeCuda, gpu_client: structkv.Client) -> None:
    pool = CudaArray(cuda, [SIZE], numpy.uint8)
    region = structkv.Region.adopt(pool, cuda_library=str(LIBRARY))
    assert (region.size_bytes, region.device) == (SIZE, "cuda:0")
    assert region.offset_of(pool) == 0 and pool.streams == [-1, -1]
    wanted = gpu_client.compress(small_open(), host)
    arena = structkv.Arena(region)
    at = pool.data
    del region, pool  # what the program allocated is the region's
    got = gpu_client.compress(
        small_open(), lambda layer: placed(arena, host(layer)), in_arena(arena)
    )
    assert got.summary.transport == "cuda_ipc"
    same(cuda, got.layers, wanted.layers)
    keys: Any = got.layers[0].keys
    offset = arena.region.offset_of(keys)
    assert offset is not None and described(keys.__dlpack__()).data == at + offset
    del got, arena
    assert cuda.held.device_bytes == SIZE and keys.shape == (2, 10, 32)
    del keys
    cuda.wait_until(Held())


def test_what_cannot_be_adopted(cuda: FakeCuda) -> None:
    def refused(tensor: Any, **options: Any) -> str:
        with pytest.raises(structkv.Error) as error:
            structkv.Region.adopt(tensor, **{"cuda_library": str(LIBRARY), **options})
        return error.value.text

    array = CudaArray(cuda, [1024], gpu=1)
    array.shape = (512,)
    assert "tensor has 2048 bytes of an allocation of 4096 on cuda:1" in refused(array)
    array.byte_offset = 2048
    assert "lies 2048 bytes behind the begin of its allocation" in refused(array)
    array.gpu, array.byte_offset, array.shape = 0, 0, (1024,)
    assert "is in the memory of GPU 1; RegionOptions.gpu is 0" in refused(array)
    array.gpu, array.shape = 1, (0,)
    assert "tensor has 0 bytes on cuda:1; 1 or more" in refused(array)
    array.shape = (1024,)
    assert "no CUDA driver: libno" in refused(array, cuda_library="libno.so")
    assert "tensor has 5 bytes on cpu; 1 or more in a GPU's memory" in refused(b"12345")
    on_host = CudaArray(cuda, [4])
    cuda.free(on_host.data)
    buffer = bytearray(16)
    on_host.data, on_host._cuda = id(buffer), None
    assert "is not in a GPU's memory" in refused(on_host)


def change(**attributes: Any) -> Callable[[CudaArray], None]:
    def apply(array: CudaArray) -> None:
        for name, value in attributes.items():
            setattr(array, name, value)

    return apply


BAD = [
    (change(shape=(2, 99, 32)), r"keys: f32 \[2, 99, 32\] on cuda:0 came; f32 \[2, 100, 32\]"),
    (change(strides=(32, 64, 1)), r"keys: f32 \[2, 100, 32\] has the strides \[32, 64, 1\]"),
    (change(dtype=numpy.dtype("i4")), None),  # the bits of f32
    (change(dtype=numpy.dtype("i2")), r"keys: int16 \[2, 100, 32\] on cuda:0 came"),
    (change(device_type=10), r"on a device \(DLPack type 10\) cannot be taken .* to the host"),
    (change(device_type=CUDA_MANAGED), r"\(DLPack type 13\) cannot be taken"),
]


def test_bad_tensors_are_named(
    cuda: FakeCuda, client: structkv.Client, gpu_client: structkv.Client
) -> None:
    arena = new_arena()
    keys = CudaArray.of(cuda, small_layer(0)["keys"])
    bare = structkv.SessionOptions(regions=[arena.region])
    with gpu_client.open_prompt(small_open(), bare) as session:
        assert session.opened.transport == "cuda_ipc"

        def refused(tensor: Any) -> str:
            with pytest.raises(structkv.InvalidArgument) as error:
                session.send_layer(0, replace(host(0), keys=tensor))
            return error.value.text

        assert refused(keys) == (
            "layer 0: keys: f32 [2, 100, 32] on cuda:0 came; it lies in none of the session's "
            "regions (1 of cuda:0), where the server reads keys and values, and there is no "
            "SessionOptions.staging that it could be copied to"
        )
        for spoil, text in BAD:
            bad = CudaArray.of(cuda, small_layer(0)["keys"])
            spoil(bad)
            said = refused(bad)
            pattern = text or r"keys: i32 \[2, 100, 32\] on cuda:0 came; it lies in none"
            assert re.search(pattern, said), said
        with pytest.raises(structkv.InvalidArgument, match="send: data: f32 .* lies in none of"):
            session.send(0, "keys", keys)
        with pytest.raises(structkv.InvalidArgument, match="SendChunk: .* read where they lie"):
            block = put(arena, small_layer(0)["keys"])
            session.send_chunk(0, 0, 100, keys=block, values=block)
        # What is read by the host may lie anywhere in a GPU's memory, if that is what it is.
        liar = CudaArray(cuda, [4, 8, 32])
        cuda.free(liar.data)
        liar._cuda = None
        with pytest.raises(structkv.InvalidArgument, match="window_queries: .*knows no GPU's memory"):
            session.send_layer(0, replace(host(0), window_queries=liar))
        assert "TENSOR_KEYS lies outside of StreamOptions.regions" in refused(host(0).keys)
    with client.open_prompt(small_open()) as session:
        for name in ("keys", "window_queries"):
            tensor = CudaArray.of(cuda, small_layer(0)[name])
            text = (
                f"layer 0: {name}: f32 .* on cuda:0 came; no region of the session is memory of a "
                "GPU: copy it to the host, or give SessionOptions.regions one of cuda:0"
            )
            with pytest.raises(structkv.InvalidArgument, match=text):
                session.send_layer(0, replace(host(0), **{name: tensor}))
        with pytest.raises(structkv.InvalidArgument, match="positions: i32 .* on cuda:0 came"):
            session.send_layer(0, replace(host(0), positions=CudaArray(cuda, [9], numpy.int32)))


def test_functions_give_memory_of_the_host(cuda: FakeCuda, client: structkv.Client) -> None:
    options = structkv.SessionOptions(allocate=lambda *given: CudaArray(cuda, [given[2]], "u1"))
    with pytest.raises(structkv.Internal, match="allocate: .*on cuda:0 came; copy it to the host"):
        client.compress(small_open(), host, options)
    options = structkv.SessionOptions(
        rows=lambda pull: (None, CudaArray(cuda, [2, pull.kept_tokens, 32]))
    )
    with pytest.raises(structkv.Internal, match="rows: .* on cuda:0 came; copy it to the host"):
        client.compress(small_open(pull="values"), host, options)
    arena = new_arena()
    with pytest.raises(structkv.ResourceExhausted, match="arena is memory of a GPU"):
        client.compress(small_open(), host, structkv.SessionOptions(allocate=arena))


def test_regions_that_do_not_fit(cuda: FakeCuda, gpu_client: structkv.Client) -> None:
    arena = new_arena()
    for options, error, text in (
        (in_arena(arena, transport="shared_memory"), "InvalidArgument", "memory of a GPU, for CUDA"),
        (in_arena(new_arena(1), results=None), "FailedPrecondition", "that of a GPU which computes"),
        (in_arena(arena, regions=[structkv.Region(4096)]), "InvalidArgument", "some of the host"),
        (in_arena(arena, regions=[new_arena(1).region]), "InvalidArgument", "some of GPU"),
        (structkv.SessionOptions(transport="cuda_ipc"), "InvalidArgument", "no region was given"),
    ):
        with pytest.raises(getattr(structkv, error), match=text):
            gpu_client.compress(small_open(), host, options)
    with pytest.raises(structkv.InvalidArgument, match="one of auto, inline, shared_memory, cuda_ipc"):
        gpu_client.compress(small_open(), host, structkv.SessionOptions(transport="x"))  # type: ignore[arg-type]
    with pytest.raises(structkv.InvalidArgument, match="Open.pull: keys and values lie in a GPU's"):
        gpu_client.compress(small_open(pull="values"), host, in_arena(arena))


def test_memory_lives_as_long_as_its_last_user(cuda: FakeCuda, gpu_client: structkv.Client) -> None:
    arena = new_arena()
    gpu_client.register(arena.region)
    tensor = arena.empty((4,), "f32")
    capsule = tensor.__dlpack__()
    del arena, tensor
    assert cuda.held.device_bytes == SIZE and cuda.held.contexts == 1
    del capsule
    cuda.wait_until(Held())
    # Sessions that are cancelled, dropped or fail give it back once the server has closed it.
    for end in ("cancel", "drop", "fail"):
        arena = new_arena()
        session = gpu_client.open_prompt(small_open(), in_arena(arena))
        tensors = placed(arena, host(0))
        if end == "fail":
            bad = numpy.full((4, 8, 32), numpy.nan, numpy.float32)
            tensors = replace(tensors, window_queries=put(arena, bad))
        session.send_layer(0, tensors)
        del arena, tensors
        assert cuda.held.device_bytes == SIZE
        if end == "cancel":
            session.cancel()
        elif end == "fail":
            with pytest.raises(structkv.InvalidArgument, match="layer 0"):
                session.collect()
        del session
        cuda.wait_until(Held())


def test_the_interpreters_end(gpu_server: Server) -> None:
    code = f"""
import structkv
from gpu_prompts import *
from conftest import small_open
FakeCuda()
arena = new_arena()
session = structkv.Client({gpu_server.target!r}).open_prompt(small_open(), in_arena(arena))
session.send_layer(0, placed(arena, host(0)))
print("sent")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "sent\n"), done.stderr
