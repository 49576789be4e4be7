"""INT4 weights on a GPU: their layout, and Triton kernels that multiply with them and dequantize them.

Layout: a block is 128 inputs of one output, as 32 words of 16 bits; nibble j of word i is input 32 * j + i of it. So
a 32-bit register holds four pairs of neighbouring inputs, which one instruction each turns into two 16-bit floats (the
number is put into the mantissa of 1024 or 128, as in Kim et al., arXiv 2211.10017), already where the tensor cores want
them. Blocks of neighbouring outputs are contiguous: words int16 [blocks, out, 32].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from squawq.backends.cuda.elementwise import await_inputs
from squawq.backends.layer_ops import Packed
from squawq.format.groupwise import ORDER, PER_WORD, SYMMETRIC_ZERO, unpack

BLOCK = 128  # inputs
WORDS = 32  # of a block
INTERPRETED = triton.knobs.runtime.interpret  # no inline assembly there
TRITON = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass
class Int4Weight(Packed):
    """words int16 [blocks, out, 32]; grids int32 [groups, out]: scale in the low half, offset in the high one.

    All is in the activations' dtype: scales, offsets, which are -(magic + zero), with a magic number of 1024 in float16
    and 128 in bfloat16, and the weights: scale * (magic + number + offset).
    """

    words: Tensor
    grids: Tensor
    dtype: torch.dtype
    group: int  # inputs; 0: all
    shape: tuple[int, int]
    bias: Tensor | None = None


def magic(dtype: torch.dtype) -> int:
    return {torch.float16: 1024, torch.bfloat16: 128}[dtype]


def empty(out: int, in_: int, group: int, dtype: torch.dtype, device: torch.device) -> Int4Weight:
    """A weight for `pack` to fill. group: inputs, 0 for all; they are padded to whole blocks."""
    words = torch.empty(-(-in_ // BLOCK), out, WORDS, dtype=torch.int16, device=device)
    grids = torch.empty(in_ // (group or in_), out, dtype=torch.int32, device=device)
    return Int4Weight(words, grids, dtype, group, (out, in_))


def pack(weight: Int4Weight, rows: slice, qweight: Tensor, scales: Tensor, qzeros: Tensor | None) -> None:
    """Repack AWQ GEMM tensors into these output rows of a weight. Peak memory beside both: twice qweight's at most."""
    words, grids = weight.words[:, rows], weight.grids[:, rows]
    blocks, out, _ = words.shape
    qweight = F.pad(qweight, (0, 0, 0, blocks * BLOCK - len(qweight)))
    quarters = qweight.view(blocks, 4, WORDS, out // PER_WORD)
    target = words.view(blocks, out // PER_WORD, PER_WORD, WORDS)
    for nibble, channel in enumerate(ORDER):
        packed = (quarters[:, 0] >> 4 * nibble) & 15
        for j in range(1, 4):
            packed |= ((quarters[:, j] >> 4 * nibble) & 15) << 4 * j
        target[:, :, channel] = packed.transpose(1, 2)
    zeros = torch.full_like(scales, SYMMETRIC_ZERO) if qzeros is None else unpack(qzeros)
    offsets = (-(zeros.float() + magic(weight.dtype))).to(weight.dtype)
    halves = torch.stack([scales.to(weight.dtype).view(torch.int16), offsets.view(torch.int16)], -1)
    grids.copy_(halves.view(torch.int32).squeeze(-1))


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """x to the nearest number of dtype; the interpreter itself cuts bfloat16 off."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _weights(words, z0, z1, z2, z3, s0, s1, s2, s3, INTERPRETED: tl.constexpr):
    """The four weights of each word in the dtype of z0 to z3, which are offsets; s0 to s3 are scales; all alike."""
    if INTERPRETED:
        base = 1024.0 if z0.dtype == tl.float16 else 128.0
        bits = words.to(tl.int32)
        w0 = ((bits & 15).to(tl.float32) + base + z0.to(tl.float32)) * s0.to(tl.float32)
        w1 = (((bits >> 4) & 15).to(tl.float32) + base + z1.to(tl.float32)) * s1.to(tl.float32)
        w2 = (((bits >> 8) & 15).to(tl.float32) + base + z2.to(tl.float32)) * s2.to(tl.float32)
        w3 = (((bits >> 12) & 15).to(tl.float32) + base + z3.to(tl.float32)) * s3.to(tl.float32)
        w0, w1 = _rounded(w0, z0.dtype), _rounded(w1, z0.dtype)
        w2, w3 = _rounded(w2, z0.dtype), _rounded(w3, z0.dtype)
    elif z0.dtype == tl.float16:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c;
            shr.b32 a, $4, 4;
            shr.b32 b, $4, 8;
            shr.b32 c, $4, 12;
            lop3.b32 $0, $4, 0x000F000F, 0x64006400, 0xEA;
            lop3.b32 $1, a, 0x000F000F, 0x64006400, 0xEA;
            lop3.b32 $2, b, 0x000F000F, 0x64006400, 0xEA;
            lop3.b32 $3, c, 0x000F000F, 0x64006400, 0xEA;
            add.f16x2 $0, $0, $5;
            add.f16x2 $1, $1, $6;
            add.f16x2 $2, $2, $7;
            add.f16x2 $3, $3, $8;
            mul.f16x2 $0, $0, $9;
            mul.f16x2 $1, $1, $10;
            mul.f16x2 $2, $2, $11;
            mul.f16x2 $3, $3, $12;
            }""",
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
            [words, z0, z1, z2, z3, s0, s1, s2, s3],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, c, one, none;
            shr.b32 a, $4, 4;
            shr.b32 b, $4, 8;
            shr.b32 c, $4, 12;
            mov.b32 one, 0x3F803F80;
            mov.b32 none, 0x80008000;
            lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $1, a, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $2, b, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $3, c, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 $0, $0, one, $5;
            fma.rn.bf16x2 $1, $1, one, $6;
            fma.rn.bf16x2 $2, $2, one, $7;
            fma.rn.bf16x2 $3, $3, one, $8;
            fma.rn.bf16x2 $0, $0, $9, none;
            fma.rn.bf16x2 $1, $1, $10, none;
            fma.rn.bf16x2 $2, $2, $11, none;
            fma.rn.bf16x2 $3, $3, $12, none;
            }""",
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
            [words, z0, z1, z2, z3, s0, s1, s2, s3],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    return w0, w1, w2, w3


@triton.jit
def _scale(grid, dtype: tl.constexpr):
    return (grid & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _offset(grid, dtype: tl.constexpr):
    return (grid >> 16).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _grid(grids, n, N, k, K, here, GROUP: tl.constexpr):
    """Offset and scale of each output, int32 [OUTPUTS], of the group in which input k is."""
    if GROUP:
        n += tl.minimum(k, K - 1) // GROUP * N  # padding has no groups of its own
    return tl.load(grids + n, mask=here, other=0)


@triton.jit
def load_block(words, grids, n, N, block, K, here, GROUP: tl.constexpr):
    """A block of outputs n as it lies in memory: words, and the grid of each quarter of the inputs."""
    i = tl.arange(0, 32)
    packed = tl.load(words + (block * N + n)[:, None] * 32 + i[None, :], mask=here[:, None], other=0)
    g0 = _grid(grids, n, N, block * 128, K, here, GROUP)
    g1, g2, g3 = g0, g0, g0
    if GROUP == 32 or GROUP == 64:
        g2 = _grid(grids, n, N, block * 128 + 64, K, here, GROUP)
        g3 = g2
    if GROUP == 32:
        g1 = _grid(grids, n, N, block * 128 + 32, K, here, GROUP)
        g3 = _grid(grids, n, N, block * 128 + 96, K, here, GROUP)
    return packed, g0, g1, g2, g3


@triton.jit
def _wide(grid, dtype: tl.constexpr):
    """Offsets and scales, [OUTPUTS, 32]."""
    shape: tl.constexpr = [grid.shape[0], 32]
    offset, scale = _offset(grid, dtype)[:, None], _scale(grid, dtype)[:, None]
    return tl.broadcast_to(offset, shape), tl.broadcast_to(scale, shape)


@triton.jit
def multiply(packed, g0, g1, g2, g3, tokens, k, K, there, acc, PADDED: tl.constexpr, INTERPRETED: tl.constexpr):
    """Add the product of a block, whose first inputs are k, and the tokens."""
    if PADDED:
        x0 = tl.load(tokens + k[:, None], mask=there & (k < K)[:, None], other=0.0)
        x1 = tl.load(tokens + k[:, None] + 32, mask=there & (k + 32 < K)[:, None], other=0.0)
        x2 = tl.load(tokens + k[:, None] + 64, mask=there & (k + 64 < K)[:, None], other=0.0)
        x3 = tl.load(tokens + k[:, None] + 96, mask=there & (k + 96 < K)[:, None], other=0.0)
    else:
        x0 = tl.load(tokens + k[:, None], mask=there, other=0.0)
        x1 = tl.load(tokens + k[:, None] + 32, mask=there, other=0.0)
        x2 = tl.load(tokens + k[:, None] + 64, mask=there, other=0.0)
        x3 = tl.load(tokens + k[:, None] + 96, mask=there, other=0.0)
    z0, s0 = _wide(g0, x0.dtype)
    z1, s1 = _wide(g1, x0.dtype)
    z2, s2 = _wide(g2, x0.dtype)
    z3, s3 = _wide(g3, x0.dtype)
    w0, w1, w2, w3 = _weights(packed, z0, z1, z2, z3, s0, s1, s2, s3, INTERPRETED)
    acc = _dot(w0, x0, acc, INTERPRETED)
    acc = _dot(w1, x1, acc, INTERPRETED)
    acc = _dot(w2, x2, acc, INTERPRETED)
    return _dot(w3, x3, acc, INTERPRETED)


@triton.jit
def _dot(w, x, acc, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # the interpreter does not multiply bfloat16
        return acc + tl.dot(w.to(tl.float32), x.to(tl.float32))
    return tl.dot(w, x, acc)


@triton.jit
def matmul_kernel(
    x,  # [M, K]
    words,  # int16 [blocks, N, 32]
    grids,  # int32 [groups, N]
    out,  # float32 [splits, M, N]
    M,
    N,
    K,
    blocks,
    split,  # blocks of a split
    GROUP: tl.constexpr,  # inputs of a group: 32, 64, a multiple of 128, or 0 for all
    PADDED: tl.constexpr,  # K is no multiple of 128
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,  # start before the kernel that makes x has ended
    INTERPRETED: tl.constexpr,
):
    """Partial sums of x @ weight.T over each split of the inputs, always in the same order."""
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    m = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    first = tl.program_id(1) * split
    last = tl.minimum(first + split, blocks)
    i = tl.arange(0, 32)
    here, there = n < N, (m < M)[None, :]
    if DEPENDENT:  # a block that needs no x yet
        packed, g0, g1, g2, g3 = load_block(words, grids, n, N, first, K, here, GROUP)
    await_inputs(DEPENDENT)
    acc = tl.zeros([OUTPUTS, TOKENS], tl.float32)
    tokens = x + m[None, :] * K
    if DEPENDENT:
        acc = multiply(packed, g0, g1, g2, g3, tokens, first * 128 + i, K, there, acc, PADDED, INTERPRETED)
        first += 1
    for block in tl.range(first, last, num_stages=STAGES):
        packed, g0, g1, g2, g3 = load_block(words, grids, n, N, block, K, here, GROUP)
        acc = multiply(packed, g0, g1, g2, g3, tokens, block * 128 + i, K, there, acc, PADDED, INTERPRETED)
    to = out + tl.program_id(1) * M * N + m[None, :] * N + n[:, None]
    tl.store(to, acc, mask=here[:, None] & there)


@triton.jit
def dequantize_kernel(words, grids, out, N, K, GROUP: tl.constexpr, OUTPUTS: tl.constexpr, DTYPE: tl.constexpr):
    """The weight [N, K] in the dtype of `out`: each number less its zero, times its scale, rounded once."""
    block = tl.program_id(1)
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    i = tl.arange(0, 32)
    here = n < N
    packed = tl.load(words + (block * N + n)[:, None] * 32 + i[None, :], mask=here[:, None], other=0)
    to = out + n.to(tl.int64)[:, None] * K + block * 128 + i[None, :]
    bits = packed.to(tl.int32)
    base = -1024.0 if tl.float16 == DTYPE else -128.0
    for j in tl.static_range(4):
        k = block * 128 + 32 * j
        g = n
        if GROUP:
            g += tl.minimum(k, K - 1) // GROUP * N
        grid = tl.load(grids + g, mask=here, other=0)
        zero = base - _offset(grid, DTYPE).to(tl.float32)
        value = (((bits >> 4 * j) & 15).to(tl.float32) - zero[:, None]) * _scale(grid, DTYPE).to(tl.float32)[:, None]
        kept = here[:, None] & (k + i < K)[None, :]
        tl.store(to + 32 * j, value.to(out.dtype.element_ty), mask=kept)
