"""A vLLM instance without a GPU: vLLM's own scheduler, connector loading, lifecycle of a step,
wrapper of an attention layer and gathering of the ranks' outputs, with workers whose model is a few
tables. Of several tensor-parallel ranks each is a process, as in vLLM."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.distributed.parallel_state import (
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention.kv_transfer_utils import maybe_transfer_kv_layer
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

torch.set_num_threads(1)  # a model this small only loses by more
LAYERS, QUERY_HEADS, KV_HEADS, DIM, VOCABULARY, BLOCK = 3, 4, 2, 32, 300, 16
RANKS = (1, 2, 4)  # of four, two share a KV head
NAMES = [f"model.layers.{layer}.self_attn.attn" for layer in range(LAYERS)]


def rotate(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Llama's rotation of [tokens, heads, DIM] at the base 10,000."""
    frequencies = 10000.0 ** (-torch.arange(0, DIM, 2) / DIM)
    angles = positions[:, None].float() * frequencies
    cos, sin = (x.repeat(1, 2)[:, None] for x in (angles.cos(), angles.sin()))
    half = torch.cat([-states[..., DIM // 2 :], states[..., : DIM // 2]], -1)
    return states * cos + half * sin


class Model:
    """Queries, keys and values of a token come from tables; the next token is the one whose column
    the layers' attention outputs point at."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)

        def table(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.queries = table(LAYERS, VOCABULARY, QUERY_HEADS, DIM)
        self.keys = table(LAYERS, VOCABULARY, KV_HEADS, DIM)
        self.values = table(LAYERS, VOCABULARY, KV_HEADS, DIM)
        self.head = table(LAYERS * QUERY_HEADS * DIM, VOCABULARY)

    def states(self, layer: int, tokens: torch.Tensor, positions: torch.Tensor) -> Any:
        """Queries, keys, values, [tokens, heads, DIM]."""
        queries = rotate(self.queries[layer][tokens], positions)
        return queries, rotate(self.keys[layer][tokens], positions), self.values[layer][tokens]

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Any:
        """The output [query_heads, DIM] of a token's query over [entries, kv_heads, DIM]."""
        grouped = query.view(keys.shape[1], -1, DIM)
        weights = torch.einsum("hgd,nhd->hgn", grouped, keys).mul(DIM**-0.5).softmax(-1)
        return torch.einsum("hgn,nhd->hgd", weights, values).reshape(-1, DIM)

    def logits(self, outputs: list[torch.Tensor], first_head: int = 0) -> torch.Tensor:
        """[VOCABULARY], of each layer's outputs of query heads from `first_head` on: those of all
        heads are the sum of their parts."""
        head = self.head.view(LAYERS, QUERY_HEADS, DIM, VOCABULARY)
        rows = head[:, first_head : first_head + outputs[0].shape[0]]
        return torch.einsum("lhd,lhdv->v", torch.stack(outputs), rows)

    def sample(self, outputs: list[torch.Tensor]) -> int:
        return int(self.logits(outputs).argmax())


def make_config(
    folder: Path, role: str, extra: dict[str, Any], ranks: int = 1, **changes: Any
) -> VllmConfig:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": QUERY_HEADS * DIM,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": QUERY_HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    transfer = {
        "kv_connector": "StructKVConnector",
        "kv_connector_module_path": "structkv.vllm_connector",
        "kv_role": role,
        "kv_connector_extra_config": extra,
        **changes,
    }
    model = ModelConfig(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=1024,
        enforce_eager=True,
    )
    return VllmConfig(
        model_config=model,
        parallel_config=ParallelConfig(tensor_parallel_size=ranks),
        scheduler_config=SchedulerConfig(
            max_num_seqs=4,
            max_num_batched_tokens=128,  # longer prompts come in chunks
            max_model_len=1024,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
        ),
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
        kv_transfer_config=KVTransferConfig(**transfer),
        device_config=DeviceConfig(device="cpu"),
    )


def cache_config(ranks: int, blocks: int) -> KVCacheConfig:
    """Of a rank."""
    spec = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=max(1, KV_HEADS // ranks), head_size=DIM, dtype=torch.float32
    )
    page = spec.page_size_bytes
    tensors = [KVCacheTensor(LAYERS * page * blocks, NAMES, page * blocks, page)]
    return KVCacheConfig(blocks, tensors, [KVCacheGroupSpec(NAMES, spec)])


def slots_of(blocks: list[int], positions: torch.Tensor) -> torch.Tensor:
    return torch.tensor(blocks)[positions // BLOCK] * BLOCK + positions % BLOCK


@dataclass
class Step:
    """What a step's workers are told: by request all its tokens and its blocks."""

    scheduled: Any
    tokens: dict[str, list[int]]
    blocks: dict[str, list[int]]


class Worker:
    """A rank: its connector, and its heads of the model and of the caches."""

    def __init__(self, config: VllmConfig, rank: int, blocks: int, meeting: str = "") -> None:
        """meeting: a file by which several ranks find one another."""
        config.parallel_config.rank = rank
        config.cache_config.num_gpu_blocks = blocks
        ranks = config.parallel_config.tensor_parallel_size
        if ranks > 1:
            with set_current_vllm_config(config):
                init_distributed_environment(ranks, rank, f"file://{meeting}", rank, "gloo")
                initialize_model_parallel(ranks)
        self._config, self._model = config, Model()
        self._query_heads = slice(QUERY_HEADS // ranks * rank, QUERY_HEADS // ranks * (rank + 1))
        first, count = rank * KV_HEADS // ranks, max(1, KV_HEADS // ranks)
        self._kv_heads = slice(first, first + count)
        self._connector = KVConnectorFactory.create_connector(
            config, KVConnectorRole.WORKER, cache_config(ranks, blocks)
        )
        self._caches = {n: torch.full((blocks, count, BLOCK, 2 * DIM), 9.0) for n in NAMES}
        self._layers = config.compilation_config.static_forward_context
        for name, cache in self._caches.items():
            forward = SimpleNamespace(forward=self._forward(name))
            self._layers[name] = SimpleNamespace(kv_cache=cache, impl=forward)
        self._connector.register_kv_caches(self._caches)

    def break_next(self, owner: str, name: str) -> None:
        """The next call of that method of the library fails."""
        import structkv  # not in the fork server, whose children could not use it

        kind = getattr(structkv, owner)
        real = getattr(kind, name)

        def broken(*arguments: Any) -> Any:
            setattr(kind, name, real)
            raise RuntimeError(f"{name} is broken")

        setattr(kind, name, broken)

    def rows(self, blocks: list[int], count: int) -> torch.Tensor:
        """The first `count` tokens of a request in the caches: [LAYERS, count, kv_heads, 2 * DIM]."""
        slots = slots_of(blocks, torch.arange(count))
        caches = self._caches.values()
        return torch.stack([cache[slots // BLOCK, :, slots % BLOCK] for cache in caches])

    def _forward(self, name: str) -> Any:
        """A backend's forward: what it has written to the cache is attended to elsewhere."""

        def forward(layer: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            assert layer is self._layers[name]

        return forward

    def execute(self, step: Step) -> tuple[dict[str, torch.Tensor], ModelRunnerOutput]:
        """One step of a model runner, requests in another order than the scheduler's. The rank's part
        of the logits of each request's last token, and an output that lacks what is sampled."""
        scheduled = step.scheduled
        computed = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        cached = scheduled.scheduled_cached_reqs
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens))
        names = sorted(scheduled.num_scheduled_tokens, reverse=True)
        spans = {
            name: torch.arange(
                computed[name], computed[name] + scheduled.num_scheduled_tokens[name]
            )
            for name in names
        }
        kv_transfer_state._KV_CONNECTOR_AGENT = self._connector
        if not names:
            mixin = KVConnectorModelRunnerMixin
            return {}, mixin.kv_connector_no_forward(scheduled, self._config)
        tokens = torch.cat([torch.tensor(step.tokens[name])[spans[name]] for name in names])
        positions = torch.cat([spans[name] for name in names])
        slots = torch.cat([slots_of(step.blocks[name], spans[name]) for name in names])
        mapping = {name: slots for name in NAMES}
        metadata = {name: SimpleNamespace() for name in NAMES}
        outputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        with set_forward_context(metadata, self._config, slot_mapping=mapping):
            with KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(scheduled) as connector:
                for layer, layer_name in enumerate(NAMES):
                    queries, keys, values = self._model.states(layer, tokens, positions)
                    queries = queries[:, self._query_heads]
                    cache = self._caches[layer_name]
                    both = torch.cat([keys, values], -1)[:, self._kv_heads]
                    cache[slots // BLOCK, :, slots % BLOCK] = both

                    @maybe_transfer_kv_layer  # type: ignore[untyped-decorator, unused-ignore]
                    def attention(query: torch.Tensor, layer_name: str) -> None:
                        module = self._layers[layer_name]
                        module.impl.forward(module, query, None, None, module.kv_cache, None)

                    attention(queries, layer_name)
                    last = torch.tensor([len(spans[name]) for name in names]).cumsum(0) - 1
                    for name, row in zip(names, last.tolist()):
                        everything = torch.arange(int(spans[name][-1]) + 1)
                        slot = slots_of(step.blocks[name], everything)
                        k, v = cache[slot // BLOCK, :, slot % BLOCK].chunk(2, -1)
                        outputs[name].append(self._model.attend(queries[row], k, v))
        first_head = self._query_heads.start
        logits = {
            name: self._model.logits(outputs[name], first_head)
            for name in names
            if int(spans[name][-1]) + 1 >= len(step.tokens[name])
        }
        indices = {name: i for i, name in enumerate(names)}
        return logits, ModelRunnerOutput(
            names, indices, [[] for _ in names], kv_connector_output=connector
        )


class Process:
    """A worker in a process of its own."""

    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload(["vllm_instance"])

    def __init__(self, configure: Callable[[], VllmConfig], *arguments: Any) -> None:
        self._pipe, inner = self._context.Pipe()
        self._process = self._context.Process(
            target=self._serve, args=(inner, configure, *arguments), daemon=True
        )
        self._process.start()
        inner.close()

    @staticmethod
    def _serve(pipe: Any, configure: Callable[[], VllmConfig], *arguments: Any) -> None:
        worker = Worker(configure(), *arguments)
        while (call := pipe.recv()) is not None:
            pipe.send(getattr(worker, call[0])(*call[1]))
        os._exit(0)  # without the end of PyTorch's groups, which waits for ranks that are gone

    def call(self, name: str, *arguments: Any) -> None:
        self._pipe.send((name, arguments))

    def result(self) -> Any:
        """Of the oldest call; EOFError where the process is gone."""
        return self._pipe.recv()

    def close(self) -> None:
        with suppress(OSError):  # it is gone already
            self._pipe.send(None)
        self._process.join(20)
        self._process.kill()


class Here:
    """A worker in this process."""

    def __init__(self, worker: Worker) -> None:
        self._worker, self._results = worker, list[Any]()

    def call(self, name: str, *arguments: Any) -> None:
        self._results.append(getattr(self._worker, name)(*arguments))

    def result(self) -> Any:
        return self._results.pop(0)

    def close(self) -> None:
        pass


class Instance:
    """One instance: scheduler and workers, one for each rank of what `configure` gives; several of
    them need it to be picklable."""

    def __init__(self, configure: Callable[[], VllmConfig], blocks: int = 200) -> None:
        config = configure()
        ranks = config.parallel_config.tensor_parallel_size
        config.cache_config.num_gpu_blocks = blocks
        caches = cache_config(ranks, blocks)
        self.scheduler = Scheduler(config, caches, StructuredOutputManager(config), BLOCK)
        self._aggregator = KVOutputAggregator.from_connector(self.scheduler.connector, ranks)
        self._workers: list[Here] | list[Process]
        if ranks == 1:
            self._workers = [Here(Worker(configure(), 0, blocks))]
        else:
            self._meeting = tempfile.TemporaryDirectory()
            meeting = f"{self._meeting.name}/ranks"
            self._workers = [Process(configure, rank, blocks, meeting) for rank in range(ranks)]
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self.cached: dict[str, int] = {}  # tokens of each request that were not computed
        self.requests: dict[str, Request] = {}
        self._blocks: dict[str, list[int]] = {}

    def close(self) -> None:
        for worker in self._workers:
            worker.close()

    def add(self, name: str, prompt: list[int], max_tokens: int, **options: Any) -> Request:
        """A request; kv_transfer_params and cache_salt as the API has them."""
        params = SamplingParams(
            max_tokens=max_tokens,
            extra_args={"kv_transfer_params": options.pop("kv_transfer_params", None)},
            **{
                name: options.pop(name)
                for name in ("skip_reading_prefix_cache", "prompt_logprobs")
                if name in options
            },
        )
        request = Request(name, prompt, params, None, block_hasher=self._hasher, **options)
        self.requests[name] = request
        self.scheduler.add_request(request)
        return request

    def run(self) -> dict[str, Any]:
        """Steps until nothing is left; each request's last output."""
        finished = {}
        while self.scheduler.has_requests():
            for outputs in self.step().values():
                for output in outputs.outputs:
                    if output.finish_reason is not None:
                        finished[output.request_id] = output
        return finished

    def step(self) -> Any:
        scheduled = self.scheduler.schedule()
        output = self.execute(scheduled)
        return self.scheduler.update_from_output(scheduled, output)

    def execute(self, scheduled: Any) -> ModelRunnerOutput:
        """One step of all workers, gathered as vLLM's executor does."""
        for new in scheduled.scheduled_new_reqs:
            self._blocks[new.req_id] = list(new.block_ids[0])
            self.cached[new.req_id] = new.num_computed_tokens
        cached = scheduled.scheduled_cached_reqs
        for name, blocks in zip(cached.req_ids, cached.new_block_ids):
            if blocks is not None:
                resumed = name in cached.resumed_req_ids
                self._blocks[name] = ([] if resumed else self._blocks[name]) + list(blocks[0])
        names = list(scheduled.num_scheduled_tokens)
        tokens = {name: list(self.requests[name].all_token_ids) for name in names}
        step = Step(scheduled, tokens, {name: self._blocks[name] for name in names})
        parts, outputs = zip(*self._of_all("execute", step))
        output = self._aggregator.aggregate(list(outputs))
        assert output is not None
        for name, place in output.req_id_to_index.items():
            if name in parts[0]:
                logits = torch.stack([part[name] for part in parts]).sum(0)
                output.sampled_token_ids[place] = [int(logits.argmax())]
        return output

    def rows(self, name: str, count: int) -> torch.Tensor:
        """Its first `count` tokens in the caches, each KV head once: [LAYERS, count, KV_HEADS,
        2 * DIM]."""
        every = self._of_all("rows", self._blocks[name], count)
        share = max(1, len(every) // KV_HEADS)  # ranks that have the same head
        for rank, rows in enumerate(every):
            assert torch.equal(rows, every[rank - rank % share])
        return torch.cat(every[::share], 2)

    def break_next(self, rank: int, owner: str, name: str) -> None:
        """Of one rank; Worker.break_next()."""
        self._workers[rank].call("break_next", owner, name)
        self._workers[rank].result()

    def _of_all(self, name: str, *arguments: Any) -> list[Any]:
        for worker in self._workers:
            worker.call(name, *arguments)
        return [worker.result() for worker in self._workers]
