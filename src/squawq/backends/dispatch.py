"""The only face of the kernels: picks the first candidate that takes the operation.

A candidate declines by returning the reason; if all decline, KernelError lists them. The native CPU kernels stand
before the reference. A weight's type says what it was packed for: `Packed...` runs natively, others on torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from squawq.backends import reference
from squawq.backends.cpu import library, operations
from squawq.backends.cpu.packed import Packed
from squawq.backends.reference import Heads
from squawq.errors import KernelError
from squawq.format.groupwise import GroupwiseTensor

Weight = Tensor | GroupwiseTensor | Packed
Matmul = Callable[[Tensor, Any, Tensor | None], Tensor]


def _native_declines(x: Tensor, weight: Weight) -> str | None:
    if not isinstance(weight, Packed):
        return "the weight is not packed for it"
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return f"activations are {x.dtype} on {x.device.type}"
    return _features(x, weight.shape[1])


def _int4_declines(x: Tensor, weight: Weight) -> str | None:
    if not isinstance(weight, GroupwiseTensor):
        return "the weight is not a GroupwiseTensor"
    return _floating(x) or _features(x, weight.q.shape[1])


def _dense_declines(x: Tensor, weight: Weight) -> str | None:
    if not isinstance(weight, Tensor):
        return "the weight is not a tensor"
    return _floating(x) or _features(x, weight.shape[1])


def _floating(x: Tensor) -> str | None:
    return None if x.dtype.is_floating_point else f"activations are {x.dtype}"


def _features(x: Tensor, features: int) -> str | None:
    return None if x.shape[-1] == features else f"activations have {x.shape[-1]} features, the weight {features}"


def _native_matmul(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    y = weight(x.reshape(-1, x.shape[-1]).contiguous()).view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


CANDIDATES: list[tuple[str, Callable[[Tensor, Weight], str | None], Matmul]] = [
    ("native", _native_declines, _native_matmul),
    ("reference int4", _int4_declines, reference.int4_matmul),
    ("reference dense", _dense_declines, reference.dense_matmul),
]


def matmul(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times a weight [out, in] plus bias [out], in x's dtype. Raises KernelError if no kernel fits."""
    refusals = []
    for name, declines, kernel in CANDIDATES:
        reason = declines(x, weight)
        if reason is None:
            return kernel(x, weight, bias)
        refusals.append(f"{name}: {reason}")
    raise KernelError(f"no kernel multiplies {tuple(x.shape)} {x.dtype}; tried {'; '.join(refusals)}")


def _native(x: Tensor, width: int) -> bool:
    """Whether the native elementwise kernels take rows x whose inner width is `width`."""
    fits = x.dtype == torch.float32 and x.dim() == 2 and width % library.LANES == 0 and x.is_contiguous()
    return fits and x.device.type == "cpu" and library.load() is not None


def _native_attention(qkv: Tensor, heads: Heads, keys: Tensor) -> bool:
    few = heads[0] // heads[1] <= operations.MOST_SHARED_HEADS
    return few and keys.dtype == torch.float16 and _native(qkv, heads[2])


def add_rms_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """hidden += delta in place, where given; the RMS norm of the sum."""
    kernels = operations if _native(hidden, hidden.shape[-1]) else reference
    y: Tensor = kernels.add_rms_norm(hidden, delta, weight, eps)
    return y


def silu_mul(gate_up: Tensor) -> Tensor:
    """[..., 2n] of gates and ups -> silu(gate) * up."""
    kernels = operations if _native(gate_up, gate_up.shape[-1] // 2) else reference
    y: Tensor = kernels.silu_mul(gate_up)
    return y


def rotary(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [len(positions), head_dim / 2]."""
    native = positions.device.type == "cpu" and library.load() is not None
    found: tuple[Tensor, Tensor] = (operations if native else reference).rotary(positions, frequencies)
    return found


def rotate_and_store(
    qkv: Tensor,
    heads: Heads,
    rotary: tuple[Tensor, Tensor],
    norms: tuple[Tensor | None, Tensor | None],
    eps: float,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Norm and rotate queries and keys in place; write keys and values to the cache. See `reference`."""
    kernels = operations if _native_attention(qkv, heads, keys) else reference
    kernels.rotate_and_store(qkv, heads, rotary, norms, eps, slots, keys, values)


def attention(
    qkv: Tensor, heads: Heads, sequences: Tensor, pages: Tensor, window: int | None, keys: Tensor, values: Tensor
) -> Tensor:
    """Causal attention over the paged cache. See `reference`."""
    kernels = operations if _native_attention(qkv, heads, keys) else reference
    y: Tensor = kernels.attention(qkv, heads, sequences, pages, window, keys, values)
    return y


def round_columns(
    wanted: Tensor, base: Tensor, feedback: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, highest: int
) -> tuple[Tensor, Tensor]:
    """Integers and errors of a block of columns whose errors are fed on. See `reference`."""
    native = wanted.device.type == "cpu" and len(wanted) <= operations.MOST_COLUMNS and library.load() is not None
    kernels = operations if native else reference
    wanted, base, feedback = wanted.contiguous(), base.contiguous(), feedback.contiguous()
    found: tuple[Tensor, Tensor] = kernels.round_columns(wanted, base, feedback, scales, zeros, groups, highest)
    return found
