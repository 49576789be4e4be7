"""The runner of our own decoder: a step's chunks in, tokens and log probabilities out.

With the native kernels a row's logits are the same bits in any batch, in any chunking, with or without cached pages.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from squawq.backends.sampling import Chunk, Sampling, StartedStep, StepOutput
from squawq.config import ModelConfig
from squawq.engine.batching import batch_of
from squawq.engine.capacity import (
    GPU_SHARE,
    MAX_CONTEXTS,
    check_room,
    default_kv_tokens,
    free_gpu_tokens,
    free_memory,
    pages_of,
    states_that_fit,
)
from squawq.engine.config import EngineConfig
from squawq.engine.followers import Followers
from squawq.errors import ConfigError
from squawq.nn.cache import Cache
from squawq.nn.decoder import Decoder
from squawq.nn.loader import Options, open_model
from squawq.nn.shard import Shard

logger = logging.getLogger("squawq")


class DecoderRunner:
    """A loaded decoder and its cache.

    Memory: the decoder's, and kv_tokens * Cache.token_bytes as pages are used; of a model with linear attention also
    max_sequences * Cache.state_bytes.

    Args:
        kv_tokens: Capacity of the KV cache; None: a share of the free memory, on a GPU up to `gpu_share` of all of it.
        rows: Sequences that run at once. The backend's own steps are then prepared, which takes seconds on a GPU; None:
            all tokens run as those of prompts do.
        step_tokens: Tokens in a step at most.
        followers: The processes that have the other parts of the model.
        threads: Of the kernels, after `close`.

    Raises:
        ConfigError: kv_tokens is less than a page, or there is no room for it.

    Attributes:
        max_sequences: Sequences that run at once, `rows` unless there is no room for their states.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv_tokens: int | None = None,
        gpu_share: float = GPU_SHARE,
        rows: int | None = None,
        step_tokens: int = 512,
        followers: Followers | None = None,
        threads: int = 1,
    ) -> None:
        self.config: ModelConfig = decoder.config if followers is None else followers.config
        self.vocab_size = self.config.vocab_size
        self.max_positions = self.config.max_positions
        self.page_size = decoder.backend.page_size
        self.token_bytes = Cache.token_bytes(decoder.config, decoder.backend.cache_dtype)  # of this process
        self.shares_prefixes = decoder.config.delta_rule is None
        device, tokens = decoder.backend.device, kv_tokens
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what loading has freed
        self.max_sequences = self._places(decoder, rows, step_tokens, gpu_share)
        rows = rows and self.max_sequences
        states = self.max_sequences * Cache.state_bytes(decoder.config)
        if tokens is None and device.type == "cuda":
            working = decoder.backend.working_bytes(decoder.config, rows or 0, step_tokens) + states
            room = None if followers is None else followers.free
            tokens = free_gpu_tokens(self.config, self.token_bytes, device, working, gpu_share, rows or 0, room)
        elif tokens is None:
            ranks = 1 if followers is None else followers.size
            tokens = default_kv_tokens(self.config, self.token_bytes, free_memory() // ranks - states)
        self.num_pages = pages_of(tokens, self.page_size)
        self._decoder, self._device = decoder, device
        self._thread = 0
        try:
            self._cache = Cache(decoder.config, self.num_pages, decoder.backend, self.max_sequences)
        except (MemoryError, RuntimeError, ValueError) as error:
            raise ConfigError(f"kv_tokens is {tokens}; the machine has no room for so many: {error}") from error
        self._followers, self._threads, self._own_threads = followers, threads, decoder.backend.threads()
        pages, tell = min(-(-self.max_positions // self.page_size), self.num_pages), None
        if followers is not None:
            tell = followers.tell
            followers.begin(self.num_pages, rows or 0, pages)
        self._steps = None if rows is None else decoder.steps(self._cache, rows, pages, tell)
        if followers is not None and rows:
            followers.wait()
        self.cache_outputs = self._steps is None

    @staticmethod
    def _places(decoder: Decoder, rows: int | None, step_tokens: int, gpu_share: float) -> int:
        """`max_sequences`, with a warning where it is less than `rows`."""
        device, wanted = decoder.backend.device, rows or MAX_CONTEXTS
        working = decoder.backend.working_bytes(decoder.config, wanted, step_tokens)
        free = free_memory()
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            free = min(free, int(gpu_share * total) - (total - free)) - working
        found = states_that_fit(decoder.config, wanted, free)
        if found < wanted:
            each = Cache.state_bytes(decoder.config) / 2**20
            logger.warning(
                "max_num_seqs is %d, and memory has room for the states of %d sequences (%.0f MiB each): no more run "
                "at the same time",
                *(wanted, found, each),
            )
        return found

    @property
    def cache_bytes(self) -> int:
        """Of the whole KV cache and all states, on all ranks."""
        ranks = 1 if self._followers is None else self._followers.size
        states = self.max_sequences * Cache.state_bytes(self.config)
        return self.num_pages * self.page_size * self.token_bytes * ranks + states

    @property
    def failure(self) -> str | None:
        return None if self._followers is None else self._followers.failure

    def release(self, slot: int) -> None:
        """States of all slots are allocated at once and stay."""

    def close(self) -> None:
        """End the processes that have other parts of the model. Idempotent."""
        backend = self._decoder.backend
        if self._followers is not None and self._followers.close() and backend.threads() == self._own_threads:
            backend.set_threads(self._threads)

    def prepare(self, sampling: Sampling) -> None:
        self._decoder.backend.prepare_sampling(sampling)

    def start(self, batch: Sequence[Chunk]) -> StartedStep:
        if self._followers is None:
            return self._start(batch)
        together = self._followers.together
        with together():
            started = self._start(batch)

        def outputs() -> list[StepOutput]:
            with together():
                return started.outputs()

        return replace(started, outputs=outputs)

    def _start(self, batch: Sequence[Chunk]) -> StartedStep:
        if self._steps is not None:
            return self._steps.start(batch, self._logits)
        found = self._decoder.backend.sample(self._logits(batch), batch)
        return StartedStep(lambda: found)

    def run(self, batch: Sequence[Chunk]) -> list[NDArray[np.float32]]:
        """A step without sampling: float32 logits [chunk.logits, vocab] of each chunk."""
        ends = np.cumsum([chunk.logits for chunk in batch])
        with nullcontext() if self._followers is None else self._followers.together():
            return np.split(self._logits(batch).cpu().numpy(), ends[:-1].tolist())

    def _logits(self, batch: Sequence[Chunk]) -> torch.Tensor:
        """float32 [rows, vocab], `chunk.logits` rows of each chunk; writes keys and values to the chunks' pages."""
        if threading.get_ident() != self._thread:
            self._thread = threading.get_ident()
            if self._decoder.native(self._cache):
                _one_torch_thread()
        step = batch_of(batch, self.page_size, self._device)
        if self._followers is not None:
            self._followers.tell(step)
        return self._decoder(step, self._cache)


def _one_torch_thread() -> None:
    """Run torch's operations of the calling thread without OpenMP threads.

    A gather of 16 rows wakes torch's OpenMP threads, which then spin for milliseconds on the cores that the kernels'
    threads and the event loop need.
    """
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    # The setting is also the default of threads that start later; only another thread can restore it for them.
    other = threading.Thread(target=torch.set_num_threads, args=(usual,))
    other.start()
    other.join()


def load_runner(folder: Path, config: EngineConfig) -> DecoderRunner:
    """Load a folder that our decoder runs. Raises SquawqError for one that cannot be run."""
    size = config.tensor_parallel_size
    dtypes = {"dtype": config.dtype, "kv_cache_dtype": config.kv_cache_dtype}
    options = Options(config.device, config.exact, config.head, shard=Shard(0, size), **dtypes)
    model = open_model(folder, options)
    backend = model.backend
    if size > 1 and (reason := backend.group_declines(size)):
        raise ConfigError(f"tensor_parallel_size is {size}, but {reason}; choose fewer, or a CPU (device cpu)")
    before, threads = backend.threads(), config.threads
    if threads is None and size > 1:
        threads = max(1, backend.default_threads() // size)
    if threads is not None:
        backend.set_threads(threads)
    if backend.device.type == "cuda":
        check_room(model, config, *torch.cuda.mem_get_info(backend.device))
    share = config.gpu_memory_utilization or GPU_SHARE
    sizes = config.kv_tokens, share, config.max_num_seqs, config.step_tokens
    if size == 1:
        return DecoderRunner(model.load(), *sizes)
    followers = None
    try:
        followers = Followers(model, options, threads or 1)
        decoder = model.load()
        followers.free = followers.wait()
        return DecoderRunner(decoder, *sizes, followers, before)
    except BaseException:
        if followers is not None:
            followers.close()
        backend.set_threads(before)
        raise
