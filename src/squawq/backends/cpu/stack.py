"""All decoder layers as one call of the library: the list of operations as the structures of csrc/layers.h."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from squawq.backends.base import Batch, Layers, Pages, Rotary
from squawq.backends.cpu.library import LANES, POINTER, SIZE, address, check, required
from squawq.backends.cpu.packed import NativePacked
from squawq.backends.layer_ops import (
    ActivationMul,
    AddResidual,
    Attention,
    Buffer,
    Matmul,
    MixtureOfExperts,
    Norm,
    Operation,
    Packed,
    RotateAndStore,
)
from squawq.errors import KernelError

MAX_SHARED_HEADS = 16  # query heads for each key-value head
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}  # of csrc/ops.h
NORM, MATMUL, ROTATE_AND_STORE, ATTENTION, ACTIVATION_MUL, EXPERTS, ADD_RESIDUAL = range(7)  # Code of csrc/layers.h


class _Matrix(ctypes.Structure):
    _fields_ = (("kind", SIZE), ("weight", POINTER))


class _Experts(ctypes.Structure):
    _fields_ = (
        *((name, SIZE) for name in ("count", "chosen", "normalize", "inner", "activation")),
        ("router", _Matrix),
        *((name, POINTER) for name in ("gate_up", "down")),
    )


class _Operation(ctypes.Structure):
    _fields_ = (
        *((name, SIZE) for name in ("code", "source", "target", "option", "width")),
        *((name, POINTER) for name in ("weight", "other", "keys", "values")),
    )


class LayerStack:
    """Layers over a cache, ready to run. Raises KernelError for what the library does not run.

    Shapes are checked here, once: afterwards pointers leave Python.
    """

    def __init__(self, layers: Layers, cache: Sequence[Pages]) -> None:
        query, kv, dim = layers.heads
        if dim % LANES or query > kv * MAX_SHARED_HEADS or any(keys.dtype != torch.float16 for keys, _ in cache):
            raise KernelError(f"no native attention for heads {layers.heads}")
        self._heads, self._eps, self._cache = layers.heads, layers.eps, cache
        self._kept: list[object] = [layers]  # the structures point into them
        self._now = {Buffer.HIDDEN: 0}  # floats of a row of each buffer
        self._most = dict.fromkeys(Buffer, 0)
        structs = [self._struct(operation) for operation in layers.operations]
        self._structs = (_Operation * len(structs))(*structs)
        self._widths = (ctypes.c_int64 * len(Buffer))(*(-(-self._most[b] // LANES) * LANES for b in Buffer))

    def __call__(self, hidden: Tensor, rotary: Rotary, batch: Batch) -> None:
        layers = (ctypes.addressof(self._structs), len(self._structs))
        sizes = (hidden.shape[0], ctypes.addressof(self._widths), *self._heads, rotary[0].shape[1])
        addresses = map(address, (*rotary, batch.slots, batch.sequences))
        sequences = (batch.sequences.shape[0], batch.pages.data_ptr())
        check(required().squawq_layers(*layers, hidden.data_ptr(), *sizes, self._eps, *addresses, *sequences))

    def _put(self, buffer: Buffer, width: int) -> None:
        self._now[buffer], self._most[buffer] = width, max(width, self._most[buffer])

    def _expect(self, buffer: Buffer, width: int, multiple: int = 1) -> None:
        if self._now.get(buffer) != width or width % multiple:
            raise KernelError(f"{buffer.name} has {self._now.get(buffer)} columns, and {width} are needed")

    def _struct(self, operation: Operation) -> _Operation:
        query, kv, dim = self._heads
        match operation:
            case Norm(weight, source, target, add):
                if source == Buffer.HIDDEN and not self._now[source]:
                    self._put(source, len(weight))
                for buffer in (source, *([Buffer.DELTA] if add else [])):
                    self._expect(buffer, len(weight), LANES)
                self._put(target, len(weight))
                return _Operation(NORM, source, target, add, len(weight), address(weight))
            case Matmul(weight, source, target):
                matrix = self._matrix(weight)
                self._expect(source, weight.shape[1])
                self._put(target, weight.shape[0])
                return _Operation(MATMUL, source, target, matrix.kind, 0, matrix.weight)
            case RotateAndStore(layer, query_norm, key_norm):
                self._expect(Buffer.WIDE, (query + 2 * kv) * dim)
                norms = map(address, (query_norm, key_norm))
                return _Operation(ROTATE_AND_STORE, 0, 0, 0, 0, *norms, *map(address, self._cache[layer]))
            case Attention(layer, window):
                self._expect(Buffer.WIDE, (query + 2 * kv) * dim)
                self._put(Buffer.NARROW, query * dim)
                return _Operation(ATTENTION, 0, 0, window or 0, 0, None, None, *map(address, self._cache[layer]))
            case ActivationMul(activation):
                inner = self._now[Buffer.WIDE] // 2
                self._expect(Buffer.WIDE, 2 * inner, 2 * LANES)
                self._put(Buffer.NARROW, inner)
                return _Operation(ACTIVATION_MUL, 0, 0, _activation(activation), inner)
            case MixtureOfExperts():
                return _Operation(EXPERTS, 0, 0, 0, 0, self._experts(operation))
            case AddResidual():
                self._expect(Buffer.DELTA, self._now[Buffer.HIDDEN])
                return _Operation(ADD_RESIDUAL)

    def _experts(self, layer: MixtureOfExperts) -> int:
        hidden, inner, count = layer.router.shape[1], layer.down[0].shape[1], len(layer.down)
        shapes = {*(w.shape for w in layer.gate_up), *(w.shape for w in layer.down), layer.router.shape}
        if shapes != {(2 * inner, hidden), (hidden, inner), (count, hidden)} or inner % LANES:
            raise KernelError(f"no native experts of {inner} columns")
        self._expect(Buffer.NORMED, hidden, LANES)
        for buffer, width in ((Buffer.WIDE, 2 * inner), (Buffer.NARROW, inner), (Buffer.DELTA, hidden)):
            self._put(buffer, width)
        lists = [(_Matrix * count)(*map(self._matrix, weights)) for weights in (layer.gate_up, layer.down)]
        sizes = (count, layer.top_k, layer.renormalize, inner, _activation(layer.activation))
        struct = _Experts(*sizes, self._matrix(layer.router), *map(ctypes.addressof, lists))
        self._kept += [*lists, struct]
        return ctypes.addressof(struct)

    @staticmethod
    def _matrix(weight: Packed) -> _Matrix:
        if not isinstance(weight, NativePacked):
            raise KernelError(f"a weight {list(weight.shape)} is not packed for the library")
        return _Matrix(weight.kind, weight.pointer)


def _activation(name: str) -> int:
    if name not in ACTIVATIONS:
        raise KernelError(f"no native {name}")
    return ACTIVATIONS[name]
