"""Limits on requests: how many are admitted, how much memory they hold, the order in which API keys are served, and
which prompts and replies are too large.

Each API key is a tenant with a share that no other key can take.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from squawq.engine.request import Request
from squawq.serve.errors import ApiError
from squawq.serve.settings import Settings
from squawq.text.tokenizer import Tokenizer

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
    size: int = 0


@dataclass
class Reservation:
    """One request's share of its tenant's usage, and the bytes that it holds."""

    tenant: Usage
    size: int = 0


class Admission:
    """Admission control, for the event loop only. Each API key is a tenant; without keys there is one.

    A tenant below an equal share is always admitted, so that no other can lock it out. All together then hold at most
    twice the limits (`Settings.most_under_way`).
    """

    def __init__(self, settings: Settings) -> None:
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
    """A thread pool that serves tenants round robin: one tenant's queue delays another by one piece of work at most.

    Args:
        workers: Threads.
        name: Their prefix.
        initializer: Called first in each thread.
    """

    def __init__(self, workers: int, name: str, initializer: Callable[[], object] | None = None) -> None:
        self._pool = ThreadPoolExecutor(workers, name, initializer)
        self._lock = threading.Lock()  # guards what follows
        self._queues: dict[str, dict[Future[Any], Callable[[], Any]]] = {}  # in the order of the turns

    async def run(self, tenant: str, work: Callable[[], Any]) -> Any:
        """Run `work` in a thread. If cancelled before its turn, it is dropped with all that it holds."""
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

    def _drop(self, tenant: str, future: Future[Any]) -> None:
        with self._lock:
            queue = self._queues.get(tenant, {})
            queue.pop(future, None)
            if not queue:
                self._queues.pop(tenant, None)


MARGIN = 4  # NFC composes four characters into one at most
_BYTES = 256


class PromptLimits:
    """Refuses prompts that cannot fit by their size, before they are rendered or tokenized.

    A text with more bytes than `max_input` tokens can stand for never fits. This is exact for byte-level tokenizers.
    One that normalizes, strips or drops characters may read more, so its bound is MARGIN times larger. The bound of a
    chat has the same margin, since its template may leave out some of it.
    """

    def __init__(self, tokenizer: Tokenizer, max_len: int, max_input: int) -> None:
        self._max_len, self._max_input = max_len, max_input
        self.max_bytes = max_input * longest_token(tokenizer)
        self._max_contents = max_input * MARGIN * _longest_piece(tokenizer)

    def check_text(self, text: str, param: str) -> None:
        """Raise ApiError for a text that cannot fit."""
        self._check_bytes([text], self.max_bytes, param)

    def check_messages(self, messages: object, *, truncated: bool = False) -> None:
        """Raise ApiError for unvalidated messages that cannot fit, by their number and their texts.

        truncated: The prompt will be truncated, so only the number counts.
        """
        if not isinstance(messages, list):
            return
        if len(messages) > self._max_input:
            raise ApiError(
                "invalid", f"{self._context()}; this one has {len(messages)} messages. Shorten it.", "messages"
            )
        if not truncated:
            self._check_bytes([*_texts(messages)], self._max_contents, "messages")

    def _check_bytes(self, texts: Sequence[str], most: int, param: str) -> None:
        if sum(map(len, texts)) * 4 <= most:
            return
        size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
        if size > most:
            raise ApiError(
                "invalid",
                f"{self._context()}; this one has {size} bytes of text, and {self._max_input} tokens stand for "
                f"{most} at most. Shorten it.",
                param,
            )

    def _context(self) -> str:
        return (
            f"This model's maximum context length is {self._max_len} tokens, of which a prompt may have "
            f"{self._max_input}"
        )


def _texts(messages: Sequence[Any]) -> Iterator[str]:
    """The texts in messages' contents."""
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                yield text


def longest_token(tokenizer: Tokenizer) -> int:
    """The most bytes of a text that one token can stand for."""
    fast = tokenizer.fast
    steps = list(_steps(fast.pre_tokenizer))
    added = fast.get_added_tokens_decoder().values()
    exact = (
        any(step["type"] == "ByteLevel" for step in steps)
        and sum(len(piece) == 1 for piece in fast.get_vocab(with_added_tokens=False)) >= _BYTES  # no byte is dropped
        and fast.normalizer is None
        and not any(step.get("behavior") == "Removed" for step in steps)
        and not any(token.lstrip or token.rstrip for token in added)  # which take in any number of spaces
    )
    return _longest_piece(tokenizer) * (1 if exact else MARGIN)


def _longest_piece(tokenizer: Tokenizer) -> int:
    """Bytes of the vocabulary's longest token."""
    fast = tokenizer.fast
    byte_level = any(step["type"] == "ByteLevel" for step in _steps(fast.pre_tokenizer))
    lengths = [len(piece) if byte_level else len(piece.encode()) for piece in fast.get_vocab(with_added_tokens=False)]
    added = (len(token.content.encode()) for token in fast.get_added_tokens_decoder().values())
    return max([*lengths, *added], default=1)


def _steps(pre_tokenizer: Any) -> Iterator[dict[str, Any]]:
    if pre_tokenizer is not None:
        state = json.loads(pre_tokenizer.__getstate__())
        yield from state.get("pretokenizers", [state])


def limit_by_logprobs(settings: Settings, prompt: int, each: int, tokens: int, *, asked: bool) -> int:
    """Limit new tokens so that the reply's log probabilities stay within `max_logprob_entries`.

    Args:
        settings: The server's.
        prompt: Log probabilities of the prompts in the reply.
        each: Log probabilities for one more token of all sequences.
        tokens: New tokens without this limit.
        asked: The request asked for `tokens`, so that fewer are an error.

    Raises:
        ApiError: The reply would be too large.
    """
    most = settings.max_logprob_entries
    if each and not asked:
        tokens = min(tokens, max(1, (most - prompt) // each))
    size = prompt + each * tokens
    if size > most:
        raise ApiError(
            "invalid",
            f"The reply would list {size} log probabilities (prompts x tokens x (logprobs + 1) x n); at most {most} "
            "are listed (--max-logprob-entries). Ask for fewer prompts, tokens, logprobs or choices.",
            "logprobs",
        )
    return tokens
