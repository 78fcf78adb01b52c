"""Waiting: the GIL, asyncio, signals, forks and the interpreter's end."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import structkv
from conftest import Prompt, Server, same, small_layer, small_open
from test_tensors import Owner, wait_until_dead

# A session that waits for its other rank, which never comes.
LONELY = structkv.ShardGroup(group_id="lonely", shard_count=2, shard_index=0)
HEADER = """
import os, signal, sys, threading, time
import structkv
sys.path.insert(0, {tests!r})
from conftest import small_layer, small_open
target = {target!r}
client = structkv.Client(target)
lonely = structkv.ShardGroup(group_id=str(os.getpid()), shard_count=2, shard_index=0)
def source(layer): return structkv.LayerTensors(**small_layer(layer))
"""


def source(layer: int) -> structkv.LayerTensors:
    return structkv.LayerTensors(**small_layer(layer))


def run(server: Server, code: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a process of its own, which must end within a minute."""
    header = HEADER.format(tests=os.path.dirname(__file__), target=server.target)
    return subprocess.run(
        [sys.executable, "-c", header + code], timeout=60, capture_output=True, text=True
    )


def test_other_threads_run_while_one_waits(client: structkv.Client) -> None:
    ticks = 0
    waiting = threading.Event()

    def count() -> None:
        nonlocal ticks
        while waiting.is_set():
            ticks += 1
            time.sleep(0.001)

    waiting.set()
    thread = threading.Thread(target=count)
    thread.start()
    with client.open_prompt(small_open(), structkv.SessionOptions(timeout=0.5)) as session:
        with pytest.raises(structkv.errors.DeadlineExceeded) as late:
            session.next_event()  # nothing was sent
        assert isinstance(late.value, TimeoutError)
    waiting.clear()
    thread.join()
    assert ticks > 50


def test_a_thread_sends_while_another_reads(client: structkv.Client, capture: Prompt) -> None:
    wanted = client.compress(capture.open, capture.source)
    options = structkv.SessionOptions(max_buffered_result_bytes=1000, max_in_flight_bytes=1000)
    with client.open_prompt(capture.open, options) as session:

        def send() -> None:
            for layer, tensors in enumerate(capture.layers):
                session.send_layer(layer, tensors)
            session.commit()

        sender = threading.Thread(target=send)
        sender.start()
        same(session.collect(), wanted)
        sender.join()


def test_many_sessions_that_are_read_late(server: Server) -> None:
    """More than gRPC has threads, each with more results than may wait."""
    code = """
def late(client):
    options = structkv.SessionOptions(max_buffered_result_bytes=1)
    sessions = [client.open_prompt(small_open(), options) for _ in range(17)]
    for session in sessions:
        for layer in range(2):
            session.send_layer(layer, source(layer))
        session.commit()
    print(sum(len(session.collect().layers) for session in sessions))
late(client)
with structkv.Engine(log_sessions=False) as engine:
    late(engine)
"""
    ran = run(server, code)
    assert (ran.returncode, ran.stdout) == (0, "34\n34\n"), ran.stderr


def test_cancel_from_another_thread(client: structkv.Client) -> None:
    session = client.open_prompt(small_open())
    threading.Timer(0.2, session.cancel).start()
    with pytest.raises(structkv.errors.Cancelled):
        session.next_event()


def test_a_collection_in_a_function_of_the_library(client: structkv.Client) -> None:
    """A session that nobody has, in a cycle, is collected while the library calls."""

    def rows(pull: structkv.RowPull) -> tuple[None, bytes]:
        cycle: list[object] = [client.open_prompt(small_open())]
        cycle.append(cycle)
        del cycle
        gc.collect()
        values = small_layer(pull.layer)["values"]
        return None, values[:, numpy.asarray(pull.positions)].tobytes()

    options = structkv.SessionOptions(rows=rows)
    same(
        client.compress(small_open(pull="values"), source, options),
        client.compress(small_open(), source),
    )


def test_nobody_there(tmp_path_factory: pytest.TempPathFactory) -> None:
    nobody = structkv.Client(f"unix:{tmp_path_factory.mktemp('nobody')}/socket")
    options = structkv.SessionOptions(
        retry=structkv.RetryPolicy(max_attempts=2, initial_backoff=0.01)
    )
    with pytest.raises(structkv.errors.Unavailable) as away:
        nobody.open_prompt(small_open(), options)
    assert isinstance(away.value, ConnectionError) and str(away.value).startswith("UNAVAILABLE: ")


def test_a_server_that_dies(start_server: Callable[..., Server]) -> None:
    server = start_server("--drain-limit", "100ms")
    with structkv.Client(server.target).open_prompt(small_open()) as session:
        server.process.terminate()
        server.process.wait(60)
        with pytest.raises(structkv.errors.Unavailable):
            session.collect()


def test_asyncio(server: Server, client: structkv.Client, capture: Prompt) -> None:
    wanted = client.compress(capture.open, capture.source)

    async def many() -> None:
        aio = structkv.AsyncClient(server.target)
        assert (await aio.get_capabilities()).version == structkv.__version__
        for got in await asyncio.gather(
            *(aio.compress(capture.open, capture.source) for _ in range(8))
        ):
            same(got, wanted)
        async with await aio.open_prompt(small_open()) as session:
            # A wait that is given up loses no event.
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(session.next_event(), 0.05)
            for layer in range(2):
                await session.send_layer(layer, source(layer))
            await session.commit()
            kinds = [type(event).__name__ async for event in session]
            assert sorted(kinds) == ["LayerResult", "LayerResult", "PivotResult", "Summary"]
        with pytest.raises(structkv.errors.InvalidArgument):
            await aio.open_prompt(small_open(prompt_tokens=0))
        batch = await aio.open_batch([structkv.BatchPrompt(small_open())] * 2)
        for each in batch:
            assert isinstance(each, structkv.AsyncSession)
            each.cancel()

    asyncio.run(many())


def test_a_session_that_is_dropped_while_it_sends(server: Server) -> None:
    tokens = 300_000  # a layer is larger than all that gRPC takes in before the server reads it

    def rank(layer: int) -> tuple[structkv.LayerTensors, Any]:
        keys = numpy.zeros((1, tokens, 32), numpy.float32).view(Owner)
        queries = small_layer(layer)["window_queries"][:2]
        return structkv.LayerTensors(keys=keys, values=keys, window_queries=queries), keys

    async def drop() -> list[weakref.ref[Any]]:
        options = structkv.SessionOptions(max_in_flight_bytes=1, chunk_bytes=100_000)
        session = await structkv.AsyncClient(server.target).open_prompt(
            small_open(prompt_tokens=tokens, shard_group=LONELY, layers_in_flight=1), options
        )
        references = []
        for layer in range(2):  # the second one waits for the first, which waits for rank 1
            tensors, keys = rank(layer)
            references.append(weakref.ref(keys))
            sending = asyncio.create_task(session.send_layer(layer, tensors))
            done, _ = await asyncio.wait({sending}, timeout=60 if layer == 0 else 0.3)
            assert bool(done) == (layer == 0)
            sending.cancel()
        return references

    wait_until_dead(asyncio.run(drop()))


def test_held_caches_and_the_engine_in_asyncio(client: structkv.Client) -> None:
    async def held() -> None:
        async with structkv.AsyncEngine(hold_budget="16MiB", log_sessions=False) as engine:
            open = small_open(output="hold")
            summary = (await engine.compress(open, source)).summary
            assert summary.held is not None
            fetched = await engine.fetch(summary.held.handle)
            assert [layer.kept_tokens for layer in fetched.layers] == [10, 10]
            assert await engine.renew(summary.held.handle) > 0
            await engine.release(summary.held.handle)
            with pytest.raises(structkv.errors.NotFound):
                await engine.release(summary.held.handle)

    asyncio.run(held())


def test_a_closed_engine_is_unavailable() -> None:
    engine = structkv.Engine(log_sessions=False)
    session = engine.open_prompt(small_open())
    engine.close()
    engine.close()
    with pytest.raises(structkv.errors.Unavailable):
        session.collect()
    with pytest.raises(structkv.errors.Unavailable):
        engine.open_prompt(
            small_open(), structkv.SessionOptions(retry=structkv.RetryPolicy(max_attempts=1))
        )


def test_the_engine_refuses_bad_options() -> None:
    with pytest.raises(structkv.errors.InvalidArgument, match="--threads"):
        structkv.Engine(threads=-3)
    with pytest.raises(structkv.errors.InvalidArgument, match="--no-such-option"):
        structkv.Engine(no_such_option=1)


@pytest.mark.parametrize(
    "wait",
    [
        "client.open_prompt(small_open()).next_event()",
        "client.open_prompt(small_open(shard_group=lonely)).collect()",
        "structkv.Engine(log_sessions=False).open_prompt(small_open()).collect()",
    ],
)
def test_keyboard_interrupt(server: Server, wait: str) -> None:
    code = f"""
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    {wait}
except KeyboardInterrupt:
    print("interrupted")
"""
    ran = run(server, code)
    assert (ran.returncode, ran.stdout) == (0, "interrupted\n"), ran.stderr


@pytest.mark.parametrize(
    "end",
    [
        # Sessions, engines and what was sent are alive, in globals, at the end.
        "keep = client.open_prompt(small_open()); keep.send_layer(0, source(0))",
        "engine = structkv.Engine(log_sessions=False); keep = engine.open_prompt(small_open())",
        "done = structkv.Engine(log_sessions=False).compress(small_open(), source)",
        "cycle = [client.open_prompt(small_open())]; cycle.append(cycle); del cycle",
        "threading.Thread(target=client.open_prompt(small_open()).collect, daemon=True).start(); "
        "time.sleep(0.2)",
        "client.open_prompt(small_open()); raise SystemExit(0)",
    ],
)
def test_the_interpreter_ends(server: Server, end: str) -> None:
    ran = run(server, end + "\n")
    assert ran.returncode == 0, ran.stderr


def test_calls_after_the_end(server: Server) -> None:
    """Of a handler that runs behind structkv's own, also where a session's end fails."""
    code = """
import atexit
session = client.open_prompt(small_open())
class Bad:
    def cancel(self): raise RuntimeError("not today")
bad = Bad()
structkv._waiting.sessions.add(bad)
def later():
    for call in (session.next_event, client.get_capabilities, session.commit):
        try:
            call()
        except structkv.errors.FailedPrecondition as error:
            print(error.text, flush=True)
structkv._waiting.atexit.unregister(structkv._waiting._stop)
atexit.register(later)
atexit.register(structkv._waiting._stop)
"""
    ran = run(server, code)
    text = "the interpreter is at its end, and structkv has stopped"
    assert (ran.returncode, ran.stdout.splitlines()) == (0, [text] * 3), ran.stderr
    assert "not today" in ran.stderr


def test_fork(server: Server) -> None:
    code = """
session = client.open_prompt(small_open())
session.send_layer(0, source(0))
child = os.fork()
if child == 0:
    try:
        client.open_prompt(small_open())
    except structkv.errors.FailedPrecondition as error:
        print(error.text.split(",")[0], flush=True)
    session.cancel()
    del session, client
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
session.send_layer(1, source(1))
session.commit()
print(len(session.collect().layers))
"""
    ran = run(server, code)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        "structkv was loaded before this process was forked; its threads are not here. Start "
        "processes with the method spawn or forkserver",
        "2",
    ]


def test_a_tensor_is_the_last_to_hold_a_region(start_server: Callable[..., Server]) -> None:
    """The end of a region that is registered by name waits for a thread, and for the server."""
    code = """
def last():
    region = structkv.Region(1 << 20, named=True, lease=3)
    client.register(region)
    return structkv.Arena(region).empty([16], "u8")
tensor = last()
child = os.fork()
if child == 0:
    del tensor
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
# With the server stopped, other threads run all the while.
ticks = []
def count():
    while True:
        ticks.append(time.monotonic())
        time.sleep(0.01)
threading.Thread(target=count, daemon=True).start()
begin = time.monotonic()
os.kill({pid}, signal.SIGSTOP)
threading.Timer(1, lambda: os.kill({pid}, signal.SIGCONT)).start()
del tensor
end = time.monotonic()
assert end - begin > 0.5, end - begin
print(len([tick for tick in ticks if begin < tick < end]) > 10)
"""
    server = start_server()
    try:
        ran = run(server, code.replace("{pid}", str(server.process.pid)))
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert (ran.returncode, ran.stdout) == (0, "True\n"), ran.stderr


def test_processes_that_are_spawned(server: Server) -> None:
    code = """
import multiprocessing
if __name__ == "__main__":
    client.get_capabilities()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(structkv.Client.__module__.upper))
"""
    ran = run(server, code)
    assert (ran.returncode, ran.stdout) == (0, "STRUCTKV.CLIENT\n"), ran.stderr
