"""Chooses the integers of linears that share an input: what to round, the range of each group, the rounding.

By the input's statistics, and in a run behind quantized linears by what the outputs lack. Knows no layer and no files.
"""

from __future__ import annotations

import torch
from torch import Tensor

from squawq.format.groupwise import GroupwiseTensor, quantize
from squawq.quant_config import QuantConfig
from squawq.quantization.drift import Drift
from squawq.quantization.rounding import CHUNK, DampedGram, Grid
from squawq.quantization.search import clip_limits, whole_ranges
from squawq.quantization.statistics import InputStatistics


class LinearRounder:
    """For linears whose input has these statistics; `drift`: what their outputs lack."""

    def __init__(self, stats: InputStatistics, config: QuantConfig, drift: Drift | None = None) -> None:
        self.stats, self.config, self.drift = stats, config, drift
        self._last: tuple[slice, DampedGram] | None = None
        self._last_change: tuple[slice, Tensor] | None = None

    def choose(self, weight: Tensor, clip: bool) -> tuple[GroupwiseTensor, tuple[Tensor, Tensor] | None]:
        """Integers for a weight [out, in], and the limits (low, high) [out, groups] of its ranges where searched.

        The weight becomes what was rounded: itself and what makes up for the outputs' lack.
        """
        config, size = self.config, self.config.group_of(weight.shape[1])
        if not self.stats.has_signal:
            return quantize(weight, size, config.zero_point), None
        if self.drift is not None:
            self._make_up(weight, self.drift)
        gram = self.stats.energy.view(-1, size) if config.error_feedback else self.stats.gram_blocks(size)
        limits = clip_limits(weight, gram, config.zero_point) if clip else None
        if not config.error_feedback:
            return quantize(weight, size, config.zero_point, limits), limits
        grid = Grid.of(limits or whole_ranges(weight, size), size, config.zero_point)
        q = torch.empty(weight.shape[::-1], dtype=torch.uint8, device=weight.device)
        for span in self.stats.spans:
            damped, own = self._damped(span), grid.columns(span)
            q[span], scale = damped.round(weight[:, span], own, config.compensate, config.refine)
            own.scale.copy_(scale)  # a view
        return grid.tensor(q), limits

    def _make_up(self, weight: Tensor, drift: Drift) -> None:
        for place, span in enumerate(self.stats.spans):
            lack = drift.lack.pop(0) if drift.single else drift.lack[place]  # large, and only one linear needs it
            change = None if drift.single else self._change(span, lack)
            for start in range(0, len(weight), step := max(1, CHUNK // (span.stop - span.start))):
                part = slice(start, start + step)
                rows = weight[part, span]
                rows += self._damped(span).solve(lack[part]) if change is None else rows @ change

    def _change(self, span: slice, lack: Tensor) -> Tensor:
        """Of all linears of the stage: W becomes W + W change, in this span. The last one is kept, too."""
        if self._last_change is None or self._last_change[0] != span:
            self._last_change = span, self._damped(span).solve(lack)
        return self._last_change[1]

    def _damped(self, span: slice) -> DampedGram:
        """The last one is kept: most inputs have only one."""
        if self._last is None or self._last[0] != span:
            self._last = None
            self._last = span, DampedGram(self.stats.gram_of(span), self.config.damping, self.config.act_order)
        return self._last[1]
