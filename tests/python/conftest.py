"""A server on a unix socket, and the bundled prompt."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy
import pytest
import structkv

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(os.environ.get("STRUCTKV_BIN", ROOT / "build/release/bin"))
CAPTURE = ROOT / "tests/data/capture-tiny-llama-1000.safetensors"

Array = numpy.ndarray[Any, Any]
TYPES = {
    "BF16": ml_dtypes.bfloat16,
    "F16": numpy.float16,
    "F32": numpy.float32,
    "I32": numpy.int32,
    "U8": numpy.uint8,
}


def read_safetensors(path: Path) -> dict[str, Array]:
    """Tensors by name, as read-only views of the file's bytes."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, info in json.loads(data[8:begin]).items():
        if name == "__metadata__" or info["dtype"] not in TYPES:
            continue
        first, last = info["data_offsets"]
        flat = numpy.frombuffer(data[begin + first : begin + last], dtype=TYPES[info["dtype"]])
        tensors[name] = flat.reshape(info["shape"])
    return tensors


@dataclass(frozen=True)
class Prompt:
    """A prompt and its tensors."""

    open: structkv.Open
    layers: list[structkv.LayerTensors]

    def source(self, layer: int) -> structkv.LayerTensors:
        return self.layers[layer]


@pytest.fixture(scope="session")
def capture() -> Prompt:
    """The bundled prompt: 12 layers, 6 query and 2 KV heads of 32, 1,000 tokens, bf16."""
    tensors = read_safetensors(CAPTURE)
    layers = [
        structkv.LayerTensors(
            keys=tensors[f"layer.{i}.k"],
            values=tensors[f"layer.{i}.v"],
            window_queries=numpy.ascontiguousarray(tensors[f"layer.{i}.q_window"][:, -8:]),
        )
        for i in range(12)
    ]
    geometry = structkv.ModelGeometry(
        layer_count=12, query_head_count=6, kv_head_count=2, key_dim=32
    )
    open = structkv.Open(
        geometry=geometry,
        prompt_tokens=1000,
        dtype="bf16",
        layout="head_token_dim",
        model_id="tiny-llama",
    )
    return Prompt(open, layers)


def small_open(**fields: Any) -> structkv.Open:
    """2 layers, 4 query and 2 KV heads of 32, 100 tokens, f32, unless said otherwise."""
    geometry = structkv.ModelGeometry(
        layer_count=2, query_head_count=4, kv_head_count=2, key_dim=32
    )
    defaults: dict[str, Any] = {
        "geometry": geometry,
        "prompt_tokens": 100,
        "dtype": "f32",
        "layout": "head_token_dim",
    }
    return structkv.Open(**{**defaults, **fields})


def small_layer(seed: int = 0, dtype: Any = numpy.float32, tokens: int = 100) -> dict[str, Array]:
    """Keys, values and window queries of small_open()."""
    random = numpy.random.default_rng(seed)
    shapes = {"keys": (2, tokens, 32), "values": (2, tokens, 32), "window_queries": (4, 8, 32)}
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


@dataclass
class Server:
    """A structkv-server that listens on a unix socket."""

    target: str
    region_socket: str
    process: subprocess.Popen[bytes] = field(repr=False)


@contextmanager
def running(folder: Path, program: Path, ready: str, *flags: str) -> Iterator[Server]:
    """A server with more flags, once its output has `ready`; it ends well."""
    target, region_socket = f"unix:{folder}/grpc", f"{folder}/regions"
    command = [str(program), "--listen", target, "--admin-listen", "off"]
    command += ["--region-socket", region_socket, *flags]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log)
    try:
        end = time.monotonic() + 30
        while ready not in (folder / "log").read_text():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end, "the server does not start"
            time.sleep(0.02)
        yield Server(target, region_socket, process)
    finally:
        process.terminate()
        code = process.wait(60)
    assert code == 0, (folder / "log").read_text()


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts a server with more flags; it ends with the tests."""
    with ExitStack() as servers:

        def start(*flags: str) -> Server:
            folder = tmp_path_factory.mktemp("server")
            started = running(folder, BIN / "structkv-server", "ready", *flags)
            return servers.enter_context(started)

        yield start


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Server]) -> Server:
    """One for all tests, with room for held caches."""
    # A drain would wait for what tests leave held.
    return start_server("--hold-budget", "64MiB", "--drain-limit", "100ms")


@pytest.fixture(scope="session")
def client(server: Server) -> structkv.Client:
    return structkv.Client(server.target)


@pytest.fixture(scope="session")
def engine() -> Iterator[structkv.Engine]:
    with structkv.Engine(hold_budget="64MiB", threads=2, log_sessions=False) as engine:
        yield engine


def same(got: structkv.Compressed, wanted: structkv.Compressed) -> None:
    """Asserts that the two are the same, to the byte."""
    assert len(got.layers) == len(wanted.layers)
    for a, b in zip(got.layers, wanted.layers):
        for name in ("positions", "keys", "values", "key_scales", "value_scales", "saliency"):
            left, right = getattr(a, name), getattr(b, name)
            assert (left is None) == (right is None), name
            if left is not None:
                assert left.shape == right.shape, name
                assert bytes(memoryview(left).cast("B")) == bytes(memoryview(right).cast("B")), name
        assert a.metrics == b.metrics
