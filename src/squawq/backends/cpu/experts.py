"""Mixture-of-experts layers as csrc/layers.h has them. Pointers leave Python here, so shapes are checked."""

from __future__ import annotations

import ctypes

from squawq.backends.cpu.library import FLOAT, LANES, POINTER, SIZE, address
from squawq.backends.cpu.packed import NativePacked, PackedInt8
from squawq.backends.layer_ops import MixtureOfExperts, Packed
from squawq.errors import KernelError

SCORINGS = {"softmax": 0, "sigmoid": 1}  # `Scores` in csrc/routing.h
SHARED = {"": 0, "added": 1, "gated": 2}  # `Shared` in csrc/layers.h
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}  # `Activation` in csrc/ops.h


class Matrix(ctypes.Structure):  # the structs of csrc/layers.h and routing.h
    _fields_ = (("kind", SIZE), ("weight", POINTER))


class _Routing(ctypes.Structure):
    _fields_ = (
        *((name, SIZE) for name in ("experts", "chosen", "renormalize", "groups", "chosen_groups", "scores")),
        *(("scale", FLOAT), ("bias", POINTER)),
    )


class Experts(ctypes.Structure):
    _fields_ = (
        ("routing", _Routing),
        *((name, SIZE) for name in ("inner", "activation", "shared")),
        *((name, Matrix) for name in ("router", "gate_up", "down")),
    )


def matrix(weight: Packed) -> Matrix:
    """Raises KernelError for a weight of another backend."""
    if not isinstance(weight, NativePacked):
        raise KernelError(f"a weight {list(weight.shape)} is not packed for the library")
    return Matrix(weight.kind, weight.pointer)


def activation(name: str) -> int:
    """Number of an activation. Raises KernelError for one that the library does not have."""
    if name not in ACTIVATIONS:
        raise KernelError(f"no native {name}")
    return ACTIVATIONS[name]


def native_experts(layer: MixtureOfExperts) -> Experts:
    """The C structure, which points into `layer`. Raises KernelError for what the library does not run."""
    routing, hidden, inner = layer.routing, layer.router.shape[1], layer.down.shape[1]
    count, outputs = routing.experts, routing.experts + (layer.shared == "gated")
    shapes = layer.router.shape, layer.gate_up.shape, layer.down.shape
    if shapes != ((outputs, hidden), (count * 2 * inner, hidden), (count * hidden, inner)):
        raise KernelError(f"router, gate and up, and down have shapes {shapes}: not those of {count} experts")
    if inner % LANES or hidden % LANES:
        raise KernelError(f"experts of {hidden} inputs and {inner} inner features: both must be multiples of {LANES}")
    matrices = [matrix(weight) for weight in (layer.router, layer.gate_up, layer.down)]
    if any(found.kind == PackedInt8.kind for found in matrices[1:]):
        raise KernelError("no native experts in int8")
    numbers = routing.experts, routing.top_k, routing.renormalize, routing.groups, routing.top_groups
    struct = _Routing(*numbers, SCORINGS[routing.scoring], routing.scale, address(routing.bias))
    return Experts(struct, inner, activation(layer.activation), SHARED[layer.shared], *matrices)
