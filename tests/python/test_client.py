"""Prompts through a server, compared with the C++ command, to the byte."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import structkv
from conftest import BIN, CAPTURE, Prompt, Server, read_safetensors, same, small_layer, small_open

FAST = structkv.FastKvMethod(tsp_layer=0)
METHODS: list[structkv.messages.Method] = [
    structkv.StructKvMethod(kv_budget=structkv.Budget(ratio=0.2)),
    structkv.SnapKvMethod(pooling="max", pooling_kernel=7, window_tokens=8),
    structkv.PyramidKvMethod(beta=10.0, window_tokens=8),
    structkv.StreamingLlmMethod(sink_tokens=2),
    FAST,
    structkv.FullMethod(),
]


def small_source(layer: int) -> structkv.LayerTensors:
    return structkv.LayerTensors(**small_layer(layer))


def test_same_as_the_command(
    client: structkv.Client, capture: Prompt, server: Server, tmp_path: Path
) -> None:
    got = client.compress(capture.open, capture.source)
    out = tmp_path / "out.safetensors"
    subprocess.run(
        [BIN / "structkv", "compress", CAPTURE, "--server", server.target, "--out", out],
        check=True,
        capture_output=True,
    )
    wanted = read_safetensors(out)
    assert [layer.layer for layer in got.layers] == list(range(12))
    for layer in got.layers:
        assert layer.keys is not None and layer.values is not None and layer.positions is not None
        assert layer.keys.shape == (2, 100, 32) and layer.keys.dtype == "bf16"
        for name, tensor in (("k", layer.keys), ("v", layer.values)):
            expected = wanted[f"layer.{layer.layer}.{name}"]
            assert tensor.numpy().tobytes() == expected.tobytes(), (layer.layer, name)
        positions = numpy.from_dlpack(layer.positions)
        assert (positions == wanted[f"layer.{layer.layer}.positions"]).all()
        assert layer.metrics is not None and layer.metrics.entropy > 0
    assert got.pivot is not None and got.pivot.pivot_layer == 10 and got.pivot.mode == "exact"
    assert got.pivot.skeleton is not None and got.pivot.skeleton.shape == (200,)
    assert got.summary.logical_length == 1000 and got.summary.kv_length == 100
    assert got.summary.next_position == 1000 and got.summary.transport == "inline"
    assert isinstance(got.opened.method, structkv.StructKvMethod)
    assert got.opened.method.decay == 0.9


def test_in_steps_as_the_command(
    client: structkv.Client, capture: Prompt, server: Server, tmp_path: Path
) -> None:
    pivot = structkv.Pivot(mode="fixed", fixed_layer=5)
    open = replace(capture.open, method=structkv.StructKvMethod(pivot=pivot))
    cut = []

    def source(layer: int, pivot: structkv.PivotResult | None) -> structkv.LayerTensors:
        tensors = capture.layers[layer]
        if pivot is None or pivot.skeleton_from_layer is None:
            return tensors
        assert layer >= pivot.skeleton_from_layer
        cut.append(layer)
        rows = numpy.asarray(pivot.skeleton)
        return structkv.LayerTensors(
            keys=numpy.ascontiguousarray(numpy.asarray(tensors.keys)[:, rows]),
            values=numpy.ascontiguousarray(numpy.asarray(tensors.values)[:, rows]),
            window_queries=tensors.window_queries,
            positions=rows,
        )

    got = client.compress_in_steps(open, source)
    assert cut == [6, 7, 8, 9, 10, 11]
    out = tmp_path / "out.safetensors"
    command: list[str | Path] = [BIN / "structkv", "compress", CAPTURE, "--out", out]
    command += ["--server", server.target, "--skeleton-layers"]
    command += ["--pivot", "fixed", "--pivot-layer", "5"]
    subprocess.run(command, check=True, capture_output=True)
    wanted = read_safetensors(out)
    for layer in got.layers:
        assert layer.keys is not None
        assert layer.keys.numpy().tobytes() == wanted[f"layer.{layer.layer}.k"].tobytes()
    aio = structkv.AsyncClient(server.target)
    same(asyncio.run(aio.compress_in_steps(open, source)), got)


def test_in_steps_where_one_layer_is_looked_at(client: structkv.Client, server: Server) -> None:
    open = small_open(method=structkv.GemFilterMethod(filter_layer=1, window_tokens=8), output="plan")
    asked: list[int] = []

    def source(layer: int, pivot: structkv.PivotResult | None) -> structkv.LayerTensors:
        asked.append(layer)
        tensors = small_layer(layer)
        return structkv.LayerTensors(
            keys=tensors["keys"], window_queries=tensors["window_queries"]
        )

    got = client.compress_in_steps(open, source)
    assert [layer.kept_tokens for layer in got.layers] == [0, 10] and got.pivot is not None
    aio = structkv.AsyncClient(server.target)
    same(asyncio.run(aio.compress_in_steps(open, source)), got)
    assert asked == [1, 1]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_the_engine_answers_as_a_server(
    client: structkv.Client, engine: structkv.Engine, method: structkv.messages.Method
) -> None:
    statistic: dict[str, structkv.messages.Method] = {"method": method}
    source = small_source
    if isinstance(method, (structkv.StreamingLlmMethod, structkv.FullMethod)):

        def source(layer: int) -> structkv.LayerTensors:
            tensors = small_layer(layer)
            return structkv.LayerTensors(keys=tensors["keys"], values=tensors["values"])

    open = small_open(**statistic)
    same(engine.compress(open, source), client.compress(open, source))


def test_events_come_in_order(client: structkv.Client) -> None:
    method = structkv.StructKvMethod(pivot=structkv.Pivot(mode="fixed", fixed_layer=0))
    open = small_open(method=method, return_saliency=True, return_centrality=True)
    with client.open_prompt(open) as session:
        assert session.open.idempotency_key != ""
        assert set(session.opened.required_tensors) == {"keys", "values", "window_queries"}
        session.send_layer(0, small_source(0))
        pivot = session.next_event()
        assert isinstance(pivot, structkv.PivotResult) and pivot.skeleton_from_layer == 1
        assert pivot.centrality is not None and pivot.centrality.shape == (100,)
        layer = session.next_event()
        assert isinstance(layer, structkv.LayerResult) and layer.saliency is not None
        assert numpy.asarray(layer.saliency).sum() == pytest.approx(4, rel=1e-4)
        # Skeleton rows alone, from here on.
        rows = numpy.asarray(pivot.skeleton)
        full = small_layer(1)
        layer_1 = structkv.LayerTensors(
            keys=numpy.ascontiguousarray(full["keys"][:, rows]),
            values=numpy.ascontiguousarray(full["values"][:, rows]),
            window_queries=full["window_queries"],
        )
        for bad, text in (
            (rows.astype(numpy.int64), r"positions: int64 \[20\] came; i32"),
            (rows.tobytes() + b"1", r"positions: u8 \[81\] came; i32 \[20\]"),
            (memoryview(b"1" + rows.tobytes())[1:], "positions lie at the address .* a multiple"),
        ):
            with pytest.raises(structkv.errors.InvalidArgument, match=text):
                session.send_layer(1, replace(layer_1, positions=bad))
        session.send_layer(1, replace(layer_1, positions=rows.tobytes()))
        session.commit()
        kinds = [type(event) for event in session]
        assert kinds == [structkv.LayerResult, structkv.Summary]
        with pytest.raises(structkv.errors.OutOfRange, match="summary"):
            session.next_event()


def test_chunks_and_bytes(client: structkv.Client) -> None:
    open = small_open(layers_in_flight=2)
    wanted = client.compress(open, small_source)
    with client.open_prompt(open) as session:
        for first, tokens in ((0, 64), (64, 36)):
            for layer in range(2):
                tensors = small_layer(layer)
                chunk = {
                    name: numpy.ascontiguousarray(tensors[name][:, first : first + tokens])
                    for name in ("keys", "values")
                }
                session.send_chunk(layer, first, tokens, **chunk)
        session.send_layer(
            0, structkv.LayerTensors(window_queries=small_layer(0)["window_queries"])
        )
        queries = small_layer(1)["window_queries"].tobytes()
        session.send(1, "window_queries", queries[:1000])
        session.send(1, "window_queries", memoryview(queries)[1000:], 1000)
        session.commit()
        same(session.collect(), wanted)


@pytest.mark.parametrize("own_rows", [False, True])
def test_pull(client: structkv.Client, own_rows: bool) -> None:
    wanted = client.compress(small_open(), small_source)
    pulled: list[int] = []

    def rows(pull: structkv.RowPull) -> tuple[None, numpy.ndarray]:
        pulled.append(pull.layer)
        assert not pull.keys
        values = small_layer(pull.layer)["values"]
        return None, numpy.ascontiguousarray(values[:, numpy.asarray(pull.positions)])

    options = structkv.SessionOptions(rows=rows if own_rows else None)
    same(client.compress(small_open(pull="values"), small_source, options), wanted)
    assert pulled == ([0, 1] if own_rows else [])


def test_a_failing_function_fails_its_session(client: structkv.Client) -> None:
    def rows(pull: structkv.RowPull) -> tuple[None, numpy.ndarray]:
        raise KeyError("no such row")

    with pytest.raises(structkv.errors.Internal, match="rows: KeyError: 'no such row'"):
        client.compress(
            small_open(pull="values"), small_source, structkv.SessionOptions(rows=rows)
        )

    def allocate(layer: int, tensor: str, nbytes: int) -> numpy.ndarray:
        raise KeyError(tensor)

    with pytest.raises(structkv.errors.Internal, match="allocate: KeyError: 'positions'"):
        client.compress(small_open(), small_source, structkv.SessionOptions(allocate=allocate))


def test_a_failing_function_fails_its_fetch(client: structkv.Client) -> None:
    held = client.compress(small_open(output="hold"), small_source).summary.held
    assert held is not None
    layers: list[int] = []

    def on_layer(layer: structkv.LayerResult) -> None:
        layers.append(layer.layer)
        raise OSError(f"no room for layer {layer.layer}")

    with pytest.raises(structkv.errors.Internal, match="on_layer: OSError: no room for layer 0"):
        client.fetch(held.handle, structkv.FetchOptions(on_layer=on_layer))
    assert layers == [0]

    def allocate(layer: int, tensor: str, nbytes: int) -> bytearray:
        return bytearray(3)

    with pytest.raises(structkv.errors.Internal, match=r"allocate: .*u8 \[3\] came"):
        client.fetch(held.handle, structkv.FetchOptions(allocate=allocate))
    client.release(held.handle)


def test_allocate(client: structkv.Client) -> None:
    given: dict[tuple[int, str], numpy.ndarray] = {}

    def allocate(layer: int, tensor: str, nbytes: int) -> numpy.ndarray:
        given[layer, tensor] = numpy.zeros(nbytes, numpy.uint8)
        return given[layer, tensor]

    got = client.compress(small_open(), small_source, structkv.SessionOptions(allocate=allocate))
    same(got, client.compress(small_open(), small_source))
    for layer in got.layers:
        assert numpy.shares_memory(numpy.asarray(layer.keys), given[layer.layer, "keys"])


def test_paged_and_other_layouts(client: structkv.Client) -> None:
    dense = client.compress(small_open(), small_source)
    table = [3, 0, 6, 2, 1, 5, 4]
    paged = structkv.PagedLayout(block_tokens=16, block_count=8, block_table=table)

    def source(layer: int) -> structkv.LayerTensors:
        tensors = small_layer(layer)
        blocks = {}
        for name in ("keys", "values"):
            room = numpy.full((8, 2, 16, 32), 7, numpy.float32)
            for i, block in enumerate(table):
                rows = tensors[name][:, 16 * i : 16 * i + 16]
                room[block, :, : rows.shape[1]] = rows
            blocks[name] = room
        return structkv.LayerTensors(window_queries=tensors["window_queries"], **blocks)

    got = client.compress(small_open(paged=paged), source)
    for a, b in zip(got.layers, dense.layers):
        assert a.keys is not None and a.keys.shape == (1, 2, 16, 32) and a.kept_blocks == 1
        assert (numpy.asarray(a.keys)[0, :, :10] == numpy.asarray(b.keys)).all()

    def transposed(layer: int) -> structkv.LayerTensors:
        tensors = small_layer(layer)
        turned = {n: numpy.ascontiguousarray(tensors[n].swapaxes(0, 1)) for n in ("keys", "values")}
        return structkv.LayerTensors(window_queries=tensors["window_queries"], **turned)

    got = client.compress(small_open(layout="token_head_dim"), transposed)
    for a, b in zip(got.layers, dense.layers):
        assert (numpy.asarray(a.keys).swapaxes(0, 1) == numpy.asarray(b.keys)).all()


def test_batch(client: structkv.Client) -> None:
    prompts = [
        structkv.BatchPrompt(small_open()),
        structkv.BatchPrompt(small_open(prompt_tokens=0)),
        structkv.BatchPrompt(small_open(method=FAST)),
    ]
    first, refused, last = client.open_batch(prompts)
    assert isinstance(refused, structkv.errors.InvalidArgument)
    assert "prompt_tokens" in refused.text
    assert isinstance(first, structkv.Session) and isinstance(last, structkv.Session)
    for layer in range(2):
        for session in (first, last):
            session.send_layer(layer, small_source(layer))
    last.commit()
    first.commit()
    same(first.collect(), client.compress(small_open(), small_source))
    same(last.collect(), client.compress(small_open(method=FAST), small_source))


def test_a_batch_in_one_call(client: structkv.Client, engine: structkv.Engine) -> None:
    prompts = [
        structkv.BatchPrompt(small_open()),
        structkv.BatchPrompt(small_open(prompt_tokens=0)),
        structkv.BatchPrompt(small_open(prompt_tokens=99)),
        structkv.BatchPrompt(small_open(method=FAST)),
    ]
    asked = []

    def source(prompt: int, layer: int) -> structkv.LayerTensors:
        asked.append((prompt, layer))
        return small_source(layer)  # of 100 tokens, so that prompt 2 fails

    for each in (client, engine):
        asked.clear()
        first, refused, wrong, last = each.compress_batch(prompts, source)
        assert asked == [(0, 0), (2, 0), (3, 0), (0, 1), (3, 1)]
        assert isinstance(refused, structkv.errors.InvalidArgument)
        assert "prompt_tokens" in refused.text
        assert isinstance(wrong, structkv.errors.InvalidArgument) and "[2, 99, 32]" in wrong.text
        assert isinstance(first, structkv.Compressed) and isinstance(last, structkv.Compressed)
        same(first, client.compress(small_open(), small_source))
        same(last, client.compress(small_open(method=FAST), small_source))
    assert client.compress_batch([], source) == []

    def broken(prompt: int, layer: int) -> structkv.LayerTensors:
        raise KeyError(f"{prompt}.{layer}")

    with pytest.raises(KeyError, match=r"0\.0"):
        client.compress_batch(prompts, broken)


def test_a_batch_that_has_no_room_at_once(start_server: Callable[..., Server]) -> None:
    server = start_server("--memory-budget", "8MiB")
    small = structkv.Client(server.target)
    # Each takes more than half of the budget, and the last would take more than all of it.
    lengths = [100, 100, 100, 100_000]
    prompts = [structkv.BatchPrompt(small_open(prompt_tokens=tokens)) for tokens in lengths]
    asked = []

    def source(prompt: int, layer: int) -> structkv.LayerTensors:
        asked.append((prompt, layer))
        return structkv.LayerTensors(**small_layer(layer, tokens=lengths[prompt]))

    *room, never = small.compress_batch(prompts, source)
    assert asked == [(prompt, layer) for prompt in range(3) for layer in range(2)]
    wanted = small.compress(prompts[0].open, lambda layer: source(0, layer))
    for each in room:
        assert isinstance(each, structkv.Compressed)
        same(each, wanted)
    assert isinstance(never, structkv.errors.ResourceExhausted) and never.retry_after is None
    once = structkv.StreamOptions(retry=structkv.RetryPolicy(max_attempts=1))
    first, *others = small.compress_batch(prompts, source, once)
    assert isinstance(first, structkv.Compressed)
    for other in others[:2]:
        assert isinstance(other, structkv.errors.ResourceExhausted)
        assert other.retry_after is not None
    asked.clear()

    async def later() -> list[structkv.Compressed | structkv.Error]:
        return await structkv.AsyncClient(server.target).compress_batch(prompts, source)

    for got in asyncio.run(later())[:3]:
        assert isinstance(got, structkv.Compressed)
        same(got, wanted)
    assert asked == [(prompt, layer) for prompt in range(3) for layer in range(2)]


def test_shard_group(client: structkv.Client) -> None:
    whole = client.compress(small_open(), small_source)
    ranks = [
        client.open_prompt(
            small_open(
                shard_group=structkv.ShardGroup(group_id="g", shard_count=2, shard_index=rank)
            )
        )
        for rank in range(2)
    ]
    for layer in range(2):
        tensors = small_layer(layer)
        for rank, session in enumerate(ranks):
            session.send_layer(
                layer,
                structkv.LayerTensors(
                    keys=tensors["keys"][rank : rank + 1],
                    values=tensors["values"][rank : rank + 1],
                    window_queries=tensors["window_queries"][2 * rank : 2 * rank + 2],
                ),
            )
    for session in ranks:
        session.commit()
    for rank, session in enumerate(ranks):
        for a, b in zip(session.collect().layers, whole.layers):
            assert (numpy.asarray(a.keys)[0] == numpy.asarray(b.keys)[rank]).all()
            assert (numpy.asarray(a.positions) == numpy.asarray(b.positions)).all()


def test_held_caches(client: structkv.Client) -> None:
    open = small_open(output="hold", hold=structkv.Hold(lease_millis=60_000))
    held = client.compress(open, small_source).summary.held
    assert held is not None and len(held.handle) == 16 and held.lease_millis == 60_000
    wanted = client.compress(small_open(), small_source)
    fetched = client.fetch(held.handle)
    assert fetched.info.kv_length == 10 and fetched.attempts == 1
    for a, b in zip(fetched.layers, wanted.layers):
        for name in ("positions", "keys", "values"):
            assert (numpy.asarray(getattr(a, name)) == numpy.asarray(getattr(b, name))).all()
    # A rank's head of one layer, handed over as it comes.
    layers: list[structkv.LayerResult] = []
    part = client.fetch(
        held.handle,
        structkv.FetchOptions(first_layer=1, first_kv_head=1, on_layer=layers.append),
    )
    assert part.layers == () and [layer.layer for layer in layers] == [1]
    assert (numpy.asarray(layers[0].keys)[0] == numpy.asarray(wanted.layers[1].keys)[1]).all()
    assert client.renew(held.handle, 30.0) == 30.0
    # A lease of 0.3 seconds lives as long as it is kept.
    assert client.renew(held.handle, 0.3) == pytest.approx(0.3)
    with client.keep(held.handle, 0.3) as lease:
        time.sleep(1)
        lease.check()
    assert client.renew(held.handle, 30.0) == 30.0
    client.release(held.handle)
    with pytest.raises(structkv.errors.NotFound):
        client.fetch(held.handle)


def test_capabilities(client: structkv.Client, engine: structkv.Engine) -> None:
    for each in (client, engine):
        capabilities = each.get_capabilities()
        assert "structkv" in capabilities.methods and "bf16" in capabilities.dtypes
        assert capabilities.limits is not None and capabilities.limits.max_layers > 0


def test_admission(start_server: Callable[..., Server]) -> None:
    small = structkv.Client(start_server("--memory-budget", "1MiB").target)
    options = structkv.SessionOptions(retry=structkv.RetryPolicy(max_attempts=1))
    with pytest.raises(structkv.errors.ResourceExhausted) as refused:
        small.open_prompt(small_open(prompt_tokens=100_000), options)
    assert refused.value.retry_after is None  # never
    assert refused.value.code == "RESOURCE_EXHAUSTED" and "budget" in refused.value.text


def test_calls_have_names(start_server: Callable[..., Server]) -> None:
    """In the server's log, with the caller's trace."""
    server = start_server()
    client = structkv.Client(server.target)
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    options = structkv.SessionOptions(
        session_id="mine", traceparent=f"00-{trace}-00f067aa0ba902b7-01", tracestate="vendor=1"
    )
    client.compress(small_open(), small_source, options)
    log = Path(server.target.removeprefix("unix:")).parent / "log"
    end = time.monotonic() + 30
    while f"client_session=mine trace={trace}" not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)
    refused = "metadata structkv-session-id has ' '"
    with pytest.raises(structkv.errors.InvalidArgument, match=refused):
        client.compress(small_open(), small_source, replace(options, session_id="two words"))
    with pytest.raises(structkv.errors.InvalidArgument, match=refused):
        client.fetch(b"h" * 16, structkv.FetchOptions(session_id="two words"))
