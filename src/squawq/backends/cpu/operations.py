"""The native CPU operations on tensors, and a stack of decoder layers that runs in one call.

Each has its twin in `reference`. Pointers leave Python here: that shapes and dtypes fit is for `dispatch` and `nn/`
to check.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from squawq.backends.cpu.library import POINTER, SIZE, address, check, required
from squawq.backends.cpu.packed import Packed

MOST_SHARED_HEADS = 16  # query heads for each key-value head
MOST_COLUMNS = 128  # rounded in one call


def add_rms_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """reference.add_rms_norm for contiguous float32 rows whose length is a multiple of 16."""
    y = torch.empty_like(hidden)
    rows, n = hidden.shape
    check(required().squawq_rms_norm(*map(address, (hidden, delta, weight)), eps, rows, n, y.data_ptr()))
    return y


def silu_mul(gate_up: Tensor) -> Tensor:
    """reference.silu_mul for contiguous float32 [rows, 2n], n a multiple of 16."""
    rows, n = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, n)
    check(required().squawq_silu_mul(gate_up.data_ptr(), rows, n, y.data_ptr()))
    return y


def rotary(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """reference.rotary: cos and sin, float32 [rows, head_dim / 2]."""
    rows, half = positions.shape[0], frequencies.shape[0]
    cos, sin = torch.empty(rows, half), torch.empty(rows, half)
    addresses = map(address, (cos, sin))
    check(required().squawq_rotary(positions.data_ptr(), rows, frequencies.data_ptr(), half, *addresses))
    return cos, sin


def rotate_and_store(
    qkv: Tensor,
    heads: tuple[int, int, int],
    rotary: tuple[Tensor, Tensor],
    norms: tuple[Tensor | None, Tensor | None],
    eps: float,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """reference.rotate_and_store for contiguous float32 rows and a float16 cache."""
    sources = map(address, (*rotary, *norms))
    targets = map(address, (slots, keys, values))
    check(required().squawq_rotate_and_store(qkv.data_ptr(), qkv.shape[0], *heads, *sources, eps, *targets))


def attention(
    qkv: Tensor,
    heads: tuple[int, int, int],
    sequences: Tensor,
    pages: Tensor,
    window: int | None,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """reference.attention for contiguous float32 rows and a float16 cache."""
    y = qkv.new_empty(qkv.shape[0], heads[0] * heads[2])
    batch = (sequences.data_ptr(), sequences.shape[0], pages.data_ptr(), window or 0)
    check(required().squawq_attention(qkv.data_ptr(), *heads, *batch, *map(address, (keys, values, y))))
    return y


def round_columns(
    wanted: Tensor, base: Tensor, feedback: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, highest: int
) -> tuple[Tensor, Tensor]:
    """reference.round_columns for contiguous float32 of at most MOST_COLUMNS columns."""
    levels, errors = torch.empty_like(wanted), torch.empty_like(wanted)
    sources = map(address, (wanted, base, feedback, scales, zeros, groups))
    check(required().squawq_round_columns(*sources, *wanted.shape, highest, levels.data_ptr(), errors.data_ptr()))
    return levels, errors


class _Matrix(ctypes.Structure):
    _fields_ = (("kind", SIZE), ("weight", POINTER))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, _Matrix) for name in ("qkv", "out", "gate_up", "down")),
        *((name, POINTER) for name in ("keys", "values")),
        ("window", SIZE),
    )


@dataclass(frozen=True)
class LayerParts:
    """What one decoder layer consists of: float32 norms, packed linears, its pages, its window (None for all)."""

    norms: tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # input, post-attention, query, key
    linears: tuple[Packed, Packed, Packed, Packed]  # qkv, out, gate-up, down
    cache: tuple[Tensor, Tensor]
    window: int | None


class LayerStack:
    """Decoder layers that run in one call. heads: (query, kv, head_dim); inner: the MLP's width.

    Whether they fit is the caller's check (`nn/decoder.py`): every width a multiple of 16, 16-bit float pages.
    """

    def __init__(self, layers: Sequence[LayerParts], heads: tuple[int, int, int], inner: int, eps: float) -> None:
        self._parts = tuple(layers)  # kept alive: the structures point into them
        self._heads, self._inner, self._eps = heads, inner, eps
        self._structs = (_Layer * len(layers))(*map(self._layer, layers))

    @staticmethod
    def _layer(parts: LayerParts) -> _Layer:
        matrices = [_Matrix(linear.kind, linear.pointer) for linear in parts.linears]
        return _Layer(*map(address, parts.norms), *matrices, *map(address, parts.cache), parts.window or 0)

    def __call__(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], slots: Tensor, sequences: Tensor, pages: Tensor
    ) -> None:
        """hidden float32 [rows, hidden_size] goes through all layers in place; the rest as for `attention`."""
        rows, width = hidden.shape
        sizes = (rows, width, self._inner, *self._heads)
        batch = (*map(address, (*rotary, slots, sequences)), sequences.shape[0], pages.data_ptr())
        layers = (ctypes.addressof(self._structs), len(self._structs))
        check(required().squawq_layers(*layers, hidden.data_ptr(), *sizes, self._eps, *batch))
