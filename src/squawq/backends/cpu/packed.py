"""Weights in the layouts of the CPU kernels (csrc/ops.h): int4, int8 and floating point.

Pointers leave Python here, so shapes and dtypes are checked before packing.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from squawq.backends.cpu.library import INT, LANES, POINTER, SIZE, address, check, required
from squawq.backends.layer_ops import Packed
from squawq.errors import KernelError

LARGE_PAGE = 2 << 20
GROUPS = (128, 64, 32, 16)  # of the kernels: inputs that share an int8 activation scale
DENSE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def kernel_group(group: int) -> int | None:
    """The group size of the kernel for weights in groups of `group`; None where no kernel fits."""
    return next((g for g in GROUPS if group % g == 0), None)


def _buffer(size: int, dtype: torch.dtype) -> Tensor:
    """Zeros [size] on huge pages (madvise) where the system has them: each token reads all weights once, and TLB misses
    of small pages cost bandwidth."""
    nbytes = size * dtype.itemsize
    memory = mmap.mmap(-1, nbytes + LARGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # untouched pages cost nothing
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % LARGE_PAGE
    if (whole := nbytes // LARGE_PAGE * LARGE_PAGE) and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE, start, whole)
    return torch.frombuffer(memory, dtype=dtype, count=size, offset=start)


def _fields(pointers: str, sizes: str) -> tuple[tuple[str, type], ...]:
    return (*((name, POINTER) for name in pointers.split()), *((name, SIZE) for name in sizes.split()))


class _Int4(ctypes.Structure):
    _fields_ = _fields("weight scales zeros bias", "out in_ group")


class _Int8(ctypes.Structure):
    _fields_ = _fields("weight scales bias", "out in_ group")


class _Dense(ctypes.Structure):
    _fields_ = (*_fields("weight bias", "out in_"), ("type", INT))


def _bias(bias: Tensor | None, out: int) -> Tensor | None:
    if bias is not None and bias.shape != (out,):
        raise KernelError(f"bias has shape {tuple(bias.shape)}; {(out,)} is needed")
    return None if bias is None else bias.float().contiguous()


def _blocks(out: int) -> int:
    return -(-out // LANES)


class NativePacked(Packed):
    """A weight that the library multiplies.

    Attributes:
        kind: `Kind` of csrc/layers.h.
        pointer: Address of the C structure.
    """

    kind: int
    pointer: int


class PackedInt4(NativePacked):
    """Int4 weight [out, in], filled from AWQ GEMM tensors part by part.

    Memory: out * in / 2 bytes, and 3 bytes for each kernel group of 16 to 128 inputs.

    Args:
        group: Inputs that share a scale and zero in the checkpoint.
        bias: [out].
        exact: Multiply float32 activations instead of int8 ones.
    """

    def __init__(self, out: int, in_: int, group: int, *, bias: Tensor | None = None, exact: bool = False) -> None:
        kernel = kernel_group(group)
        if kernel is None or in_ % group or out % 8:
            raise KernelError(f"no native kernel for int4 weights [{out}, {in_}] in groups of {group}")
        self.shape, self._repeat = (out, in_), group // kernel
        self.kind = 1 if exact else 0
        blocks, groups = _blocks(out), in_ // kernel
        self._weight = _buffer(blocks * in_ * LANES // 2, torch.uint8)
        self._scales = torch.zeros(blocks * groups * LANES, dtype=torch.float16)
        self._zeros = torch.zeros(blocks * groups * LANES, dtype=torch.uint8)
        self._bias = _bias(bias, out)
        addresses = [address(t) for t in (self._weight, self._scales, self._zeros, self._bias)]
        self._struct = _Int4(*addresses, out, in_, kernel)
        self.pointer = ctypes.addressof(self._struct)

    def fill(self, first_row: int, qweight: Tensor, scales: Tensor, qzeros: Tensor | None) -> None:
        """Pack the AWQ GEMM tensors of n rows.

        Args:
            first_row: Output row of the first; a multiple of 8.
            qweight: int32 [in, n / 8].
            scales: [groups, n].
            qzeros: int32 [groups, n / 8]; None where every zero is 8.
        """
        rows, groups = qweight.shape[1] * 8, scales.shape[0]
        fits = qweight.dtype == torch.int32 and qweight.shape[0] == self.shape[1] and scales.shape[1] == rows
        fits &= groups * self._repeat * self._struct.group == self.shape[1]
        fits &= first_row % 8 == 0 and first_row + rows <= self.shape[0]
        fits &= qzeros is None or (qzeros.shape == (groups, rows // 8) and qzeros.dtype == torch.int32)
        if not fits:
            raise KernelError(
                f"qweight {tuple(qweight.shape)} and scales {tuple(scales.shape)} do not fit {self.shape}"
            )
        if scales.dtype != torch.float16:
            scales = scales.to(torch.float16)
            if not bool(torch.isfinite(scales).all()):
                raise KernelError("scales beyond float16 do not fit the native kernels")
        sources = [t if t is None else t.contiguous() for t in (qweight, qzeros, scales)]
        check(
            required().squawq_pack_gemm(
                *map(address, sources),
                *(rows, self.shape[1], groups, self._repeat, first_row),
                *map(address, (self._weight, self._scales, self._zeros)),
            )
        )


class PackedInt8(NativePacked):
    """Weight [out, in] rounded to int8 with one scale per row; out * in bytes."""

    kind = 2

    def __init__(self, weight: Tensor) -> None:
        out, in_ = self.shape = (weight.shape[0], weight.shape[1])
        kernel = kernel_group(in_)
        if kernel is None or weight.dtype not in DENSE_TYPES:
            raise KernelError(f"no native int8 kernel for weights {tuple(weight.shape)} of {weight.dtype}")
        self._weight = _buffer(_blocks(out) * LANES * in_, torch.int8)
        self._scales = torch.zeros(_blocks(out) * LANES)
        source = weight.contiguous()
        arguments = (address(source), DENSE_TYPES[weight.dtype], out, in_)
        check(required().squawq_pack_int8(*arguments, address(self._weight), address(self._scales)))
        self._struct = _Int8(address(self._weight), address(self._scales), None, out, in_, kernel)
        self.pointer = ctypes.addressof(self._struct)


class PackedDense(NativePacked):
    """float16, bfloat16 or float32 weight [out, in], stacked from parts [out_i, in]; multiplied in float32."""

    kind = 3

    def __init__(self, parts: Sequence[Tensor], *, bias: Tensor | None = None) -> None:
        out, in_ = self.shape = (sum(p.shape[0] for p in parts), parts[0].shape[1])
        dtype = parts[0].dtype
        if dtype not in DENSE_TYPES or any(p.dtype != dtype or p.shape[1] != in_ for p in parts):
            raise KernelError(
                f"no native kernel for weights of {', '.join(f'{p.dtype} {tuple(p.shape)}' for p in parts)}"
            )
        self._weight = _buffer(_blocks(out) * LANES * in_, dtype)
        row = 0
        for part in parts:
            source = part.contiguous()
            arguments = (address(source), part.shape[0], in_, row, dtype.itemsize)
            check(required().squawq_pack_dense(*arguments, address(self._weight)))
            row += part.shape[0]
        self._bias = _bias(bias, out)
        self._struct = _Dense(address(self._weight), address(self._bias), out, in_, DENSE_TYPES[dtype])
        self.pointer = ctypes.addressof(self._struct)
