"""Self-generated calibration data: rows of tokens that the 16-bit model samples itself, at temperature 1.

Liu et al., LLM-QAT, arXiv 2305.17888; Williams et al., Self-calibration for Language Model Quantization and Pruning,
arXiv 2410.17170. The model runs in squawq's decoder where that runs it and there is room, else in transformers': with
all layers in memory, or with one at a time.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from squawq.backends.sampling import Chunk, Sampling
from squawq.config import ModelConfig
from squawq.engine.capacity import check_room, free_memory, free_on, gib
from squawq.engine.config import EngineConfig
from squawq.engine.generation_config import GenerationConfig
from squawq.engine.request import SamplingParams
from squawq.engine.runner import DecoderRunner
from squawq.errors import CalibrationError, CheckpointError, ConfigError
from squawq.families import family_of
from squawq.format.reader import Checkpoint
from squawq.layerwise.blocks import Blocks
from squawq.layerwise.whole_model import WholeModel, collect_garbage, draw
from squawq.nn.cache import Cache
from squawq.nn.loader import OpenModel, Options, open_model
from squawq.quantization.calibration import DEFAULT_SAMPLES, builtin_documents, token_blocks
from squawq.text.tokenizer import Tokenizer

SELF, MIXED = "self", "self+builtin"
SOURCES = (SELF, MIXED)
BATCH = 32  # rows at once in transformers' model; on a GPU up to GPU_BATCH. Its logits may depend on their number
GPU_BATCH = 1024
TUNED_TEXT = 512  # rows for tuning, those for calibration included
PARAMS = SamplingParams(max_tokens=None, temperature=1.0)
LOGIT_BYTES = 32  # of each row's logits: float32, and float64 probabilities with their sums

Progress = Callable[[str, int, int], object]  # what is done, tokens so far, all tokens


@dataclass(frozen=True)
class SelfCalibration:
    """What the model generates.

    A row begins with a token of `starts` and goes on with sampled ones. An end token is kept, and another text begins
    after it in the same row, again with a token of `starts`; the model sees the text before it, as it does in
    calibration. So every row is full.

    Attributes:
        rows: Calibration rows that the model generates.
        given: Calibration rows that follow them and are not generated, int64 [rows, seqlen].
        tuning_rows: Rows that the model generates for tuning alone.
        starts: First tokens of texts, drawn uniformly: those of the built-in set's documents. That is the BOS token
            where the tokenizer puts one.
        ends: End tokens of the model, except those that the built-in set's chats hold: they end a turn, not a text.
    """

    rows: int
    given: Tensor
    tuning_rows: int
    seqlen: int
    seed: int
    starts: tuple[int, ...]
    ends: frozenset[int]

    @classmethod
    def of(
        cls, source: str, checkpoint: Checkpoint, *, rows: int, seqlen: int, seed: int, tune: bool = False
    ) -> SelfCalibration:
        """Plan `rows` rows of `seqlen` tokens; with "self+builtin", up to half of them are from the built-in set.

        Args:
            source: "self" or "self+builtin".
            checkpoint: The 16-bit model.
            rows: Calibration rows.
            seqlen: Tokens in each.
            seed: Of the sampling.
            tune: Plan rows for tuning as well.

        Raises:
            CheckpointError: The model has no tokenizer.
            CalibrationError: The tokenizer knows tokens that the model does not.
        """
        tokenizer, vocabulary = Tokenizer(checkpoint.folder), checkpoint.config.vocab_size
        builtin = torch.empty(0, seqlen, dtype=torch.int64)
        if source == MIXED:
            most = min(DEFAULT_SAMPLES, rows // 2)
            builtin = token_blocks(
                None, lambda: tokenizer, seqlen=seqlen, samples=None, vocab_size=vocabulary, most=most
            )
        documents = [ids for ids in builtin_documents(tokenizer) if ids]
        tokenizer.close()
        if (largest := max(map(max, documents))) >= vocabulary:
            raise CalibrationError(f"the tokenizer has token id {largest}; the model knows 0 to {vocabulary - 1}")
        ends = GenerationConfig(checkpoint.folder, checkpoint.config).eos_ids - {i for ids in documents for i in ids}
        starts = tuple(ids[0] for ids in documents)
        return cls(rows - len(builtin), builtin, _fresh(rows) if tune else 0, seqlen, seed, starts, ends)

    @classmethod
    def beside(cls, given: Tensor, checkpoint: Checkpoint, seed: int) -> SelfCalibration:
        """Plan rows for tuning beside calibration rows that are given, int64 [rows, seqlen].

        Texts begin with the model's BOS token, or where it has none with a token that a given row begins with.
        """
        config = GenerationConfig(checkpoint.folder, checkpoint.config)
        starts = tuple(given[:, 0].tolist()) if (bos := checkpoint.config.bos_id) is None else (bos,)
        ends = config.eos_ids - set(given.flatten().tolist())
        return cls(0, given, _fresh(len(given)), given.shape[1], seed, starts, ends)

    @property
    def calibration_rows(self) -> int:
        """Rows that layers are calibrated on; those for tuning follow."""
        return self.rows + len(self.given)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, tokens) of all."""
        return self.calibration_rows + self.tuning_rows, self.seqlen

    @property
    def generated(self) -> int:
        """Rows that the model generates."""
        return self.rows + self.tuning_rows

    def fingerprint(self) -> str:
        """What tells this plan from others: with the model and the device, it decides the tokens."""
        digest = hashlib.sha256(repr((self.shape, self.rows, self.seed, self.starts, sorted(self.ends))).encode())
        digest.update(self.given.numpy().tobytes())
        return digest.hexdigest()

    def tokens(self, checkpoint: Checkpoint, device: str, progress: Progress) -> Tensor:
        """Generate the rows: those for calibration; then come those that are given, and last those for tuning.

        The same plan, model and device give the same tokens, if the same way is taken: free memory decides that.

        Args:
            checkpoint: The 16-bit model.
            device: "cpu", "cuda", "cuda:1" ... or "mps".
            progress: Called before the first token and after each step.

        Returns:
            int64 [rows, seqlen], see `shape`.

        Raises:
            ConfigError: Not even one layer and the KV cache fit in memory.
            CheckpointError: The model's logits are not finite.
        """
        try:
            found = self._by_decoder(checkpoint, torch.device(device), progress)
            if found is None:
                found = self._by_transformers(checkpoint, torch.device(device), progress)
        finally:
            collect_garbage(device)  # the model
        return torch.cat([found[: self.rows], self.given, found[self.rows :]])

    def _forced(self, before: int | None, choice: random.Random) -> int | None:
        """The token that must follow `before` (None: nothing): a text's first; None where the model chooses."""
        if before is not None and before not in self.ends:
            return None
        start = choice.choice(self.starts)
        return None if start == before else start  # one token that both ends a text and begins the next

    def _choice(self, row: int) -> random.Random:
        """Draws the first tokens of a row's texts."""
        return random.Random(f"{self.seed} {row}")

    def _by_decoder(self, checkpoint: Checkpoint, device: torch.device, progress: Progress) -> Tensor | None:
        """By squawq's decoder; None if it does not run the model, or has no room for it."""
        if (opened := _open(checkpoint, device)) is None:
            return None
        rows = self.generated
        while rows and not _fits(opened, rows, self.seqlen):
            rows //= 2
        if not rows:
            return None
        what = f"generating {self.generated} rows of {self.seqlen} calibration tokens with squawq's decoder"
        progress(what, 0, self.generated * self.seqlen)
        with _torch_threads_kept():
            kv_tokens = rows * _paged(self.seqlen, opened)
            runner = DecoderRunner(opened.load(), kv_tokens, rows=rows, step_tokens=2 * rows)
            rows = min(rows, runner.max_sequences)
            found: list[list[int]] = []
            for first in range(0, self.generated, rows):
                before = len(found) * self.seqlen
                for count in (part := _Decoding(self, runner, range(first, min(first + rows, self.generated)))):
                    progress(what, before + count, self.generated * self.seqlen)
                found += part.tokens
        return torch.tensor(found, dtype=torch.int64)

    def _by_transformers(self, checkpoint: Checkpoint, device: torch.device, progress: Progress) -> Tensor:
        blocks = Blocks(checkpoint, family_of(checkpoint.config.model_type), str(device))
        dtype, resident, rows = self._placed(blocks, device)
        what = f"generating {self.generated} rows of {self.seqlen} calibration tokens with transformers"
        if not resident:
            what += (
                f", one layer in memory at a time: reads the model's {gib(checkpoint.nbytes())} "
                f"{self.seqlen - 1} times, which can take hours; a smaller seqlen takes less"
            )
        progress(what, 0, self.generated * self.seqlen)
        model = WholeModel(blocks, dtype, resident=resident)
        generator = torch.Generator().manual_seed(self.seed)
        uniform = torch.rand(self.generated, self.seqlen, dtype=torch.float64, generator=generator)
        found = torch.empty(self.generated, self.seqlen, dtype=torch.int64)
        for part in torch.split(torch.arange(self.generated), rows):
            model.reset()
            choices = [self._choice(row) for row in part.tolist()]
            row_before: Sequence[int | None] = [None] * len(part)
            for place in range(self.seqlen):
                forced = [self._forced(before, choice) for before, choice in zip(row_before, choices, strict=True)]
                drawn = [0] * len(part)
                if place:
                    drawn = draw(model.next_logits(found[part, place - 1]), uniform[part, place]).tolist()
                row_before = [one if start is None else start for start, one in zip(forced, drawn, strict=True)]
                found[part, place] = torch.tensor(row_before)
                progress(what, int(part[0]) * self.seqlen + len(part) * (place + 1), found.numel())
        return found

    def _placed(self, blocks: Blocks, device: torch.device) -> tuple[torch.dtype, bool, int]:
        """transformers' model: its computation dtype, whether all layers fit in memory, and how many rows run at once.

        Raises ConfigError.
        """
        checkpoint, dtype, free = blocks.checkpoint, blocks.fast_dtype(), free_on(device)
        batches = [GPU_BATCH >> n for n in range(5)] if device.type == "cuda" else []
        in_memory = [(dtype, True, min(rows, self.generated)) for rows in (*batches, BATCH)]
        for kind, resident, rows in (*in_memory, (torch.float32, False, self.generated)):
            weights = WholeModel.memory(blocks, kind, resident=resident)
            cache = rows * self.seqlen * Cache.token_bytes(checkpoint.config, kind)
            needed = weights + cache + rows * LOGIT_BYTES * checkpoint.config.vocab_size
            if needed <= free:
                return kind, resident, rows
        raise ConfigError(
            f"calibration 'self' needs {gib(needed)} of memory on {device} even with one layer at a time, "
            f"{gib(needed - free)} more than are free ({gib(weights)} for weights, {gib(cache)} for the KV cache of "
            f"{rows} rows of {self.seqlen} tokens); ask for fewer samples or a smaller seqlen, or give text that the "
            "model has written elsewhere as a .jsonl file"
        )


@dataclass
class _Row:
    tokens: list[int]
    choice: random.Random
    sampling: Sampling
    pages: list[int]
    slot: int  # of its state, in models that keep one
    computed: int = 0  # tokens in the KV cache


@dataclass
class _Decoding:
    """Rows that a runner generates together; iterating generates, and yields how many tokens there are."""

    plan: SelfCalibration
    runner: DecoderRunner
    numbers: Sequence[int]
    tokens: list[list[int]] = field(default_factory=list)  # of all rows, once done

    def __iter__(self) -> Iterator[int]:
        rows = [self._row(place, number) for place, number in enumerate(self.numbers)]
        self.tokens = [row.tokens for row in rows]
        while left := [row for row in rows if len(row.tokens) < self.plan.seqlen]:
            chunks = [
                Chunk(row.tokens[row.computed :], row.computed, row.pages, 1, row.sampling, slot=row.slot)
                for row in left
            ]
            for row, output in zip(left, self.runner.start(chunks).outputs(), strict=True):
                if output.error is not None or output.token is None:
                    raise CheckpointError(f"the 16-bit model cannot generate calibration text: {output.error}")
                row.computed = len(row.tokens)
                self._append(row, output.token)
            yield sum(len(row.tokens) for row in rows)

    def _row(self, place: int, number: int) -> _Row:
        size = -(-self.plan.seqlen // self.runner.page_size)
        choice = self.plan._choice(number)
        start = self.plan._forced(None, choice)
        assert start is not None
        tokens = [start]
        sampling = Sampling(PARAMS, [start], (), self.plan.seed, number, tokens=tokens)
        self.runner.prepare(sampling)
        return _Row(tokens, choice, sampling, list(range(place * size, (place + 1) * size)), place)

    def _append(self, row: _Row, token: int) -> None:
        row.tokens.append(token)
        if len(row.tokens) < self.plan.seqlen and (start := self.plan._forced(token, row.choice)) is not None:
            row.tokens.append(start)


def _open(checkpoint: Checkpoint, device: torch.device) -> OpenModel | None:
    """The checkpoint for squawq's decoder, with nothing rounded; None if that does not run it."""
    bfloat16 = device.type == "cuda" and any(info.dtype == torch.bfloat16 for info in checkpoint.tensors.values())
    try:
        return open_model(
            checkpoint.folder, Options(str(device), head="16-bit", dtype="bfloat16" if bfloat16 else "auto")
        )
    except ConfigError:
        return None


def _fits(model: OpenModel, rows: int, seqlen: int) -> bool:
    """Whether the weights, and keys and values of so many rows, fit in the device's free memory."""
    config: ModelConfig = model.checkpoint.config
    kv_tokens = rows * _paged(seqlen, model)
    if model.backend.device.type != "cuda":
        cache = kv_tokens * Cache.token_bytes(config, model.backend.cache_dtype) + rows * Cache.state_bytes(config)
        needed = model.checkpoint.nbytes() + cache + rows * LOGIT_BYTES * config.vocab_size
        return needed <= free_memory()
    device = model.backend.device
    settings = EngineConfig(device=str(device), kv_tokens=kv_tokens, max_num_seqs=rows, max_num_batched_tokens=2 * rows)
    try:
        check_room(model, settings, *torch.cuda.mem_get_info(device))
    except ConfigError:
        return False
    return True


def _paged(seqlen: int, model: OpenModel) -> int:
    """Tokens of the KV cache that a row takes: whole pages."""
    return -(-seqlen // model.backend.page_size) * model.backend.page_size


def default_rows(values: int) -> int:
    """Calibration rows on a GPU, where text costs little: as many as have hidden states of 1 GiB, but 128 to 1,536.

    Args:
        values: Of a row's hidden states.
    """
    return max(DEFAULT_SAMPLES, min(1536, (1 << 28) // values))


def _fresh(rows: int) -> int:
    """Rows for tuning alone, beside so many calibration rows: TUNED_TEXT in all, but 1/4 to 3 for each."""
    return max(1, rows // 4, min(3 * rows, TUNED_TEXT - rows))


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """A runner sets this thread's number of torch threads to 1; quantization needs them again."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
