"""CPU backend: the C++ kernels of csrc/. What they do not take (another dtype, an odd width) runs on `reference`.

Pointers leave Python here, so shapes and dtypes are checked before each call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from squawq.backends.base import Gemm, Heads, Layers, Norms, Pages, Rotary, RunLayers
from squawq.backends.cpu import library
from squawq.backends.cpu.library import LANES, address, check, required
from squawq.backends.cpu.packed import DENSE_TYPES, NativePacked, PackedDense, PackedInt4, PackedInt8, kernel_group
from squawq.backends.cpu.stack import ACTIVATIONS, MAX_SHARED_HEADS, LayerStack
from squawq.backends.layer_ops import Packed
from squawq.backends.reference import Reference
from squawq.errors import KernelError

MAX_COLUMNS = 128  # rounded in one call


class CpuBackend(Reference):
    """See `Backend` for shapes and dtypes. Not `exact`: int4 and int8 products round activations to int8."""

    name = "cpu"
    traceable = False

    def __init__(self, device: torch.device, *, exact: bool = False) -> None:
        super().__init__(device, exact=exact)
        self.head = "16-bit" if exact else "int8"

    @classmethod
    def declines(cls, device: torch.device) -> str | None:
        if device.type != "cpu":
            return "it runs on the CPU"
        return "its library is not built here" if library.load() is None else None

    def int8_declines(self, out: int, in_: int, dtype: torch.dtype) -> str | None:  # noqa: ARG002
        if kernel_group(in_) is None:
            return f"hidden_size is {in_}, no multiple of 16"
        return None if dtype in DENSE_TYPES else f"the weight is {dtype}"

    def pack_int4(self, out: int, in_: int, group: int, parts: Iterable[Gemm], bias: Tensor | None = None) -> Packed:
        """Peak memory: the packed weight and one part."""
        if kernel_group(group) is None:
            return super().pack_int4(out, in_, group, parts, bias)
        packed = PackedInt4(out, in_, group, bias=bias, exact=self.exact)
        row = 0
        for qweight, scales, qzeros in parts:
            packed.fill(row, qweight, scales, qzeros)
            row += scales.shape[1]
        return packed

    def pack_int8(self, weight: Tensor) -> Packed:
        return PackedInt8(weight)

    def pack_dense(self, parts: Sequence[Tensor], bias: Tensor | None = None) -> Packed:
        same = len({part.dtype for part in parts}) == 1 and parts[0].dtype in DENSE_TYPES
        return PackedDense(parts if same else [part.float() for part in parts], bias=bias)

    def matmul(self, x: Tensor, weight: Packed) -> Tensor:
        if not isinstance(weight, NativePacked):
            return super().matmul(x, weight)
        y = weight(x.reshape(-1, x.shape[-1]).float().contiguous())
        return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    def add_rms_norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        if not _native(hidden, hidden.shape[-1]):
            return super().add_rms_norm(hidden, delta, weight, eps)
        y = torch.empty_like(hidden)
        rows, n = hidden.shape
        check(required().squawq_rms_norm(*map(address, (hidden, delta, weight)), eps, rows, n, y.data_ptr()))
        return y

    def activation_mul(self, gate_up: Tensor, activation: str) -> Tensor:
        if activation not in ACTIVATIONS or not _native(gate_up, gate_up.shape[-1] // 2):
            return super().activation_mul(gate_up, activation)
        rows, n = gate_up.shape[0], gate_up.shape[1] // 2
        y = gate_up.new_empty(rows, n)
        check(required().squawq_activation_mul(gate_up.data_ptr(), rows, n, ACTIVATIONS[activation], y.data_ptr()))
        return y

    def rotary(self, positions: Tensor, frequencies: Tensor) -> Rotary:
        rows, half = positions.shape[0], frequencies.shape[0]
        cos, sin = torch.empty(rows, half), torch.empty(rows, half)
        addresses = map(address, (cos, sin))
        check(required().squawq_rotary(positions.data_ptr(), rows, frequencies.data_ptr(), half, *addresses))
        return cos, sin

    def rotate_and_store(
        self, qkv: Tensor, heads: Heads, rotary: Rotary, norms: Norms, eps: float, slots: Tensor, pages: Pages
    ) -> None:
        if not _native_attention(qkv, heads, pages):
            return super().rotate_and_store(qkv, heads, rotary, norms, eps, slots, pages)
        sizes = (*heads, rotary[0].shape[1])
        sources = map(address, (*rotary, *norms))
        targets = map(address, (slots, *pages))
        check(required().squawq_rotate_and_store(qkv.data_ptr(), qkv.shape[0], *sizes, *sources, eps, *targets))
        return None

    def attention(
        self, qkv: Tensor, heads: Heads, sequences: Tensor, tables: Tensor, window: int | None, pages: Pages
    ) -> Tensor:
        if not _native_attention(qkv, heads, pages):
            return super().attention(qkv, heads, sequences, tables, window, pages)
        y = qkv.new_empty(qkv.shape[0], heads[0] * heads[2])
        batch = (sequences.data_ptr(), sequences.shape[0], tables.data_ptr(), window or 0)
        check(required().squawq_attention(qkv.data_ptr(), *heads, *batch, *map(address, (*pages, y))))
        return y

    def round_columns(
        self, wanted: Tensor, base: Tensor, feedback: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, top: int
    ) -> tuple[Tensor, Tensor]:
        wanted, base, feedback = wanted.contiguous(), base.contiguous(), feedback.contiguous()
        if len(wanted) > MAX_COLUMNS:
            return super().round_columns(wanted, base, feedback, scales, zeros, groups, top)
        levels, errors = torch.empty_like(wanted), torch.empty_like(wanted)
        sources = map(address, (wanted, base, feedback, scales, zeros, groups))
        check(required().squawq_round_columns(*sources, *wanted.shape, top, levels.data_ptr(), errors.data_ptr()))
        return levels, errors

    def set_threads(self, count: int) -> None:
        library.set_threads(count)

    def describe(self) -> dict[str, object]:
        return {"threads": library.threads(), "instructions": library.isa()}

    def prepare(self, layers: Layers, cache: Sequence[Pages]) -> RunLayers:
        try:
            return LayerStack(layers, cache)
        except KernelError:
            return super().prepare(layers, cache)

    def runs_whole(self, run: RunLayers) -> bool:
        return isinstance(run, LayerStack)


def _native(x: Tensor, width: int) -> bool:
    """Whether the kernels take rows x whose inner width is `width`."""
    return x.dtype == torch.float32 and x.dim() == 2 and width % LANES == 0 and x.is_contiguous()


def _native_attention(qkv: Tensor, heads: Heads, pages: Pages) -> bool:
    few = heads[0] // heads[1] <= MAX_SHARED_HEADS
    return few and pages[0].dtype == torch.float16 and _native(qkv, heads[2])
