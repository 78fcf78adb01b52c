"""Options of clients, streams and prompts. None leaves the C++ client's default, which
structkv/options.h of the C++ client states; times are in seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ._core import Arena, Region
from .messages import Open
from .results import LayerResult, RowPull

Array: TypeAlias = Any
"""A dense tensor with DLPack or the buffer protocol: torch, numpy, structkv.Tensor, memoryview,
bytes. On the CPU but for what a session with regions of a GPU sends. Typed Any, since the buffer
protocol has no type before Python 3.12."""

CudaStream: TypeAlias = Any
"""A cudaStream_t as an int, as torch.cuda.Stream.cuda_stream is. Typed Any, so that a dict of tensors
can be unpacked into LayerTensors."""

Transport: TypeAlias = Literal["auto", "inline", "shared_memory", "cuda_ipc"]


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """When a prompt is opened again: after Unavailable, and after ResourceExhausted where the
    server says when.

    max_attempts: in all; 1: never again.
    initial_backoff, max_backoff, multiplier: the wait before the second attempt, the longest, and
        how it grows.
    """

    max_attempts: int | None = None
    initial_backoff: float | None = None
    max_backoff: float | None = None
    multiplier: float | None = None


@dataclass(frozen=True, kw_only=True)
class Tls:
    """PEM texts. None: the system's roots, no certificate of the client's own."""

    root_certificates: str | None = None
    private_key: str | None = None
    certificate_chain: str | None = None


@dataclass(frozen=True, kw_only=True)
class ClientOptions:
    """Of a connection.

    tls: None: an unencrypted channel.
    token: sent with every call, for a server with a token file. Without tls only to unix sockets and
        this host's own addresses.
    idle_buffer_bytes: memory of dropped results that is kept for the next ones.
    keepalive_interval: how often an idle connection is probed.
    """

    tls: Tls | None = None
    token: str | None = None
    idle_buffer_bytes: int | None = None
    keepalive_interval: float | None = None
    user_agent: str | None = None


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """What the prompts of a batch have in common.

    timeout: from the first attempt to the last answer.
    chunk_bytes: tensor bytes per message.
    max_in_flight_bytes: tensor bytes that may wait to be sent before sending waits.
    max_buffered_result_bytes: result bytes that may wait to be read before the library stops
        reading; 0: no bound. With a bound, read results while others are sent.
    checksums: send an XXH3 checksum with every piece in a message.
    replica: of several, the address of the one to use; None: the client chooses.
    transport: "auto" takes shared memory where regions are given and the server can have it; of
        several replicas that the client chooses from, "auto" is "inline". With regions of a GPU it
        takes "cuda_ipc", or what copy_from_gpu lets.
    regions: that keys and values lie in, all of the host's memory or all of one GPU's.
    staging: that keys and values outside of the regions are copied to, for shared memory and
        "cuda_ipc".
    copy_from_gpu: with regions of a GPU that the server cannot read, copy keys and values to the
        host and send them in messages, and results to the arena, many times slower; False: that is
        FailedPrecondition, with the reason.
    metadata: sent with every attempt, for instance ("structkv-tenant", "me").
    session_id: the caller's own name, for the server's log, status page and traces: 1 to 128
        letters, digits and "._:/+@-".
    traceparent, tracestate: W3C Trace Context of the caller's span.
    """

    timeout: float | None = None
    chunk_bytes: int | None = None
    max_in_flight_bytes: int | None = None
    max_buffered_result_bytes: int | None = None
    checksums: bool | None = None
    retry: RetryPolicy | None = None
    replica: str | None = None
    transport: Transport | None = None
    regions: Sequence[Region] = ()
    staging: Arena | None = None
    copy_from_gpu: bool | None = None
    metadata: Sequence[tuple[str, str]] | None = None
    session_id: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Of one prompt. Functions are called on a thread of the library, which reads nothing further
    meanwhile: they are quick, wait for no session, and hold none (it would never be collected).
    What one raises ends the session, as Internal.

    allocate: gives memory for one tensor of a result, `allocate(layer, tensor, nbytes)`: a writable
        u8 [nbytes], which is not copied and stays alive; or an arena. Of the host.
    results: with shared memory and "cuda_ipc", kept keys and values are written here by the server.
    rows: with Open.pull, gives the rows that the server asks for as (keys or None, values), each
        [kv_heads, kept_tokens, dim] or the layout of Open. None: they are taken from what
        send_layer() was given.
    """

    allocate: Callable[[int, str, int], Array] | Arena | None = None
    results: Arena | None = None
    rows: Callable[[RowPull], tuple[Array | None, Array]] | None = None


@dataclass(frozen=True, kw_only=True)
class SessionOptions(PromptOptions, StreamOptions):
    """Of a prompt that has its stream to itself."""


@dataclass(frozen=True)
class BatchPrompt:
    """One prompt of several in one stream."""

    open: Open
    options: PromptOptions = PromptOptions()


@dataclass(frozen=True, kw_only=True)
class HeldCallOptions:
    """Of a call about a held cache; timeout from the first attempt to the end. session_id,
    traceparent and tracestate as in StreamOptions, of a fetch.

    replica: of several, the address of the one that holds it (Summary.held.replica); None: each is
        asked in turn.
    """

    timeout: float | None = None
    replica: str | None = None
    metadata: Sequence[tuple[str, str]] | None = None
    session_id: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None


@dataclass(frozen=True, kw_only=True)
class FetchOptions(HeldCallOptions):
    """Which layers and KV heads of the model; None: all. What breaks is gone on with.

    max_message_bytes: bytes of a message, at most.
    max_bytes: the most tensor bytes that are taken in; a cache that has more is ResourceExhausted
        before memory is taken for it.
    allocate: as in PromptOptions.
    results: with shared memory and "cuda_ipc", keys and values are written here by the server.
        ResourceExhausted where it has no room for all.
    transport: "auto" takes shared memory where results is given and the server has it, or
        "cuda_ipc" where that is a GPU's; FetchedCache.info.transport says which it was.
    on_layer: takes each layer as it is complete, in place of FetchedCache.layers, on a thread of
        the library. What it, or allocate, raises is raised by the fetch, as Internal.
    """

    first_layer: int | None = None
    layer_count: int | None = None
    first_kv_head: int | None = None
    kv_head_count: int | None = None
    max_message_bytes: int | None = None
    checksums: bool | None = None
    max_bytes: int | None = None
    retry: RetryPolicy | None = None
    allocate: Callable[[int, str, int], Array] | Arena | None = None
    results: Arena | None = None
    transport: Transport | None = None
    on_layer: Callable[[LayerResult], None] | None = None


@dataclass(frozen=True, kw_only=True)
class LayerTensors:
    """One layer's tensors, each dense; None where the prompt has no such tensor
    (Opened.required_tensors). They are not copied, and stay alive until the library is done.

    They lie on the CPU. With regions of a GPU keys and values lie in one, or in any memory that
    `staging` or `copy_from_gpu` has them copied from; of the others, what is in a GPU's memory is
    copied to the host.

    keys, values: [kv_heads, tokens, dim] or [tokens, kv_heads, dim], by Open.layout, or blocks of
        Open.paged: [blocks, kv_heads, block_tokens, dim] or [blocks, block_tokens, kv_heads, dim].
    window_queries: [query_heads, window_tokens, key_dim], after RoPE.
    window_lse: f32 [query_heads, window_tokens].
    saliency: f32 [tokens] or [kv_heads, tokens].
    key_scales, value_scales: f32 [1] or [kv_heads], of fp8.
    positions: i32 [skeleton_tokens], PivotResult.skeleton: the layer holds skeleton rows alone,
        and `tokens` above are the skeleton's.
    cuda_stream: with regions of a GPU, the cudaStream_t on which the tensors are written
        (torch.cuda.current_stream().cuda_stream): the server waits for what was queued there until
        now. None: they are written, or Region.record() was called.

    Leading axes of 1 are dropped. Integers of the same size stand for the bits of bf16 and fp8
    (numpy has neither), and u8 [nbytes] for anything.
    """

    keys: Array | None = None
    values: Array | None = None
    window_queries: Array | None = None
    window_lse: Array | None = None
    saliency: Array | None = None
    key_scales: Array | None = None
    value_scales: Array | None = None
    positions: Array | None = None
    cuda_stream: CudaStream | None = None
