"""A batch of prompts in one call: what Client and AsyncClient have in common."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Generic, TypeVar

from .errors import Error, ResourceExhausted, Unavailable
from .options import BatchPrompt, StreamOptions
from .results import Compressed
from .session import AsyncSession, Session

_Session = TypeVar("_Session", Session, AsyncSession)


class Batch(Generic[_Session]):
    """The prompts of a call, and how far each has come. It goes in rounds: those that are due are
    opened in one stream, and those that found no room in it are due once the others are over. A
    round that admits none is the last: opening has tried again by itself.

    As a context manager it cancels at the end what is not over.
    """

    def __init__(self, prompts: Sequence[BatchPrompt], options: StreamOptions) -> None:
        self._prompts = prompts
        self._options = options
        self._end = None if options.timeout is None else time.monotonic() + options.timeout
        self._due = list(range(len(prompts)))
        self._rounds = 0
        self._sessions: dict[int, _Session] = {}
        self._outcomes: dict[int, Compressed | Error] = {}

    def __enter__(self) -> Batch[_Session]:
        return self

    def __exit__(self, *args: object) -> None:
        for session in self._sessions.values():
            session.cancel()

    def due(self) -> list[BatchPrompt]:
        """What is to be opened; empty once the batch is over."""
        return [self._prompts[number] for number in self._due]

    def options(self) -> StreamOptions:
        """Of the round's stream, with what is left of the time."""
        if self._end is None:
            return self._options
        return replace(self._options, timeout=max(0.0, self._end - time.monotonic()))

    def opened(self, openings: Sequence[_Session | Error]) -> None:
        """Takes what came of those that were due."""
        numbers, self._due = self._due, []
        for number, opening in zip(numbers, openings):
            if isinstance(opening, Error):
                self._outcomes[number] = opening
            else:
                self._sessions[number] = opening
        self._rounds += 1
        if self._sessions and self._may_go_on():
            self._due = [n for n in numbers if n not in self._sessions and self._no_room(n)]

    def layers(self) -> Iterator[tuple[int, int, _Session]]:
        """Number, layer and session of what is to be sent: a layer of each prompt in turn, of those
        that still run and keep tokens there.
        """
        kept = {number: each.opened.kept_tokens for number, each in self._sessions.items()}
        for layer in range(max(map(len, kept.values()), default=0)):
            for number, tokens in kept.items():
                session = self._sessions.get(number)
                if session is not None and layer < len(tokens) and tokens[layer] > 0:
                    yield number, layer, session

    def running(self) -> list[tuple[int, _Session]]:
        """Number and session of those that were admitted and have neither failed nor ended."""
        return list(self._sessions.items())

    @contextmanager
    def failing_alone(self, number: int) -> Iterator[None]:
        """An Error in this context is that prompt's, which leaves the others as they are."""
        try:
            yield
        except Error as error:
            self._sessions.pop(number).cancel()
            self._outcomes[number] = error

    def collected(self, number: int, compressed: Compressed) -> None:
        """That prompt is over."""
        del self._sessions[number]
        self._outcomes[number] = compressed

    def outcomes(self) -> list[Compressed | Error]:
        """Of all prompts, in their order."""
        return [self._outcomes[number] for number in range(len(self._prompts))]

    def _may_go_on(self) -> bool:
        attempts = None if self._options.retry is None else self._options.retry.max_attempts
        in_time = self._end is None or time.monotonic() < self._end
        return in_time and (attempts is None or self._rounds < attempts)

    def _no_room(self, number: int) -> bool:
        """Whether the prompt may be opened again, as RetryPolicy says."""
        error = self._outcomes[number]
        exhausted = isinstance(error, ResourceExhausted) and error.retry_after is not None
        return exhausted or isinstance(error, Unavailable)
