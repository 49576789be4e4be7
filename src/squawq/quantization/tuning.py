"""Tunes the scales of a quantized model to predict what the 16-bit model predicts: integers and zero points stay.

The loss is the KL divergence of the whole model's output from the 16-bit model's, on calibration text and text that the
16-bit model generates. EfficientQAT's second phase (Chen et al., arXiv 2407.11062) trains the same scales, on the text
itself. Some generated rows are held back; if the loss on them does not fall, scales stay as they were.

Peak memory: a byte a weight, one layer in float32 with its gradients, the output head in float32, a batch's hidden
states before each layer, and for all rows the first hidden states and the 16-bit model's last.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from squawq.engine.capacity import free_on, gib
from squawq.errors import ConfigError
from squawq.format.groupwise import PACKED, from_gemm
from squawq.layerwise.blocks import Blocks
from squawq.layerwise.extra_inputs import ExtraInputs
from squawq.layerwise.plan import LayerPlan
from squawq.quantization.precision import float32_products
from squawq.report.schema import TuningRow

STEPS = 300
BATCH = 4096  # tokens of a step
RATE = 1e-3  # Adam's, of a scale's relative change; it falls to 0 along a cosine
EVALUATIONS = 4  # the best scales of so many are kept
PASSES = 8  # over the text, at most: more would learn it by heart
HELD_BACK = 4  # one of so many rows that no layer was calibrated on

Stored = dict[str, Tensor]  # a layer's tensors by name in the checkpoint


@dataclass
class TunedLinear:
    """A quantized linear."""

    scales_name: str  # in the checkpoint
    steps: Tensor  # integers less their zeros, int8 [out, groups, group]
    scales: Tensor  # float32 [out, groups]
    change: nn.Parameter  # of the scales, relative, float32 [out, groups]

    @classmethod
    def of(cls, scales_name: str, packed: Sequence[Tensor]) -> TunedLinear:
        integers = from_gemm(*packed)
        out, groups = integers.scales.shape
        steps = integers.q.view(out, groups, -1).to(torch.int8) - integers.zeros[..., None].to(torch.int8)
        scales = integers.scales.float()
        return cls(scales_name, steps, scales, nn.Parameter(torch.zeros_like(scales)))

    def tuned(self) -> Tensor:
        """The scales as they are stored, in float16; gradients pass through the rounding."""
        exact = self.scales * (1 + self.change)
        return exact + (exact.half().float() - exact).detach()

    def weight(self) -> Tensor:
        """float32 [out, in]."""
        return (self.steps.float() * self.tuned()[..., None]).flatten(1)


class TunedLayer:
    """A quantized layer whose weights are computed at each pass."""

    def __init__(self, blocks: Blocks, index: int, stored: Stored) -> None:
        self._blocks, self._index = blocks, index
        prefix, self._module = blocks.family.layer(index) + ".", blocks.layers[index]
        blocks.meta_model.fill_constants(self._module.modules())
        self._tensors: Stored = {}
        self.linears: dict[str, TunedLinear] = {}  # by the weight's name in the layer
        for name in self._module.state_dict():
            owner, _, kind = name.rpartition(".")
            packed = [blocks.names.stored_name(f"{prefix}{owner}.{part}") for part in PACKED]
            if kind == "weight" and all(part in stored for part in packed):
                found = [stored[part].to(blocks.device) for part in packed]
                self.linears[name] = TunedLinear.of(packed[PACKED.index("scales")], found)
            else:
                tensor = stored[blocks.names.stored_name(prefix + name)]
                self._tensors[name] = tensor.to(blocks.device, torch.float32)

    def __call__(self, states: Tensor, extra: ExtraInputs) -> Tensor:
        """[blocks, tokens, hidden] -> the same; see `Blocks.call`."""
        weights = {name: linear.weight() for name, linear in self.linears.items()}
        return self._blocks.call(self._index, self._module, states, self._tensors | weights, extra)


class Tuning:
    """Tunes the scales of a whole quantized model.

    Args:
        blocks: The 16-bit model.
        tokens: Rows of text, int64 [rows, tokens].
        wanted: The 16-bit model's last hidden states for them, float32 [rows, tokens, hidden].
        held_back: How many of the rows, the last ones, only judge.
        stored: Returns the quantized layer of an index as stored.
    """

    def __init__(
        self, blocks: Blocks, tokens: Tensor, wanted: Tensor, held_back: int, stored: Callable[[int], Stored]
    ) -> None:
        self._blocks, self._first, self._wanted = blocks, blocks.embed(tokens), wanted
        self._layers = [TunedLayer(blocks, index, stored(index)) for index in range(len(blocks.layers))]
        self._extra = blocks.extra_inputs(tokens)
        self._logits = blocks.logits()
        self._rows = max(1, BATCH // tokens.shape[1])
        self._used = range(len(tokens) - held_back)
        self._held = range(len(tokens) - held_back, len(tokens))

    @property
    def linears(self) -> list[TunedLinear]:
        return [linear for layer in self._layers for linear in layer.linears.values()]

    def run(self, steps: int, seen: Callable[[int, int], None] = lambda *_: None) -> TuningRow:
        """Tune, and keep the best scales of some that are compared on the text held back.

        Args:
            steps: Training steps.
            seen: Called after each step with its number and the count of all.
        """
        began, parameters = time.perf_counter(), [linear.change for linear in self.linears]
        adam = torch.optim.Adam(parameters, lr=RATE, betas=(0.9, 0.99))
        falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
        before = least = self.loss(self._held)
        best = [torch.zeros_like(change) for change in parameters]
        generator, order = torch.Generator().manual_seed(0), list[int]()
        for step in range(1, steps + 1):
            while len(order) < self._rows:
                order += [self._used[i] for i in torch.randperm(len(self._used), generator=generator).tolist()]
            rows, order = order[: self._rows], order[self._rows :]
            adam.zero_grad()
            self._backward(rows)
            adam.step()
            falling.step()
            if step == steps or step % -(-steps // EVALUATIONS) == 0:
                loss = self.loss(self._held)
                if loss < least:
                    least, best = loss, [change.detach().clone() for change in parameters]
            seen(step, steps)
        with torch.no_grad():
            for change, value in zip(parameters, best, strict=True):
                change.copy_(value)
        return TuningRow(
            steps=steps,
            rows=len(self._used),
            held_back=len(self._held),
            loss_before=before,
            loss=least,
            seconds=round(time.perf_counter() - began, 3),
        )

    @torch.no_grad()
    def scales(self) -> Stored:
        """The scales as tuned, float16 [groups, out], by name in the checkpoint."""
        return {linear.scales_name: linear.tuned().T.contiguous().half().cpu() for linear in self.linears}

    @torch.no_grad()
    def loss(self, rows: Sequence[int]) -> float:
        """Mean KL divergence from the 16-bit model over the tokens of these rows, in nats."""
        total = 0.0
        for start in range(0, len(rows), self._rows):
            part = rows[start : start + self._rows]
            total += sum(
                float(self._divergence(row, states[None])) for row, states in zip(part, self._last(part), strict=True)
            )
        return total / (len(rows) * self._first.shape[1])

    def _backward(self, rows: Sequence[int]) -> None:
        """Gradients of the mean loss. Logits of one row at a time: those of a batch would be large."""
        states = self._last(rows)
        gradients = []
        for row, own in zip(rows, states.detach(), strict=True):
            given = own[None].requires_grad_()
            self._divergence(row, given).backward()  # type: ignore[no-untyped-call]
            gradients.append(given.grad)
        states.backward(torch.cat(gradients) / (len(rows) * self._first.shape[1]))  # type: ignore[no-untyped-call]

    def _last(self, rows: Sequence[int]) -> Tensor:
        """The quantized model's last hidden states for these rows, float32 [rows, tokens, hidden]."""
        states, extra = self._first[list(rows)], self._extra.each(lambda tensor: tensor[list(rows)])
        for layer in self._layers:
            given = states, extra
            states = checkpoint(layer, *given, use_reentrant=False) if torch.is_grad_enabled() else layer(*given)
        return states

    def _divergence(self, row: int, states: Tensor) -> Tensor:
        """KL divergence of a row, summed over its tokens; states: the quantized model's last [1, tokens, hidden]."""
        with torch.no_grad():
            wanted = self._logits(self._wanted[row : row + 1].to(states.device)).float().log_softmax(-1)
        found = self._logits(states).float().log_softmax(-1)
        return (wanted.exp() * (wanted - found)).sum()


def tune(
    blocks: Blocks,
    rows: Tensor,
    fresh: int,
    stored: Callable[[int], Stored],
    seen: Callable[[int, int], None] = lambda *_: None,
) -> tuple[Stored, TuningRow]:
    """Tune the scales of a whole quantized model.

    Args:
        blocks: The 16-bit model.
        rows: Text, int64 [rows, tokens].
        fresh: How many of the rows, the last ones, no layer was calibrated on; some of them are held back.
        stored: Returns the quantized layer of an index as stored.
        seen: Called after each step with its number and the count of all.

    Returns:
        Scales by name in the checkpoint, float16 [groups, out]: none if the loss did not fall. And what was done.
    """
    held_back = max(1, fresh // HELD_BACK)
    with float32_products(blocks.device, exact=False):
        tuning = Tuning(blocks, rows, blocks.last_states(rows), held_back, stored)
        row = tuning.run(steps_for((len(rows) - held_back) * rows.shape[1]), seen)
    return (tuning.scales() if row.loss < row.loss_before else {}), row


def steps_for(tokens: int) -> int:
    """Training steps for so many tokens of text."""
    return max(1, min(STEPS, PASSES * tokens // BATCH))


def check_tuning(blocks: Blocks, plans: Sequence[LayerPlan], rows: tuple[int, int]) -> None:
    """Raise ConfigError if there is too little memory to tune on so many rows of so many tokens."""
    needed, device = tuning_bytes(blocks, plans, rows), torch.device(blocks.device)
    room = free_on(device)
    if needed > room:
        raise ConfigError(
            f"tuning needs about {gib(needed)} of memory on {device}, and {gib(room)} are free; free some, use a "
            "larger device, or do without (tune=False, --no-tune)"
        )


def tuning_bytes(blocks: Blocks, plans: Sequence[LayerPlan], rows: tuple[int, int]) -> int:
    """About the bytes of memory that tuning takes, on so many rows of so many tokens."""
    head = blocks.checkpoint.config.vocab_size, blocks.checkpoint.config.hidden_size
    weights = [sum(out * in_ for out, in_ in plan.shapes.values()) for plan in plans]
    scales = sum(weights) // min(128, plans[0].config.group_of(128))
    states = ((len(plans) + 8) * max(BATCH, rows[1]) + 2 * math.prod(rows)) * head[1]
    return sum(weights) + 4 * (4 * scales + 6 * max(weights) + states + head[0] * (head[1] + 6 * rows[1]))
