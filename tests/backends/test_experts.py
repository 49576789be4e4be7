"""Mixture-of-experts layers of the reference and of the library against a plain loop over rows and experts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from expert_layers import ROUTINGS, chosen, expected, packed, random_weights, rows_of

from squawq.backends import backend_for
from squawq.backends.base import route
from squawq.backends.cpu import library
from squawq.backends.layer_ops import MixtureOfExperts, Routing
from squawq.errors import KernelError

NATIVE = library.load() is not None
needs_library = pytest.mark.skipif(not NATIVE, reason="the native kernels are not built on this machine")


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
    for name, kind in product(("renormalized", "groups"), ("int4", "16-bit")):
        layer = packed(backend, weights, ROUTINGS[name], kind)
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
        shapes = (2, hidden), (4 * inner, hidden), (down, inner)
        router, gate_up, downs = (backend.pack_dense([torch.zeros(*shape)]) for shape in shapes)
        return MixtureOfExperts(router, gate_up, downs, Routing(2, 1))

    assert backend.experts_declines(layer(32, 16, 64)) is None
    assert "multiples of 16" in str(backend.experts_declines(layer(32, 24, 64)))
    assert "not those of 2 experts" in str(backend.experts_declines(layer(32, 16, 96)))
    with pytest.raises(KernelError, match="do not fit experts of 32 inputs"):
        backend.experts(torch.zeros(1, 48), layer(32, 16, 64), None)
