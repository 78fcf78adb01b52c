"""A vLLM instance without a GPU: vLLM's own scheduler, connector loading, lifecycle of a step and
wrapper of an attention layer, with a worker whose model is a few tables."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
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
        """The output [QUERY_HEADS, DIM] of a token's query over [entries, KV_HEADS, DIM]."""
        grouped = query.view(KV_HEADS, -1, DIM)
        weights = torch.einsum("hgd,nhd->hgn", grouped, keys).mul(DIM**-0.5).softmax(-1)
        return torch.einsum("hgn,nhd->hgd", weights, values).reshape(QUERY_HEADS, DIM)

    def sample(self, outputs: list[torch.Tensor]) -> int:
        return int((torch.cat([output.flatten() for output in outputs]) @ self.head).argmax())


def make_config(folder: Path, role: str, extra: dict[str, Any], **changes: Any) -> VllmConfig:
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


class Instance:
    """One instance: scheduler and worker."""

    def __init__(self, config: VllmConfig, model: Model, blocks: int = 200) -> None:
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=KV_HEADS, head_size=DIM, dtype=torch.float32
        )
        page = spec.page_size_bytes
        tensors = [KVCacheTensor(LAYERS * page * blocks, NAMES, page * blocks, page)]
        caches = KVCacheConfig(blocks, tensors, [KVCacheGroupSpec(NAMES, spec)])
        config.cache_config.num_gpu_blocks = blocks
        self._config, self._model = config, model
        self.scheduler = Scheduler(config, caches, StructuredOutputManager(config), BLOCK)
        self.connector = KVConnectorFactory.create_connector(
            config, KVConnectorRole.WORKER, caches
        )
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self.caches = {n: torch.full((blocks, KV_HEADS, BLOCK, 2 * DIM), 9.0) for n in NAMES}
        self._layers = config.compilation_config.static_forward_context
        for name, cache in self.caches.items():
            forward = SimpleNamespace(forward=self._forward(name))
            self._layers[name] = SimpleNamespace(kv_cache=cache, impl=forward)
        self.connector.register_kv_caches(self.caches)
        self.cached: dict[str, int] = {}  # tokens of each request that were not computed
        self.requests: dict[str, Request] = {}
        self.blocks: dict[str, list[int]] = {}

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
        output = self._execute(scheduled)
        return self.scheduler.update_from_output(scheduled, output)

    def _forward(self, name: str) -> Any:
        """A backend's forward: what it has written to the cache is attended to elsewhere."""

        def forward(layer: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            assert layer is self._layers[name]

        return forward

    def _execute(self, scheduled: Any) -> ModelRunnerOutput:
        """One step of a model runner, requests in another order than the scheduler's."""
        for new in scheduled.scheduled_new_reqs:
            self.blocks[new.req_id] = list(new.block_ids[0])
            self.cached[new.req_id] = new.num_computed_tokens
        cached = scheduled.scheduled_cached_reqs
        for name, blocks in zip(cached.req_ids, cached.new_block_ids):
            if blocks is not None:
                resumed = name in cached.resumed_req_ids
                self.blocks[name] = ([] if resumed else self.blocks[name]) + list(blocks[0])
        computed = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens))
        names = sorted(scheduled.num_scheduled_tokens, reverse=True)
        spans = {
            name: torch.arange(
                computed[name], computed[name] + scheduled.num_scheduled_tokens[name]
            )
            for name in names
        }
        kv_transfer_state._KV_CONNECTOR_AGENT = self.connector
        if not names:
            return KVConnectorModelRunnerMixin.kv_connector_no_forward(scheduled, self._config)
        tokens = torch.cat(
            [torch.tensor(self.requests[name].all_token_ids)[spans[name]] for name in names]
        )
        positions = torch.cat([spans[name] for name in names])
        slots = torch.cat([self._slots(name, spans[name]) for name in names])
        mapping = {name: slots for name in NAMES}
        metadata = {name: SimpleNamespace() for name in NAMES}
        outputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        with set_forward_context(metadata, self._config, slot_mapping=mapping):
            with KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(scheduled) as connector:
                for layer, layer_name in enumerate(NAMES):
                    queries, keys, values = self._model.states(layer, tokens, positions)
                    cache = self.caches[layer_name]
                    both = torch.cat([keys, values], -1)
                    cache[slots // BLOCK, :, slots % BLOCK] = both

                    @maybe_transfer_kv_layer  # type: ignore[untyped-decorator, unused-ignore]
                    def attention(query: torch.Tensor, layer_name: str) -> None:
                        module = self._layers[layer_name]
                        module.impl.forward(module, query, None, None, module.kv_cache, None)

                    attention(queries, layer_name)
                    last = torch.tensor([len(spans[name]) for name in names]).cumsum(0) - 1
                    for name, row in zip(names, last.tolist()):
                        everything = torch.arange(int(spans[name][-1]) + 1)
                        slot = self._slots(name, everything)
                        k, v = cache[slot // BLOCK, :, slot % BLOCK].chunk(2, -1)
                        outputs[name].append(self._model.attend(queries[row], k, v))
        sampled = [
            [self._model.sample(outputs[name])]
            if int(spans[name][-1]) + 1 >= self.requests[name].num_tokens
            else []
            for name in names
        ]
        indices = {name: i for i, name in enumerate(names)}
        return ModelRunnerOutput(names, indices, sampled, kv_connector_output=connector)

    def _slots(self, name: str, positions: torch.Tensor) -> torch.Tensor:
        blocks = torch.tensor(self.blocks[name])
        return blocks[positions // BLOCK] * BLOCK + positions % BLOCK
