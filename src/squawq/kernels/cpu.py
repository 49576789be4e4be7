"""The native CPU kernels (csrc/), loaded by ctypes: weights in their packed layouts, and a call for each operation.

Optional: without the library `load()` gives None and everything runs on torch, slower. Pointers leave Python here:
weights are checked here, what goes into an operation by `dispatch` and `nn/`. SQUAWQ_ISA forces an instruction set
(avx512, avx2, neon, scalar), or "torch" for none; SQUAWQ_THREADS sets the number of threads, by default every core that
this process may use.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from squawq.errors import ConfigError, KernelError
from squawq.format.groupwise import quantize
from squawq.format.packing import to_gemm

logger = logging.getLogger("squawq")
ABI = 2
LARGE_PAGE = 2 << 20
LANES = 16  # output rows of a packed block, tokens of a page
ISAS = ("avx512", "avx2", "neon", "scalar", "torch")
GROUPS = (128, 64, 32, 16)  # inputs that share an activation scale
ROUNDED_ROWS = 4096
MOST_SHARED_HEADS = 16  # query heads for each key-value head
DENSE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "squawq_set_isa": (ctypes.c_char_p,),
    "squawq_set_threads": (_INT,),
    "squawq_pack_gemm": (_POINTER,) * 3 + (_SIZE,) * 5 + (_POINTER,) * 3,
    "squawq_pack_dense": (_POINTER, _SIZE, _SIZE, _SIZE, _SIZE, _POINTER),
    "squawq_pack_int8": (_POINTER, _INT, _SIZE, _SIZE, _POINTER, _POINTER),
    "squawq_int4_matmul": (_POINTER, _SIZE, _POINTER, _INT, _POINTER),
    "squawq_int8_matmul": (_POINTER, _SIZE, _POINTER, _POINTER),
    "squawq_dense_matmul": (_POINTER, _SIZE, _POINTER, _POINTER),
    "squawq_rms_norm": (_POINTER, _POINTER, _POINTER, _FLOAT, _SIZE, _SIZE, _POINTER),
    "squawq_silu_mul": (_POINTER, _SIZE, _SIZE, _POINTER),
    "squawq_rotary": (_POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _POINTER),
    "squawq_rotate_and_store": (_POINTER, *(_SIZE,) * 4, *(_POINTER,) * 4, _FLOAT, *(_POINTER,) * 3),
    "squawq_layers": (_POINTER, _SIZE, _POINTER, *(_SIZE,) * 6, _FLOAT, *(_POINTER,) * 4, _SIZE, _POINTER, _POINTER),
    "squawq_attention": (_POINTER, *(_SIZE,) * 3, _POINTER, _SIZE, _POINTER, _SIZE, *(_POINTER,) * 3),
}


@cache
def load() -> ctypes.CDLL | None:
    """The library, ready to run, or None where it was not built or SQUAWQ_ISA=torch.

    Raises ConfigError for a SQUAWQ_ISA or SQUAWQ_THREADS that cannot be.
    """
    wanted = os.environ.get("SQUAWQ_ISA", "")
    if wanted and wanted not in ISAS:
        raise ConfigError(f"SQUAWQ_ISA is {wanted!r}; choose one of {', '.join(ISAS)}")
    path = None if wanted == "torch" else _find()
    if path is None:
        if wanted not in ("", "torch"):
            raise ConfigError(
                f"SQUAWQ_ISA is {wanted!r}, but the native kernels are not built; reinstall with a compiler"
            )
        if wanted != "torch":
            logger.warning(
                "the native CPU kernels are not built; running on torch, much slower. "
                "Install a C++ compiler and reinstall squawq."
            )
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        logger.warning("the native CPU kernels cannot be loaded; running on torch, much slower: %s", error)
        return None
    if library.squawq_abi() != ABI:
        raise ConfigError(f"{path} is of another version of squawq; reinstall the package")
    library.squawq_isa.restype = ctypes.c_char_p
    for name, types in _SIGNATURES.items():
        getattr(library, name).argtypes = types
    if wanted and library.squawq_set_isa(wanted.encode()):
        raise ConfigError(f"SQUAWQ_ISA is {wanted!r}, which this machine or this build does not have")
    library.squawq_set_threads(default_threads())
    return library


def _find() -> Path | None:
    """The library beside this package; an editable install keeps it in a second folder of the same package."""
    folders = import_module("squawq.kernels").__path__
    return next((p for f in folders if (p := Path(f) / "libsquawq.so").is_file()), None)


def default_threads() -> int:
    """SQUAWQ_THREADS, or the cores that this process may use. Raises ConfigError for a number that cannot be."""
    given = os.environ.get("SQUAWQ_THREADS")
    if not given:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(cores, _quota() or cores)
    if not given.isdecimal() or not 1 <= int(given) <= 1024:
        raise ConfigError(f"SQUAWQ_THREADS is {given!r}; it must be a whole number from 1 to 1024")
    return int(given)


def _quota() -> int | None:
    """Cores that a container's limit comes to (cgroup v2's cpu.max), rounded up."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, -(-int(quota) // int(period)))
    except (OSError, ValueError):  # no limit, or none of this kind
        return None


def _library() -> ctypes.CDLL:
    library = load()
    if library is None:
        raise KernelError("the native kernels are not built here")
    return library


def isa() -> str:
    """The instruction set in use: one of ISAS; "torch" without the library."""
    library = load()
    return "torch" if library is None else str(library.squawq_isa().decode())


def set_isa(name: str) -> None:
    """Switch to another instruction set. Raises ConfigError where it is not there."""
    if _library().squawq_set_isa(name.encode()):
        raise ConfigError(f"instruction set {name!r} is not in this build or not on this machine")


def threads() -> int:
    """Threads of the kernels; torch's without the library."""
    library = load()
    return torch.get_num_threads() if library is None else int(library.squawq_threads())


def set_threads(count: int) -> None:
    """Threads of the kernels (torch's without the library). Raises ConfigError unless it is 1 to 1024."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 1024:
        raise ConfigError(f"threads is {count!r}; it must be a whole number, 1 to 1024")
    library = load()
    if library is None:
        torch.set_num_threads(count)
    else:
        _check(library.squawq_set_threads(count))
        if threads() != count:
            raise ConfigError(f"threads is {count}; only {threads()} could be started here")


def _check(code: int) -> None:
    if code:
        raise MemoryError("the native kernels could not get memory")


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def kernel_group(group: int) -> int | None:
    """The inputs that share an activation scale where weights have groups of `group`; None where no kernel fits."""
    return next((g for g in GROUPS if group % g == 0), None)


def _buffer(size: int, dtype: torch.dtype) -> Tensor:
    """Zeros for a packed weight, on large memory pages where the system gives them: weights are read from end to end
    for every token, and translating the addresses of small pages costs bandwidth."""
    nbytes = size * dtype.itemsize
    memory = mmap.mmap(-1, nbytes + LARGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # untouched pages cost nothing
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % LARGE_PAGE
    if (whole := nbytes // LARGE_PAGE * LARGE_PAGE) and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE, start, whole)
    return torch.frombuffer(memory, dtype=dtype, count=size, offset=start)


class _Int4(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("weight", "scales", "zeros", "bias")),
        *((name, _SIZE) for name in ("out", "in_", "group")),
    )


class _Int8(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("weight", "scales", "bias")),
        *((name, _SIZE) for name in ("out", "in_", "group")),
    )


class _Dense(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("weight", "bias")),
        *((name, _SIZE) for name in ("out", "in_")),
        ("type", _INT),
    )


def _bias(bias: Tensor | None, out: int) -> Tensor | None:
    if bias is not None and bias.shape != (out,):
        raise KernelError(f"bias has shape {tuple(bias.shape)}; {(out,)} is needed")
    return None if bias is None else bias.float().contiguous()


def _blocks(out: int) -> int:
    return -(-out // LANES)


class PackedInt4:
    """4-bit weights [out, in] in the kernels' layout (csrc/ops.h), filled from AWQ GEMM tensors part by part.

    exact: multiply float32 activations instead of int8 ones. Memory: out * in / 2 bytes and 3 more for every
    kernel group of 16 to 128 inputs.
    """

    def __init__(self, out: int, in_: int, group: int, *, bias: Tensor | None = None, exact: bool = False) -> None:
        kernel = kernel_group(group)
        if kernel is None or in_ % group or out % 8:
            raise KernelError(f"no native kernel for int4 weights [{out}, {in_}] in groups of {group}")
        self.shape, self.exact, self._repeat = (out, in_), exact, group // kernel
        self.kind = 1 if exact else 0  # of csrc/layers.h
        blocks, groups = _blocks(out), in_ // kernel
        self._weight = _buffer(blocks * in_ * LANES // 2, torch.uint8)
        self._scales = torch.zeros(blocks * groups * LANES, dtype=torch.float16)
        self._zeros = torch.zeros(blocks * groups * LANES, dtype=torch.uint8)
        self._bias = _bias(bias, out)
        addresses = [_address(t) for t in (self._weight, self._scales, self._zeros, self._bias)]
        self._struct = _Int4(*addresses, out, in_, kernel)
        self.pointer = ctypes.addressof(self._struct)

    def fill(self, first_row: int, qweight: Tensor, scales: Tensor, qzeros: Tensor | None) -> None:
        """AWQ GEMM tensors of some rows: qweight int32 [in, n/8], scales 16-bit [groups, n], qzeros int32
        [groups, n/8] or None for zeros of 8."""
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
        _check(
            _library().squawq_pack_gemm(
                *map(_address, sources),
                *(rows, self.shape[1], groups, self._repeat, first_row),
                *map(_address, (self._weight, self._scales, self._zeros)),
            )
        )

    @classmethod
    def rounded(cls, weight: Tensor, group: int) -> PackedInt4:
        """A dense weight [out, in] rounded to nearest. Memory beside the result: a slice of some thousand rows."""
        out, in_ = weight.shape
        packed = cls(out, in_, group)
        for row in range(0, out, ROUNDED_ROWS):
            gemm = to_gemm(quantize(weight[row : row + ROUNDED_ROWS], group, zero_point=True))
            packed.fill(row, gemm["qweight"], gemm["scales"], gemm["qzeros"])
        return packed

    def __call__(self, x: Tensor) -> Tensor:
        """x float32 [rows, in] -> float32 [rows, out]."""
        y = x.new_empty(x.shape[0], self.shape[0])
        _check(_library().squawq_int4_matmul(x.data_ptr(), x.shape[0], self.pointer, self.exact, y.data_ptr()))
        return y


class PackedInt8:
    """Weights [out, in] rounded to int8 with one scale a row, in the kernels' layout: out * in bytes."""

    kind = 2

    def __init__(self, weight: Tensor) -> None:
        out, in_ = self.shape = (weight.shape[0], weight.shape[1])
        kernel = kernel_group(in_)
        if kernel is None or weight.dtype not in DENSE_TYPES:
            raise KernelError(f"no native int8 kernel for weights {tuple(weight.shape)} of {weight.dtype}")
        self._weight = _buffer(_blocks(out) * LANES * in_, torch.int8)
        self._scales = torch.zeros(_blocks(out) * LANES)
        source = weight.contiguous()
        arguments = (_address(source), DENSE_TYPES[weight.dtype], out, in_)
        _check(_library().squawq_pack_int8(*arguments, _address(self._weight), _address(self._scales)))
        self._struct = _Int8(_address(self._weight), _address(self._scales), None, out, in_, kernel)
        self.pointer = ctypes.addressof(self._struct)

    def __call__(self, x: Tensor) -> Tensor:
        """x float32 [rows, in] -> float32 [rows, out]."""
        y = x.new_empty(x.shape[0], self.shape[0])
        _check(_library().squawq_int8_matmul(x.data_ptr(), x.shape[0], self.pointer, y.data_ptr()))
        return y


class PackedDense:
    """float16, bfloat16 or float32 weights [out, in] in the kernels' layout; multiplied in float32."""

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
            arguments = (_address(source), part.shape[0], in_, row, dtype.itemsize)
            _check(_library().squawq_pack_dense(*arguments, _address(self._weight)))
            row += part.shape[0]
        self._bias = _bias(bias, out)
        self._struct = _Dense(_address(self._weight), _address(self._bias), out, in_, DENSE_TYPES[dtype])
        self.pointer = ctypes.addressof(self._struct)

    def __call__(self, x: Tensor) -> Tensor:
        """x float32 [rows, in] -> float32 [rows, out]."""
        y = x.new_empty(x.shape[0], self.shape[0])
        _check(_library().squawq_dense_matmul(x.data_ptr(), x.shape[0], self.pointer, y.data_ptr()))
        return y


Packed = PackedInt4 | PackedInt8 | PackedDense


def add_rms_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """reference.add_rms_norm for contiguous float32 rows whose length is a multiple of 16."""
    y = torch.empty_like(hidden)
    rows, n = hidden.shape
    _check(_library().squawq_rms_norm(*map(_address, (hidden, delta, weight)), eps, rows, n, y.data_ptr()))
    return y


def silu_mul(gate_up: Tensor) -> Tensor:
    """reference.silu_mul for contiguous float32 [rows, 2n], n a multiple of 16."""
    rows, n = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, n)
    _check(_library().squawq_silu_mul(gate_up.data_ptr(), rows, n, y.data_ptr()))
    return y


def rotary(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """reference.rotary: cos and sin, float32 [rows, head_dim / 2]."""
    rows, half = positions.shape[0], frequencies.shape[0]
    cos, sin = torch.empty(rows, half), torch.empty(rows, half)
    addresses = map(_address, (cos, sin))
    _check(_library().squawq_rotary(positions.data_ptr(), rows, frequencies.data_ptr(), half, *addresses))
    return cos, sin


def rotate_and_store(
    qkv: Tensor,
    heads: tuple[int, int, int],
    rotary: tuple[Tensor, Tensor],
    norms: tuple[Tensor | None, Tensor | None],
    eps: float,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """reference.rotate_and_store for contiguous float32 rows and a float16 cache."""
    sources = map(_address, (*rotary, *norms))
    targets = map(_address, (slots, keys, values))
    _check(_library().squawq_rotate_and_store(qkv.data_ptr(), qkv.shape[0], *heads, *sources, eps, *targets))


def attention(
    qkv: Tensor,
    heads: tuple[int, int, int],
    sequences: Tensor,
    pages: Tensor,
    window: int | None,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """reference.attention for contiguous float32 rows and a float16 cache."""
    y = qkv.new_empty(qkv.shape[0], heads[0] * heads[2])
    batch = (sequences.data_ptr(), sequences.shape[0], pages.data_ptr(), window or 0)
    _check(_library().squawq_attention(qkv.data_ptr(), *heads, *batch, *map(_address, (keys, values, y))))
    return y


class _Matrix(ctypes.Structure):
    _fields_ = (("kind", _SIZE), ("weight", _POINTER))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        *((name, _Matrix) for name in ("qkv", "out", "gate_up", "down")),
        *((name, _POINTER) for name in ("keys", "values")),
        ("window", _SIZE),
    )


@dataclass(frozen=True)
class LayerParts:
    """What one decoder layer consists of: float32 norms, packed linears, its pages, its window (None for all)."""

    norms: tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # input, post-attention, query, key
    linears: tuple[Packed, Packed, Packed, Packed]  # qkv, out, gate-up, down
    cache: tuple[Tensor, Tensor]
    window: int | None


class LayerStack:
    """Decoder layers that run in one call. heads: (query, kv, head_dim); inner: the MLP's width.

    Whether they fit is the caller's check (`nn/decoder.py`): every width a multiple of 16, 16-bit float pages.
    """

    def __init__(self, layers: Sequence[LayerParts], heads: tuple[int, int, int], inner: int, eps: float) -> None:
        self._parts = tuple(layers)  # kept alive: the structures point into them
        self._heads, self._inner, self._eps = heads, inner, eps
        self._structs = (_Layer * len(layers))(*map(self._layer, layers))

    @staticmethod
    def _layer(parts: LayerParts) -> _Layer:
        matrices = [_Matrix(linear.kind, linear.pointer) for linear in parts.linears]
        return _Layer(*map(_address, parts.norms), *matrices, *map(_address, parts.cache), parts.window or 0)

    def __call__(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], slots: Tensor, sequences: Tensor, pages: Tensor
    ) -> None:
        """hidden float32 [rows, hidden_size] goes through all layers in place; the rest as for `attention`."""
        rows, width = hidden.shape
        query, kv, dim = self._heads
        floats = 2 * width + max((query + 2 * kv) * dim, 2 * self._inner) + max(query * dim, self._inner)
        workspace = torch.empty(rows * floats)
        sizes = (rows, width, self._inner, query, kv, dim)
        batch = (*map(_address, (*rotary, slots, sequences)), sequences.shape[0], pages.data_ptr())
        layers = (ctypes.addressof(self._structs), len(self._structs))
        _check(_library().squawq_layers(*layers, hidden.data_ptr(), *sizes, self._eps, *batch, workspace.data_ptr()))
