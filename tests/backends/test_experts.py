"""Mixture-of-experts layers of the backends against a plain loop over rows and experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from squawq.backends import backend_for
from squawq.backends.base import Backend, route
from squawq.backends.cpu import library
from squawq.backends.layer_ops import MixtureOfExperts, Routing
from squawq.errors import KernelError
from squawq.format.groupwise import GroupwiseTensor, quantize, to_gemm

EXPERTS, HIDDEN, INNER, GROUP = 12, 64, 208, 16
NATIVE = library.load() is not None
needs_library = pytest.mark.skipif(not NATIVE, reason="the native kernels are not built on this machine")
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
    gate, up, down = weights.integers
    stacks = []
    for parts in ([part for pair in zip(gate, up, strict=True) for part in pair], down):
        out, in_ = sum(len(part.q) for part in parts), parts[0].q.shape[1]
        if kind == "int4":
            gemms = (to_gemm(part) for part in parts)
            tensors = ((gemm["qweight"], gemm["scales"], gemm["qzeros"]) for gemm in gemms)
            stacks.append(backend.pack_int4(out, in_, GROUP, tensors))
        else:
            stacks.append(backend.pack_dense([part.dequantize() for part in parts]))
    router = [weights.router, weights.shared_gate] if shared == "gated" else [weights.router]
    return MixtureOfExperts(backend.pack_dense(router), *stacks, routing, shared)


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


@pytest.mark.parametrize("name", ROUTINGS)
def test_routing(name: str) -> None:
    routing, weights = ROUTINGS[name], random_weights()
    logits = rows_of(20) @ weights.router.T
    shares, ids = route(logits, routing)
    for row, (given, numbers) in zip(logits, zip(shares, ids, strict=True), strict=True):
        scores = row.sigmoid() if routing.scoring == "sigmoid" else row.softmax(0)
        assert numbers.tolist() == chosen(scores.tolist(), routing)
        whole = scores[numbers].sum() if routing.renormalize else 1
        assert torch.allclose(given, routing.scale * scores[numbers] / whole)


@pytest.fixture(params=["cpu", "reference"])
def backend_name(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and not NATIVE:
        pytest.skip("the native kernels are not built on this machine")
    return str(request.param)


@pytest.mark.parametrize("kind", ["int4", "16-bit"])
@pytest.mark.parametrize("name", ROUTINGS)
def test_in_float32(name: str, kind: str, backend_name: str) -> None:
    backend, weights = backend_for("cpu", backend_name, exact=True), random_weights()
    x = rows_of(19)
    layer = packed(backend, weights, ROUTINGS[name], kind)
    assert backend.experts_declines(layer) is None
    found, wanted = backend.experts(x, layer, None), expected(x, weights, ROUTINGS[name])
    assert wanted.abs().max() > 0.1
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("shared", ["added", "gated"])
def test_a_shared_expert(shared: str, backend_name: str) -> None:
    backend, weights, routing = backend_for("cpu", backend_name, exact=True), random_weights(), ROUTINGS["bias"]
    x, output = rows_of(5), rows_of(5, seed=2)
    kept = output.clone()
    found = backend.experts(x, packed(backend, weights, routing, "int4", shared), output)
    wanted = expected(x, weights, routing, output, shared == "gated")
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()
    assert torch.equal(output, kept)


@pytest.fixture(params=library.ISAS if NATIVE else ["none"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn."""
    if not NATIVE:
        pytest.skip("the native kernels are not built on this machine")
    before = library.isa()
    try:
        library.set_isa(request.param)
    except Exception:
        pytest.skip(f"{request.param} is not on this machine")
    yield request.param
    library.set_isa(before)


def test_with_activations_in_int8(instructions: str) -> None:
    """Each instruction set; rows of a batch give the bits that they give alone, in any order and number."""
    assert library.isa() == instructions
    backend, weights = backend_for("cpu", "cpu"), random_weights()
    x = rows_of(40)
    for name in ("renormalized", "all"):
        layer = packed(backend, weights, ROUTINGS[name], "int4")
        found, wanted = backend.experts(x, layer, None), expected(x, weights, ROUTINGS[name])
        assert (found - wanted).abs().max() < 3e-2 * wanted.abs().max()
        order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
        assert torch.equal(backend.experts(x[order], layer, None), found[order])
        for at in (0, 8, 39):
            assert torch.equal(backend.experts(x[at : at + 1], layer, None), found[at : at + 1])
        for count in (2, 3, 5, 9, 17):
            assert torch.equal(backend.experts(x[:count], layer, None), found[:count])


@needs_library
def test_threads_change_no_bit() -> None:
    backend, before = backend_for("cpu", "cpu"), library.threads()
    layer, x = packed(backend, random_weights(), ROUTINGS["softmax"], "int4"), rows_of(40)
    found = []
    for threads in (1, 3):
        library.set_threads(threads)
        found += [backend.experts(x, layer, None), backend.experts(x[:1], layer, None)]
    library.set_threads(before)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


@needs_library
def test_numbers_that_are_not_finite_reach_only_their_row() -> None:
    backend, weights = backend_for("cpu", "cpu"), random_weights()
    for name in ("renormalized", "groups"):
        layer = packed(backend, weights, ROUTINGS[name], "int4")
        x = rows_of(6)
        clean = backend.experts(x, layer, None)
        x[2] = float("nan")
        found = backend.experts(x, layer, None)
        assert not found[2].isfinite().any()
        others = [0, 1, 3, 4, 5]
        assert torch.equal(found[others], clean[others])


@needs_library
def test_what_the_library_declines() -> None:
    backend = backend_for("cpu", "cpu")

    def layer(hidden: int, inner: int, down: int) -> MixtureOfExperts:
        matrices = (torch.zeros(*shape) for shape in ((2, hidden), (4 * inner, hidden), (down, inner)))
        return MixtureOfExperts(*(backend.pack_dense([matrix]) for matrix in matrices), Routing(2, 1))

    assert backend.experts_declines(layer(32, 16, 64)) is None
    assert "multiples of 16" in str(backend.experts_declines(layer(32, 24, 64)))
    assert "not those of 2 experts" in str(backend.experts_declines(layer(32, 16, 96)))
    with pytest.raises(KernelError, match="do not fit experts of 32 inputs"):
        backend.experts(torch.zeros(1, 48), layer(32, 16, 64), None)
