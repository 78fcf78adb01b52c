"""The same for asyncio. Results come by the library's events; what may block (opening, sending
when too much waits, calls about held caches) runs on the library's threads, which the call does
not occupy."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from . import _core
from ._batch import Batch
from ._core import Region
from ._waiting import wait_async
from .client import BatchSource, Flag, LayerSource, SteppedSource, _Connection, flags
from .errors import Error
from .messages import GetCapabilitiesResponse, Open
from .options import (
    BatchPrompt,
    ClientOptions,
    FetchOptions,
    HeldCallOptions,
    SessionOptions,
    StreamOptions,
)
from .results import Compressed, FetchedCache
from .session import AsyncSession, Gatherer


class AsyncClient(_Connection):
    """Client for asyncio."""

    def __init__(self, target: str, options: ClientOptions = ClientOptions()) -> None:
        super().__init__(_core.connect(target, options))

    async def get_capabilities(self, timeout: float = 10) -> GetCapabilitiesResponse:
        """What the server can do."""
        response: GetCapabilitiesResponse = await wait_async(self._core.get_capabilities(timeout))
        return response

    async def choose_replica(self, open: Open, timeout: float = 10) -> str:
        """As Client.choose_replica()."""
        address: str = await wait_async(self._core.choose_replica(open, timeout))
        return address

    async def register(self, region: Region, tenant: str = "") -> None:
        """As Client.register()."""
        await wait_async(self._core.register(region, tenant))

    async def open_prompt(
        self, open: Open, options: SessionOptions = SessionOptions()
    ) -> AsyncSession:
        """As Client.open_prompt()."""
        (opening,) = await wait_async(self._core.open_batch([(open, options)], options))
        if isinstance(opening, Error):
            raise opening
        return AsyncSession(opening)

    async def open_batch(
        self, prompts: Sequence[BatchPrompt], options: StreamOptions = StreamOptions()
    ) -> list[AsyncSession | Error]:
        """As Client.open_batch()."""
        pairs = [(prompt.open, prompt.options) for prompt in prompts]
        openings = await wait_async(self._core.open_batch(pairs, options))
        return [each if isinstance(each, Error) else AsyncSession(each) for each in openings]

    async def compress(
        self, open: Open, source: LayerSource, options: SessionOptions = SessionOptions()
    ) -> Compressed:
        """As Client.compress()."""
        async with await self.open_prompt(open, options) as session:
            for layer, kept in enumerate(session.opened.kept_tokens):
                if kept > 0:
                    await session.send_layer(layer, source(layer))
            await session.commit()
            return await session.collect()

    async def compress_batch(
        self,
        prompts: Sequence[BatchPrompt],
        source: BatchSource,
        options: StreamOptions = StreamOptions(),
    ) -> list[Compressed | Error]:
        """As Client.compress_batch()."""
        with Batch[AsyncSession](prompts, options) as batch:
            while due := batch.due():
                batch.opened(await self.open_batch(due, batch.options()))
                for number, layer, session in batch.layers():
                    tensors = source(number, layer)
                    with batch.failing_alone(number):
                        await session.send_layer(layer, tensors)
                for number, session in batch.running():
                    with batch.failing_alone(number):
                        await session.commit()
                for number, session in batch.running():
                    with batch.failing_alone(number):
                        batch.collected(number, await session.collect())
            return batch.outcomes()

    async def compress_in_steps(
        self, open: Open, source: SteppedSource, options: SessionOptions = SessionOptions()
    ) -> Compressed:
        """As Client.compress_in_steps()."""
        async with await self.open_prompt(open, options) as session:
            gatherer = Gatherer(session.opened)
            for layer, kept in enumerate(session.opened.kept_tokens):
                if kept == 0:
                    continue
                await session.send_layer(layer, source(layer, gatherer.pivot))
                while not gatherer.has(layer):
                    gatherer.add(await session.next_event())
            await session.commit()
            while (compressed := gatherer.add(await session.next_event())) is None:
                pass
            return compressed

    async def fetch(self, handle: bytes, options: FetchOptions = FetchOptions()) -> FetchedCache:
        """As Client.fetch()."""
        fetched: FetchedCache = await wait_async(self._core.fetch(handle, options))
        return fetched

    async def renew(
        self,
        handle: bytes,
        lease: float | None = None,
        options: HeldCallOptions = HeldCallOptions(),
    ) -> float:
        """As Client.renew()."""
        seconds: float = await wait_async(self._core.renew(handle, lease, options))
        return seconds

    async def release(self, handle: bytes, options: HeldCallOptions = HeldCallOptions()) -> None:
        """As Client.release()."""
        await wait_async(self._core.release(handle, options))


class AsyncEngine(AsyncClient):
    """Engine for asyncio."""

    def __init__(self, **options: Flag) -> None:
        _Connection.__init__(self, _core.embed(flags(options), ClientOptions()))

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
