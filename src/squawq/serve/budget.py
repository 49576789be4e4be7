"""What requests cost in memory, and an amount that those under way share: whoever finds too little of it left waits,
first come first served.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from squawq.engine.request import Request

_TOKEN = 48  # bytes: an integer, and its place in two lists
_SEQUENCE = 16 * 1024  # bytes: a sequence's sampler, text and place in the queue
_SEEN = 120  # bytes that a repetition penalty takes for a token of the prompt


def cost(requests: Iterable[Request]) -> int:
    """Bytes that requests hold, about, while they wait or run."""
    total = 0
    for request in requests:
        params, prompt = request.params, len(request.prompt)
        sequence = _SEQUENCE + 8 * prompt + 16 * len(params.allowed_ids or ())
        if params.repetition_penalty != 1:
            sequence += _SEEN * prompt
        total += _TOKEN * prompt + params.sequences * sequence
    return total


def scores(requests: Iterable[Request]) -> int:
    """Log probabilities that the engine hands out for requests, at most."""
    total = 0
    for request in requests:
        params = request.params
        if params.prompt_logprobs is not None:
            total += len(request.prompt) * (params.prompt_logprobs + 1)
        if params.logprobs is not None:
            total += params.sequences * (params.max_tokens or 0) * (params.logprobs + 1)
    return total


class Budget:
    """Shares out `amount`. For the event loop alone."""

    def __init__(self, amount: int) -> None:
        self._left = amount
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def take(self, amount: int) -> AsyncIterator[None]:
        """A context that holds a share, which must not be more than there is altogether; waits for it."""
        if amount:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((amount, turn))
            self._share_out()
            try:
                await turn
            except asyncio.CancelledError:
                if turn.cancelled():
                    self._waiting.remove((amount, turn))
                    self._give(0)
                else:  # its turn came just now
                    self._give(amount)
                raise
        try:
            yield
        finally:
            self._give(amount)

    def _give(self, amount: int) -> None:
        self._left += amount
        self._share_out()

    def _share_out(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._left:
            amount, turn = self._waiting.popleft()
            self._left -= amount
            turn.set_result(None)
