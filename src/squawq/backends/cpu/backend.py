"""CPU backend: the C++ kernels of csrc/. What they do not take (another dtype, an odd width) runs on `reference`.

Pointers leave Python here, so shapes and dtypes are checked before each call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from squawq.backends.base import Batch, Gemm, Heads, Layers, Norms, Pages, Rotary, RunLayers
from squawq.backends.cpu import library
from squawq.backends.cpu.library import LANES, POINTER, SIZE, address, check, required
from squawq.backends.cpu.packed import DENSE_TYPES, NativePacked, PackedDense, PackedInt4, PackedInt8, kernel_group
from squawq.backends.layer_ops import ActivationMul, Attention, Matmul, Norm, Operation, Packed, RotateAndStore
from squawq.backends.reference import Reference

MAX_SHARED_HEADS = 16  # query heads for each key-value head
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
        if activation != "silu" or not _native(gate_up, gate_up.shape[-1] // 2):
            return super().activation_mul(gate_up, activation)
        rows, n = gate_up.shape[0], gate_up.shape[1] // 2
        y = gate_up.new_empty(rows, n)
        check(required().squawq_silu_mul(gate_up.data_ptr(), rows, n, y.data_ptr()))
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
        if not _native_attention(qkv, heads, pages) or 2 * rotary[0].shape[1] != heads[2]:
            return super().rotate_and_store(qkv, heads, rotary, norms, eps, slots, pages)
        sources = map(address, (*rotary, *norms))
        targets = map(address, (slots, *pages))
        check(required().squawq_rotate_and_store(qkv.data_ptr(), qkv.shape[0], *heads, *sources, eps, *targets))
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
        return LayerStack.of(layers, cache) or super().prepare(layers, cache)

    def runs_whole(self, run: RunLayers) -> bool:
        return isinstance(run, LayerStack)


def _native(x: Tensor, width: int) -> bool:
    """Whether the kernels take rows x whose inner width is `width`."""
    return x.dtype == torch.float32 and x.dim() == 2 and width % LANES == 0 and x.is_contiguous()


def _native_attention(qkv: Tensor, heads: Heads, pages: Pages) -> bool:
    few = heads[0] // heads[1] <= MAX_SHARED_HEADS
    return few and pages[0].dtype == torch.float16 and _native(qkv, heads[2])


class _Matrix(ctypes.Structure):
    _fields_ = (("kind", SIZE), ("weight", POINTER))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, _Matrix) for name in ("qkv", "out", "gate_up", "down")),
        *((name, POINTER) for name in ("keys", "values")),
        ("window", SIZE),
    )


class LayerStack:
    """Llama-like decoder layers in one call of the library."""

    def __init__(self, structs: Sequence[_Layer], layers: Layers, cache: Sequence[Pages], inner: int) -> None:
        self._kept = layers, cache  # the structures point into them
        self._inner = inner
        self._structs = (_Layer * len(structs))(*structs)

    @classmethod
    def of(cls, layers: Layers, cache: Sequence[Pages]) -> LayerStack | None:
        """None where the library does not run all of this: another order of operations, a width that is no multiple
        of 16, a weight that is not packed for it."""
        query, kv, dim = layers.heads
        whole, each = len(layers.operations) - 1, OPERATIONS_A_LAYER
        found = [_layer(layers.operations[at : at + each], cache) for at in range(0, whole, each)]
        structs = [struct for struct in found if struct is not None]
        if not found or len(structs) < len(found) or dim % LANES or query > kv * MAX_SHARED_HEADS:
            return None
        down = layers.operations[-2]
        inner = down.weight.shape[1] if isinstance(down, Matmul) else 0
        return None if inner % LANES else cls(structs, layers, cache, inner)

    def __call__(self, hidden: Tensor, rotary: Rotary, batch: Batch) -> None:
        rows, width = hidden.shape
        heads, eps = self._kept[0].heads, self._kept[0].eps
        sizes = (rows, width, self._inner, *heads)
        sequences = (batch.sequences.shape[0], batch.pages.data_ptr())
        addresses = map(address, (*rotary, batch.slots, batch.sequences))
        layers = (ctypes.addressof(self._structs), len(self._structs))
        check(required().squawq_layers(*layers, hidden.data_ptr(), *sizes, eps, *addresses, *sequences))


OPERATIONS_A_LAYER = 9


def _layer(operations: Sequence[Operation], cache: Sequence[Pages]) -> _Layer | None:
    match operations:
        case [
            Norm(input_norm),
            Matmul(qkv),
            RotateAndStore(index, query_norm, key_norm),
            Attention(_, window),
            Matmul(out),
            Norm(post_norm),
            Matmul(gate_up),
            ActivationMul("silu"),
            Matmul(down),
        ] if cache[index][0].dtype == torch.float16 and len(input_norm) % LANES == 0:
            linears = [w for w in (qkv, out, gate_up, down) if isinstance(w, NativePacked)]
            if len(linears) < 4:
                return None
            norms = map(address, (input_norm, post_norm, query_norm, key_norm))
            matrices = [_Matrix(linear.kind, linear.pointer) for linear in linears]
            return _Layer(*norms, *matrices, *map(address, cache[index]), window or 0)
    return None
