"""One prompt on its way through the service."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from types import TracebackType

from . import _core
from ._waiting import sessions, wait, wait_async
from .messages import Open, Opened, Summary, Tensor as TensorName
from .options import Array, LayerTensors
from .results import Compressed, Event, LayerResult, PivotResult


class Gatherer:
    """Puts a session's events in order."""

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._layers: dict[int, LayerResult] = {}
        self._pivot: PivotResult | None = None

    def has(self, layer: int) -> bool:
        """Whether the layer was answered."""
        return layer in self._layers

    def answer(self, layer: int) -> LayerResult | None:
        """The layer's answer, once it is there."""
        return self._layers.get(layer)

    @property
    def pivot(self) -> PivotResult | None:
        """The pivot, once it is there."""
        return self._pivot

    def add(self, event: Event) -> Compressed | None:
        if isinstance(event, LayerResult):
            self._layers[event.layer] = event
        elif isinstance(event, PivotResult):
            self._pivot = event
        else:
            layers = tuple(self._layers[layer] for layer in sorted(self._layers))
            return Compressed(
                opened=self._opened, layers=layers, pivot=self._pivot, summary=event
            )
        return None


class _Session:
    """What both kinds of session have in common.

    A failed session raises what it failed with from every call. One thread may send while another
    reads; cancel() may be called from any.
    """

    def __init__(self, core: _core.Session) -> None:
        self._core = core
        sessions.add(self)

    @property
    def open(self) -> Open:
        """What was asked for, with the idempotency key in force."""
        open: Open = self._core.open
        return open

    @property
    def opened(self) -> Opened:
        """What the server answered: effective parameters, tokens that each layer keeps."""
        opened: Opened = self._core.opened
        return opened

    @property
    def replica(self) -> str:
        """The address of the server that has the prompt; empty for an engine."""
        return self._core.replica

    def cancel(self) -> None:
        """Ends the session as Cancelled, without waiting; events that were not read are dropped. Of
        one that is over: nothing."""
        self._core.cancel()


class Session(_Session):
    """A prompt that the server has admitted. As a context manager it is cancelled at the end,
    unless it is over."""

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    def send_layer(self, layer: int, tensors: LayerTensors) -> None:
        """Sends a layer's tensors; waits while too many bytes wait to be sent."""
        wait(self._core.send_layer(layer, tensors))

    def send_chunk(
        self,
        layer: int,
        first_token: int,
        tokens: int,
        *,
        keys: Array | None = None,
        values: Array | None = None,
    ) -> None:
        """Sends keys and values of tokens [first_token, first_token + tokens) of a layer, with
        these tokens in the place of all; the layer's other tensors go by send_layer()."""
        wait(self._core.send_chunk(layer, first_token, tokens, keys=keys, values=values))

    def send(self, layer: int, tensor: TensorName, data: Array, offset_bytes: int = 0) -> None:
        """Sends bytes of a tensor, those of `data`, from `offset_bytes` of it on."""
        wait(self._core.send(layer, tensor, data, offset_bytes))

    def commit(self) -> None:
        """Ends the prompt: everything was sent."""
        wait(self._core.commit())

    def next_event(self) -> Event:
        """Waits for the next event; OutOfRange after the summary."""
        while (event := self._core.next_event()) is None:
            wait(self._core.ready())
        result: Event = event
        return result

    def __iter__(self) -> Iterator[Event]:
        """The events up to the summary."""
        while True:
            event = self.next_event()
            yield event
            if isinstance(event, Summary):
                return

    def collect(self) -> Compressed:
        """Reads all that is left and puts it in order."""
        gatherer = Gatherer(self.opened)
        while True:
            compressed = gatherer.add(self.next_event())
            if compressed is not None:
                return compressed


class AsyncSession(_Session):
    """Session for asyncio."""

    async def __aenter__(self) -> AsyncSession:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    async def send_layer(self, layer: int, tensors: LayerTensors) -> None:
        """Sends a layer's tensors; waits while too many bytes wait to be sent."""
        await wait_async(self._core.send_layer(layer, tensors))

    async def send_chunk(
        self,
        layer: int,
        first_token: int,
        tokens: int,
        *,
        keys: Array | None = None,
        values: Array | None = None,
    ) -> None:
        """As Session.send_chunk()."""
        await wait_async(
            self._core.send_chunk(layer, first_token, tokens, keys=keys, values=values)
        )

    async def send(
        self, layer: int, tensor: TensorName, data: Array, offset_bytes: int = 0
    ) -> None:
        """As Session.send()."""
        await wait_async(self._core.send(layer, tensor, data, offset_bytes))

    async def commit(self) -> None:
        """Ends the prompt: everything was sent."""
        await wait_async(self._core.commit())

    async def next_event(self) -> Event:
        """Waits for the next event; OutOfRange after the summary. A wait that is cancelled loses
        no event."""
        while (event := self._core.next_event()) is None:
            await wait_async(self._core.ready())
        result: Event = event
        return result

    async def __aiter__(self) -> AsyncIterator[Event]:
        """The events up to the summary."""
        while True:
            event = await self.next_event()
            yield event
            if isinstance(event, Summary):
                return

    async def collect(self) -> Compressed:
        """Reads all that is left and puts it in order."""
        gatherer = Gatherer(self.opened)
        while True:
            compressed = gatherer.add(await self.next_event())
            if compressed is not None:
                return compressed
