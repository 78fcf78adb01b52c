"""One client of several servers."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

import pytest
import structkv
from conftest import Server, same, small_layer, small_open


def source(layer: int) -> structkv.LayerTensors:
    return structkv.LayerTensors(**small_layer(layer))


def test_prompts_go_to_either_and_around_a_dead_one(start_server: Callable[..., Server]) -> None:
    # A drain would wait for the cache that the second one holds.
    flags = ["--hold-budget", "16MiB", "--drain-limit", "100ms"]
    servers = [start_server(*flags) for _ in range(2)]
    targets = [server.target for server in servers]
    client = structkv.Client(",".join(targets))
    wanted = structkv.Client(targets[0]).compress(small_open(), source)
    same(client.compress(small_open(), source), wanted)
    assert [state.address for state in client.replicas()] == sorted(targets)
    assert all(state.health == "ready" and state.limit_bytes > 0 for state in client.replicas())
    assert client.choose_replica(small_open()) in targets

    told = structkv.SessionOptions(replica=targets[1])
    with client.open_prompt(small_open(), told) as session:
        assert session.replica == targets[1]
    held = client.compress(small_open(output="hold"), source, told).summary.held
    assert held is not None and held.replica == targets[1]
    by_name = client.fetch(held.handle, structkv.FetchOptions(replica=held.replica))
    assert [layer.layer for layer in client.fetch(held.handle).layers] == [
        layer.layer for layer in by_name.layers
    ]
    with pytest.raises(structkv.NotFound):
        client.renew(held.handle, options=structkv.HeldCallOptions(replica=targets[0]))

    servers[1].process.send_signal(signal.SIGTERM)
    assert servers[1].process.wait(60) == 0
    for _ in range(5):
        same(client.compress(small_open(), source), wanted)
    with pytest.raises(structkv.Unavailable, match=targets[1]):
        client.fetch(held.handle, structkv.FetchOptions(replica=held.replica))

    async def one_more() -> str:
        return await structkv.AsyncClient(",".join(targets)).choose_replica(small_open())

    assert asyncio.run(one_more()) == targets[0]
