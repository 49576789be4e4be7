"""The face of the kernels: the right product, and a refusal that lists what was tried."""

from __future__ import annotations

import pytest
import torch

from squawq.backends import dispatch
from squawq.errors import KernelError
from squawq.format.groupwise import quantize

WEIGHT = quantize(torch.randn(24, 64, generator=torch.Generator().manual_seed(0)), 32, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int4_matmul(dtype: torch.dtype) -> None:
    x, bias = torch.randn(3, 5, 64).to(dtype), torch.randn(24)
    expected = x.double() @ WEIGHT.dequantize().double().T + bias.double()
    found = dispatch.matmul(x, WEIGHT, bias)
    assert found.dtype == dtype
    assert torch.allclose(found.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_refusal_lists_what_was_tried() -> None:
    with pytest.raises(
        KernelError,
        match=r"native: the weight is not packed for it; reference int4: activations have 60 features, the weight 64",
    ):
        dispatch.matmul(torch.zeros(2, 60), WEIGHT)
