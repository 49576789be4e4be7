"""Nibble order: golden words, round trips for all inputs, and a checkpoint that AutoAWQ itself wrote."""

from __future__ import annotations

import pytest
import torch
from conftest import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from squawq.errors import CheckpointError
from squawq.format.groupwise import dequantize_gemm, from_gemm, pack, quantize, to_gemm, unpack


def test_golden_word() -> None:
    """Channels 0..7 hold 0..7: nibbles from the lowest are channels 0 2 4 6 1 3 5 7."""
    assert pack(torch.arange(8).view(1, 8)).tolist() == [[0x75316420]]
    assert pack(torch.full((1, 8), 15)).tolist() == [[-1]]


def test_golden_bytes() -> None:
    """One row of sixteen channels as it lies in the file, little endian."""
    values = torch.tensor([[15, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]])
    assert pack(values).numpy().tobytes().hex() == "1f53206497dba8ec"


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 40), words=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_round_trip(rows: int, words: int, seed: int) -> None:
    values = torch.randint(0, 16, (rows, words * 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(values)
    assert packed.dtype == torch.int32
    assert torch.equal(unpack(packed), values)
    assert torch.equal(pack(unpack(packed)), packed)


def test_word_against_shifts() -> None:
    values = torch.randint(0, 16, (5, 8), generator=torch.Generator().manual_seed(3))
    for row, word in zip(values.tolist(), pack(values).flatten().tolist(), strict=True):
        expected = sum(row[channel] << (4 * i) for i, channel in enumerate([0, 2, 4, 6, 1, 3, 5, 7]))
        assert word & 0xFFFFFFFF == expected


@pytest.mark.parametrize("group", [16, 32, 128])
@pytest.mark.parametrize("zero_point", [True, False])
def test_gemm_round_trip(group: int, zero_point: bool) -> None:
    tensor = quantize(torch.randn(24, 128, generator=torch.Generator().manual_seed(2)), group, zero_point)
    stored = to_gemm(tensor)
    assert stored["qweight"].shape == (128, 3)
    assert stored["qzeros"].shape == stored["scales"].view(128 // group, -1)[:, :3].shape
    again = from_gemm(stored["qweight"], stored["scales"], stored["qzeros"])
    assert torch.equal(again.q, tensor.q)
    assert torch.equal(again.zeros, tensor.zeros)
    assert torch.equal(again.scales, tensor.scales)
    if not zero_point:
        assert torch.equal(from_gemm(stored["qweight"], stored["scales"], None).zeros, tensor.zeros)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("zero_point", [True, False])
def test_dequantized_is_rounded_once(dtype: torch.dtype, zero_point: bool) -> None:
    stored = to_gemm(quantize(torch.randn(24, 128, generator=torch.Generator().manual_seed(2)), 32, zero_point))
    qweight, scales, zeros = stored["qweight"], stored["scales"], stored["qzeros"]
    for qzeros in (zeros,) if zero_point else (zeros, None):
        found = dequantize_gemm(qweight, scales, qzeros, dtype)
        assert found.dtype == dtype
        assert torch.equal(found, from_gemm(qweight, scales, qzeros).dequantize().T.to(dtype))


def test_shapes_that_do_not_belong_together() -> None:
    with pytest.raises(CheckpointError, match="scales"):
        from_gemm(torch.zeros(32, 2, dtype=torch.int32), torch.zeros(1, 24).half(), None)
    with pytest.raises(CheckpointError, match="qzeros"):
        from_gemm(
            torch.zeros(32, 2, dtype=torch.int32), torch.zeros(1, 16).half(), torch.zeros(2, 2, dtype=torch.int32)
        )
    with pytest.raises(CheckpointError, match="int32"):
        from_gemm(torch.zeros(32, 2), torch.zeros(1, 16).half(), None)


def test_autoawq_checkpoint_unpacks_and_repacks_bit_identically() -> None:
    stored = load_file(shared_data("autoawq-babyllama") / "model.safetensors")
    linears = sorted(name.removesuffix(".qweight") for name in stored if name.endswith(".qweight"))
    assert len(linears) == 35
    for name in linears:
        parts = {kind: stored[f"{name}.{kind}"] for kind in ("qweight", "scales", "qzeros")}
        again = to_gemm(from_gemm(**parts))
        for kind, tensor in parts.items():
            assert torch.equal(again[kind], tensor), f"{name}.{kind}"
