"""Rounds a block of a weight's columns with error feedback, for quantization; see `Backend.round_columns`."""

from __future__ import annotations

import triton
import triton.language as tl

MAX_COLUMNS = 128  # of a block
ROWS = 16  # outputs of a program


@triton.jit
def round_columns_kernel(
    wanted,  # [columns, out]
    base,  # [columns, out]
    feedback,  # [columns, columns]
    scales,  # [groups, out]
    zeros,
    groups,  # int64 [columns]
    levels,  # [columns, out]
    errors,
    columns,
    out,
    top,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Outputs are independent; a program keeps the targets of its own in registers, and takes column after column."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, COLUMNS)
    here = row < out
    targets = tl.load(wanted + i[:, None] * out + row[None, :], mask=(i < columns)[:, None] & here[None, :], other=0.0)
    column = columns - 1
    group = tl.load(groups + column) * out
    scale = tl.load(scales + group + row, mask=here, other=1.0)
    zero = tl.load(zeros + group + row, mask=here, other=0.0)
    start = tl.load(base + column * out + row, mask=here, other=0.0)
    factors = tl.load(feedback + i * columns + column, mask=i < column, other=0.0)
    next_group = tl.load(groups + tl.maximum(column - 1, 0)) * out
    for _ in range(columns):
        after = tl.maximum(column - 1, 0)  # loaded while this column is computed
        next_scale = tl.load(scales + next_group + row, mask=here, other=1.0)
        next_zero = tl.load(zeros + next_group + row, mask=here, other=0.0)
        next_start = tl.load(base + after * out + row, mask=here, other=0.0)
        next_factors = tl.load(feedback + i * columns + after, mask=i < after, other=0.0)
        next_group = tl.load(groups + tl.maximum(column - 2, 0)) * out
        target = tl.sum(tl.where((i == column)[:, None], targets, 0.0), 0)
        steps = tl.minimum(tl.maximum(tl.div_rn(target, scale), -zero), top - zero)
        steps = (steps + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds to the nearest integer, halves to even
        error = start - steps * scale
        tl.store(levels + column * out + row, steps + zero, mask=here)
        tl.store(errors + column * out + row, error, mask=here)
        targets += factors[:, None] * error[None, :]
        scale, zero, start, factors, column = next_scale, next_zero, next_start, next_factors, column - 1
