"""The only face of the kernels: picks the first candidate that takes the operation.

A candidate declines by returning the reason; if all decline, KernelError lists them. So far the reference is
the only candidate; faster ones go in front of it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from squawq.errors import KernelError
from squawq.format.groupwise import GroupwiseTensor
from squawq.kernels import reference

Int4Matmul = Callable[[Tensor, GroupwiseTensor, Tensor | None], Tensor]


def _reference_declines(x: Tensor, weight: GroupwiseTensor) -> str | None:
    if not x.dtype.is_floating_point:
        return f"activations are {x.dtype}"
    if x.shape[-1] != weight.q.shape[1]:
        return f"activations have {x.shape[-1]} features, the weight {weight.q.shape[1]}"
    return None


CANDIDATES: list[tuple[str, Callable[[Tensor, GroupwiseTensor], str | None], Int4Matmul]] = [
    ("reference", _reference_declines, reference.int4_matmul),
]


def int4_matmul(x: Tensor, weight: GroupwiseTensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times a 4-bit weight [out, in] plus bias [out], in x's dtype. Raises KernelError if none fits."""
    refusals = []
    for name, declines, kernel in CANDIDATES:
        reason = declines(x, weight)
        if reason is None:
            return kernel(x, weight, bias)
        refusals.append(f"{name}: {reason}")
    raise KernelError(f"no kernel multiplies {tuple(x.shape)} {x.dtype}; tried {'; '.join(refusals)}")


dense_matmul = reference.dense_matmul
rms_norm = reference.rms_norm
