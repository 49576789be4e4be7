"""Random mixture-of-experts layers, and what they compute, as a plain loop over tokens and experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from squawq.backends.base import Backend
from squawq.backends.layer_ops import MixtureOfExperts, Routing
from squawq.format.groupwise import GroupwiseTensor, quantize, to_gemm

EXPERTS, HIDDEN, INNER, GROUP = 12, 64, 224, 32
ROUTINGS = {
    "softmax": Routing(EXPERTS, 3),
    "renormalized": Routing(EXPERTS, 3, renormalize=True),
    "one": Routing(EXPERTS, 1),
    "all": Routing(EXPERTS, EXPERTS, scale=0.5),
    "bias": Routing(EXPERTS, 3, "sigmoid", True, torch.linspace(-0.4, 0.4, EXPERTS), scale=2.5),
    "groups": Routing(EXPERTS, 3, "sigmoid", True, torch.linspace(0.4, -0.4, EXPERTS), groups=4, top_groups=2),
}


@dataclass
class Weights:
    """Integers of each expert's gate, up and down, and what they say in float64: [experts, inner or hidden, in]."""

    router: Tensor  # float32 [experts, hidden]
    shared_gate: Tensor  # [1, hidden]
    integers: tuple[list[GroupwiseTensor], ...]
    gate: Tensor
    up: Tensor
    down: Tensor


@cache
def random_weights() -> Weights:
    generator = torch.Generator().manual_seed(0)

    def normal(out: int, in_: int) -> Tensor:
        return torch.randn(out, in_, generator=generator).mul_(in_**-0.5)

    shapes = (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)
    integers = tuple([quantize(normal(*shape), GROUP, zero_point=True) for _ in range(EXPERTS)] for shape in shapes)
    stacks = (torch.stack([one.dequantize().double() for one in part]) for part in integers)
    return Weights(2 * normal(EXPERTS, HIDDEN), normal(1, HIDDEN), integers, *stacks)


def packed(backend: Backend, weights: Weights, routing: Routing, kind: str, shared: Any = "") -> MixtureOfExperts:
    """The layer in a backend's layout; kind: "int4" or "16-bit"."""
    gate, up, downs = weights.integers
    stacks = []
    for parts in ([part for pair in zip(gate, up, strict=True) for part in pair], downs):
        out, in_ = sum(len(part.q) for part in parts), parts[0].q.shape[1]
        if kind == "int4":
            gemms = (to_gemm(part) for part in parts)
            tensors = ((gemm["qweight"], gemm["scales"], gemm["qzeros"]) for gemm in gemms)
            stacks.append(backend.pack_int4(out, in_, GROUP, tensors))
        else:
            stacks.append(backend.pack_dense([part.dequantize() for part in parts]))
    router = [weights.router, weights.shared_gate] if shared == "gated" else [weights.router]
    gate_up, down = stacks
    bias = None if routing.bias is None else routing.bias.to(backend.device)
    return MixtureOfExperts(backend.pack_dense(router), gate_up, down, replace(routing, bias=bias), shared)


def chosen(scores: list[float], routing: Routing) -> list[int]:
    """As DeepSeek-V3's report says it, one expert at a time."""
    bias = [0.0] * EXPERTS if routing.bias is None else routing.bias.tolist()
    keys = [score + add for score, add in zip(scores, bias, strict=True)]
    size = EXPERTS // routing.groups
    sums = [sum(sorted(keys[g * size : (g + 1) * size])[-2:]) for g in range(routing.groups)]
    best = sorted(range(routing.groups), key=lambda g: -sums[g])[: routing.top_groups]
    allowed = [e for e in range(EXPERTS) if routing.groups == 1 or e // size in best]
    return sorted(allowed, key=lambda e: -keys[e])[: routing.top_k]


def expected(
    x: Tensor, weights: Weights, routing: Routing, shared: Tensor | None = None, gated: bool = False
) -> Tensor:
    """float64."""
    rows = []
    for index, row in enumerate(x.double()):
        logits = weights.router.double() @ row
        scores = logits.sigmoid() if routing.scoring == "sigmoid" else logits.softmax(0)
        ids = chosen(scores.tolist(), routing)
        whole = scores[ids].sum() if routing.renormalize else torch.ones(())
        total = torch.zeros(HIDDEN, dtype=torch.float64)
        if shared is not None:
            total += shared[index] * ((weights.shared_gate.double() @ row).sigmoid() if gated else 1)
        for e in ids:
            inner = torch.nn.functional.silu(weights.gate[e] @ row) * (weights.up[e] @ row)
            total += routing.scale * scores[e] / whole * (weights.down[e] @ inner)
        rows.append(total)
    return torch.stack(rows)


def rows_of(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))
