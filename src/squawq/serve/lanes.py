"""Threads beside the event loop whose work is taken from tenants in turn: what one of them has queued holds up another
by one piece of work at most.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Lane:
    """A queue of work for each tenant, served round robin, and the threads that do it.

    initializer: what each thread calls first.
    """

    def __init__(self, workers: int, name: str, initializer: Callable[[], object] | None = None) -> None:
        self._pool = ThreadPoolExecutor(workers, name, initializer)
        self._lock = threading.Lock()  # guards what follows
        self._queues: dict[str, dict[Future[Any], Callable[[], Any]]] = {}  # in the order of the turns

    async def run(self, tenant: str, work: Callable[[], Any]) -> Any:
        """What `work` returns or raises. If cancelled before its turn, it is dropped with all that it holds."""
        future: Future[Any] = Future()
        with self._lock:
            self._queues.setdefault(tenant, {})[future] = work
        try:
            self._pool.submit(self._take)
            return await asyncio.wrap_future(future)
        finally:
            self._drop(tenant, future)
            del future, work  # an exception's traceback holds this frame, and the future holds the exception

    def close(self) -> None:
        """End the threads when they have done what they are at; the rest is cancelled."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            queues, self._queues = self._queues, {}
        for queue in queues.values():
            for future in queue:
                future.cancel()

    def _take(self) -> None:
        """Do the next piece of work, not necessarily the one that was queued with this call."""
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

    def _drop(self, tenant: str, future: Future[Any]) -> None:
        with self._lock:
            queue = self._queues.get(tenant, {})
            queue.pop(future, None)
            if not queue:
                self._queues.pop(tenant, None)
