"""Corrects weights for quantization error in their input: the closed-form weight correction of QEP.

Arai and Ichikawa, Quantization Error Propagation (QEP), arXiv 2504.09629. The 16-bit model has inputs x, the quantized
one x^ (x hat); ' transposes; sums run over tokens. Weights W^ = W + W sum (x - x^) x^' H^-1 minimize the output error
sum ||W x - W^ x^||^2, where H = sum x^ x^' is the Hessian: QEP's correction at propagation strength alpha = 1. It is
added once, before the weights are rounded with error feedback (GPTQ) on H. GPTAQ (arXiv 2504.02692) and Qronos (arXiv
2505.11695) minimize the same error, but correct it column by column while they round.

Four things are not in these papers. H is damped by a share of each diagonal entry (`QuantConfig.damping`, by default
0.5), in place of a smaller alpha. The error cross-covariance is E = W sum (x - x^) x^' + sum (r - r^) x^', where
the linear's output is added to the residual stream r: the linear also corrects that stream's error. Inputs of more than
`statistics.MAX_GRAM` features are corrected one diagonal block of H at a time. Tokens may have weights
(`token_weights`), which multiply every term of these sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from squawq.families import expert_of
from squawq.layerwise.blocks import Block, InputHook
from squawq.layerwise.extra_inputs import ExtraInputs
from squawq.layerwise.tensor_names import all_finite
from squawq.quantization.states import Spool
from squawq.quantization.statistics import InputStatistics, capture_modules


@dataclass(frozen=True)
class Stage:
    """Linears that read the same input and are quantized together."""

    capture_module: str  # whose hook captures that input
    linears: tuple[str, ...]
    residual: str = ""  # norm whose input is the residual stream that a single linear's output is added to; "": none


def sequential_stages(block: Block, converted: Sequence[str]) -> list[Stage]:
    """A layer's stages in order of execution. Without experts: the quantized model may route a token to other ones."""
    capture = capture_modules(block.groups)
    found: dict[str, Stage] = {}
    for group in block.groups:
        linears = [name for name in group.linears if name in converted and expert_of(name) is None]
        for name in linears:
            same = tuple(n for n in linears if capture[n] == capture[name])
            found.setdefault(capture[name], Stage(capture[name], same, group.residual if len(linears) == 1 else ""))
    return list(found.values())


class ActivationRecord:
    """Records inputs of modules in the 16-bit run, for all tokens, in bfloat16.

    Modules share `in_memory` GiB in proportion to their `features`; the rest goes to files in `folder`.
    """

    def __init__(self, features: Mapping[str, int], folder: Path, in_memory: float) -> None:
        total = sum(features.values())
        self._spools = {name: Spool(folder, in_memory * width / total) for name, width in features.items()}
        self.hooks: dict[str, InputHook] = {name: self._hook(spool) for name, spool in self._spools.items()}

    @classmethod
    def of(cls, block: Block, stages: Iterable[Stage], hidden: int, folder: Path, in_memory: float) -> ActivationRecord:
        """For the inputs of these stages, and the residual streams of `hidden` features that they are added to."""
        features = {stage.capture_module: block.weight(stage.linears[0]).shape[1] for stage in stages}
        return cls(features | {stage.residual: hidden for stage in stages if stage.residual}, folder, in_memory)

    @staticmethod
    def _hook(spool: Spool) -> InputHook:
        return lambda x: spool.add(x.to(torch.bfloat16))

    def replay(self, module: str) -> Iterator[Tensor]:
        """The recorded inputs of a module, batch by batch; only once."""
        return self._spools[module].drain()

    def keep(self, stages: Iterable[Stage]) -> None:
        """Drop what none of these stages reads."""
        needed = {module for stage in stages for module in (stage.capture_module, stage.residual)}
        for module in self._spools.keys() - needed:
            del self._spools[module], self.hooks[module]


class ErrorStatistics:
    """Hessian and error cross-covariance of a stage, summed over all tokens of the quantized run.

    Attributes:
        inputs: Statistics of x^. Its Hessian has one diagonal block for each slice of features in `inputs.spans`.
        cross: One tensor per span. Of a single linear: E, float32 [out, span]. Of several linears, which share an input
            error: sum (x - x^) x^', float32 [span, span]; W times this is a linear's E.
        single: Whether the stage has a single linear.

    Each span corrects an equal part of the residual stream's error.
    """

    def __init__(self, block: Block, stage: Stage, scales: Tensor | None, weights: Tensor | None = None) -> None:
        """Nothing is summed yet.

        Args:
            block: The layer.
            stage: Its linears that are quantized next.
            scales: AWQ scales float32 [in] that the recorded inputs are divided by; None: ones.
            weights: Of the tokens, [calibration blocks, tokens]; None: ones.
        """
        self.stage, self._scales, self._block, self._weights = stage, scales, block, weights
        self._seen = 0  # tokens
        self.single = len(stage.linears) == 1
        out, features = block.weight(stage.linears[0]).shape
        self.inputs = InputStatistics(features, block.device)
        self._spans = self.inputs.spans
        sizes = [span.stop - span.start for span in self._spans]
        self.cross = [torch.zeros(out if self.single else size, size, device=block.device) for size in sizes]
        self._residual: Tensor | None = None

    @property
    def sums(self) -> list[Tensor]:
        """All that is summed over tokens; an all-reduce of these gives the sums over all ranks' tokens."""
        return [*self.inputs.sums, *self.cross]

    def collect(
        self,
        states: Tensor,
        extra: ExtraInputs,
        record: ActivationRecord,
        hooks: Mapping[str, InputHook] = MappingProxyType({}),
    ) -> None:
        """Run the quantized model's hidden states up to the stage's input, and add to `inputs` and `cross`.

        Args:
            states: float32 [calibration blocks, tokens, hidden], the same tokens as in `record`.
            extra: What the layer reads beside them.
            record: Inputs of the 16-bit run.
            hooks: Further input hooks.
        """
        wanted, residual, self._seen = record.replay(self.stage.capture_module), self.stage.residual, 0
        own: dict[str, InputHook] = {self.stage.capture_module: lambda x: self._add(*_pair(x, wanted))}
        if residual:
            stream = record.replay(residual)
            own = {residual: lambda x: self._set_residual(*_pair(x, stream))} | own
        with self._block.input_hooks(hooks):
            self._block.run_until_captured(states, own, extra)

    def _set_residual(self, x: Tensor, wanted: Tensor) -> None:
        self._residual = wanted.sub_(x)

    def _add(self, x: Tensor, wanted: Tensor) -> None:
        input_error, residual = (wanted if self._scales is None else wanted.div_(self._scales)).sub_(x), self._residual
        if self._weights is not None:
            some = self._weights.view(-1)[self._seen : self._seen + len(x)]
            self._seen += len(x)
            root = some.to(x.device, torch.float32).sqrt()[:, None]
            x, input_error = x * root, input_error.mul_(root)
            residual = None if residual is None else residual.mul_(root)
        self.inputs.update(x)
        for span, total in zip(self._spans, self.cross, strict=True):
            error, part = input_error[:, span], x[:, span]
            if self.single:
                error = error @ self._block.weight(self.stage.linears[0])[:, span].T
                if residual is not None:
                    error.add_(residual, alpha=1 / len(self._spans))
            if not (all_finite(error) and all_finite(part)):
                finite = torch.isfinite(error).all(-1) & torch.isfinite(part).all(-1)
                error, part = error[finite], part[finite]
            total.addmm_(error.T, part)


def _pair(x: Tensor, recorded: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """A batch of the quantized run, and the same batch of the 16-bit run, each float32 [tokens, features]."""
    rows = x.reshape(-1, x.shape[-1]).float()
    return rows, next(recorded).reshape(rows.shape).float()
