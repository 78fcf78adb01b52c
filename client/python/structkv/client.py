"""The client of a StructKV server, and the engine in this process behind the same interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TypeAlias

from . import _core
from ._batch import Batch
from ._core import Lease, Region
from ._waiting import connections, wait
from .errors import Error
from .messages import GetCapabilitiesResponse, Open
from .options import (
    BatchPrompt,
    ClientOptions,
    FetchOptions,
    HeldCallOptions,
    LayerTensors,
    SessionOptions,
    StreamOptions,
)
from .results import Compressed, FetchedCache, PivotResult
from .session import Gatherer, Session

Flag: TypeAlias = str | int | float | bool
"""The value of an option of structkv-server."""

LayerSource: TypeAlias = Callable[[int], LayerTensors]
"""Gives a layer's tensors; asked for in ascending order, for the layers that keep tokens."""

BatchSource: TypeAlias = Callable[[int, int], LayerTensors]
"""Gives the tensors of a layer, by the prompt's number in its batch and the layer's; otherwise as
LayerSource."""

SteppedSource: TypeAlias = Callable[[int, PivotResult | None], LayerTensors]
"""The same, for one layer after the other: the pivot is None until the layers before have decided
it. From its skeleton_from_layer on, a layer may hold skeleton rows (LayerTensors.positions)."""


@dataclass(frozen=True)
class ReplicaState:
    """What a client knows of one of several servers: as it said itself when it was last asked.

    health: "unknown" before it was asked, "ready", "draining", or "failed".
    failure: why it has failed.
    """

    address: str
    health: str
    failure: str
    reserved_bytes: int
    limit_bytes: int
    active_sessions: int


class _Connection:
    """What Client and AsyncClient have in common. Thread-safe; sessions may outlive it."""

    def __init__(self, core: _core.Connection) -> None:
        self._core = core
        connections.add(core)

    def close(self) -> None:
        """Of an engine: ends it; what runs in it, and what comes, is Unavailable. Of a client:
        nothing; the connection closes with its last session."""
        self._core.close()

    def replicas(self) -> list[ReplicaState]:
        """What is known of the servers that the target stands for, by address; of those of a name
        nothing before the first call."""
        return [ReplicaState(*state) for state in self._core.replicas()]

    def keep(
        self, handle: bytes, lease: float, options: HeldCallOptions = HeldCallOptions()
    ) -> Lease:
        """Keeps a held cache alive: renews its lease of `lease` seconds three times in each, until
        what is returned is stopped or dropped. It is a context manager."""
        return self._core.keep(handle, lease, options)


def flags(options: dict[str, Flag]) -> list[str]:
    """Options of structkv-server by name as its flags."""
    return [
        f"--{name.replace('_', '-')}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in options.items()
    ]


class Client(_Connection):
    """A connection to a server at `target`, "host:port" or "unix:/path", or to several that do the
    same: "host:port,host:port", or "dns:///name:port" for all addresses of a name. Connects with
    the first call."""

    def __init__(self, target: str, options: ClientOptions = ClientOptions()) -> None:
        super().__init__(_core.connect(target, options))

    def get_capabilities(self, timeout: float = 10) -> GetCapabilitiesResponse:
        """What the server can do."""
        response: GetCapabilitiesResponse = wait(self._core.get_capabilities(timeout))
        return response

    def choose_replica(self, open: Open, timeout: float = 10) -> str:
        """Where `open` would go now, of several servers: for ranks of a shard group that are told
        where to meet (StreamOptions.replica)."""
        address: str = wait(self._core.choose_replica(open, timeout))
        return address

    def register(self, region: Region, tenant: str = "") -> None:
        """Registers `region` with the server. Opening a prompt does so by itself; this says early
        why it cannot be."""
        wait(self._core.register(region, tenant))

    def open_prompt(self, open: Open, options: SessionOptions = SessionOptions()) -> Session:
        """Opens a stream, and waits until the server has admitted the prompt, trying again as
        `options.retry` says."""
        (opening,) = wait(self._core.open_batch([(open, options)], options))
        if isinstance(opening, Error):
            raise opening
        return Session(opening)

    def open_batch(
        self, prompts: Sequence[BatchPrompt], options: StreamOptions = StreamOptions()
    ) -> list[Session | Error]:
        """Opens several prompts in one stream, and returns a session of each, or the error that
        refused it and left the others as they are."""
        pairs = [(prompt.open, prompt.options) for prompt in prompts]
        openings = wait(self._core.open_batch(pairs, options))
        return [each if isinstance(each, Error) else Session(each) for each in openings]

    def compress(
        self, open: Open, source: LayerSource, options: SessionOptions = SessionOptions()
    ) -> Compressed:
        """Compresses a prompt in one call. Opening is tried again as `options.retry` says; what
        fails later is raised."""
        with self.open_prompt(open, options) as session:
            for layer, kept in enumerate(session.opened.kept_tokens):
                if kept > 0:
                    session.send_layer(layer, source(layer))
            session.commit()
            return session.collect()

    def compress_batch(
        self,
        prompts: Sequence[BatchPrompt],
        source: BatchSource,
        options: StreamOptions = StreamOptions(),
    ) -> list[Compressed | Error]:
        """Compresses several prompts in one stream and one call; their lengths, methods and types
        need not agree. Asks for a layer of each prompt in turn, as an engine has them that prefills
        them together, and returns what came of each, in the order of `prompts`: one that is refused
        or fails leaves the others as they are. What `source` raises is raised, and cancels all.

        Prompts that found no room beside the others are opened again once those are over, as often
        as `options.retry` says; what fails later is not sent again. Results wait in the library
        until everything was sent, so leave `options.max_buffered_result_bytes` unbounded.
        """
        with Batch[Session](prompts, options) as batch:
            while due := batch.due():
                batch.opened(self.open_batch(due, batch.options()))
                for number, layer, session in batch.layers():
                    tensors = source(number, layer)
                    with batch.failing_alone(number):
                        session.send_layer(layer, tensors)
                for number, session in batch.running():
                    with batch.failing_alone(number):
                        session.commit()
                for number, session in batch.running():
                    with batch.failing_alone(number):
                        batch.collected(number, session.collect())
            return batch.outcomes()

    def compress_in_steps(
        self, open: Open, source: SteppedSource, options: SessionOptions = SessionOptions()
    ) -> Compressed:
        """As compress(), one layer after the other: each is answered before the next one is asked
        for, so that a worker can cut its prefill at the pivot."""
        with self.open_prompt(open, options) as session:
            gatherer = Gatherer(session.opened)
            for layer, kept in enumerate(session.opened.kept_tokens):
                if kept == 0:
                    continue
                session.send_layer(layer, source(layer, gatherer.pivot))
                while not gatherer.has(layer):
                    gatherer.add(session.next_event())
            session.commit()
            while (compressed := gatherer.add(session.next_event())) is None:
                pass
            return compressed

    def fetch(self, handle: bytes, options: FetchOptions = FetchOptions()) -> FetchedCache:
        """Fetches a held cache (Summary.held), or some of its layers and KV heads."""
        fetched: FetchedCache = wait(self._core.fetch(handle, options))
        return fetched

    def renew(
        self,
        handle: bytes,
        lease: float | None = None,
        options: HeldCallOptions = HeldCallOptions(),
    ) -> float:
        """Begins the lease anew, of that many seconds or the one in force, and returns it."""
        seconds: float = wait(self._core.renew(handle, lease, options))
        return seconds

    def release(self, handle: bytes, options: HeldCallOptions = HeldCallOptions()) -> None:
        """Ends the lease of a held cache."""
        wait(self._core.release(handle, options))


class Engine(Client):
    """The engine in this process, without a server, a socket or a copy in the transport. Options
    are those of structkv-server by name, for instance
    Engine(threads=4, memory_budget="8GiB", hold_budget="1GiB"). Ended by close(), or as a context
    manager."""

    def __init__(self, **options: Flag) -> None:
        _Connection.__init__(self, _core.embed(flags(options), ClientOptions()))

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
