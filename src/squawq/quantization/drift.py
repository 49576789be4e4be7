"""How far the inputs of one layer's linears have drifted because what comes before them is quantized.

A run of the 16-bit model is recorded; then the quantized model's hidden states run through the same layer, stage by
stage, each behind the quantized stages before it. Both are seen token by token, so that a linear can make up for what
was lost on the way to it: its weights W become W + E (G + damping)^-1, where G sums x x' over the quantized inputs x,
and E sums e x' over what is missing from its outputs, e. Peak memory: the record, in bfloat16, in a file when large.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from squawq.families import expert_of
from squawq.layerwise.blocks import Block
from squawq.layerwise.tensor_names import all_finite
from squawq.quantization.inputs import InputHook, LayerInputs
from squawq.quantization.states import Spool
from squawq.quantization.statistics import InputStatistics


@dataclass(frozen=True)
class Stage:
    """Linears that read the same input, captured at `capture_module`. residual: the norm whose input their output is
    added to, "" if it is not."""

    capture_module: str
    linears: tuple[str, ...]
    residual: str


def stages(block: Block, inputs: LayerInputs, converted: list[str]) -> list[Stage]:
    """In the order of the layer's groups. Experts have none: which tokens they see is not the same in both runs."""
    found: dict[str, Stage] = {}
    for group in block.groups:
        linears = [name for name in group.linears if name in converted and expert_of(name) is None]
        for name in linears:
            watched = inputs.capture_module(name)
            same = tuple(n for n in linears if inputs.capture_module(n) == watched)
            found.setdefault(watched, Stage(watched, same, group.residual if len(linears) == 1 else ""))
    return list(found.values())


class Recording:
    """Inputs of modules while a layer runs over all tokens, in bfloat16; by how wide they are (`features`) they share
    `in_memory` GiB."""

    def __init__(self, features: Mapping[str, int], folder: Path, in_memory: float) -> None:
        whole = sum(features.values())
        self._kept = {name: Spool(folder, in_memory * width / whole) for name, width in features.items()}
        self.watchers: dict[str, InputHook] = {name: self._keeper(spool) for name, spool in self._kept.items()}

    @staticmethod
    def _keeper(spool: Spool) -> InputHook:
        return lambda x: spool.add(x.to(torch.bfloat16))

    def again(self, module: str) -> Reading:
        """What was recorded of a module, from the start."""
        return Reading(iter(self._kept[module]))

    def keep(self, todo: Iterable[Stage]) -> None:
        """Forget what none of these stages reads."""
        needed = {module for stage in todo for module in (stage.capture_module, stage.residual)}
        for module in self._kept.keys() - needed:
            del self._kept[module], self.watchers[module]


class Reading:
    """A record read on while another run sees the same tokens in the same batches."""

    def __init__(self, kept: Iterator[Tensor]) -> None:
        self._kept = kept

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of the run that goes on, float32 [tokens, features], and a copy of those recorded of the same."""
        rows = x.reshape(-1, x.shape[-1]).float()
        return rows, next(self._kept).reshape(rows.shape).float()


class Drift:
    """Statistics of a stage's inputs in the quantized run, and of what its outputs lack.

    A single linear's lack is summed as it is, E [out, in]. Where several share an input, the input's own lack d is
    summed once for all, D = sum of d x' [in, in], and E is W D. Of inputs too wide for a whole Gram matrix, each part
    makes up for what it lacks itself, and for its share of what the residual stream does; `lack` has a tensor for each.
    """

    def __init__(self, block: Block, stage: Stage, scales: Tensor | None) -> None:
        self.stage, self._scales, self._block = stage, scales, block
        self.single = len(stage.linears) == 1
        out, features = block.weight(stage.linears[0]).shape
        self.inputs = InputStatistics(features, block.device)
        self._spans = self.inputs.spans
        sizes = [span.stop - span.start for span in self._spans]
        self.lack = [torch.zeros(out if self.single else size, size, device=block.device) for size in sizes]
        self._residual: Tensor | None = None

    @property
    def sums(self) -> list[Tensor]:
        """All that is added up over processes."""
        return [*self.inputs.sums, *self.lack]

    def observe(
        self, states: Tensor, recording: Recording, also: Mapping[str, InputHook] = MappingProxyType({})
    ) -> None:
        """Run the quantized model's hidden states up to the stage. also: what else sees the inputs of modules."""
        at, residual = recording.again(self.stage.capture_module), self.stage.residual
        watchers: dict[str, InputHook] = {self.stage.capture_module: lambda x: self._add(*at.beside(x))}
        if residual:
            base = recording.again(residual)
            watchers = {residual: lambda x: self._keep(*base.beside(x))} | watchers
        with self._block.input_hooks(also):
            self._block.run_until_captured(states, watchers)

    def _keep(self, x: Tensor, wanted: Tensor) -> None:
        self._residual = wanted.sub_(x)

    def _add(self, x: Tensor, wanted: Tensor) -> None:
        self.inputs.update(x)
        own = (wanted if self._scales is None else wanted.div_(self._scales)).sub_(x)
        for span, total in zip(self._spans, self.lack, strict=True):
            lack, part = own[:, span], x[:, span]
            if self.single:
                lack = lack @ self._block.weight(self.stage.linears[0])[:, span].T
                if self._residual is not None:
                    lack.add_(self._residual, alpha=1 / len(self._spans))
            if not (all_finite(lack) and all_finite(part)):
                finite = torch.isfinite(lack).all(-1) & torch.isfinite(part).all(-1)
                lack, part = lack[finite], part[finite]
            total.addmm_(lack.T, part)
