"""Memory of a GPU in the address spaces of several processes: CUDA's inter-process communication (driver API, "IPC").

https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MEM.html
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import cache

from squawq.backends.cuda.group import CudaGroup

PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class _Handle(ctypes.Structure):  # CUipcMemHandle
    _fields_ = (("bytes", ctypes.c_ubyte * 64),)


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int) -> None:
    if status:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(status, ctypes.byref(name))
        raise RuntimeError((name.value or b"").decode() or f"CUDA error {status}")


def share(address: int, group: CudaGroup) -> list[int]:
    """Where each rank's memory is for this process, of which this one's is at `address`.

    Every rank calls this. Raises RuntimeError, on all ranks, if one cannot reach another's.
    """
    problem, found, key = "", [0] * group.size, f"memory {group.count()}"
    try:
        mine = _export(address)
    except (RuntimeError, OSError) as error:
        problem, mine = str(error), b""
    group.store.set(f"{key} {group.rank}", mine)
    for rank in range(group.size):
        theirs = mine if rank == group.rank else bytes(group.store.get(f"{key} {rank}"))
        try:
            found[rank] = address if rank == group.rank else _open(theirs)
        except RuntimeError as error:
            problem = problem or str(error)
    if group.any(bool(problem)):
        close(at for rank, at in enumerate(found) if at and rank != group.rank)
        raise RuntimeError(problem or "another rank cannot")
    return found


def _export(address: int) -> bytes:
    """A handle on the allocation that an address lies in, and the distance to it."""
    base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
    driver = _driver()
    _check(driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address)))
    _check(driver.cuIpcGetMemHandle(ctypes.byref(handle), base))
    return bytes(handle) + (address - base.value).to_bytes(8, "little")


def _open(exported: bytes) -> int:
    if not exported:
        raise RuntimeError("another rank cannot")
    base, handle = ctypes.c_uint64(), _Handle.from_buffer_copy(exported[:64])
    _check(_driver().cuIpcOpenMemHandle_v2(ctypes.byref(base), handle, PEER_ACCESS))
    _opened[base.value + int.from_bytes(exported[64:], "little")] = base.value
    return base.value + int.from_bytes(exported[64:], "little")


_opened: dict[int, int] = {}  # addresses, and the allocations that they lie in


def close(addresses: Iterable[int]) -> None:
    """Take other ranks' memory, by the addresses of `share`, out of this process."""
    for address in addresses:
        _driver().cuIpcCloseMemHandle(ctypes.c_uint64(_opened.pop(address)))
