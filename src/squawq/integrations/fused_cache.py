"""The key-value cache that a fused model hands to transformers: a page table for each row of the batch.

Every row is a sequence of its own; pad tokens are not stored. Beams share pages, and a shared page is copied before it
is written (copy on write).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from squawq.backends.base import NextLogits
from squawq.engine.pages import PagePool
from squawq.engine.runner import DecoderRunner
from squawq.errors import ConfigError
from squawq.nn.decoder import Decoder


class _Runner(DecoderRunner):
    """A decoder for a batch of `rows` rows of at most `tokens` tokens, whose pages can be copied."""

    def __init__(self, decoder: Decoder, rows: int, tokens: int) -> None:
        self._pages = -(-tokens // decoder.backend.page_size)
        super().__init__(decoder, rows * self._pages * decoder.backend.page_size)
        self.rows, self.tokens = rows, tokens
        self.next_logits: NextLogits | None = None

    def prepare_next_logits(self) -> NextLogits | None:
        """The backend's way to run one token of each row, prepared at the first call: that takes time on a GPU."""
        if self.next_logits is None:
            self.next_logits = self._decoder.next_logits(self._cache, self.rows, self._pages)
        return self.next_logits

    def copy(self, source: int, target: int) -> None:
        self._cache.copy(source, target)

    def twin(self, pages: Sequence[int]) -> _Runner:
        """The same decoder with a copy of the cache, of which `pages` are filled."""
        made = _Runner(self._decoder, self.rows, self.tokens)
        made._cache.take(pages, self._cache)
        return made


class Runners:
    """Makes a decoder's runners, and keeps the last one that has prepared a way to run next tokens."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._idle: _Runner | None = None

    def take(self, rows: int, tokens: int) -> _Runner:
        idle, self._idle = self._idle, None
        if idle is not None and (idle.rows, idle.tokens) == (rows, tokens):
            return idle
        del idle  # its memory is needed
        return _Runner(self._decoder, rows, tokens)

    def give(self, runner: _Runner) -> None:
        """Take back a runner that nobody uses any longer."""
        if runner.next_logits is not None:
            self._idle = runner


class FusedCache(Cache):  # type: ignore[misc]
    """Pages for one batch, allocated at its first step; each row holds up to `max_seq_len` tokens.

    `lengths`: tokens of each row. `width`: columns of the batch so far with pad tokens, which transformers calls the
    length. Memory: on a CPU it grows as tokens are written; elsewhere it is allocated at once.
    """

    def __init__(self, runners: Runners, max_seq_len: int) -> None:
        super().__init__(layers=[])
        self._runners, self.max_seq_len = runners, max_seq_len
        self.lengths: list[int] = []
        self.tables: list[list[int]] = []
        self.width = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedCache:
        """An independent copy for the same decoder, as transformers makes for prompts with a shared prefix."""
        made = memo[id(self)] = FusedCache(self._runners, self.max_seq_len)
        if self.lengths:
            made.lengths, made.width = list(self.lengths), self.width
            made.tables = [list(table) for table in self.tables]
            made._pool = deepcopy(self._pool)
            made._use(self._runner.twin(sorted({page for table in self.tables for page in table})))
        return made

    def open(self, rows: int) -> _Runner:
        """The runner for a batch of `rows` rows. Raises ConfigError if the cache holds another number of rows."""
        if not self.lengths:
            self._use(self._runners.take(rows, self.max_seq_len))
            self._pool = PagePool(self._runner.num_pages, self._runner.page_size)
            self.lengths, self.tables = [0] * rows, [[] for _ in range(rows)]
        if rows != len(self.lengths):
            raise ConfigError(f"the batch has {rows} rows, its cache {len(self.lengths)}; start with a new cache")
        return self._runner

    def _use(self, runner: _Runner) -> None:
        self._runner = runner
        self._give_back = weakref.finalize(self, self._runners.give, runner)

    def extend(self, counts: Sequence[int], width: int) -> list[int]:
        """Allocate pages for `counts` new tokens of each row, in `width` new columns, pad tokens included.

        Returns:
            Each row's position of its first new token.

        Raises:
            ConfigError: A row would exceed `max_seq_len`; nothing has changed.
        """
        starts = self.lengths
        lengths = [start + count for start, count in zip(starts, counts, strict=True)]
        check_length(max(lengths), self.max_seq_len)
        for index, (start, end) in enumerate(zip(starts, lengths, strict=True)):
            table = self.tables[index]
            if end > start and start % self._pool.page_size and self._pool.is_shared(table[-1]):
                page = self._pool.take()
                self._runner.copy(table[-1], page)
                self._pool.release([table[-1]])
                table[-1] = page
            table.extend(self._pool.take() for _ in range(self._pool.pages_for(end) - len(table)))
        self.lengths, self.width = lengths, self.width + width
        return starts

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row i continues as a copy of row indices[i]; the number of rows must not grow."""
        chosen, old = indices.tolist(), self.tables
        if len(chosen) > len(old):
            raise ConfigError(f"a fused cache of {len(old)} rows cannot become one of {len(chosen)}")
        self.tables = [list(old[index]) for index in chosen]
        self.lengths = [self.lengths[index] for index in chosen]
        for table in self.tables:
            self._pool.share(table)
        for table in old:
            self._pool.release(table)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """`batch_select_indices`, as beam search calls it."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Raises ConfigError if it would add rows: pages were allocated for the rows that exist."""
        self.batch_select_indices(Tensor([i for i in range(len(self.lengths)) for _ in range(repeats)]).long())

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens of every row."""
        count = abs(tokens_to_remove)
        if tokens_to_remove > 0 or any(length < count for length in self.lengths):
            raise ConfigError(f"crop is given {tokens_to_remove}; it takes minus the number of tokens to forget")
        self.lengths, self.width = [length - count for length in self.lengths], max(0, self.width - count)
        for table, length in zip(self.tables, self.lengths, strict=True):
            keep = self._pool.pages_for(length)
            self._pool.release(table[keep:])
            del table[keep:]

    def reset(self) -> None:
        """Drop all rows; the next step may have any number of rows."""
        if self.lengths:
            self._give_back()
        self.lengths, self.tables, self.width = [], [], 0

    def update(self, *_: Any, **__: Any) -> Any:
        """Raises ConfigError: only the fused model writes keys and values."""
        raise ConfigError("a fused model's cache is written by the fused model alone")

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        return self.width

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002
        return self.max_seq_len

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:  # noqa: ARG002 (the same, before transformers 5.24)
        return self.max_seq_len

    @property
    def batch_size(self) -> int:
        return len(self.lengths) or -1

    # transformers asks these per layer; answered as for one layer of full attention.
    is_linear = is_sliding = is_dummy = property(lambda _: [False])
    is_compileable = property(lambda _: False)
    is_initialized = property(lambda self: bool(self.lengths))
    is_croppable = property(lambda _: True)


def check_length(tokens: int, limit: int) -> None:
    """Raise ConfigError where a sequence would be longer than the cache."""
    if tokens > limit:
        raise ConfigError(
            f"a sequence of {tokens} tokens, prompt and new ones, is more than fuse_max_seq_len, which is {limit}; "
            f"load the model with AwqConfig(..., do_fuse=True, fuse_max_seq_len={tokens}), or ask for fewer tokens"
        )
