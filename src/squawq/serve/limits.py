"""Limits on requests: how many are admitted, how much memory they hold, how fast bodies must arrive, and the order in
which API keys are served. Each API key is a tenant with a share that no other key can take.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from squawq.engine.request import Request
from squawq.serve.errors import ApiError
from squawq.serve.settings import ServerSettings

SMALL = 64 * 1024  # bytes; bodies up to this size are limited in time, not in rate and memory
MAX_LARGE = 64  # large bodies of max_body_bytes that may arrive at once; they may use that much memory
WINDOW = 5.0  # seconds over which a large body's rate is measured
_TOKEN = 48  # bytes: an integer, and its slot in two lists
_SEQUENCE = 16 * 1024  # bytes: a sequence's sampler, text and place in the queue
_SEEN = 120  # bytes that a repetition penalty takes for a token of the prompt
_LOGPROB = 240  # bytes of a log probability: with its token in a tuple, then as JSON in the reply


def cost(requests: Iterable[Request]) -> int:
    """Estimated bytes that requests hold, from the queue to the reply.

    The log probability of each new token itself is not counted: it is no larger than the token's text.
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
class Usage:
    """Requests that are running or waiting, and the bytes that they hold."""

    requests: int = 0
    size: int = 0  # bytes


@dataclass
class Reservation:
    """One admitted request: its tenant's usage, and the bytes that the request holds."""

    tenant: Usage
    size: int = 0  # bytes


class Admission:
    """Admission control, for the event loop only.

    A tenant below its equal share (limit / tenants) is always admitted, so that no other can lock it out. All together
    then hold at most twice the limits (`ServerSettings.most_under_way`).
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.load = Usage()
        self.tenants: defaultdict[str, Usage] = defaultdict(Usage)
        self._settings = settings

    @property
    def full(self) -> bool:
        """Whether a small request of any tenant would be refused."""
        loads = list(self.tenants.values())
        if len(loads) < self._settings.tenants:
            loads.append(Usage())
        return not any(self._fits(load, 1, 1) for load in loads)

    @contextmanager
    def admitted(self, tenant: str, size: int) -> Iterator[Reservation]:
        """Reserve room for a tenant's request with a body of `size` bytes. Raises ApiError if there is none."""
        reservation = Reservation(self.tenants[tenant])
        self._check(self._fits(reservation.tenant, 1, size))
        self._count(reservation, 1, size)
        try:
            yield reservation
        finally:
            self._count(reservation, -1, 0)

    def hold(self, reservation: Reservation, size: int) -> None:
        """Change a reservation to `size` bytes. Raises ApiError if that is too much."""
        self._check(self._fits(reservation.tenant, 0, size, reservation.size))
        self._count(reservation, 0, size)

    def _fits(self, own: Usage, requests: int, size: int, before: int = 0) -> bool:
        """Whether `requests` more fit, and `size` bytes in place of the `before` bytes that were held."""
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

    def _count(self, reservation: Reservation, requests: int, size: int) -> None:
        for load in (self.load, reservation.tenant):
            load.requests += requests
            load.size += size - reservation.size
        reservation.size = size


class FairPool:
    """A thread pool that serves tenants round robin: one tenant's queue delays another by at most one piece of work."""

    def __init__(self, workers: int, name: str, initializer: Callable[[], object] | None = None) -> None:
        self._pool = ThreadPoolExecutor(workers, name, initializer)
        self._lock = threading.Lock()  # guards _queues
        self._queues: dict[str, dict[Future[Any], Callable[[], Any]]] = {}  # the next tenant first

    async def run(self, tenant: str, work: Callable[[], Any], *, first: bool = False) -> Any:
        """Run `work` in a thread; first: before the tenant's other work. It is dropped if cancelled before its turn."""
        future: Future[Any] = Future()
        self._add(tenant, future, work, first)
        try:
            self._pool.submit(self._take)
            return await asyncio.wrap_future(future)
        finally:
            self._drop(tenant, future)
            del future, work  # an exception's traceback holds this frame, and the future holds the exception

    def close(self) -> None:
        """Finish running work, cancel the rest, and end the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            queues, self._queues = self._queues, {}
        for queue in queues.values():
            for future in queue:
                future.cancel()

    def _take(self) -> None:
        """Do the next piece of work: not always the one that was queued with this call."""
        with self._lock:
            if not self._queues:  # its work was dropped
                return
            tenant = next(iter(self._queues))
            queue = self._queues.pop(tenant)
            future = next(iter(queue))
            work = queue.pop(future)
            if queue:
                self._queues[tenant] = queue  # behind the others
        try:
            if future.set_running_or_notify_cancel():
                future.set_result(work())
        except BaseException as error:
            future.set_exception(error)
        finally:
            del future, work

    def _add(self, tenant: str, future: Future[Any], work: Callable[[], Any], first: bool) -> None:
        with self._lock:
            queue = self._queues.setdefault(tenant, {})
            if first:
                self._queues[tenant] = {future: work, **queue}
            else:
                queue[future] = work

    def _drop(self, tenant: str, future: Future[Any]) -> None:
        with self._lock:
            queue = self._queues.get(tenant, {})
            queue.pop(future, None)
            if not queue:
                self._queues.pop(tenant, None)


class Bodies:
    """Reads request bodies within limits of size, time, rate and memory; for the event loop only.

    Small bodies are never refused because of others. If large bodies exceed their memory, the slowest is ended."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._large: set[_Upload] = set()
        self._held = 0  # bytes of large bodies that are still arriving

    async def read(self, request: HttpRequest) -> bytes:
        """Read a request's body. Raises ApiError."""
        _check_headers(request.headers, self._settings.max_body_bytes)
        upload = _Upload(self._settings)
        try:
            async with upload.timeout:
                async for piece in request.stream():
                    self._add(upload, piece)
        except ClientDisconnect as error:
            raise ApiError("slow", "the client disconnected") from error
        except TimeoutError as error:
            raise ApiError("slow", upload.late) from error
        finally:
            self._forget(upload)
        return bytes(upload.body)

    def _add(self, upload: _Upload, piece: bytes) -> None:
        """Add a piece. If large bodies exceed their memory, end the slowest."""
        upload.take(piece)
        if len(upload.body) > self._settings.max_body_bytes:
            raise _too_large(self._settings.max_body_bytes)
        if upload in self._large:
            self._held += len(piece)
        elif len(upload.body) > SMALL:
            self._large.add(upload)
            self._held += len(upload.body)
        while self._held > MAX_LARGE * self._settings.max_body_bytes:
            slowest = min(self._large, key=_Upload.rate)
            self._forget(slowest)
            slowest.end("too many large bodies are arriving, and this one came most slowly")

    def _forget(self, upload: _Upload) -> None:
        if upload in self._large:
            self._large.discard(upload)
            self._held -= len(upload.body)


class _Upload:
    """A body while it arrives. `timeout` expires if the body, or a window of a large one, is late."""

    def __init__(self, settings: ServerSettings) -> None:
        self.body = bytearray()
        self.late = f"the body did not arrive within {settings.body_timeout:g} s"
        self.timeout = asyncio.timeout(settings.body_timeout)
        self._clock = asyncio.get_running_loop().time
        self._deadline = self._clock() + settings.body_timeout
        self._needed = settings.min_body_rate * WINDOW  # bytes in a window, at least
        self._began, self._count = self._clock(), 0  # the window's start, and the bytes received in it
        self._before = self._began, 0  # those of the window before

    def take(self, piece: bytes) -> None:
        """Add a piece. Start the next window if this one has enough bytes."""
        self.body += piece
        self._count += len(piece)
        if len(self.body) <= SMALL or self._count < self._needed:
            return
        self._before = self._began, self._count
        self._began, self._count = self._clock(), 0
        if self._began + WINDOW < self._deadline:
            self._end_at(self._began + WINDOW, f"less than {self._needed:g} bytes of the body came within {WINDOW:g} s")

    def rate(self) -> float:  # bytes per second, over this window and the one before
        began, count = self._before
        return (count + self._count) / max(self._clock() - began, 0.1)

    def end(self, why: str) -> None:
        self._end_at(self._clock(), why)

    def _end_at(self, when: float, why: str) -> None:
        if not self.timeout.expired():
            self.late = why
            self.timeout.reschedule(when)


def _check_headers(headers: Headers, limit: int) -> None:
    """Raise ApiError if the headers say that the body is not JSON or too large."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError("media_type", "send JSON, with the header Content-Type: application/json")
    length = headers.get("content-length", "0")
    if len(length) > 18 or int(length) > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> ApiError:
    return ApiError("too_large", f"the body has more than {limit} bytes")
