"""Rounding that sees the error, on tensors alone: what rounding one column loses, the columns after it make up for.

Frantar et al., GPTQ, arXiv 2210.17323, in LDLQ's form (Chee et al., QuIP, arXiv 2307.13304), which needs one
factorization and no inverse; columns in descending order of their inputs' energy, inside groups that stay where the
format has them; then coordinate descent, over integers and scales. Zeros are given. No model, no files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from squawq.backends import backend_for
from squawq.format.groupwise import LEVELS, MIN_SCALE, GroupwiseTensor, round_to_grid, scale_and_zero

BLOCK = 128  # columns between whose errors no matrix product is made
CHUNK = 1 << 24  # weights handled at once: rows do not depend on each other
GPU_CHUNK = 1 << 26  # where a column's operations are too short to be worth starting
FLOOR = 1e-4  # of the mean energy, for channels without signal
TRIES = 8


@dataclass(frozen=True)
class Grid:
    """Scales and zeros float32 [groups, out] that integers 0..15 stand on, in groups of `group` columns."""

    scale: Tensor
    zero: Tensor
    group: int

    @classmethod
    def of(cls, limits: tuple[Tensor, Tensor], group: int, zero_point: bool) -> Grid:
        """For ranges (low, high), each [out, groups]."""
        scale, zero = scale_and_zero(*limits, zero_point)
        return cls(scale.T.contiguous(), zero.T.contiguous(), group)

    def rows(self, part: slice) -> Grid:
        """Some of the output channels, with scales of their own."""
        return Grid(self.scale[:, part].clone(), self.zero[:, part].contiguous(), self.group)

    def columns(self, part: slice) -> Grid:
        """Some of the inputs: whole groups, or a part of one that is larger."""
        groups = slice(part.start // self.group, -(-part.stop // self.group))
        return Grid(self.scale[groups], self.zero[groups], self.group)

    def nearest(self, target: Tensor) -> Tensor:
        """Integers as float32 for weights [in, out]."""
        grouped = target.view(len(self.scale), -1, target.shape[1])
        return round_to_grid(grouped, self.scale[:, None], self.zero[:, None]).view_as(target)

    def round(self, wanted: Tensor, base: Tensor, feedback: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Integers as float32 for a block of columns [columns, out], the last one first, and their errors from `base`,
        of which each column takes feedback [columns, columns] along. groups int64 [columns], on the CPU: its place."""
        return backend_for(wanted.device).round_columns(wanted, base, feedback, self.scale, self.zero, groups, LEVELS)

    def fit(self, levels: Tensor, pull: Tensor, gram: Tensor, energy: Tensor, group: Tensor) -> Tensor:
        """Move a group's scales, in place, to where the loss is least for its integers, [columns, out]; the weights'
        change. pull [columns, out]: the loss's slope; gram [columns, columns]; both divided by energy [columns, 1]."""
        steps, scale = levels - self.zero[group], self.scale[group].clone()
        gain = (energy * pull * steps).sum(0) / (energy * (gram @ steps) * steps).sum(0)  # NaN where all steps are 0
        fitted = (scale + gain).half().float()
        possible = (fitted > scale / 2) & (fitted < scale * 2) & (fitted >= MIN_SCALE)
        self.scale[group] = torch.where(possible, fitted, scale)
        return steps * (self.scale[group] - scale)

    def values(self, levels: Tensor) -> Tensor:
        """Weights [in, out] for integers as float32."""
        grouped = levels.view(len(self.scale), -1, levels.shape[1])
        return (grouped - self.zero[:, None]).mul_(self.scale[:, None]).view_as(levels)

    def tensor(self, q: Tensor) -> GroupwiseTensor:
        """With integers uint8 [in, out]."""
        return GroupwiseTensor(
            q.T.contiguous(), self.scale.T.contiguous().half(), self.zero.T.contiguous().to(torch.uint8)
        )


class DampedGram:
    """A Gram matrix [in, in] with its diagonal raised, and its Cholesky factor; `damping` is a share of the diagonal.

    Raising the diagonal is to trust correlations between inputs less than the calibration shows them. `act_order`:
    columns are rounded in descending order of the diagonal, else from first to last.
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

    def solve(self, owed: Tensor) -> Tensor:
        """owed [out, in] times the inverse: the change of weights that makes up for it."""
        half = torch.linalg.solve_triangular(self.factor, owed[:, self.columns].T, upper=False)  # copies no factor
        found = torch.empty_like(owed)
        found[:, self.columns] = torch.linalg.solve_triangular(self.factor.T, half, upper=True).T
        return found

    def round(self, target: Tensor, grid: Grid, compensate: bool, passes: int) -> tuple[Tensor, Tensor]:
        """Integers uint8 [in, out] for a weight [out, in], and the scales float32 [groups, out] they are to stand on.

        Errors are fed on, or integers are the nearest; then so many passes of coordinate descent.
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
        """Integers as float32 [in, out] for [in, out], each column's error fed to those that come after."""
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
        """Move each group's scale and each integer in turn to where the loss is least, the others given, in place.

        levels, target [in, out]. Groups larger than a block keep their scales.
        """
        groups = torch.arange(len(target)) // grid.group
        energy = self.gram.diagonal() + self.ridge
        errors = target - grid.values(levels)
        for part in _blocks(len(target)):
            feedback = self.gram[part] / energy[part, None]
            within = feedback[:, part].fill_diagonal_(1)
            pull = feedback @ errors  # each weight's way to where the loss is least
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
    """The last one first."""
    return (slice(max(0, stop - BLOCK), stop) for stop in range(columns, 0, -BLOCK))


def _cholesky(gram: Tensor, ridge: Tensor) -> tuple[Tensor, bool]:
    """The lower factor of a symmetric matrix plus a diagonal `ridge`, in its place; and whether it failed."""
    gram.diagonal().add_(ridge)
    factor, failed = gram.T, torch.zeros((), dtype=torch.int32, device=gram.device)  # the layout that LAPACK works in
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    return factor, bool(failed)
