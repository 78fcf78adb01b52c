"""StructKVConnector: compacted prompts between prefill and decode instances of vLLM
(docs/engines.md).

vllm serve MODEL --kv-transfer-config '{"kv_connector": "StructKVConnector",
  "kv_connector_module_path": "structkv.vllm_connector", "kv_role": "kv_producer",
  "kv_connector_extra_config": {"target": "localhost:7411", "kv_budget": 0.1}}'
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from threading import Thread
from typing import Any
from uuid import uuid4

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tp_group
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from ._core import Arena, Region
from ._connection import connection_options
from ._vllm_model import Shard, build_open, check
from ._vllm_worker import HeldShard, Load, Prefill, Sender, join, load, release
from .client import Client
from .options import FetchOptions, SessionOptions
from .vllm_requests import COMPRESS, ERROR, HELD, HeldPrompt

logger = init_logger(__name__)


@dataclass
class StepMetadata(KVConnectorMetadata):
    """From the scheduler to the worker, for one step."""

    prefills: list[Prefill] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)


@dataclass
class StepResults(KVConnectorWorkerMetadata):
    """From the workers to the scheduler: what each rank holds of a request's prompt, or why it does
    not, by request and rank."""

    shards: dict[str, dict[int, HeldShard | str]]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, StepResults)
        requests = {**self.shards, **other.shards}
        return StepResults(
            {
                request: {**self.shards.get(request, {}), **other.shards.get(request, {})}
                for request in requests
            }
        )


class StructKVConnector(KVConnectorBase_V1, SupportsHMA):
    """The prefill instance (kv_producer) compresses prompts of which the request asks for it, and
    leaves them in the service; the decode instance (kv_consumer) loads them. One instance may be
    both. Of tensor-parallel ranks each sends, and loads, its own heads; the two instances need not
    have the same number.

    kv_connector_extra_config: `target` (required), `tls_authorities`, `tls_certificate`, `tls_key`
    and `token_file` (paths), `lease` of held prompts and `timeout` in seconds, `region_bytes` that
    each rank shares with a server on its host; of a producer `method`, `kv_budget` and other
    parameters of the method, as in structkv.hf.

    ValueError, when vLLM starts, for what is not supported: pipeline and context parallelism, MLA,
    sliding windows, quantised caches, several groups of cache layers, kv_load_failure_policy
    "recompute".
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        config = self._kv_transfer_config
        extra = dict(config.kv_connector_extra_config)
        if "target" not in extra:
            raise ValueError("kv_connector_extra_config: no 'target', the StructKV server")
        check(vllm_config, kv_cache_config)
        client = Client(extra.pop("target"), connection_options(extra))
        timeout, lease = extra.pop("timeout", 30.0), extra.pop("lease", None)
        self._region_bytes = extra.pop("region_bytes", 0)
        self._produces, self._consumes = config.is_kv_producer, config.is_kv_consumer
        self._block_tokens: int = vllm_config.cache_config.block_size
        self._shard = Shard.of(vllm_config)
        # Of the scheduler.
        self._prompts: dict[str, tuple[int, list[int]]] = {}  # tokens, blocks
        self._loads: list[Load] = []
        self._finished: dict[str, dict[str, Any]] = {}
        # Of the worker.
        self._layers: dict[str, int] = {}
        self._caches: list[torch.Tensor] = []
        self._queries: dict[str, torch.Tensor] = {}
        self._failed_blocks: set[int] = set()
        self._refused: set[str] = set()
        self._results: dict[str, dict[int, HeldShard | str]] = {}
        self._client, self._fetch = client, FetchOptions(timeout=timeout)
        self._window = 0
        if self._produces:
            open, self._window = build_open(vllm_config, extra, lease)
            options = SessionOptions(timeout=timeout)
            self._sender = Sender(client, open, self._shard, self._window, options)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Queries and layers are handed out by Python, between graphs."""
        return True

    # The scheduler's side.

    def on_new_request(self, request: Any) -> None:
        params = request.kv_transfer_params or {}
        if self._produces and params.get(COMPRESS):
            self._prompts[request.request_id] = (request.num_prompt_tokens, [])
        if self._consumes and HELD in params:
            # Set with prompt_logprobs: vLLM would compute the stand-ins and ask for no load.
            request.skip_reading_prefix_cache = False

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        params = request.kv_transfer_params or {}
        if not self._consumes or HELD not in params:
            return 0, False
        held, _ = self._held(request)
        known = self._known(request, held)
        return max(0, known - num_computed_tokens), held is None

    def _known(self, request: Any, held: HeldPrompt | None) -> int:
        """Tokens that are said to be there. Of what is refused all, and later, so that a load of at
        least one of them fails, and the request with it, before any stand-in is computed as if it
        were the prompt."""
        tokens: int = request.num_prompt_tokens
        return tokens if held is None else held.kv_length

    def _held(self, request: Any) -> tuple[HeldPrompt | None, str | None]:
        """What the request names, or why it cannot be loaded."""
        given = request.kv_transfer_params[HELD]
        names = {each.name for each in fields(HeldPrompt)}
        if not isinstance(given, dict) or {"replica", *given} != names:
            return None, f"{HELD}: {given!r}; {', '.join(sorted(names))} are expected"
        held = HeldPrompt(**given)
        if not isinstance(held.handles, list) or not all(map(_is_handle, held.handles)):
            return None, f"handles: {held.handles!r}; a list of hexadecimal handles is expected"
        try:
            self._shard.parts(len(held.handles))
        except ValueError as error:
            return None, str(error)
        if not isinstance(held.kv_length, int) or held.kv_length < 1:
            return None, f"kv_length: {held.kv_length!r}; at least 1 is expected"
        if not isinstance(held.replica, str):
            return None, f"replica: {held.replica!r}; an address is expected"
        if request.num_prompt_tokens <= held.kv_length:
            return None, (
                f"prompt: {request.num_prompt_tokens} tokens; more than the {held.kv_length} of the"
                " compacted one are expected"
            )
        if request.cache_salt != held.cache_salt:
            return None, f"cache_salt: {request.cache_salt!r}; {held.cache_salt!r} is expected"
        return held, None

    def update_state_after_alloc(
        self, request: Any, blocks: Any, num_external_tokens: int
    ) -> None:
        if num_external_tokens == 0:
            return
        held, refused = self._held(request)
        (block_ids,) = blocks.get_block_ids()
        first = self._known(request, held) - num_external_tokens
        self._loads.append(Load(request.request_id, held, first, list(block_ids), refused))

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        metadata = StepMetadata(loads=self._loads)
        self._loads = []
        for new in scheduler_output.scheduled_new_reqs:
            self._schedule(
                metadata,
                scheduler_output,
                new.req_id,
                new.num_computed_tokens,
                new.block_ids,
                True,
            )
        cached = scheduler_output.scheduled_cached_reqs
        for request, computed, blocks in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids
        ):
            anew = request in cached.resumed_req_ids
            self._schedule(metadata, scheduler_output, request, computed, blocks, anew)
        return metadata

    def _schedule(
        self,
        metadata: StepMetadata,
        scheduler_output: Any,
        request: str,
        computed: int,
        blocks: tuple[list[int], ...] | None,
        anew: bool,
    ) -> None:
        if request not in self._prompts:
            return
        tokens, block_ids = self._prompts[request]
        if blocks is not None:
            block_ids = list(blocks[0]) if anew else block_ids + list(blocks[0])
            self._prompts[request] = (tokens, block_ids)
        end = min(tokens, computed + scheduler_output.num_scheduled_tokens[request])
        if computed < tokens and end > tokens - max(1, self._window):
            used = -(-tokens // self._block_tokens)
            metadata.prefills.append(
                Prefill(request, uuid4().hex, tokens, computed, end, block_ids[:used])
            )

    def update_connector_output(self, connector_output: Any) -> None:
        results = connector_output.kv_connector_worker_meta
        if isinstance(results, StepResults):
            for request, shards in results.shards.items():
                ordered = [shards.get(i, "no result came") for i in range(self._shard.ranks)]
                if request not in self._prompts:  # aborted, before its results came
                    self._release(ordered)
                    continue
                held = join(self._prompts[request][0], ordered)
                if isinstance(held, str):
                    logger.warning("structkv: %s is not compressed: %s", request, held)
                    self._finished[request] = {ERROR: held}
                    self._release(ordered)
                else:
                    self._finished[request] = {HELD: asdict(held)}

    def _release(self, shards: list[HeldShard | str]) -> None:
        """The scheduler waits for nobody."""
        if any(isinstance(each, HeldShard) for each in shards):
            arguments = (self._client, shards, self._fetch.timeout)
            Thread(target=release, args=arguments, daemon=True).start()

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._prompts.pop(request.request_id, None)
        return False, self._finished.pop(request.request_id, None)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    # The worker's side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        names = sorted(kv_caches, key=extract_layer_index)
        self._layers = {name: layer for layer, name in enumerate(names)}
        self._caches = [kv_caches[name] for name in names]
        model = self._vllm_config.model_config
        shape = (
            model.get_num_kv_heads(self._vllm_config.parallel_config),
            self._block_tokens,
            2 * model.get_head_size(),
        )
        for name in names:
            if tuple(kv_caches[name].shape[1:]) != shape:
                raise ValueError(
                    f"{name}: a cache of {list(kv_caches[name].shape)}; [blocks, {shape[0]},"
                    f" {shape[1]}, {shape[2]}] (KV heads, tokens, keys and values) is expected"
                )
        if self._region_bytes:
            self._share(self._caches[0].device)
        if self._produces:
            attention = self._vllm_config.compilation_config.static_forward_context
            for name in names:
                impl = attention[name].impl
                impl.forward = self._keep_queries(name, impl.forward)

    def _share(self, device: torch.device) -> None:
        """Memory where the caches are, that rows go through to the service and back."""
        gpu = device.index if device.type == "cuda" else None
        arena = Arena(Region(self._region_bytes, gpu=gpu))
        self._fetch = replace(self._fetch, results=arena)
        if self._produces:
            self._sender.share(arena)

    def _keep_queries(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The attention backend's function, which the interface hands no queries out of."""

        def keeping(layer: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.has_connector_metadata() and self._step().prefills:
                self._queries[name] = query
            return forward(layer, query, *args, **kwargs)

        return keeping

    def _step(self) -> StepMetadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        return metadata

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """The first call of a step: opens the prompts that it completes."""
        super().bind_connector_metadata(connector_metadata)
        complete = [each for each in self._step().prefills if each.complete]
        if complete and self._produces:
            for request in self._agreed(self._sender.open(complete)):
                self._sender.fail(request, "another rank could not open it")

    def _agreed(self, failed: set[str]) -> set[str]:
        """Requests that this rank has opened and another one has not: ranks that went on alone would
        wait for it in the service, and the engine with them."""
        if self._shard.ranks == 1:
            return set()
        every: list[Any] = [None] * self._shard.ranks
        torch.distributed.all_gather_object(every, failed, get_tp_group().cpu_group)
        return set().union(*every) - failed

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for each in self._step().loads:
            try:
                load(self._client, each, self._shard, self._caches, self._fetch)
            except Exception as error:
                logger.error("structkv: request %s is not loaded: %s", each.request, error)
                # Those before may be other requests' as well, and are right.
                self._failed_blocks.update(each.block_ids[each.first // self._block_tokens :])
                if each.refused is not None:
                    self._refused.add(each.request)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Everything was loaded by start_load_kv()."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        prefills = self._step().prefills
        if not prefills or not self._produces:
            return
        queries = self._queries.pop(layer_name)
        slot_mapping = get_forward_context().slot_mapping[layer_name]
        for prefill in prefills:
            self._sender.layer(prefill, self._layers[layer_name], kv_layer, queries, slot_mapping)

    def wait_for_save(self) -> None:
        for prefill in self._step().prefills:
            if prefill.complete:
                held = self._sender.finish(prefill)
                self._results[prefill.request] = {self._shard.rank: held}

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        results, self._results = self._results, {}
        return StepResults(results) if results else None

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._produces:
            for request in finished_req_ids:
                self._sender.drop(request)
        refused, self._refused = self._refused, set()
        return None, refused or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed


def _is_handle(given: Any) -> bool:
    try:
        return isinstance(given, str) and len(bytes.fromhex(given)) == 16
    except ValueError:
        return False
