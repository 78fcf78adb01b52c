"""Prompts whose tensors lie in a GPU's memory, that of the fake CUDA (fake_cuda.py), and a server of
it in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy
import pytest
import structkv
from conftest import Array, Server, running, small_layer
from fake_cuda import LIBRARY, SERVER, FakeCuda, Held

NEEDS_FAKE = pytest.mark.skipif(
    not (LIBRARY.exists() and SERVER.exists()),
    reason=f"{LIBRARY.name} or {SERVER.name} was not built: there are no headers of CUDA",
)
SIZE = 2 << 20
NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int32": "i32"}


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    """Nothing is left of it after the test, and nothing was freed that the server had open."""
    cuda = FakeCuda()
    yield cuda
    cuda.wait_until(Held())


@pytest.fixture(scope="module")
def gpu_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("gpu")
    with running(folder, SERVER, "listening on", "--hold-budget=64MiB") as server:
        yield server


@pytest.fixture(scope="module")
def gpu_client(gpu_server: Server) -> structkv.Client:
    return structkv.Client(gpu_server.target)


def new_arena(gpu: int = 0) -> structkv.Arena:
    return structkv.Arena(structkv.Region(SIZE, gpu=gpu, cuda_library=str(LIBRARY)))


def in_arena(arena: structkv.Arena, **options: Any) -> structkv.SessionOptions:
    return structkv.SessionOptions(**{"regions": [arena.region], "results": arena, **options})


def put(arena: structkv.Arena, array: Array) -> structkv.Tensor:
    """A tensor of the arena with the array's bytes."""
    block = arena.empty(array.shape, NAMES[array.dtype.name])
    at = arena.region.offset_of(block)
    assert at is not None
    arena.region.write(at, array.tobytes())
    return block


def host(layer: int, dtype: Any = numpy.float32) -> structkv.LayerTensors:
    return structkv.LayerTensors(**small_layer(layer, dtype))


def placed(arena: structkv.Arena, tensors: structkv.LayerTensors) -> structkv.LayerTensors:
    """The same with every tensor in the arena."""
    given = {each.name: getattr(tensors, each.name) for each in fields(tensors)}
    return replace(tensors, **{n: put(arena, a) for n, a in given.items() if a is not None})


def same(
    cuda: FakeCuda, got: Sequence[structkv.LayerResult], wanted: Sequence[structkv.LayerResult]
) -> None:
    """Asserts that the two are the same, to the byte, wherever they lie."""
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted):
        for name in ("positions", "keys", "values", "saliency"):
            left, right = getattr(a, name), getattr(b, name)
            assert (left is None) == (right is None), name
            if left is not None:
                assert (left.shape, left.dtype) == (right.shape, right.dtype), name
                assert cuda.read(left) == cuda.read(right), name
