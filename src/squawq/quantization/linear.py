"""Quantizes linears that share an input: correct the weight, clip its ranges, round it.

Knows the statistics of that input, no layer and no files.
"""

from __future__ import annotations

import torch
from torch import Tensor

from squawq.format.groupwise import GroupwiseTensor, quantize
from squawq.quant_config import QuantConfig
from squawq.quantization.error_propagation import ErrorStatistics
from squawq.quantization.rounding import CHUNK, DampedGram, Grid
from squawq.quantization.search import clip_limits, whole_ranges
from squawq.quantization.statistics import InputStatistics

Limits = tuple[Tensor, Tensor]


class LinearQuantizer:
    """For linears whose input has these statistics; `error`: of that input in the quantized run, if it is corrected."""

    def __init__(self, stats: InputStatistics, config: QuantConfig, error: ErrorStatistics | None = None) -> None:
        self.stats, self.config, self.error = stats, config, error
        self._damped_span: tuple[slice, DampedGram] | None = None
        self._correction_span: tuple[slice, Tensor] | None = None

    def quantize(self, weight: Tensor, clip: bool) -> tuple[GroupwiseTensor, Limits | None]:
        """Quantize a weight.

        Args:
            weight: float32 [out, in]; becomes the corrected weight.
            clip: Whether to search narrower ranges.

        Returns:
            The integers, and the ranges (low, high), each float32 [out, groups], if they were searched.
        """
        if not self.stats.has_signal:
            return quantize(weight, self.config.group_of(weight.shape[1]), self.config.zero_point), None
        self.correct(weight)
        limits = self.clip(weight) if clip else None
        return self.round(weight, limits), limits

    def correct(self, weight: Tensor) -> None:
        """Add the QEP weight correction E (H + damping)^-1 to a weight [out, in], in place (`error_propagation`)."""
        if (error := self.error) is None:
            return
        for index, span in enumerate(self.stats.spans):
            cross = error.cross.pop(0) if error.single else error.cross[index]  # large, and only one linear needs it
            shared = None if error.single else self._shared_correction(span, cross)
            for start in range(0, len(weight), step := max(1, CHUNK // (span.stop - span.start))):
                part = slice(start, start + step)
                rows = weight[part, span]
                rows += self._damped(span).solve(cross[part]) if shared is None else rows @ shared

    def clip(self, weight: Tensor) -> Limits:
        """The range of each group with the least error, weighted by the Hessian (its diagonal under error feedback)."""
        size = self.config.group_of(weight.shape[1])
        gram = self.stats.energy.view(-1, size) if self.config.error_feedback else self.stats.gram_blocks(size)
        return clip_limits(weight, gram, self.config.zero_point)

    def round(self, weight: Tensor, limits: Limits | None) -> GroupwiseTensor:
        """Round a weight [out, in] to integers within `limits`: with error feedback (GPTQ), or to nearest."""
        config, size = self.config, self.config.group_of(weight.shape[1])
        if not config.error_feedback:
            return quantize(weight, size, config.zero_point, limits)
        grid = Grid.of(limits or whole_ranges(weight, size), size, config.zero_point)
        q = torch.empty(weight.shape[::-1], dtype=torch.uint8, device=weight.device)
        for span in self.stats.spans:
            damped, own = self._damped(span), grid.columns(span)
            q[span], scale = damped.round(weight[:, span], own, config.compensate, config.refine)
            own.scale.copy_(scale)  # a view
        return grid.tensor(q)

    def _shared_correction(self, span: slice, cross: Tensor) -> Tensor:
        """C [span, span] of all linears that share the input: W becomes W + W C. Cached for the last span."""
        if self._correction_span is None or self._correction_span[0] != span:
            self._correction_span = span, self._damped(span).solve(cross)
        return self._correction_span[1]

    def _damped(self, span: slice) -> DampedGram:
        """Cached for the last span: most inputs have only one."""
        if self._damped_span is None or self._damped_span[0] != span:
            self._damped_span = None
            self._damped_span = span, DampedGram(self.stats.gram_of(span), self.config.damping, self.config.act_order)
        return self._damped_span[1]
