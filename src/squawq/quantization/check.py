"""Checks a result by running a few rows of text through it: its dtype during the run, and the whole folder at the end.

`DtypeCheck`: activations of some models overflow float16; the result would load everywhere and answer with NaN. Each
layer is checked as soon as it is committed. `ReadBack`: the finished folder is read back and compared with the 16-bit
model. Peak memory: one layer in float32, and at the end the head in 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from squawq.errors import CheckpointError, SquawqError
from squawq.evaluation.metrics import SlicedDivergence
from squawq.format.reader import Checkpoint
from squawq.layerwise.blocks import Block, Blocks
from squawq.layerwise.tensor_names import all_finite
from squawq.quantization.calibration import token_blocks
from squawq.quantization.job import Job
from squawq.quantization.prepare import Work
from squawq.quantization.statistics import token_errors
from squawq.report.schema import ReadBackRow, ReadBackText
from squawq.text.tokenizer import Tokenizer

ROWS, TOKENS = 4, 128
DTYPE_TOKENS = 32  # of a row that DtypeCheck runs
VOCABULARY = 8192  # tokens whose logits are computed at once: a whole head in float32 can be larger than a layer
FAR_OFF = 0.5  # relative error of the median token's output; computing in 16 bits alone gives a few percent


class DtypeCheck:
    """`layer` after each layer in turn, `head` at the end; each raises CheckpointError naming what overflows."""

    @torch.no_grad()
    def __init__(self, work: Work, job: Job, ids: Tensor) -> None:
        """ids: int64 [rows, tokens]."""
        self.blocks, self.job, self.dtype = work.blocks, job, getattr(torch, work.config.dtype)
        meta_model, family = self.blocks.meta_model, self.blocks.family
        embedding = f"{family.embedding}.weight"
        table = job.tensors(0)[self.blocks.names.stored_name(embedding)]
        self.wide, self.wide_extra = meta_model.embed(ids, table), self.blocks.extra_inputs(ids)
        self.narrow, self.narrow_extra = meta_model.embed(ids, table, self.dtype), self.blocks.extra_inputs(ids)
        self._compare(family.embedding, self.wide, self.narrow)

    @torch.no_grad()
    def layer(self, index: int) -> None:
        with self.blocks.open(index, self.job.tensors(index + 1)) as block:
            block.run(self.wide, in_place=True, extra=self.wide_extra)
            block.cast(self.dtype)
            block.run(self.narrow, in_place=True, extra=self.narrow_extra)
        self._compare(self.blocks.family.layer(index), self.wide, self.narrow)

    @torch.no_grad()
    def head(self) -> float:
        """Relative error of the median token's centred logits."""
        names, meta_model, family = self.blocks.names, self.blocks.meta_model, self.blocks.family
        embedding, head = f"{family.embedding}.weight", f"{family.head}.weight"
        before = {embedding, *meta_model.per_layer}
        stored = {name: names.stored_name(name) for name in meta_model.outer if name not in before}
        found = self.job.tensors(self.job.layers + 1, stored.values())
        outer = {name: found[own] for name, own in stored.items()}
        if head not in outer:
            outer[head] = self.job.tensors(0)[names.stored_name(embedding)]
        evenly_spread = slice(None, None, -(-len(outer[head]) // VOCABULARY))
        logits = []
        for states in (self.wide, self.narrow):
            meta_model.put(outer, states.dtype, evenly_spread)
            logits.append(meta_model.logits(states).float())
        wide, narrow = (each - each.mean(-1, keepdim=True) for each in logits)
        return self._compare("the final norm and head", wide, narrow)

    def _compare(self, where: str, wide: Tensor, narrow: Tensor) -> float:
        if not all_finite(wide):
            raise CheckpointError(f"{where}: its output is not finite in float32 either; the 16-bit model is broken")
        error = float(token_errors(narrow, wide).median())  # a router may choose other experts for a few tokens
        if error <= FAR_OFF and all_finite(narrow):
            return error
        name = str(self.dtype).removeprefix("torch.")
        wrong = f"{error:.0%} away from that in float32" if all_finite(narrow) else "not finite"
        raise CheckpointError(
            f"{where}: computed in {name}, in which the result would be stored, its output is {wrong}{self._advice()}"
        )

    def _advice(self) -> str:
        """float16 holds less than bfloat16: where that is not enough, no dtype of 16 bits is."""
        if self.dtype == torch.bfloat16:
            return ""
        layers = range(1, self.job.layers + 1)
        remove = f"remove {self.job.partial} and " if any(self.job.record(part) is not None for part in layers) else ""
        return f"; {remove}quantize with dtype='bfloat16' (--dtype bfloat16)"


class ReadBack:
    """Compares the finished folder, read back as `squawq eval` reads it, with the 16-bit model.

    The rows run through every 16-bit layer while it is loaded to be quantized (`layer`), so that the source is not
    read again.
    """

    def __init__(self, work: Work, job: Job, text: Rows) -> None:
        self.blocks, self.job, self.text = work.blocks, job, text
        self.states = self.blocks.embed(text.ids)  # of the 16-bit model, float32 [rows, tokens, hidden]
        self.extra = self.blocks.extra_inputs(text.ids)

    def layer(self, block: Block) -> None:
        """Run the rows through a 16-bit layer; called for each in turn."""
        block.run(self.states, in_place=True, extra=self.extra)

    @torch.no_grad()
    def compare(self, step: Callable[[int], object]) -> ReadBackRow:
        """Read OUT.partial layer by layer, and compare its logits with the 16-bit model's.

        The final norm and the head are not quantized: those in OUT.partial serve both models.

        Args:
            step: Called with the number of layers done, after each.

        Raises:
            CheckpointError: The folder cannot be read, or its logits are not finite.
        """
        again = f"remove {self.job.partial} and run the same command again"
        try:
            checkpoint = Checkpoint(self.job.partial)
            written = Blocks(checkpoint, self.blocks.family, self.blocks.device)
            both = torch.stack([self.states, written.last_states(self.text.ids, step)])
            sums = SlicedDivergence(self.text.ids.numel(), self.blocks.device)
            for logits in written.logits_by_slices(both.flatten(0, 1), VOCABULARY):
                sums.add(logits.reshape(2, -1, logits.shape[-1]))
        except CheckpointError as error:
            raise CheckpointError(f"the finished folder cannot be read back: {error}; {again}") from error
        kl, agreement = sums.result()
        if not math.isfinite(kl):
            whose = "its" if all_finite(self.states) else "the 16-bit model's own"
            raise CheckpointError(f"{self.job.partial}: read back, {whose} logits are not finite; {again}")
        return ReadBackRow(
            text=self.text.name, tokens=self.text.ids.numel(), kl_mean=round(kl, 6), top1_agreement=round(agreement, 4)
        )


@dataclass(frozen=True)
class Rows:
    """A few rows of text: ids int64 [rows, tokens], up to 4 x 128, and what text it is."""

    ids: Tensor
    name: ReadBackText

    @classmethod
    def of(cls, work: Work) -> Rows:
        """The first tokens of up to four calibration blocks, evenly spread; without calibration, of the built-in text.

        The model's BOS token comes first: in many models its activations are the largest by far.
        """
        checkpoint, meta_model = work.blocks.checkpoint, work.blocks.meta_model
        vocabulary, _ = meta_model.outer[f"{work.blocks.family.embedding}.weight"]
        length = min(TOKENS, checkpoint.config.max_positions)
        tokens = work.tokens
        name: ReadBackText = "calibration text"
        if tokens is None:
            try:
                read = partial(Tokenizer, checkpoint.folder)
                tokens = token_blocks(None, read, seqlen=length, samples=ROWS, vocab_size=vocabulary)
                name = "built-in text"
            except SquawqError:  # no tokenizer, or not this model's: plain rounding needs none
                tokens = torch.linspace(0, vocabulary - 1, ROWS * length).round().long().view(ROWS, length)
                name = "token ids over the whole vocabulary"
        blocks = torch.linspace(0, len(tokens) - 1, min(ROWS, len(tokens))).round().long()
        ids = tokens[blocks, :length].clone()
        if (bos := checkpoint.config.bos_id) is not None:
            ids[:, 0] = bos
        return cls(ids, name)
