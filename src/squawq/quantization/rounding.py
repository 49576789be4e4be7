"""Quantizes a linear: QEP correction, clipping, rounding with error feedback (GPTQ), coordinate descent.

Frantar et al., GPTQ, arXiv 2210.17323, in LDLQ's form (Chee et al., QuIP, arXiv 2307.13304), which needs one Cholesky
factorization and no inverse. Columns are rounded in descending order of the Hessian's diagonal (act_order), in static
groups. Coordinate descent minimizes the same loss, tr((W - Q) H (W - Q)'), over integers and scales; zero points stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from squawq.backends import backend_for
from squawq.format.groupwise import LEVELS, MIN_SCALE, GroupwiseTensor, quantize, round_to_grid, scale_and_zero
from squawq.quant_config import QuantConfig
from squawq.quantization.error_propagation import ErrorStatistics
from squawq.quantization.precision import float32_products
from squawq.quantization.search import clip_limits, whole_ranges
from squawq.quantization.statistics import InputStatistics

Limits = tuple[Tensor, Tensor]  # ranges (low, high), each float32 [out, groups]
BLOCK = 128  # columns rounded between two matrix products (lazy batch updates)
CHUNK = 1 << 24  # weights rounded at once: rows are independent
GPU_CHUNK = 1 << 25  # larger, because launching a block's kernels costs more than running them
FLOOR = 1e-4  # share of the mean diagonal that is added as well, for channels without signal
TRIES = 8  # Cholesky factorizations, each with more damping than the one before


@dataclass(frozen=True)
class Grid:
    """Scales and zeros, float32 [groups, out], of integers 0..15 in groups of `group` columns."""

    scale: Tensor
    zero: Tensor
    group: int

    @classmethod
    def of(cls, limits: tuple[Tensor, Tensor], group: int, zero_point: bool) -> Grid:
        """The grid that spans ranges (low, high), each float32 [out, groups]."""
        scale, zero = scale_and_zero(*limits, zero_point)
        return cls(scale.T.contiguous(), zero.T.contiguous(), group)

    def rows(self, part: slice) -> Grid:
        """The grid of some output channels; its scales are a copy."""
        return Grid(self.scale[:, part].clone(), self.zero[:, part].contiguous(), self.group)

    def columns(self, part: slice) -> Grid:
        """The grid of some input channels: whole groups, or a part of one. Its scales are a view."""
        groups = slice(part.start // self.group, -(-part.stop // self.group))
        return Grid(self.scale[groups], self.zero[groups], self.group)

    def nearest(self, target: Tensor) -> Tensor:
        """Nearest integers, as float32 [in, out], for weights float32 [in, out]."""
        grouped = target.view(len(self.scale), -1, target.shape[1])
        return round_to_grid(grouped, self.scale[:, None], self.zero[:, None]).view_as(target)

    def round(self, wanted: Tensor, base: Tensor, feedback: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Round a block of columns with error feedback, the last one first.

        Args:
            wanted: Target weights float32 [columns, out].
            base: Weights that errors are measured from, float32 [columns, out].
            feedback: float32 [columns, columns]; entry [i, j] times column j's error, j > i, is added to target i.
            groups: Group of each column, int64 [columns], on the CPU.

        Returns:
            Integers as float32, and errors (base minus rounded), each [columns, out].
        """
        return backend_for(wanted.device).round_columns(wanted, base, feedback, self.scale, self.zero, groups, LEVELS)

    def fit(self, levels: Tensor, pull: Tensor, gram: Tensor, energy: Tensor, group: Tensor) -> Tensor:
        """Fit a group's scales, in place, to the least loss for its integers.

        Args:
            levels: The group's integers as float32 [columns, out].
            pull: H (W - Q) of its columns, divided by `energy`, float32 [columns, out].
            gram: H of its columns, divided by `energy`, float32 [columns, columns].
            energy: The diagonal of H, float32 [columns, 1].
            group: Index of the group, int64 scalar.

        Returns:
            The change of the rounded weights, float32 [columns, out].
        """
        steps, scale = levels - self.zero[group], self.scale[group].clone()
        gain = (energy * pull * steps).sum(0) / (energy * (gram @ steps) * steps).sum(0)  # NaN where all steps are 0
        fitted = (scale + gain).half().float()
        possible = (fitted > scale / 2) & (fitted < scale * 2) & (fitted >= MIN_SCALE)
        self.scale[group] = torch.where(possible, fitted, scale)
        return steps * (self.scale[group] - scale)

    def values(self, levels: Tensor) -> Tensor:
        """Dequantized weights, float32 [in, out], for integers as float32 [in, out]."""
        grouped = levels.view(len(self.scale), -1, levels.shape[1])
        return (grouped - self.zero[:, None]).mul_(self.scale[:, None]).view_as(levels)

    def tensor(self, q: Tensor) -> GroupwiseTensor:
        """The quantized weight with integers uint8 [in, out]."""
        return GroupwiseTensor(
            q.T.contiguous(), self.scale.T.contiguous().half(), self.zero.T.contiguous().to(torch.uint8)
        )


class DampedGram:
    """A Hessian X'X with damping on its diagonal, and its Cholesky factor.

    Args:
        gram: float32 [in, in].
        damping: Share of the diagonal that is added to it; larger values count correlations between inputs less.
        act_order: Round columns in descending order of the diagonal, else from first to last.
    """

    def __init__(self, gram: Tensor, damping: float, act_order: bool) -> None:
        self.gram, energy = gram, gram.diagonal()
        self.columns = (
            energy.argsort(stable=True) if act_order else torch.arange(len(gram) - 1, -1, -1, device=gram.device)
        )
        for _ in range(TRIES):
            self.ridge = damping * energy + FLOOR * energy.mean()
            self.factor, failed = _cholesky(gram[self.columns[:, None], self.columns], self.ridge[self.columns])
            if not failed:
                break
            damping = max(0.01, 2 * damping)
        self._diagonal = self.factor.diagonal().clone()

    def solve(self, cross: Tensor) -> Tensor:
        """cross (H + damping)^-1, float32 [out, in], for an error cross-covariance float32 [out, in]."""
        half = torch.linalg.solve_triangular(self.factor, cross[:, self.columns].T, upper=False)  # factor not copied
        found = torch.empty_like(cross)
        found[:, self.columns] = torch.linalg.solve_triangular(self.factor.T, half, upper=True).T
        return found

    def round(self, target: Tensor, grid: Grid, compensate: bool, passes: int) -> tuple[Tensor, Tensor]:
        """Round a weight.

        Args:
            target: float32 [out, in].
            grid: Its scales and zeros.
            compensate: Round with error feedback (GPTQ), else to nearest.
            passes: Passes of coordinate descent that follow.

        Returns:
            Integers uint8 [in, out], and scales float32 [groups, out].
        """
        q = torch.empty(target.shape[::-1], dtype=torch.uint8, device=target.device)
        scale = grid.scale.clone()
        chunk = CHUNK if target.device.type == "cpu" else GPU_CHUNK
        step = max(1, chunk // target.shape[1])
        for start in range(0, len(target), step):
            part = slice(start, start + step)
            wanted, own = target[part].T.contiguous(), grid.rows(part)
            levels = self._compensate(wanted, own) if compensate else own.nearest(wanted)
            for _ in range(passes):
                self._descend(levels, wanted, own)
            q[:, part], scale[:, part] = levels.to(torch.uint8), own.scale
        return q, scale

    def _compensate(self, target: Tensor, grid: Grid) -> Tensor:
        """GPTQ: integers for a weight, both float32 [in, out]; columns not yet rounded compensate the errors."""
        groups, target = (self.columns // grid.group).cpu(), target[self.columns]
        errors, levels = torch.empty_like(target), torch.empty_like(target)
        for part in _blocks(len(target)):
            feedback = self.factor[part.start :, part].T / self._diagonal[part, None]
            size = part.stop - part.start
            wanted = torch.addmm(target[part], feedback[:, size:], errors[part.stop :])
            levels[part], errors[part] = grid.round(wanted, target[part], feedback[:, :size], groups[part])
        found = torch.empty_like(levels)
        found[self.columns] = levels
        return found

    def _descend(self, levels: Tensor, target: Tensor, grid: Grid) -> None:
        """One pass of coordinate descent: sets each scale and each integer in turn to the least loss, in place.

        `levels` (integers) and `target` are float32 [in, out]. Scales stay unless the group size divides BLOCK.
        """
        groups = torch.arange(len(target)) // grid.group
        energy = self.gram.diagonal() + self.ridge
        errors = target - grid.values(levels)
        for part in _blocks(len(target)):
            feedback = self.gram[part] / energy[part, None]
            within = feedback[:, part].fill_diagonal_(1)
            pull = feedback @ errors  # how far each weight is from its optimum, all others fixed
            for start in range(0, len(pull), grid.group) if BLOCK % grid.group == 0 else ():
                own = slice(start, start + grid.group)
                change = grid.fit(
                    levels[part][own], pull[own], within[own, own], energy[part][own, None], groups[part][start]
                )
                errors[part][own] -= change
                pull -= within[:, own] @ change
            base = target[part] - errors[part]
            levels[part], change = grid.round(base + pull, base, within.fill_diagonal_(0), groups[part])
            errors[part] += change


def _blocks(columns: int) -> Iterator[slice]:
    """Blocks of columns, the last one first."""
    return (slice(max(0, stop - BLOCK), stop) for stop in range(columns, 0, -BLOCK))


def _cholesky(gram: Tensor, ridge: Tensor) -> tuple[Tensor, bool]:
    """Lower Cholesky factor of `gram` plus a diagonal `ridge`, and whether it failed. Overwrites `gram`."""
    gram.diagonal().add_(ridge)
    factor, failed = gram.T, torch.zeros((), dtype=torch.int32, device=gram.device)  # the layout that LAPACK works in
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    return factor, bool(failed)


class LinearQuantizer:
    """Quantizes linears that share an input with statistics `stats`; `error` is for the QEP correction, None: none."""

    def __init__(self, stats: InputStatistics, config: QuantConfig, error: ErrorStatistics | None = None) -> None:
        self.stats, self.config, self.error = stats, config, error
        self._damped_span: tuple[slice, DampedGram] | None = None
        self._correction_span: tuple[slice, Tensor] | None = None

    def quantize(self, weight: Tensor, clip: bool) -> tuple[GroupwiseTensor, Limits | None]:
        """Quantize a weight; to nearest, uncorrected and unclipped, if the input had no signal.

        Args:
            weight: float32 [out, in]; corrected in place.
            clip: Whether to search narrower ranges (clipping).

        Returns:
            The integers, and the ranges (low, high), each float32 [out, groups], if they were searched.
        """
        if not self.stats.has_signal:
            return quantize(weight, self.config.group_of(weight.shape[1]), self.config.zero_point), None
        with float32_products(weight.device, exact=True):
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
        """C [span, span], the same for all linears of the input: W becomes W + W C. Cached for the last span."""
        if self._correction_span is None or self._correction_span[0] != span:
            self._correction_span = span, self._damped(span).solve(cross)
        return self._correction_span[1]

    def _damped(self, span: slice) -> DampedGram:
        """The damped Hessian of a span. Cached for the last span: most inputs have only one."""
        if self._damped_span is None or self._damped_span[0] != span:
            self._damped_span = None
            self._damped_span = span, DampedGram(self.stats.gram_of(span), self.config.damping, self.config.act_order)
        return self._damped_span[1]
