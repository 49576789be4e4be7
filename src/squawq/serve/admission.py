"""How many requests may be under way or waiting, and how much memory they may hold, with a share for each API key that
no other key can take. For the event loop alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from squawq.engine.request import Request
from squawq.serve.errors import ApiError
from squawq.serve.settings import Settings

_TOKEN = 48  # bytes: an integer, and its place in two lists
_SEQUENCE = 16 * 1024  # bytes: a sequence's sampler, text and place in the queue
_SEEN = 120  # bytes that a repetition penalty takes for a token of the prompt
_LOGPROB = 240  # bytes of a log probability: with its token in a tuple, then as JSON in the reply


def cost(requests: Iterable[Request]) -> int:
    """Bytes that requests hold, about, from the queue to the reply.

    The log probability of each new token itself is left out: it takes no more than the token's text, of which a request
    that asks for no log probabilities holds as much.
    """
    total = 0
    for request in requests:
        params, prompt = request.params, len(request.prompt)
        sequence = _SEQUENCE + 8 * prompt + 16 * len(params.allowed_ids or ())
        if params.repetition_penalty != 1:
            sequence += _SEEN * prompt
        sequence += _LOGPROB * (params.max_tokens or 0) * (params.logprobs or 0)
        total += _TOKEN * prompt + params.sequences * sequence
        if params.prompt_logprobs is not None:
            total += _LOGPROB * prompt * (params.prompt_logprobs + 1)
    return total


@dataclass
class Load:
    """Requests that are under way or waiting, and the bytes that they hold."""

    requests: int = 0
    size: int = 0


@dataclass
class Place:
    """One request's place in its tenant's load, and the bytes that it holds."""

    tenant: Load
    size: int = 0


class Admission:
    """Lets requests in. Each API key is a tenant; without keys there is one.

    A tenant that holds less than an equal share is let in whatever the others hold, so that none can lock it out. All
    together then hold at most twice the limits (Settings.most_under_way says how many requests).
    """

    def __init__(self, settings: Settings) -> None:
        self.load = Load()
        self.tenants: defaultdict[str, Load] = defaultdict(Load)
        self._settings = settings

    @property
    def full(self) -> bool:
        """Whether one more small request would be refused, of whichever tenant."""
        loads = list(self.tenants.values())
        if len(loads) < self._settings.tenants:
            loads.append(Load())
        return not any(self._fits(load, 1, 1) for load in loads)

    @contextmanager
    def admitted(self, tenant: str, size: int) -> Iterator[Place]:
        """A place for a tenant's request with a body of `size` bytes. Raises ApiError where there is none."""
        place = Place(self.tenants[tenant])
        self._check(self._fits(place.tenant, 1, size))
        self._count(place, 1, size)
        try:
            yield place
        finally:
            self._count(place, -1, 0)

    def hold(self, place: Place, size: int) -> None:
        """Count what a request holds now. Raises ApiError where that is too much beside the others."""
        self._check(self._fits(place.tenant, 0, size, place.size))
        self._count(place, 0, size)

    def _fits(self, own: Load, requests: int, size: int, before: int = 0) -> bool:
        """Whether there is room for `requests` more, and for `size` bytes in the place of those held `before`."""
        settings = self._settings
        for limit, wanted, others, mine in (
            (settings.max_concurrent, requests, self.load.requests, own.requests),
            (settings.max_queue_bytes, size, self.load.size - before, own.size - before),
        ):
            if wanted and others and others + wanted > limit and mine + wanted > max(1, limit // settings.tenants):
                return False
        return True

    @staticmethod
    def _check(fits: bool) -> None:
        if not fits:
            raise ApiError("overloaded", "Model is overloaded")

    def _count(self, place: Place, requests: int, size: int) -> None:
        for load in (self.load, place.tenant):
            load.requests += requests
            load.size += size - place.size
        place.size = size
