"""Loads the CPU kernels' library (csrc/) through ctypes and sets its instruction set and threads.

The library is optional: without it everything runs on torch, slower. Environment variables: SQUAWQ_ISA forces an
instruction set (avx512, avx2, neon, scalar, or torch for no library); SQUAWQ_THREADS sets the number of threads, by
default all cores that this process may use.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
from functools import cache
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from squawq.errors import ConfigError, KernelError, RankError

logger = logging.getLogger("squawq")
ABI = 8  # that squawq_abi() of a matching library returns
LANES = 16  # values of a vector, output rows of a packed block, tokens of a page
ENDED = -2  # a result: see csrc/dispatch.cpp
ISAS = ("avx512", "avx2", "neon", "scalar", "torch")

POINTER, SIZE, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "squawq_set_isa": (ctypes.c_char_p,),
    "squawq_set_threads": (INT,),
    "squawq_use_openmp": (INT,),
    "squawq_pack_gemm": (POINTER,) * 3 + (SIZE,) * 5 + (POINTER,) * 3,
    "squawq_pack_dense": (POINTER, SIZE, SIZE, SIZE, SIZE, POINTER),
    "squawq_pack_int8": (POINTER, INT, SIZE, SIZE, POINTER, POINTER),
    "squawq_matmul": (POINTER, SIZE, SIZE, POINTER, POINTER),
    "squawq_rms_norm": (POINTER, POINTER, POINTER, FLOAT, SIZE, SIZE, POINTER),
    "squawq_experts": (POINTER, POINTER, SIZE, SIZE, POINTER),
    "squawq_activation_mul": (POINTER, SIZE, SIZE, SIZE, POINTER),
    "squawq_soft_cap": (POINTER, SIZE, FLOAT),
    "squawq_rotary": (POINTER, SIZE, POINTER, SIZE, POINTER, POINTER),
    "squawq_rotate_and_store": (POINTER, *(SIZE,) * 4, POINTER, POINTER, SIZE, POINTER, FLOAT, *(POINTER,) * 3),
    "squawq_layers": (POINTER, SIZE, POINTER, SIZE, POINTER, *(SIZE,) * 4, FLOAT, *(POINTER,) * 4, SIZE, POINTER),
    "squawq_attention": (POINTER, *(SIZE,) * 3, POINTER, SIZE, *(POINTER,) * 5),
    "squawq_group_bytes": (SIZE, SIZE),
    "squawq_all_reduce": (POINTER, POINTER, SIZE),
    "squawq_gather": (POINTER, POINTER, SIZE, POINTER, POINTER),
    "squawq_end_group": (POINTER,),
    "squawq_round_columns": (*(POINTER,) * 6, SIZE, SIZE, FLOAT, POINTER, POINTER),
}


@cache
def load() -> ctypes.CDLL | None:
    """The library, ready to use; None if it was not built or SQUAWQ_ISA is "torch".

    Raises:
        ConfigError: SQUAWQ_ISA or SQUAWQ_THREADS is invalid.
    """
    wanted = os.environ.get("SQUAWQ_ISA", "")
    if wanted and wanted not in ISAS:
        raise ConfigError(f"SQUAWQ_ISA is {wanted!r}; choose one of {', '.join(ISAS)}")
    if wanted == "torch":
        return None
    try:
        library = _open(_find())
    except KernelError as error:
        if wanted:
            raise ConfigError(f"SQUAWQ_ISA is {wanted!r}, but {error}") from error
        logger.warning("%s; running on torch, much slower", error)
        return None
    if wanted and library.squawq_set_isa(wanted.encode()):
        raise ConfigError(f"SQUAWQ_ISA is {wanted!r}, which this machine or this build does not have")
    library.squawq_set_threads(default_threads())
    return library


def _open(path: Path | None) -> ctypes.CDLL:
    """Open the library and declare its functions. Raises KernelError if that is impossible."""
    if path is None:
        raise KernelError("the native CPU kernels are not built: install a C++ compiler and reinstall squawq")
    try:
        _check_whole(path)
        library = ctypes.CDLL(str(path))
        if library.squawq_abi() != ABI:
            raise KernelError(f"{path} is of another version of squawq: reinstall the package")
        library.squawq_isa.restype = ctypes.c_char_p
        library.squawq_group_bytes.restype = SIZE
        for name, types in _SIGNATURES.items():
            getattr(library, name).argtypes = types
    except (OSError, AttributeError) as error:  # unreadable, or without a symbol
        raise KernelError(f"the native CPU kernels cannot be loaded ({error}): reinstall the package") from error
    return library


def _check_whole(path: Path) -> None:
    """Raise KernelError for a truncated ELF file: loading one kills the process."""
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\2\1":  # not a 64-bit little-endian ELF file
        return
    try:
        programs, sections = struct.unpack_from("<QQ", data, 32)
        *program, section_size, section_count = struct.unpack_from("<4H", data, 54)
        ends = [sections + section_size * section_count]
        for index in range(program[1]):
            offset, _, _, size = struct.unpack_from("<4Q", data, programs + index * program[0] + 8)
            ends.append(offset + size)
    except struct.error:
        ends = [len(data) + 1]
    if max(ends) > len(data):
        raise KernelError(f"{path} is cut off: reinstall the package")


def _find() -> Path | None:
    """The library's file in this package (an editable install has two folders); None if it is not built."""
    folders = import_module("squawq.backends.cpu").__path__
    return next((p for f in folders if (p := Path(f) / "libsquawq.so").is_file()), None)


def default_threads() -> int:
    """SQUAWQ_THREADS, or the number of cores that this process may use. Raises ConfigError."""
    given = os.environ.get("SQUAWQ_THREADS")
    if not given:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(cores, _quota() or cores)
    if not given.isdecimal() or not 1 <= int(given) <= 1024:
        raise ConfigError(f"SQUAWQ_THREADS is {given!r}; it must be a whole number from 1 to 1024")
    return int(given)


def _quota() -> int | None:
    """The container's CPU limit in cores (cgroup v2's cpu.max), rounded up; None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, -(-int(quota) // int(period)))
    except (OSError, ValueError):  # "max", or no cgroup v2
        return None


def required() -> ctypes.CDLL:
    """The library, as `load` returns it. Raises KernelError where that is None."""
    library = load()
    if library is None:
        raise KernelError("the native kernels are not built here")
    return library


def isa() -> str:
    """The instruction set in use, one of ISAS; "torch" without the library."""
    library = load()
    return "torch" if library is None else str(library.squawq_isa().decode())


def set_isa(name: str) -> None:
    """Switch to another instruction set. Raises ConfigError if this build or machine does not have it."""
    if required().squawq_set_isa(name.encode()):
        raise ConfigError(f"instruction set {name!r} is not in this build or not on this machine")


def threads() -> int:
    """Number of threads of the kernels; torch's without the library."""
    library = load()
    return torch.get_num_threads() if library is None else int(library.squawq_threads())


def set_threads(count: int) -> None:
    """Set the number of threads, 1 to 1024, of the kernels (torch's without the library). Raises ConfigError."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 1024:
        raise ConfigError(f"threads is {count!r}; it must be a whole number, 1 to 1024")
    library = load()
    if library is None:
        torch.set_num_threads(count)
    else:
        check(library.squawq_set_threads(count))
        if threads() != count:
            raise ConfigError(f"threads is {count}; only {threads()} could be started here")


def use_openmp(count: int) -> bool:
    """Run the kernels on the OpenMP threads of this process (torch's) instead of their own, until `set_threads`.

    For programs whose other operations run on those threads, bound to cores: two sets of threads would compete. Every
    call should then come from one thread, since OpenMP has a team of threads for each, and none from a forked child.

    Args:
        count: Number of threads; the first ones of the team, where it has more.

    Returns:
        Whether the process has an OpenMP library; if not, nothing is changed.
    """
    return bool(required().squawq_use_openmp(count) == 0)


def check(code: int) -> None:
    """Raise MemoryError, or RankError if another rank has ended, for a nonzero result of a library function."""
    if code == ENDED:
        raise RankError("another process that runs a part of the model has ended")
    if code:
        raise MemoryError("the native kernels could not get memory")


def address(tensor: Tensor | None) -> int | None:
    """A tensor's data pointer; None (NULL in C) for None."""
    return None if tensor is None else tensor.data_ptr()
