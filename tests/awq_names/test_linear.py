"""WQLinear_GEMM and packing_utils, against the layout spelled out. compare_autoawq.py asks AutoAWQ itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from awq.modules.linear import WQLinear_GEMM
from awq.utils import packing_utils as packing
from squawq.errors import ConfigError
from squawq.format.groupwise import quantize


def spelled_out(integers: Tensor) -> list[list[int]]:
    """Words of [rows, out]: bits 4i to 4i+3 of word c hold channel 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
    rows = []
    for row in integers.tolist():
        words = []
        for start in range(0, len(row), 8):
            word = sum(int(row[start + channel]) << 4 * i for i, channel in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
            words.append(word - 2**32 if word >= 2**31 else word)
        rows.append(words)
    return rows


def made(
    out: int = 40, rows: int = 64, group: int = 16, *, bias: bool = True, zero_point: bool = True
) -> tuple[WQLinear_GEMM, Tensor, nn.Linear]:
    """A packed linear, its integers [in, out], and the linear that holds what they say."""
    generator = torch.Generator().manual_seed(1)
    found = quantize(torch.randn(out, rows, generator=generator) * 0.1, rows if group == -1 else group, zero_point)
    linear = nn.Linear(rows, out, bias=bias)
    linear.weight.data = found.dequantize()
    zeros = found.zeros.T.float() if zero_point else None
    packed = WQLinear_GEMM.from_linear(linear, 4, group, False, found.scales.T.contiguous(), zeros)
    return packed.eval(), found.q.T, linear


@pytest.mark.parametrize("group", [16, 32, -1])
@pytest.mark.parametrize("zero_point", [True, False])
def test_words_are_the_formats(group: int, zero_point: bool) -> None:
    packed, integers, _ = made(group=group, zero_point=zero_point)
    assert packed.qweight.dtype == packed.qzeros.dtype == torch.int32
    assert packed.qweight.tolist() == spelled_out(integers)
    if not zero_point:
        assert packed.qzeros.tolist() == spelled_out(torch.full((64 // packed.group_size, 40), 8))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.float16, 4e-3), (torch.bfloat16, 4e-2)])
def test_forward_is_the_linear(dtype: torch.dtype, bound: float) -> None:
    packed, _, linear = made()
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2))
    out = packed(x.to(dtype))
    assert out.dtype == dtype
    assert out.shape == (2, 5, 40)
    torch.testing.assert_close(out.float(), linear(x).detach(), atol=bound, rtol=bound)
    assert packed(x[0].to(dtype)).shape == (5, 40)


def test_gradients_reach_the_input() -> None:
    packed, _, linear = made()
    x = torch.randn(3, 64, requires_grad=True)
    packed(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, linear.weight.detach().sum(0).expand(3, 64), atol=1e-3, rtol=1e-3)


def test_integers_beyond_the_range_do_not_touch_their_neighbours() -> None:
    linear = nn.Linear(16, 8, bias=False)
    linear.weight.data.fill_(1.0)
    linear.weight.data[0] = 100.0
    packed = WQLinear_GEMM.from_linear(linear, 4, 16, False, torch.full((1, 8), 0.1), torch.zeros(1, 8))
    weight = packing.dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, 16)
    torch.testing.assert_close(weight[:, 1:], torch.ones(16, 7).half(), atol=1e-3, rtol=0)


def test_zeros_are_rounded_and_do_not_touch_their_neighbours() -> None:
    linear = nn.Linear(16, 8, bias=False)
    zeros = torch.tensor([[16.0, -3.0, 7.9999, 0.0, 3.4, 15.0, 15.6, 8.0]])
    packed = WQLinear_GEMM.from_linear(linear, 4, 16, False, torch.full((1, 8), 0.1), zeros)
    words = packing.reverse_awq_order(*packing.unpack_awq(packed.qweight, packed.qzeros, 4), 4)[1]
    assert words is not None
    assert (words & 15).tolist() == [[15, 0, 8, 0, 3, 15, 15, 8]]


def test_an_empty_one_takes_a_state_dict() -> None:
    packed, _, linear = made()
    empty = WQLinear_GEMM.from_linear(linear, 4, 16, init_only=True)
    assert not empty.qweight.any()
    empty.load_state_dict(packed.state_dict())
    x = torch.randn(1, 64)
    assert torch.equal(empty(x), packed(x))


def test_what_does_not_fit_is_refused() -> None:
    linear = nn.Linear(64, 40)
    with pytest.raises(ConfigError, match=r"\[groups, out\] \[4, 40\]"):
        WQLinear_GEMM.from_linear(linear, 4, 16)
    with pytest.raises(ConfigError, match=r"\[groups, out\] \[4, 40\]"):
        WQLinear_GEMM.from_linear(linear, 4, 16, False, torch.ones(40, 4), torch.ones(40, 4))
    with pytest.raises(ConfigError, match="w_bit is 3; choose 4"):
        WQLinear_GEMM(3, 16, 64, 40, False)
    with pytest.raises(ConfigError, match="in_features 64 is not a multiple of group size 48"):
        WQLinear_GEMM(4, 48, 64, 40, False)
    with pytest.raises(ConfigError, match="out_features 42 is not a multiple of 8"):
        WQLinear_GEMM(4, 16, 64, 42, False)


def test_unpacking_gives_the_integers_back() -> None:
    packed, integers, linear = made()
    raw = packing.unpack_awq(packed.qweight, packed.qzeros, 4)
    weights, zeros = packing.reverse_awq_order(*raw, 4)
    assert zeros is not None
    assert torch.equal(weights & 15, integers.to(torch.int8))
    assert packing.unpack_awq(packed.qweight, None, 4)[1] is None
    dense = packing.dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, 16)
    assert dense.dtype == torch.float16
    torch.testing.assert_close(dense.T.float(), linear.weight.detach(), atol=1e-3, rtol=0)


def test_orders_are_each_others_inverse() -> None:
    assert packing.AWQ_ORDER == [0, 2, 4, 6, 1, 3, 5, 7]
    assert [packing.AWQ_ORDER[i] for i in packing.AWQ_REVERSE_ORDER] == list(range(8))


def test_exllama_words_run_along_the_input_and_zeros_are_one_less() -> None:
    packed, integers, _ = made()
    qweight, qzeros = packing.unpack_reorder_pack(packed.qweight, packed.qzeros, 4)
    assert qweight.shape == (8, 40)
    assert torch.equal((qweight[0] >> 4) & 15, integers[1].to(torch.int32))
    zeros = packing.reverse_awq_order(*packing.unpack_awq(packed.qweight, packed.qzeros, 4), 4)[1]
    assert zeros is not None
    assert int(qzeros[0, 0]) & 15 == (int(zeros[0, 0]) - 1) & 15


def test_other_widths_are_refused() -> None:
    words = torch.zeros(8, 2, dtype=torch.int32)
    with pytest.raises(ConfigError, match="bits is 8"):
        packing.unpack_awq(words, words, 8)
