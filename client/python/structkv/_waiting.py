"""How Python waits for the library, and how the two part at the interpreter's end."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import weakref
from typing import Any

from . import _core

_SLICE_SECONDS = 0.1  # Python looks for signals (KeyboardInterrupt) in between


def wait(pending: _core.Pending) -> Any:
    """Waits without the GIL. What is interrupted goes on in the library."""
    while not pending.wait(_SLICE_SECONDS):
        pass
    return pending.result()


async def wait_async(pending: _core.Pending) -> Any:
    """Waits on the running event loop."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def finish() -> None:
        if not future.done():
            future.set_result(None)

    def finish_threadsafe() -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed
            loop.call_soon_threadsafe(finish)

    pending.on_done(finish_threadsafe)
    await future
    return pending.result()


# What may run at the interpreter's end: sessions, then the engines that they run in.
sessions: weakref.WeakSet[Any] = weakref.WeakSet()
connections: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register
def _stop() -> None:
    try:
        for session in list(sessions):
            session.cancel()
        for connection in list(connections):
            connection.close()
    finally:
        _core.stop()
