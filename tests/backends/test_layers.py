"""Lists of operations in one call of the library, against the reference: what no family of today has, too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from squawq.backends import backend_for
from squawq.backends.base import Backend, Batch, Layers
from squawq.backends.cpu import library
from squawq.backends.layer_ops import (
    ActivationMul,
    AddResidual,
    Attention,
    Buffer,
    Matmul,
    Norm,
    Operation,
    RotateAndStore,
)

HIDDEN, INNER, HEADS = 64, 48, (4, 2, 16)
QKV = (HEADS[0] + 2 * HEADS[1]) * HEADS[2]

if library.load() is None:
    pytest.skip("the native kernels are not built on this machine", allow_module_level=True)


def operations(backend: Backend, kind: str) -> list[Operation]:
    """Two layers: kind is one of the cases below."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(shape[-1] ** -0.5)

    def norm() -> Tensor:
        return 1 + 0.1 * torch.randn(HIDDEN, generator=generator)

    found: list[Operation] = []
    for layer in range(2):
        linears = [backend.pack_dense([weight(*shape)]) for shape in ((QKV, HIDDEN), (HIDDEN, HEADS[0] * HEADS[2]))]
        gate_up, down = weight(2 * INNER, HIDDEN), weight(HIDDEN, INNER)
        activation = "gelu_tanh" if kind == "gelu" else "silu"
        mlp: list[Operation] = [
            Matmul(backend.pack_dense([gate_up]), Buffer.NORMED, Buffer.WIDE),
            ActivationMul(activation),
            Matmul(backend.pack_dense([down]), Buffer.NARROW, Buffer.DELTA),
        ]
        after = [Norm(norm(), Buffer.DELTA, Buffer.DELTA, add=False)] if kind == "norms after" else []
        found += [
            Norm(norm(), add=layer > 0),
            Matmul(linears[0], Buffer.NORMED, Buffer.WIDE),
            RotateAndStore(layer),
            Attention(layer),
            Matmul(linears[1], Buffer.NARROW, Buffer.DELTA),
            *after,
            Norm(norm()),
            *mlp,
            *after,
        ]
    return [*found, AddResidual()]


@pytest.mark.parametrize("kind", ["plain", "norms after", "gelu", "partial rotary"])
def test_as_the_reference(kind: str) -> None:
    rows, results = 23, []
    hidden = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(rows)
    batch = Batch(
        positions, positions, positions, torch.tensor([[0, rows, 0, 0]]), torch.tensor([0, 1]).int(), positions
    )
    frequencies = 1.0 / 10000 ** (torch.arange(0, 8 if kind == "partial rotary" else 16, 2) / 16)
    frequencies = torch.stack([frequencies, torch.ones_like(frequencies)])
    for name in ("cpu", "reference"):
        backend = backend_for("cpu", name, exact=True)
        key, value = backend.page_shapes(HEADS[1], HEADS[2])
        cache = [(torch.zeros(2, *key).half(), torch.zeros(2, *value).half()) for _ in range(2)]
        run = backend.prepare(Layers(tuple(operations(backend, kind)), HEADS, 1e-5), cache)
        assert backend.runs_whole(run) == (name == "cpu")
        x = hidden.clone()
        run(x, backend.rotary(positions, frequencies), batch)
        results.append(x)
        alone = hidden[:1].clone()
        one = Batch(positions[:1], positions[:1], positions[:1], torch.tensor([[0, 1, 0, 0]]), batch.pages, batch.ids)
        run(alone, backend.rotary(positions[:1], frequencies), one)
        if name == "cpu":
            assert torch.equal(alone[0], x[0])
    assert (results[0] - hidden).abs().mean() > 0.1
    assert torch.allclose(results[0], results[1], atol=2e-3)
