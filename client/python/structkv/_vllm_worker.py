"""The worker's side of the vLLM connector, on plain tensors: prompts from the paged cache to the
service, and held ones back into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ._core import Arena
from ._vllm_model import Shard
from .client import Client
from .errors import Error
from .messages import Open
from .options import FetchOptions, HeldCallOptions, LayerTensors, SessionOptions
from .session import Session
from .vllm_requests import HeldPrompt


@dataclass(frozen=True)
class Prefill:
    """What a step computes of a prompt that is to be compressed: tokens [begin, end) of `tokens`,
    which lie in `block_ids`, in order. `group`: where the ranks' heads of it meet in the service, of
    this step alone, since a prompt that was preempted comes again."""

    request: str
    group: str
    tokens: int
    begin: int
    end: int
    block_ids: list[int]

    @property
    def complete(self) -> bool:
        return self.end == self.tokens


@dataclass(frozen=True)
class Load:
    """A held prompt whose rows [first, kv_length) go to `block_ids`, in order. `refused`: why it is
    not to be loaded."""

    request: str
    held: HeldPrompt | None
    first: int
    block_ids: list[int]
    refused: str | None


def slots(block_ids: Sequence[int], block_tokens: int, begin: int, end: int) -> torch.Tensor:
    """Slots in the paged cache of tokens [begin, end), i64."""
    tokens = torch.arange(begin, end)
    return torch.tensor(block_ids)[tokens // block_tokens] * block_tokens + tokens % block_tokens


@dataclass(frozen=True)
class HeldShard:
    """What a rank left in the service of a prompt: HeldPrompt with its own handle. `several`: whether
    it knows of more than one server, so that whoever fetches must be told which."""

    handle: str
    kv_length: int
    fingerprint: str
    replica: str
    several: bool


class Sender:
    """A rank's heads of prompts on their way to the service. `window`: the last queries that it
    wants of each."""

    def __init__(
        self, client: Client, open: Open, shard: Shard, window: int, options: SessionOptions
    ) -> None:
        self._client, self._open, self._shard = client, open, shard
        self._window, self._options = window, options
        # By request and layer: the first token, and the queries from there on.
        self._queries: dict[tuple[str, int], tuple[int, torch.Tensor]] = {}
        self._sessions: dict[str, Session] = {}
        self._errors: dict[str, str] = {}

    def share(self, arena: Arena) -> None:
        """Keys and values go to the service through this memory, in place of messages."""
        self._options = replace(self._options, staging=arena)

    def open(self, prefills: Sequence[Prefill]) -> set[str]:
        """Before the layers of a step that completes these prompts; the requests that failed, now or
        in an earlier step."""
        for prefill in prefills:
            if prefill.request in self._errors:
                continue
            try:
                open = replace(
                    self._open,
                    prompt_tokens=prefill.tokens,
                    shard_group=self._shard.group(prefill.group),
                )
                session = self._client.open_prompt(open, self._options)
                self._sessions[prefill.request] = session
            except Exception as error:
                self.fail(prefill.request, str(error))
        return {each.request for each in prefills if each.request in self._errors}

    def fail(self, request: str, error: str) -> None:
        """The prompt is not compressed; the engine goes on."""
        self.drop(request)
        self._errors[request] = error

    def layer(
        self,
        prefill: Prefill,
        layer: int,
        cache: torch.Tensor,
        queries: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """After a layer's attention, with the rank's heads. cache: [blocks, kv_heads, block_tokens,
        2 * dim], keys and values beside each other; queries: [tokens, query_heads, dim] of the whole
        step, in the slots slot_mapping [tokens]."""
        if prefill.request in self._errors:
            return
        try:
            tail = self._tail(prefill, layer, cache.shape[2], queries, slot_mapping)
            if prefill.complete:
                self._send(prefill, layer, cache, tail)
        except Exception as error:
            self.fail(prefill.request, str(error))

    def _tail(
        self,
        prefill: Prefill,
        layer: int,
        block_tokens: int,
        queries: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        """The window's queries so far, [tokens, query_heads, dim]."""
        begin = max(prefill.begin, prefill.tokens - self._window)
        wanted = slots(prefill.block_ids, block_tokens, begin, max(begin, prefill.end))
        same = wanted.to(slot_mapping.device)[:, None] == slot_mapping[None]
        if not bool(same.any(1).all()):
            raise ValueError("the step's slot mapping lacks the prompt's last tokens")
        now = queries.index_select(0, same.int().argmax(1))
        first, before = self._queries.pop((prefill.request, layer), (begin, now[:0]))
        if first <= begin <= first + len(before):
            # Fewer than there are where the prompt was preempted, and is computed again.
            tail = torch.cat([before[: begin - first], now])
        else:
            first, tail = begin, now
        if not prefill.complete:
            self._queries[prefill.request, layer] = (first, tail)
        return tail

    def _send(self, prefill: Prefill, layer: int, cache: torch.Tensor, tail: torch.Tensor) -> None:
        window = min(self._window, prefill.tokens)
        if len(tail) < window:
            raise ValueError(
                f"{len(tail)} of the last {window} tokens were computed, the others came from the"
                " prefix cache; the request must not read it (skip_reading_prefix_cache)"
            )
        blocks = cache[torch.tensor(prefill.block_ids, device=cache.device)]
        keys, values = (
            each.transpose(1, 2).flatten(0, 1)[: prefill.tokens].contiguous()
            for each in blocks.chunk(2, -1)
        )
        del blocks  # of a GPU's memory too
        queries = tail.transpose(0, 1).contiguous().cpu() if window else None
        stream = None
        if self._options.staging is None:
            keys, values = keys.cpu(), values.cpu()
        elif keys.is_cuda:
            stream = torch.cuda.current_stream(keys.device).cuda_stream
        self._sessions[prefill.request].send_layer(
            layer,
            LayerTensors(keys=keys, values=values, window_queries=queries, cuda_stream=stream),
        )

    def finish(self, prefill: Prefill) -> HeldShard | str:
        """After the last layer: what is held, or why there is nothing."""
        error = self._errors.pop(prefill.request, None)
        if error is not None:
            return error
        try:
            session = self._sessions.pop(prefill.request)
            with session:
                session.commit()
                summary = session.collect().summary
            assert summary.held is not None
            return HeldShard(
                summary.held.handle.hex(),
                summary.kv_length,
                summary.fingerprint,
                summary.held.replica,
                len(self._client.replicas()) > 1,
            )
        except Exception as error:
            return str(error)

    def drop(self, request: str) -> None:
        """Of a request that is over, or failed."""
        self._errors.pop(request, None)
        if (session := self._sessions.pop(request, None)) is not None:
            session.cancel()
        for key in [key for key in self._queries if key[0] == request]:
            del self._queries[key]


def join(prefill_tokens: int, shards: Sequence[HeldShard | str]) -> HeldPrompt | str:
    """The prompt whose ranks' heads are held, or why it is not."""
    errors = [
        each if len(shards) == 1 else f"rank {rank}: {each}"
        for rank, each in enumerate(shards)
        if isinstance(each, str)
    ]
    held = [each for each in shards if isinstance(each, HeldShard)]
    if errors:
        return "; ".join(errors)
    if len({(each.kv_length, each.fingerprint, each.replica) for each in held}) != 1:
        return f"the ranks' heads differ: {held}"
    first = held[0]
    return HeldPrompt(
        [each.handle for each in held],
        first.kv_length,
        prefill_tokens,
        first.fingerprint,
        # The address of an only one need not be the one that others reach it at.
        first.replica if any(each.several for each in held) else "",
    )


def release(client: Client, shards: Sequence[HeldShard | str], timeout: float) -> None:
    """Of a prompt that nobody will fetch; what cannot be released now ends with its lease."""
    for each in shards:
        if isinstance(each, HeldShard):
            try:
                options = HeldCallOptions(timeout=timeout, replica=each.replica or None)
                client.release(bytes.fromhex(each.handle), options)
            except Error:
                pass


def load(
    client: Client,
    load: Load,
    shard: Shard,
    caches: Sequence[torch.Tensor],
    options: FetchOptions,
) -> None:
    """Fetches the rank's heads of a held prompt into the layers' caches, [blocks, kv_heads,
    block_tokens, 2 * dim]. ValueError where it is not what was announced."""
    if load.refused is not None or load.held is None:
        raise ValueError(load.refused)
    held = load.held
    parts = [
        _fetch(client, held, holder, heads, len(caches), options)
        for holder, heads in shard.parts(len(held.handles))
    ]
    device, block_tokens = caches[0].device, caches[0].shape[2]  # alike in all layers
    place = slots(load.block_ids, block_tokens, load.first, held.kv_length).to(device)
    for layer, cache in enumerate(caches):
        rows = torch.cat([part[layer] for part in parts], 1)
        cache[place // block_tokens, :, place % block_tokens] = rows[load.first :].to(device)


def _fetch(
    client: Client,
    held: HeldPrompt,
    holder: int,
    heads: range,
    layers: int,
    options: FetchOptions,
) -> list[torch.Tensor]:
    """Keys and values beside each other, [kv_length, heads, 2 * dim] of each layer."""
    options = replace(
        options,
        replica=held.replica or None,
        first_kv_head=heads.start,
        kv_head_count=len(heads),
    )
    fetched = client.fetch(bytes.fromhex(held.handles[holder]), options)
    if fetched.info.fingerprint != held.fingerprint:
        raise ValueError(
            f"fingerprint: {fetched.info.fingerprint}; {held.fingerprint} is expected"
        )
    if len(fetched.layers) != layers:
        raise ValueError(f"layers: {len(fetched.layers)}; {layers} are expected")
    for layer in fetched.layers:
        if layer.kept_tokens != held.kv_length:
            raise ValueError(f"layer {layer.layer}: {layer.kept_tokens} tokens; {held.kv_length}")
    rows = [
        torch.cat([torch.from_dlpack(layer.keys), torch.from_dlpack(layer.values)], -1)
        for layer in fetched.layers
    ]
    if rows and rows[0].is_cuda:
        # What was fetched goes with this function, and its place is the next fetch's.
        torch.cuda.current_stream(rows[0].device).synchronize()
    return rows
