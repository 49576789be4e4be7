"""Rounding that sees the error, on tensors alone: what rounding one column loses, the columns after it make up for.

Frantar et al., GPTQ, arXiv 2210.17323, in LDLQ's form (Chee et al., QuIP, arXiv 2307.13304), which needs one
factorization and no inverse; columns in descending order of their inputs' energy, inside groups that stay where the
format has them; then coordinate descent. Ranges are given: only integers are chosen. No model, no files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from squawq.format.groupwise import LEVELS, GroupwiseTensor, round_to_grid, scale_and_zero

BLOCK = 128  # columns between whose errors only short products are made
CHUNK = 1 << 24  # weights handled at once: rows do not depend on each other
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
        """Some of the output channels."""
        return Grid(self.scale[:, part], self.zero[:, part], self.group)

    def columns(self, part: slice) -> Grid:
        """Some of the inputs: whole groups, or a part of one that is larger."""
        groups = slice(part.start // self.group, -(-part.stop // self.group))
        return Grid(self.scale[groups], self.zero[groups], min(self.group, part.stop - part.start))

    def nearest(self, target: Tensor) -> Tensor:
        """Integers as float32 for weights [in, out]."""
        grouped = target.view(len(self.scale), -1, target.shape[1])
        return round_to_grid(grouped, self.scale[:, None], self.zero[:, None]).view_as(target)

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

    def round(self, target: Tensor, grid: Grid, compensate: bool, passes: int) -> Tensor:
        """Integers uint8 [in, out] for a weight [out, in]: errors fed on, or to nearest; then coordinate descent."""
        q = torch.empty(target.shape[::-1], dtype=torch.uint8, device=target.device)
        step = max(1, CHUNK // target.shape[1])
        for start in range(0, len(target), step):
            part = slice(start, start + step)
            wanted, own = target[part].T.contiguous(), grid.rows(part)
            levels = self._compensate(wanted, own) if compensate else own.nearest(wanted)
            for _ in range(passes):
                self._descend(levels, wanted, own)
            q[:, part] = levels.to(torch.uint8)
        return q

    def _compensate(self, target: Tensor, grid: Grid) -> Tensor:
        """Integers as float32 [in, out] for [in, out], each column's error fed to those that come after."""
        factor, diagonal = self.factor, self._diagonal
        groups = (self.columns // grid.group).tolist()
        target = target[self.columns]
        errors, levels = torch.empty_like(target), torch.empty_like(target)
        for stop in range(len(target), 0, -BLOCK):
            start = max(0, stop - BLOCK)
            feedback = factor[start:, start:stop] / diagonal[start:stop]
            wanted = torch.addmm(target[start:stop], feedback[stop - start :].T, errors[stop:])
            for own in range(stop - 1, start - 1, -1):
                column, group = wanted[own - start], groups[own]
                if own + 1 < stop:
                    column.addmv_(errors[own + 1 : stop].T, feedback[own + 1 - start : stop - start, own - start])
                scale, zero = grid.scale[group], grid.zero[group]
                torch.div(column, scale, out=levels[own]).round_().add_(zero).clamp_(0, LEVELS)
                torch.sub(zero, levels[own], out=errors[own]).mul_(scale).add_(target[own])
        found = torch.empty_like(levels)
        found[self.columns] = levels
        return found

    def _descend(self, levels: Tensor, target: Tensor, grid: Grid) -> None:
        """Move each integer in turn to where the loss is least, the others given. levels, target [in, out]."""
        energy = self.gram.diagonal() + self.ridge
        size = grid.group
        errors = ((levels.view(-1, size, levels.shape[1]) - grid.zero[:, None]) * grid.scale[:, None]).view_as(levels)
        errors -= target
        for start in range(0, len(target), BLOCK):
            stop = min(len(target), start + BLOCK)
            slope = torch.addmm(self.ridge[start:stop, None] * errors[start:stop], self.gram[start:stop], errors)
            for own in range(start, stop):
                scale, level, row = grid.scale[own // size], levels[own], own - start
                moved = (slope[row] / (scale * -energy[own])).round_().add_(level).clamp_(0, LEVELS)
                change = (moved - level).mul_(scale)
                level.copy_(moved)
                errors[own] += change
                if own + 1 < stop:
                    slope[row + 1 :].addr_(self.gram[own + 1 : stop, own], change)


def _cholesky(gram: Tensor, ridge: Tensor) -> tuple[Tensor, bool]:
    """The lower factor of a symmetric matrix plus a diagonal `ridge`, in its place; and whether it failed."""
    gram.diagonal().add_(ridge)
    factor, failed = gram.T, torch.zeros((), dtype=torch.int32, device=gram.device)  # the layout that LAPACK works in
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    return factor, bool(failed)
