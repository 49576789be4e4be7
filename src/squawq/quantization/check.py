"""Checks that the quantized layers can be computed in their 16-bit dtype, by running a few tokens beside float32.

Activations of some models overflow float16: the result would load everywhere and answer with NaN. Each layer is checked
as soon as it is on disk. Peak memory: one layer in float32.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from squawq.errors import CheckpointError, SquawqError
from squawq.layerwise.tensor_names import all_finite
from squawq.quantization.calibration import token_blocks
from squawq.quantization.job import Job, Work
from squawq.quantization.statistics import token_errors
from squawq.text.tokenizer import Tokenizer

ROWS, TOKENS = 4, 32
VOCABULARY = 8192  # logits that are computed, evenly spread: a whole head in float32 can be larger than a layer
FAR_OFF = 0.5  # relative error of the median token's output; computing in 16 bits alone gives a few percent


class DtypeCheck:
    """`layer` after each layer in turn, `head` at the end; each raises CheckpointError naming what overflows."""

    @torch.no_grad()
    def __init__(self, work: Work, job: Job) -> None:
        self.blocks, self.job, self.dtype = work.blocks, job, getattr(torch, work.config.dtype)
        meta_model, family = self.blocks.meta_model, self.blocks.family
        embedding = f"{family.embedding}.weight"
        table = job.tensors(0)[self.blocks.names.stored_name(embedding)]
        ids = _tokens(work, len(table))
        self.wide = meta_model.embed(ids, table)
        self.narrow = meta_model.embed(ids, table, self.dtype)
        self._compare(family.embedding, self.wide, self.narrow)

    @torch.no_grad()
    def layer(self, index: int) -> None:
        with self.blocks.open(index, self.job.tensors(index + 1)) as block:
            self.wide = block.run(self.wide)
            block.cast(self.dtype)
            self.narrow = block.run(self.narrow)
        self._compare(self.blocks.family.layer(index), self.wide, self.narrow)

    @torch.no_grad()
    def head(self) -> float:
        """Relative error of the median token's centred logits."""
        names, meta_model, family = self.blocks.names, self.blocks.meta_model, self.blocks.family
        found = {**self.job.tensors(0), **self.job.tensors(self.job.layers + 1)}
        embedding, head = f"{family.embedding}.weight", f"{family.head}.weight"
        outer = {name: found[names.stored_name(name)] for name in meta_model.outer if name != embedding}
        outer.setdefault(head, found[names.stored_name(embedding)])
        step = -(-len(outer[head]) // VOCABULARY)
        outer = {name: t[::step] if name.startswith(f"{family.head}.") else t for name, t in outer.items()}
        logits = []
        for states in (self.wide, self.narrow):
            meta_model.put({name: t.to(self.blocks.device, states.dtype) for name, t in outer.items()})
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


def _tokens(work: Work, vocabulary: int) -> Tensor:
    """The first tokens of up to four calibration blocks, evenly spread; without calibration, of the built-in text.

    The model's BOS token comes first: in many models its activations are the largest by far.
    """
    tokens, checkpoint = work.tokens, work.blocks.checkpoint
    length = min(TOKENS, checkpoint.config.max_positions)
    if tokens is None:
        try:
            read = partial(Tokenizer, checkpoint.folder)
            tokens = token_blocks(None, read, seqlen=length, samples=ROWS, vocab_size=vocabulary)
        except SquawqError:  # no tokenizer, or not this model's: plain rounding needs none
            tokens = torch.linspace(0, vocabulary - 1, ROWS * length).round().long().view(ROWS, length)
    blocks = torch.linspace(0, len(tokens) - 1, min(ROWS, len(tokens))).round().long()
    rows = tokens[blocks, :length].clone()
    raw = checkpoint.config.raw
    bos = {**raw, **(raw.get("text_config") or {})}.get("bos_token_id")
    if isinstance(bos, int) and 0 <= bos < vocabulary:
        rows[:, 0] = bos
    return rows
