"""The vLLM connector in vLLM's own scheduler; skipped where vLLM is missing (python_test.sh)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structkv
from conftest import Server
from structkv import vllm_requests

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from structkv._vllm_model import Shard  # noqa: E402
from structkv._vllm_worker import Sender  # noqa: E402
from vllm.v1.request import RequestStatus  # noqa: E402
from vllm_instance import (  # noqa: E402
    BLOCK,
    DIM,
    KV_HEADS,
    LAYERS,
    NAMES,
    QUERY_HEADS,
    RANKS,
    VOCABULARY,
    Instance,
    Model,
    make_config,
)

TOKENS = 300


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


@pytest.fixture
def make(tmp_path: Path, server: Server) -> Iterator[Any]:
    instances = []

    def instance(role: str, ranks: int = 1, **extra: Any) -> Instance:
        options = {"target": server.target, "kv_budget": 0.1, **extra}
        instances.append(Instance(partial(make_config, tmp_path, role, options, ranks)))
        return instances[-1]

    yield instance
    for each in instances:
        each.close()


def prompt(seed: int = 0, tokens: int = TOKENS) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    result: list[int] = torch.randint(0, VOCABULARY, (tokens,), generator=generator).tolist()
    return result


def compacted(
    engine: structkv.Engine, model: Model, ids: list[int], method: Any
) -> structkv.Compressed:
    """What the service makes of the prompt as a whole, keys turned."""
    open = structkv.Open(
        geometry=structkv.ModelGeometry(
            layer_count=LAYERS, query_head_count=QUERY_HEADS, kv_head_count=KV_HEADS, key_dim=DIM
        ),
        prompt_tokens=len(ids),
        dtype="f32",
        layout="token_head_dim",
        method=method,
        rotary=structkv.RotaryParameters(rope_theta=10000.0, rope_type="default"),
    )

    def source(layer: int) -> structkv.LayerTensors:
        positions = torch.arange(len(ids))
        queries, keys, values = model.states(layer, torch.tensor(ids), positions)
        window = queries[-8:].transpose(0, 1).contiguous()
        none = isinstance(method, structkv.StreamingLlmMethod)
        return structkv.LayerTensors(
            keys=keys, values=values, window_queries=None if none else window
        )

    return engine.compress(open, source)


def ask(decode: Instance, name: str, body: dict[str, Any], **options: Any) -> Any:
    """Adds what decode_request() made, for five tokens."""
    return decode.add(
        name,
        body["prompt"],
        5,
        kv_transfer_params=body["kv_transfer_params"],
        cache_salt=body["cache_salt"],
        **options,
    )


def rows_of(result: structkv.Compressed) -> Any:
    """As Instance.rows() has them."""
    layers = [
        torch.cat([torch.from_dlpack(layer.keys), torch.from_dlpack(layer.values)], -1)
        for layer in result.layers
    ]
    return torch.stack(layers)


def expected(model: Model, result: structkv.Compressed, first: int, count: int) -> list[int]:
    """Tokens that follow on the compacted cache."""
    layers = [
        (torch.from_dlpack(layer.keys).clone(), torch.from_dlpack(layer.values).clone())
        for layer in result.layers
    ]
    tokens = [first]
    for place in range(count):
        outputs = []
        position = torch.tensor([result.summary.kv_length + place])
        for layer, (keys, values) in enumerate(layers):
            query, key, value = model.states(layer, torch.tensor(tokens[-1:]), position)
            keys, values = torch.cat([keys, key]), torch.cat([values, value])
            layers[layer] = (keys, values)
            outputs.append(model.attend(query[0], keys, values))
        tokens.append(model.sample(outputs))
    return tokens[1:]


@pytest.mark.parametrize(
    "method, message",
    [
        ("structkv", structkv.StructKvMethod(kv_budget=structkv.Budget(ratio=0.1))),
        ("fastkv", structkv.FastKvMethod(kv_budget=structkv.Budget(ratio=0.1), tsp_layer=0)),
        ("streaming_llm", structkv.StreamingLlmMethod(kv_budget=structkv.Budget(ratio=0.1))),
    ],
)
def test_from_prefill_to_decode(
    make: Any, engine: structkv.Engine, model: Model, method: str, message: Any
) -> None:
    """Two prompts in chunks, one of whose last chunk is shorter than the window, and one that is
    not to be compressed."""
    prefill = make("kv_producer", method=method)
    prompts = {"a": prompt(0, 261), "b": prompt(1), "c": prompt(2)}
    for name, ids in prompts.items():
        params = {vllm_requests.COMPRESS: True} if name != "c" else None
        request = prefill.add(name, ids, 2, kv_transfer_params=params)
        if name == "a":
            first_request = request
    outputs = prefill.run()
    assert outputs["c"].kv_transfer_params is None
    assert first_request.num_output_tokens == 2

    decode = make("kv_consumer")
    firsts, bodies = {}, {}
    for name in ("a", "b"):
        firsts[name] = prefill.requests[name].output_token_ids[0]
        bodies[name] = vllm_requests.decode_request(
            {"model": "m"}, prompts[name], firsts[name], outputs[name].kv_transfer_params
        )
        body = bodies[name]
        assert len(body["prompt"]) == -(-len(prompts[name]) // 10) + 1
        ask(decode, name, body)
    decode.step()
    for name in ("a", "b"):
        wanted = compacted(engine, model, prompts[name], message)
        kept = wanted.summary.kv_length
        assert decode.cached[name] == kept
        assert torch.equal(decode.rows(name, kept), rows_of(wanted))
    decode.run()
    for name in ("a", "b"):
        wanted = compacted(engine, model, prompts[name], message)
        tokens = list(decode.requests[name].output_token_ids)
        assert tokens == expected(model, wanted, firsts[name], 5)

    # Once more: the salted blocks are found again; the same tokens without the salt are not.
    body = bodies["b"]
    again = ask(decode, "again", body)
    decode.add("plain", body["prompt"], 1)
    decode.run()
    assert list(again.output_token_ids) == list(decode.requests["b"].output_token_ids)
    assert decode.cached["plain"] == 0


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_tensor_parallel_ranks(
    make: Any, engine: structkv.Engine, model: Model, ranks: int
) -> None:
    """Two prompts in one step, decoded by each number of ranks: to the byte what one worker with all
    heads gives."""
    # Of two ranks in memory that each shares with the server.
    shared = {"region_bytes": 1 << 20} if ranks == 2 else {}
    prefill = make("kv_producer", ranks, **shared)
    prompts = {"a": prompt(0, 61), "b": prompt(1, 62)}
    for name, ids in prompts.items():
        prefill.add(name, ids, 2, kv_transfer_params={vllm_requests.COMPRESS: True})
    outputs = prefill.run()
    method = structkv.StructKvMethod(kv_budget=structkv.Budget(ratio=0.1))
    wanted = {name: compacted(engine, model, ids, method) for name, ids in prompts.items()}
    firsts = {name: prefill.requests[name].output_token_ids[0] for name in prompts}
    for decode_ranks in RANKS:
        decode = make("kv_consumer", decode_ranks, **shared)
        for name, ids in prompts.items():
            params = outputs[name].kv_transfer_params
            assert len(set(params[vllm_requests.HELD]["handles"])) == ranks
            body = vllm_requests.decode_request({}, ids, firsts[name], params)
            ask(decode, name, body)
        decode.step()
        for name in prompts:
            kept = wanted[name].summary.kv_length
            assert torch.equal(decode.rows(name, kept), rows_of(wanted[name]))
        decode.run()
        for name in prompts:
            tokens = list(decode.requests[name].output_token_ids)
            assert tokens == expected(model, wanted[name], firsts[name], 5)


@pytest.mark.parametrize(
    "owner, name, other",
    [
        ("Client", "open_prompt", "another rank could not open it"),
        ("Session", "send_layer", "cancelled"),
        ("Session", "commit", "cancelled"),
    ],
)
def test_one_rank_that_cannot_send(make: Any, owner: str, name: str, other: str) -> None:
    """Its prompt is not compressed, nobody waits for it, and the next one is."""
    prefill = make("kv_producer", 2)
    prefill.break_next(1, owner, name)
    asked = {vllm_requests.COMPRESS: True}
    prefill.add("a", prompt(0, 100), 2, kv_transfer_params=asked)
    begin = time.monotonic()
    error = prefill.run()["a"].kv_transfer_params[vllm_requests.ERROR]
    assert time.monotonic() - begin < 10  # the group's limit is 30 s
    first, second = error.split("; rank 1: ")
    assert first.startswith("rank 0: ") and other in first.lower() and second == f"{name} is broken"
    prefill.add("b", prompt(1, 100), 2, kv_transfer_params=asked)
    assert vllm_requests.HELD in prefill.run()["b"].kv_transfer_params


def test_one_rank_that_cannot_load(make: Any) -> None:
    prefill = make("kv_producer", 2)
    prefill.add("a", prompt(0, 100), 2, kv_transfer_params={vllm_requests.COMPRESS: True})
    params = prefill.run()["a"].kv_transfer_params
    held = vllm_requests.HeldPrompt(**params[vllm_requests.HELD])
    half = replace(held, handles=[held.handles[0], "00" * 16])
    decode = make("kv_consumer", 2)
    reasons: dict[str, str] = {}
    for name, given in (("half", half), ("whole", held)):
        decode.add(
            name,
            [*prompt(0, held.kv_length), 1],
            5,
            kv_transfer_params={vllm_requests.HELD: asdict(given)},
            cache_salt=given.cache_salt,
        )
        reasons |= {each: str(output.finish_reason) for each, output in decode.run().items()}
    assert reasons == {"half": "error", "whole": "length"}


def test_what_only_some_ranks_hold_is_released(make: Any, client: structkv.Client) -> None:
    prefill = make("kv_producer", 2)
    prefill.add("a", prompt(0, 100), 2, kv_transfer_params={vllm_requests.COMPRESS: True})
    scheduled = prefill.scheduler.schedule()
    output = prefill.execute(scheduled)
    shards = output.kv_connector_output.kv_connector_worker_meta.shards["a"]
    assert set(shards) == {0, 1}
    handle = bytes.fromhex(shards[0].handle)
    client.renew(handle)
    shards[1] = "it is lost"
    prefill.scheduler.update_from_output(scheduled, output)
    params = prefill.run()["a"].kv_transfer_params
    assert params == {vllm_requests.ERROR: "rank 1: it is lost"}
    wait_until_released(client, handle)


def wait_until_released(client: structkv.Client, handle: bytes) -> None:
    end = time.monotonic() + 20
    with pytest.raises(structkv.NotFound):
        while time.monotonic() < end:
            client.renew(handle)
            time.sleep(0.01)


def test_heads_of_ranks() -> None:
    """Every rank finds its heads with any number of holders, once."""
    for kv_heads in (1, 2, 8, 12):
        counts = [n for n in range(1, 25) if kv_heads % n == 0 or n % kv_heads == 0]
        for ranks in counts:
            for rank in range(ranks):
                shard = Shard(rank, ranks, kv_heads)
                for holders in counts:
                    parts = shard.parts(holders)
                    assert [head for _, heads in parts for head in heads] == list(shard.heads())
                    for holder, heads in parts:
                        theirs = Shard(holder, holders, kv_heads).heads()
                        assert len(heads) and set(heads) <= set(theirs)
    with pytest.raises(ValueError, match="handles: 3; a divisor or a multiple of .* 8 KV heads"):
        Shard(0, 1, 8).parts(3)


def test_the_holder_of_several_is_named(
    make: Any, start_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = [start_server("--hold-budget", "16MiB").target for _ in range(2)]
    prefill = make("kv_producer", target=",".join(targets))
    prefill.add("a", prompt(), 2, kv_transfer_params={vllm_requests.COMPRESS: True})
    params = prefill.run()["a"].kv_transfer_params
    assert params[vllm_requests.HELD]["replica"] in targets
    asked: list[str | None] = []
    fetch = structkv.Client.fetch

    def note(self: Any, handle: bytes, options: structkv.FetchOptions) -> structkv.FetchedCache:
        asked.append(options.replica)
        return fetch(self, handle, options)

    monkeypatch.setattr(structkv.Client, "fetch", note)
    # Named, it need not be one of the decode worker's own.
    decode = make("kv_consumer")
    body = vllm_requests.decode_request({}, prompt(), 1, params)
    ask(decode, "a", body)
    assert str(decode.run()["a"].finish_reason) == "length"
    assert asked == [params[vllm_requests.HELD]["replica"]]


def test_rows_go_through_shared_memory(
    make: Any, engine: structkv.Engine, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = structkv.StructKvMethod(kv_budget=structkv.Budget(ratio=0.1))
    wanted = compacted(engine, model, prompt(), method)
    transports: list[str | None] = []
    open_prompt, fetch = structkv.Client.open_prompt, structkv.Client.fetch

    def note_open(self: Any, *arguments: Any) -> structkv.Session:
        session = open_prompt(self, *arguments)
        transports.append(session.opened.transport)
        return session

    def note_fetch(self: Any, *arguments: Any) -> structkv.FetchedCache:
        fetched = fetch(self, *arguments)
        transports.append(fetched.info.transport)
        return fetched

    monkeypatch.setattr(structkv.Client, "open_prompt", note_open)
    monkeypatch.setattr(structkv.Client, "fetch", note_fetch)
    prefill = make("kv_producer", region_bytes=1 << 20)
    prefill.add("a", prompt(), 2, kv_transfer_params={vllm_requests.COMPRESS: True})
    params = prefill.run()["a"].kv_transfer_params
    decode = make("kv_consumer", region_bytes=1 << 20)
    body = vllm_requests.decode_request({}, prompt(), 1, params)
    ask(decode, "a", body)
    decode.step()
    assert torch.equal(decode.rows("a", wanted.summary.kv_length), rows_of(wanted))
    assert transports == ["shared_memory", "shared_memory"]


def test_what_is_not_compressed(make: Any, server: Server) -> None:
    prefill = make("kv_producer")
    prefill.add("warm", prompt(), 1)
    prefill.run()
    prefill.add("hit", prompt(), 2, kv_transfer_params={vllm_requests.COMPRESS: True})
    prefill.add(
        "anew",
        prompt(),
        2,
        kv_transfer_params={vllm_requests.COMPRESS: True},
        skip_reading_prefix_cache=True,
    )
    outputs = prefill.run()
    assert vllm_requests.HELD in outputs["anew"].kv_transfer_params
    # 288 of 300 tokens were cached: 12 were computed, enough for the window.
    assert vllm_requests.HELD in outputs["hit"].kv_transfer_params
    short = prompt(0, 18 * BLOCK + 3)
    prefill.add("short", short, 2, kv_transfer_params={vllm_requests.COMPRESS: True})
    params = prefill.run()["short"].kv_transfer_params
    assert "3 of the last 8 tokens" in params[vllm_requests.ERROR]
    with pytest.raises(ValueError, match="3 of the last 8 tokens"):
        vllm_requests.decode_request({}, short, 1, params)

    gone = make("kv_producer", target="unix:/nowhere/at/all", timeout=0.5)
    gone.add("a", prompt(), 2, kv_transfer_params={vllm_requests.COMPRESS: True})
    assert vllm_requests.ERROR in gone.run()["a"].kv_transfer_params


def test_what_cannot_be_loaded_fails_the_request(make: Any) -> None:
    prefill, decode = make("kv_producer"), make("kv_consumer")
    prefill.add("a", prompt(), 2, kv_transfer_params={vllm_requests.COMPRESS: True})
    params = prefill.run()["a"].kv_transfer_params
    body = vllm_requests.decode_request({}, prompt(), 1, params)
    held = params[vllm_requests.HELD]
    changes: dict[str, dict[str, Any]] = {
        "unsalted": {"cache_salt": None},
        "short": {"prompt": body["prompt"][:-1]},
        "gone": {"held": {**held, "handles": ["00" * 16]}},
        "other": {"held": {**held, "fingerprint": "00" * 16}},
        "broken": {"held": {"handles": held["handles"]}},
        "no handle": {"held": {**held, "handles": ["zz"]}},
        "no list": {"held": {**held, "handles": held["handles"][0]}},
        "three ranks": {"held": {**held, "handles": held["handles"] * 3}},
        "no object": {"held": 3},
        "no address": {"held": {**held, "replica": 3}},
        "no length": {"held": {**held, "kv_length": -1}},
        # The ordinary prefix cache has all of it but its last token.
        "cached": {"prompt": prompt(5, 2 * BLOCK + 1), "cache_salt": None},
        "one token": {"prompt": [1], "cache_salt": None},
    }
    warm = decode.add("warm", prompt(5, 2 * BLOCK + 1), 3)
    decode.step()
    for name, change in changes.items():
        given = change.get("held", held)
        salt = body["cache_salt"]
        if isinstance(given, dict) and set(given) == set(held):
            salt = vllm_requests.HeldPrompt(**given).cache_salt
        decode.add(
            name,
            change.get("prompt", body["prompt"]),
            5,
            kv_transfer_params={vllm_requests.HELD: given},
            cache_salt=change.get("cache_salt", salt),
        )
    outputs = decode.run()
    for name in changes:
        assert outputs[name].finish_reason is not None
        assert str(outputs[name].finish_reason) == "error", name
        assert outputs[name].new_token_ids == []
    # Who shares blocks with a refused request goes on, and no block is lost.
    assert str(outputs["warm"].finish_reason) == "length" and warm.num_output_tokens == 3
    decode.step()
    pool = decode.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one is vLLM's null block
    assert decode.scheduler.requests == {}


def test_stand_ins_are_not_computed_for_prompt_logprobs(make: Any) -> None:
    prefill, decode = make("kv_producer"), make("kv_consumer")
    prefill.add("a", prompt(), 2, kv_transfer_params={vllm_requests.COMPRESS: True})
    params = prefill.run()["a"].kv_transfer_params
    body = vllm_requests.decode_request({"echo": True, "prompt_logprobs": 1}, prompt(), 1, params)
    assert "echo" not in body and "prompt_logprobs" not in body
    for name, options in (("with", {"prompt_logprobs": 1}), ("without", {})):
        ask(decode, name, body, **options)
        decode.run()
    kept = params[vllm_requests.HELD]["kv_length"]
    assert decode.cached["with"] == kept
    one, other = (list(decode.requests[name].output_token_ids) for name in ("with", "without"))
    assert one == other


def test_a_prompt_that_is_preempted_in_its_window(make: Any, client: structkv.Client) -> None:
    """Four tokens of the window are computed before, and once more after it."""
    held = []
    for preempts in (False, True):
        prefill = make("kv_producer", method="snapkv")
        ids = prompt(0, 128 + 4)  # the window, 32, begins in the first step and ends in the second
        request = prefill.add("a", ids, 2, kv_transfer_params={vllm_requests.COMPRESS: True})
        prefill.step()
        if preempts:
            scheduler = prefill.scheduler
            scheduler.running.remove(request)
            scheduler._preempt_request(request, 0.0)
            scheduler.reset_prefix_cache()
        params = prefill.run()["a"].kv_transfer_params
        (handle,) = params[vllm_requests.HELD]["handles"]
        held.append(client.fetch(bytes.fromhex(handle)))
    for left, right in zip(held[0].layers, held[1].layers):
        assert torch.equal(torch.from_dlpack(left.keys), torch.from_dlpack(right.keys))


def test_a_prompt_that_failed_in_an_earlier_step_is_not_opened(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window, 32, begins in the first step and ends in the second, which opens the prompt."""
    opened: list[Any] = []
    tails = iter(["the first step's"])
    tail = Sender._tail

    def broken_once(self: Any, *arguments: Any) -> Any:
        if next(tails, None) is not None:
            raise RuntimeError("the tail is broken")
        return tail(self, *arguments)

    monkeypatch.setattr(Sender, "_tail", broken_once)
    monkeypatch.setattr(structkv.Client, "open_prompt", lambda *given: opened.append(given))
    prefill = make("kv_producer", method="snapkv")
    asked = {vllm_requests.COMPRESS: True}
    prefill.add("a", prompt(0, 128 + 4), 2, kv_transfer_params=asked)
    params = prefill.run()["a"].kv_transfer_params
    assert params == {vllm_requests.ERROR: "the tail is broken"} and opened == []


def test_results_of_a_request_that_was_aborted(make: Any, client: structkv.Client) -> None:
    prefill = make("kv_producer")
    prefill.add("a", prompt(0, 100), 2, kv_transfer_params={vllm_requests.COMPRESS: True})
    scheduled = prefill.scheduler.schedule()
    output = prefill.execute(scheduled)
    prefill.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    prefill.scheduler.update_from_output(scheduled, output)
    shards = output.kv_connector_output.kv_connector_worker_meta.shards["a"]
    assert prefill.scheduler.connector._finished == {}
    wait_until_released(client, bytes.fromhex(shards[0].handle))


def test_requests_are_such_as_the_server_takes() -> None:
    protocol = pytest.importorskip("vllm.entrypoints.openai.completion.protocol")
    body = {"model": "m", "prompt": prompt(), "temperature": 0.0, "max_tokens": 7}
    asked = {"min_tokens": 3, "stop": "x", "stop_token_ids": [4], "stream": True}
    body |= {**asked, "stream_options": {"include_usage": True}, "echo": True, "logprobs": 1}
    first = protocol.CompletionRequest(**vllm_requests.prefill_request(body))
    assert first.max_tokens == 2 and first.return_token_ids and not first.stream
    # No end token is kept from being the first one, and none ends the request before the second.
    assert first.ignore_eos and first.min_tokens == 0 and not first.stop_token_ids
    assert not first.stop
    held = vllm_requests.HeldPrompt(["00" * 16], 30, 300, "11" * 16)
    params = {vllm_requests.HELD: asdict(held)}
    for wanted in (0, 1):
        with pytest.raises(ValueError, match=f"max_tokens: {wanted}; at least 2"):
            vllm_requests.decode_request({"max_tokens": wanted}, prompt(), 5, params)
    assert vllm_requests.decode_request({}, prompt(), 5, params)["max_tokens"] == 15
    body = vllm_requests.decode_request(body, prompt(), 5, params)
    request = protocol.CompletionRequest(**body)
    # The first token is there already.
    assert request.prompt == [*prompt()[-30:], 5]
    assert (request.max_tokens, request.min_tokens) == (6, 2)
    assert request.stop == "x" and request.stream and not request.echo
    assert request.cache_salt == held.cache_salt
    sampling = request.to_sampling_params(6, {})
    assert not sampling.skip_reading_prefix_cache
    assert sampling.extra_args["kv_transfer_params"] == params


def test_configurations_that_are_refused(tmp_path: Path, server: Server) -> None:
    target = {"target": server.target}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({}, {}, "no 'target'"),
        ({**target, "method": "h2o"}, {}, "'h2o'; one of structkv, snapkv"),
        (target, {"kv_load_failure_policy": "recompute"}, "'fail' is expected"),
    ]
    for extra, changes, text in cases:
        with pytest.raises(ValueError, match=text):
            Instance(partial(make_config, tmp_path, "kv_both", extra, **changes))
    assert len(NAMES) == LAYERS
