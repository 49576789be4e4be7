"""CPU backend: calls the C++ kernels of csrc/; inputs of other dtypes or widths run on `reference`.

The kernels take raw pointers, so shapes and dtypes are checked before a call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from squawq.backends.base import Gemm, Heads, LayerCache, Layers, Pages, Rotary, RunLayers, States
from squawq.backends.cpu import library
from squawq.backends.cpu.experts import ACTIVATIONS, native_experts
from squawq.backends.cpu.group import SharedGroup, new_shared_memory
from squawq.backends.cpu.layer_stack import (
    MAX_SHARED_HEADS,
    LayerStack,
    native_delta_rule,
    native_rotation,
    native_scoring,
)
from squawq.backends.cpu.library import LANES, address, check, required
from squawq.backends.cpu.packed import DENSE_TYPES, NativePacked, PackedDense, PackedInt4, PackedInt8, kernel_group
from squawq.backends.layer_ops import Attention, GatedDeltaRule, MixtureOfExperts, Packed, RotateAndStore
from squawq.backends.reference import Reference
from squawq.errors import KernelError

MAX_COLUMNS = 128  # that round_columns rounds in one native call


class CpuBackend(Reference):
    """See `Backend` for shapes and dtypes. Rounds activations to int8 for int8 weights, and for int4 unless `exact`."""

    name = "cpu"
    traceable = False

    def __init__(self, device: torch.device, *, exact: bool = False, **dtypes: str) -> None:
        super().__init__(device, exact=exact, **dtypes)
        self.head = "16-bit" if exact else "int8"

    @classmethod
    def declines(cls, device: torch.device) -> str | None:
        if device.type != "cpu":
            return "it runs on the CPU"
        return "its library is not built here" if library.load() is None else None

    def int8_declines(self, out: int, in_: int, dtype: torch.dtype) -> str | None:  # noqa: ARG002
        if kernel_group(in_) is None:
            return f"hidden_size is {in_}, not a multiple of 16"
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
        if x.shape[-1] != weight.shape[1] or not x.dtype.is_floating_point or x.device.type != "cpu":
            given = f"activations {x.dtype} {list(x.shape)} on {x.device}"
            raise KernelError(f"{given} do not fit a weight {list(weight.shape)} on the CPU")
        rows = x.reshape(-1, x.shape[-1]).float().contiguous()
        y = rows.new_empty(rows.shape[0], weight.shape[0])
        check(required().squawq_matmul(rows.data_ptr(), len(rows), weight.kind, weight.pointer, y.data_ptr()))
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

    def soft_cap(self, logits: Tensor, cap: float) -> Tensor:
        check(required().squawq_soft_cap(logits.data_ptr(), logits.numel(), cap))
        return logits

    def experts_declines(self, layer: MixtureOfExperts) -> str | None:
        try:
            native_experts(layer)
        except KernelError as error:
            return str(error)
        return None

    def experts(self, x: Tensor, layer: MixtureOfExperts, shared: Tensor | None) -> Tensor:
        struct, rows = native_experts(layer), x.float().contiguous()
        y = torch.empty_like(rows) if shared is None else shared.to(torch.float32, copy=True)
        if rows.shape != (len(rows), layer.router.shape[1]) or y.shape != rows.shape:
            raise KernelError(f"activations {list(x.shape)} do not fit experts of {layer.router.shape[1]} inputs")
        check(required().squawq_experts(ctypes.addressof(struct), rows.data_ptr(), *rows.shape, y.data_ptr()))
        return y.to(x.dtype)

    def rotary(self, positions: Tensor, frequencies: Tensor) -> Rotary:
        rows, columns = positions.shape[0], frequencies.shape[1]
        cos, sin = torch.empty(rows, columns), torch.empty(rows, columns)
        addresses = map(address, (cos, sin))
        check(required().squawq_rotary(positions.data_ptr(), rows, frequencies.data_ptr(), columns, *addresses))
        return cos, sin

    def rotate_and_store(
        self,
        qkv: Tensor,
        heads: Heads,
        operation: RotateAndStore,
        rotary: Rotary,
        eps: float,
        slots: Tensor,
        pages: Pages,
    ) -> None:
        if not _native_attention(qkv, heads, pages):
            return super().rotate_and_store(qkv, heads, operation, rotary, eps, slots, pages)
        rotation, tables = native_rotation(operation, heads), map(address, rotary)
        sizes = (qkv.shape[0], *heads, *tables, rotary[0].shape[1], ctypes.addressof(rotation))
        check(required().squawq_rotate_and_store(qkv.data_ptr(), *sizes, eps, *map(address, (slots, *pages))))
        return None

    def attention(
        self, qkv: Tensor, heads: Heads, operation: Attention, sequences: Tensor, tables: Tensor, pages: Pages
    ) -> Tensor:
        if not _native_attention(qkv, heads, pages):
            return super().attention(qkv, heads, operation, sequences, tables, pages)
        y = qkv.new_empty(qkv.shape[0], heads[0] * heads[2])
        scoring = native_scoring(operation, heads[2])
        batch = (sequences.data_ptr(), sequences.shape[0], tables.data_ptr(), ctypes.addressof(scoring))
        check(required().squawq_attention(qkv.data_ptr(), *heads, *batch, *map(address, (*pages, y))))
        return y

    def output_gate(self, x: Tensor, gates: Tensor) -> Tensor:
        if not _native(x, x.shape[-1]) or not _native(gates, x.shape[-1]) or gates.shape != x.shape:
            return super().output_gate(x, gates)
        y = x.clone()
        check(required().squawq_output_gate(y.data_ptr(), gates.data_ptr(), y.numel()))
        return y

    def gated_delta_rule(
        self,
        wide: Tensor,
        gates: Tensor,
        rule: GatedDeltaRule,
        eps: float,
        sequences: Tensor,
        places: Tensor,
        states: States,
    ) -> Tensor:
        struct = native_delta_rule(rule, states)
        if struct is None or not _native(wide, LANES) or not _native(gates, LANES):
            return super().gated_delta_rule(wide, gates, rule, eps, sequences, places, states)
        sizes = rule.sizes
        widths = wide.shape[1] == sizes.channels + sizes.values and gates.shape == (len(wide), 2 * sizes.value_heads)
        if not widths or len(places) != len(sequences) or int(places.max()) >= len(states[0]):
            raise KernelError(f"inputs {list(wide.shape)} and {list(gates.shape)} do not fit a delta rule of {sizes}")
        y = wide.new_empty(wide.shape[0], rule.sizes.values)
        inputs = wide.clone(), gates.clone()
        batch = sequences.data_ptr(), places.data_ptr(), len(sequences)
        check(
            required().squawq_gated_delta_rule(
                *map(address, inputs), ctypes.addressof(struct), *batch, eps, y.data_ptr()
            )
        )
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

    def group_declines(self, size: int) -> str | None:  # noqa: ARG002
        return None

    def group_memory(self, size: int) -> int:
        return new_shared_memory(size)

    def join(self, rank: int, size: int, memory: int) -> SharedGroup:
        self.group = group = SharedGroup(rank, size, memory)
        return group

    def threads(self) -> int:
        return library.threads()

    def default_threads(self) -> int:
        return library.default_threads()

    def set_threads(self, count: int) -> None:
        library.set_threads(count)

    def use_openmp(self, count: int) -> bool:
        return library.use_openmp(count)

    def describe(self) -> dict[str, object]:
        return {"threads": library.threads(), "instructions": library.isa()}

    def prepare(self, layers: Layers, cache: Sequence[LayerCache]) -> RunLayers:
        try:
            return LayerStack(layers, cache, self.group)
        except KernelError:
            return super().prepare(layers, cache)

    def runs_whole(self, run: RunLayers) -> bool:
        return isinstance(run, LayerStack)


def _native(x: Tensor, width: int) -> bool:
    """Whether the kernels take x, whose rows are vectors of `width` values: contiguous float32 [rows, n]."""
    return x.dtype == torch.float32 and x.dim() == 2 and width % LANES == 0 and x.is_contiguous()


def _native_attention(qkv: Tensor, heads: Heads, pages: Pages) -> bool:
    grouped = heads[0] // heads[1] <= MAX_SHARED_HEADS
    return grouped and pages[0].dtype == torch.float16 and _native(qkv, heads[2])
