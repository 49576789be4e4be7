"""The registry and the reference backend: products, and refusals that list what was tried."""

from __future__ import annotations

import pytest
import torch

from squawq.backends import BACKENDS, backend_for
from squawq.errors import KernelError
from squawq.format.groupwise import quantize, to_gemm

WEIGHT = quantize(torch.randn(24, 64, generator=torch.Generator().manual_seed(0)), 32, True)
PARTS = [tuple(to_gemm(WEIGHT)[name] for name in ("qweight", "scales", "qzeros"))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int4_matmul(dtype: torch.dtype) -> None:
    x, bias = torch.randn(3, 5, 64).to(dtype), torch.randn(24)
    expected = x.double() @ WEIGHT.dequantize().double().T + bias.double()
    backend = backend_for("cpu", "reference", exact=True)
    found = backend.matmul(x, backend.pack_int4(24, 64, 32, PARTS, bias))  # type: ignore[arg-type]
    assert found.dtype == dtype
    assert torch.allclose(found.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_symmetric_parts_beside_others() -> None:
    """Stacked linears of which one has no zeros."""
    symmetric = quantize(torch.randn(16, 64), 32, False)
    gemm = to_gemm(symmetric)
    backend = backend_for("cpu", "reference")
    parts = [*PARTS, (gemm["qweight"], gemm["scales"], None)]
    found = backend.matmul(torch.eye(64), backend.pack_int4(40, 64, 32, parts)).T  # type: ignore[arg-type]
    assert torch.equal(found, torch.cat([WEIGHT.dequantize(), symmetric.dequantize()]))


def test_int8_rounds_to_half_a_step() -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    backend = backend_for("cpu", "reference")
    found = backend.matmul(torch.eye(64), backend.pack_int8(weight)).T
    assert bool(((found - weight).abs() <= weight.abs().amax(1, keepdim=True) / 127 / 2 + 1e-6).all())


def test_refusal_lists_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_for("cpu", "reference")
    with pytest.raises(KernelError, match=r"activations torch.float32 \(2, 60\) do not fit a weight \[24, 64\]"):
        backend.matmul(torch.zeros(2, 60), backend.pack_int4(24, 64, 32, PARTS))  # type: ignore[arg-type]
    monkeypatch.delitem(BACKENDS, "reference")
    with pytest.raises(KernelError, match="no backend runs on meta; tried cpu: it runs on the CPU"):
        backend_for("meta")
    with pytest.raises(KernelError, match="backend is 'gpu'; choose one of cpu"):
        backend_for("cpu", "gpu")
