"""The runner of our own decoder: a step's chunks in, tokens and log probabilities out.

With the native kernels a row's logits are the same bits in any batch, in any chunking, with or without cached pages.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from squawq.backends import backend_for
from squawq.backends.base import PAGE, Batch
from squawq.backends.sampling import Chunk, Sampling, StartedStep
from squawq.config import ModelConfig
from squawq.engine.config import EngineConfig
from squawq.errors import ConfigError
from squawq.nn.cache import Cache
from squawq.nn.decoder import Decoder
from squawq.nn.loader import Options, load

CACHE_SHARE = 0.25  # of the memory that is free, for keys and values, by default
MAX_CONTEXTS = 16  # whole contexts, beyond which more cache is of little use


class DecoderRunner:
    """A loaded decoder and its KV cache. Memory: the decoder's, and kv_tokens * Cache.token_bytes as pages are used."""

    def __init__(
        self, decoder: Decoder, kv_tokens: int | None = None, gpu_share: float | None = None, rows: int = 64
    ) -> None:
        self.config: ModelConfig = decoder.config
        self.vocab_size = self.config.vocab_size
        self.max_positions = self.config.max_positions
        self.page_size = decoder.backend.page_size
        device = decoder.backend.device
        tokens = kv_tokens
        if tokens is None and gpu_share is not None and device.type == "cuda":
            tokens = shared_kv_tokens(self.config, gpu_share, *torch.cuda.mem_get_info(device))
        if tokens is None:
            tokens = default_kv_tokens(self.config, device)
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < self.page_size:
            raise ConfigError(
                f"kv_tokens is {tokens!r}; it must be a whole number, at least one page of {self.page_size} tokens"
            )
        self.num_pages = tokens // self.page_size
        self.token_bytes = Cache.token_bytes(self.config)
        self._decoder, self._device = decoder, device
        self._thread = 0
        try:
            self._cache = Cache(self.config, self.num_pages, decoder.backend)
        except (MemoryError, RuntimeError, ValueError) as error:
            raise ConfigError(f"kv_tokens is {tokens}; the machine has no room for so many: {error}") from error
        pages = min(-(-self.max_positions // self.page_size), self.num_pages)
        self._steps = decoder.steps(self._cache, rows, pages)
        self.cache_outputs = self._steps is None

    def prepare(self, sampling: Sampling) -> None:
        self._decoder.backend.prepare_sampling(sampling)

    def start(self, batch: Sequence[Chunk]) -> StartedStep:
        if self._steps is not None:
            return self._steps.start(batch, self._logits)
        found = self._decoder.backend.sample(self._logits(batch), batch)
        return StartedStep(lambda: found)

    def run(self, batch: Sequence[Chunk]) -> list[NDArray[np.float32]]:
        """A step without sampling: float32 logits [chunk.logits, vocab] of each chunk."""
        ends = np.cumsum([chunk.logits for chunk in batch])
        return np.split(self._logits(batch).cpu().numpy(), ends[:-1].tolist())

    def _logits(self, batch: Sequence[Chunk]) -> torch.Tensor:
        """float32 [rows, vocab], `chunk.logits` rows of each chunk; writes keys and values to the chunks' pages."""
        if threading.get_ident() != self._thread:
            self._thread = threading.get_ident()
            if self._decoder.native(self._cache):
                _one_torch_thread()
        ids: list[int] = []
        pages: list[int] = []
        outputs: list[int] = []
        sequences, positions, slots = [], [], []
        for chunk in batch:
            rows, first = len(chunk.ids), len(ids)
            sequences.append((first, rows, chunk.start, len(pages)))
            at = np.arange(chunk.start, chunk.start + rows)
            table = np.asarray(chunk.pages[: -(-(chunk.start + rows) // self.page_size)])
            positions.append(at)
            slots.append(table[at // self.page_size] * self.page_size + at % self.page_size)
            outputs.extend(range(first + rows - chunk.logits, first + rows))
            ids.extend(chunk.ids)
            pages.extend(table.tolist())
        step = Batch(
            ids=self._tensor(ids),
            positions=self._tensor(np.concatenate(positions)),
            slots=self._tensor(np.concatenate(slots)),
            sequences=torch.as_tensor(sequences, dtype=torch.int64),
            pages=self._tensor(pages).int(),
            outputs=self._tensor(outputs),
        )
        return self._decoder(step, self._cache)

    def _tensor(self, values: Sequence[object] | NDArray[np.int64]) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int64).to(self._device, non_blocking=True)


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


def default_kv_tokens(config: ModelConfig, device: torch.device) -> int:
    """Tokens that fit a quarter of the free memory: at least one context if half of it can hold that, at most 16."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory()
    each = Cache.token_bytes(config)
    wanted = min(int(free * CACHE_SHARE) // each, MAX_CONTEXTS * config.max_positions)
    return max(min(config.max_positions, int(free * 2 * CACHE_SHARE) // each), wanted, PAGE) // PAGE * PAGE


def shared_kv_tokens(config: ModelConfig, share: float, free: int, total: int) -> int:
    """Tokens in the KV cache when weights and cache together may use this share of the GPU's memory.

    free, total: bytes of the GPU after the weights are loaded. Raises ConfigError if the weights use up the share.
    """
    room = int(share * total) - (total - free)
    if room < PAGE * Cache.token_bytes(config):
        raise ConfigError(
            f"gpu_memory_utilization is {share:g} of the GPU's {total / 2**30:.1f} GiB, and "
            f"{(total - free) / 2**30:.1f} GiB are taken; none are left for keys and values: raise it"
        )
    return room // Cache.token_bytes(config) // PAGE * PAGE


def _free_memory() -> int:
    """Bytes available without swapping on the machine, or within the container's limit (cgroup v2)."""
    free = _machine_memory()
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
        return min(free, max(0, int(limit) - int(used)))
    except (OSError, ValueError):  # no limit, or none of this kind
        return free


def _machine_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES")) // 2


def load_runner(folder: Path, config: EngineConfig) -> DecoderRunner:
    """Load a folder for the engine. Raises SquawqError for one that cannot be run."""
    options = Options(config.device, config.exact, config.head)
    if config.threads is not None:
        backend_for(config.device).set_threads(config.threads)
    decoder = load(folder, options)
    return DecoderRunner(decoder, config.kv_tokens, config.gpu_memory_utilization, config.max_num_seqs)
