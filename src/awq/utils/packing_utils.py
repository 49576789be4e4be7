"""AWQ GEMM's words, under AutoAWQ's names; same values and dtypes as AutoAWQ's for the same tensors.

Knows the nibble orders; squawq.format.groupwise is where new code should look.
"""

from __future__ import annotations

import torch
from torch import Tensor

from squawq.errors import ConfigError
from squawq.format import groupwise
from squawq.format.groupwise import ORDER, PER_WORD, unpack

AWQ_ORDER = list(ORDER)
AWQ_REVERSE_ORDER = [ORDER.index(channel) for channel in range(PER_WORD)]
BITS = 4


def _check(bits: int) -> None:
    if bits != BITS:
        raise ConfigError(f"bits is {bits!r}; AWQ words hold {BITS}-bit integers")


def _nibbles(words: Tensor) -> Tensor:
    """int8 [rows, 8 x words], each with higher bits of its word above the four that count, as AutoAWQ leaves them."""
    shifts = torch.arange(0, 32, BITS, device=words.device)
    return (words[..., None] >> shifts).to(torch.int8).flatten(1)


def unpack_awq(qweight: Tensor, qzeros: Tensor | None, bits: int) -> tuple[Tensor, Tensor | None]:
    """int32 words [rows, n] to int8 [rows, 8n] in the words' own order; mask with 15 to get the integers."""
    _check(bits)
    return _nibbles(qweight), None if qzeros is None else _nibbles(qzeros)


def reverse_awq_order(iweights: Tensor, izeros: Tensor | None, bits: int) -> tuple[Tensor, Tensor | None]:
    """Columns in the words' order to the order of output channels."""
    _check(bits)

    def ordered(values: Tensor) -> Tensor:
        return values.view(len(values), -1, PER_WORD)[..., AWQ_REVERSE_ORDER].flatten(1)

    return ordered(iweights), None if izeros is None else ordered(izeros)


def pack_exllama(iweights: Tensor, izeros: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integers [in, out] packed along `in`, zeros [groups, out] along `out`, in natural order: ExLlama words."""
    _check(bits)
    shifts = torch.arange(0, 32, BITS, device=iweights.device)
    rows = iweights.view(-1, PER_WORD, iweights.shape[1]) << shifts[:, None]
    columns = izeros.view(len(izeros), -1, PER_WORD) << shifts
    return rows.sum(1).to(torch.int32), columns.sum(2).to(torch.int32)


def unpack_reorder_pack(qweight: Tensor, qzeros: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """AWQ GEMM words to ExLlama's; its zeros are stored less one."""
    _check(bits)
    return pack_exllama(unpack(qweight).to(torch.int8), unpack(qzeros).to(torch.int8) - 1, bits)


def dequantize_gemm(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    bits: int,
    group_size: int,  # noqa: ARG001 (the shape of scales says it)
) -> Tensor:
    """Weights [in, out] in the dtype of `scales`."""
    _check(bits)
    return groupwise.dequantize_gemm(qweight, scales, qzeros, scales.dtype)
