"""All decoder layers in one call of the library: their operations as the structs of csrc/layers.h and ops.h.

Pointers leave Python here, so shapes are checked.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from squawq.backends.base import Batch, Group, Heads, LayerCache, Layers, Rotary, States
from squawq.backends.cpu.experts import activation as activation_code
from squawq.backends.cpu.experts import matrix, native_experts
from squawq.backends.cpu.group import SharedGroup
from squawq.backends.cpu.library import FLOAT, LANES, POINTER, SIZE, address, check, required
from squawq.backends.layer_ops import (
    ActivationMul,
    AddResidual,
    AllReduce,
    Attention,
    Buffer,
    GatedDeltaRule,
    Matmul,
    MixtureOfExperts,
    Norm,
    Operation,
    OutputGate,
    RotateAndStore,
)
from squawq.errors import KernelError

MAX_SHARED_HEADS = 16  # query heads per key-value head
# `Code` in csrc/layers.h
NORM, MATMUL, ROTATE_AND_STORE, ATTENTION, ACTIVATION_MUL, EXPERTS, ADD_RESIDUAL, ALL_REDUCE = range(8)
OUTPUT_GATE, DELTA_RULE = range(8, 10)
MAX_DELTA_DIM, MAX_DELTA_KERNEL = 256, 16  # of a head, of the convolution: csrc/ops.h


class Rotation(ctypes.Structure):  # the structs of csrc/ops.h and layers.h
    _fields_ = (
        *((name, SIZE) for name in ("first", "pairs", "interleaved", "whole", "rope_first")),
        *((name, POINTER) for name in ("q_norm", "k_norm")),
    )


class Scoring(ctypes.Structure):
    _fields_ = (("window", SIZE), *((name, FLOAT) for name in ("scale", "cap", "beta")), ("original", SIZE))


class DeltaRule(ctypes.Structure):
    _fields_ = (
        *((name, SIZE) for name in ("key_heads", "value_heads", "key_dim", "value_dim", "kernel")),
        *((name, POINTER) for name in ("convolution", "rate", "bias", "norm", "inputs", "memory")),
    )


class _Operation(ctypes.Structure):
    _fields_ = (
        *((name, SIZE) for name in ("code", "source", "target", "option", "width")),
        *((name, POINTER) for name in ("weight", "keys", "values", "order")),
    )


def native_rotation(operation: RotateAndStore, heads: Heads) -> Rotation:
    """Raises KernelError for norms or pairs of another size."""
    query, kv, dim = heads
    for norm, count in ((operation.query_norm, query), (operation.key_norm, kv)):
        if norm is not None and len(norm) != (count * dim if operation.whole else dim):
            raise KernelError(f"a norm of {len(norm)} weights does not fit heads {heads}")
    pairs = -1 if operation.pairs is None else operation.pairs
    if 2 * pairs > dim:
        raise KernelError(f"{pairs} pairs do not fit heads {heads}")
    flags = operation.interleaved, operation.whole, operation.rope_first
    return Rotation(operation.first, pairs, *flags, address(operation.query_norm), address(operation.key_norm))


def native_scoring(operation: Attention, dim: int) -> Scoring:
    numbers = operation.scale_of(dim), operation.cap, operation.beta
    return Scoring(operation.window or 0, *numbers, operation.original)


def native_delta_rule(rule: GatedDeltaRule, states: States) -> DeltaRule | None:
    """None where the kernel does not take these sizes."""
    sizes, weights = rule.sizes, (rule.convolution, rule.rate, rule.bias, rule.norm)
    heads = sizes.value_heads, sizes.value_heads, sizes.value_dim
    shapes = (sizes.kernel, sizes.channels), *((count,) for count in heads)
    wrong = any(t.shape != shape for t, shape in zip(weights, shapes, strict=True))
    wrong |= any(t.shape[1:] != shape for t, shape in zip(states, sizes.state_shapes, strict=True))
    wrong |= any(t.dtype != torch.float32 or not t.is_contiguous() for t in (*weights, *states))
    dims = sizes.key_dim, sizes.value_dim
    if wrong or sizes.kernel > MAX_DELTA_KERNEL or any(dim % LANES or dim > MAX_DELTA_DIM for dim in dims):
        return None
    numbers = sizes.key_heads, sizes.value_heads, *dims, sizes.kernel
    return DeltaRule(*numbers, *map(address, (*weights, *states)))


class LayerStack:
    """Runs all decoder layers on a KV cache in one call of the library. The constructor checks all shapes, once.

    Raises:
        KernelError: The library does not run one of the operations.
    """

    def __init__(self, layers: Layers, cache: Sequence[LayerCache], group: Group | None = None) -> None:
        query, kv, dim = layers.heads
        pages = [cache[op.layer] for op in layers.operations if isinstance(op, Attention)]
        if dim % LANES or query > kv * MAX_SHARED_HEADS or any(keys.dtype != torch.float16 for keys, _ in pages):
            raise KernelError(f"no native attention for heads {layers.heads}")
        self._heads, self._eps, self._cache, self._group = layers.heads, layers.eps, cache, group
        self._kept: list[object] = [layers]  # keeps alive what the C structures point to
        self._width = {Buffer.HIDDEN: 0}  # current floats per row of each buffer
        self._max_width = dict.fromkeys(Buffer, 0)
        structs = [self._struct(operation) for operation in layers.operations]
        self._structs = (_Operation * len(structs))(*structs)
        self._widths = (ctypes.c_int64 * len(Buffer))(*(-(-self._max_width[b] // LANES) * LANES for b in Buffer))

    def __call__(self, hidden: Tensor, rotary: Rotary, batch: Batch) -> None:
        layers = (ctypes.addressof(self._structs), len(self._structs))
        sizes = (hidden.shape[0], ctypes.addressof(self._widths), *self._heads, rotary[0].shape[1])
        addresses = map(address, (*rotary, batch.slots, batch.sequences))
        sequences = (batch.sequences.shape[0], batch.pages.data_ptr(), batch.places.data_ptr())
        check(required().squawq_layers(*layers, hidden.data_ptr(), *sizes, self._eps, *addresses, *sequences))

    def _set_width(self, buffer: Buffer, width: int) -> None:
        self._width[buffer], self._max_width[buffer] = width, max(width, self._max_width[buffer])

    def _first_width(self, source: Buffer, width: int) -> None:
        """The first operation says how wide the residual stream is."""
        if source == Buffer.HIDDEN and not self._width[source]:
            self._set_width(source, width)

    def _check_width(self, buffer: Buffer, width: int, multiple: int = 1) -> None:
        if self._width.get(buffer) != width or width % multiple:
            raise KernelError(f"{buffer.name} has {self._width.get(buffer)} columns, and {width} are needed")

    def _struct(self, operation: Operation) -> _Operation:
        query, kv, dim = self._heads
        match operation:
            case Norm(weight, source, target, add):
                self._first_width(source, len(weight))
                for buffer in (source, *([Buffer.DELTA] if add else [])):
                    self._check_width(buffer, len(weight), LANES)
                self._set_width(target, len(weight))
                return _Operation(NORM, source, target, add, len(weight), address(weight))
            case Matmul(weight, source, target):
                found = matrix(weight)
                self._first_width(source, weight.shape[1])
                self._check_width(source, weight.shape[1])
                self._set_width(target, weight.shape[0])
                sizes = found.kind, weight.shape[1], found.weight
                return _Operation(MATMUL, source, target, *sizes, None, None, address(weight.order))
            case RotateAndStore(layer):
                self._check_width(Buffer.WIDE, (query + 2 * kv) * dim)
                rotation = self._keep(native_rotation(operation, self._heads))
                return _Operation(ROTATE_AND_STORE, 0, 0, 0, 0, rotation, *map(address, self._cache[layer]))
            case Attention(layer):
                self._check_width(Buffer.WIDE, (query + 2 * kv) * dim)
                self._set_width(Buffer.NARROW, query * dim)
                scoring = self._keep(native_scoring(operation, dim))
                return _Operation(ATTENTION, 0, 0, 0, 0, scoring, *map(address, self._cache[layer]))
            case OutputGate():
                width = self._width.get(Buffer.NARROW, 0)
                self._check_width(Buffer.GATES, width, LANES)
                return _Operation(OUTPUT_GATE, 0, 0, 0, width)
            case GatedDeltaRule(layer, sizes):
                struct = native_delta_rule(operation, self._cache[layer])
                if struct is None:
                    raise KernelError(f"no native delta rule of {sizes}")
                self._check_width(Buffer.WIDE, sizes.channels + sizes.values)
                self._check_width(Buffer.GATES, 2 * sizes.value_heads)
                self._set_width(Buffer.NARROW, sizes.values)
                return _Operation(DELTA_RULE, 0, 0, 0, 0, self._keep(struct))
            case ActivationMul(activation):
                inner = self._width[Buffer.WIDE] // 2
                self._check_width(Buffer.WIDE, 2 * inner, 2 * LANES)
                self._set_width(Buffer.NARROW, inner)
                return _Operation(ACTIVATION_MUL, 0, 0, activation_code(activation), inner)
            case MixtureOfExperts():
                return _Operation(EXPERTS, 0, 0, 0, 0, self._experts(operation))
            case AddResidual():
                self._check_width(Buffer.DELTA, self._width[Buffer.HIDDEN])
                return _Operation(ADD_RESIDUAL)
            case AllReduce():
                if not isinstance(self._group, SharedGroup):
                    raise KernelError("no native sum over the ranks")
                width = self._width[Buffer.DELTA]
                return _Operation(ALL_REDUCE, Buffer.DELTA, 0, 0, width, self._group.pointer)

    def _experts(self, layer: MixtureOfExperts) -> int:
        struct, hidden = native_experts(layer), layer.router.shape[1]
        self._check_width(Buffer.NORMED, hidden, LANES)
        if layer.shared:
            self._check_width(Buffer.DELTA, hidden)
        self._set_width(Buffer.DELTA, hidden)
        return self._keep(struct)

    def _keep(self, struct: ctypes.Structure) -> int:
        """Its address, which stays valid."""
        self._kept.append(struct)
        return ctypes.addressof(struct)
