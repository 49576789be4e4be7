"""What work on a layer took: seconds, and peak memory of the process and of the device; and giving memory back."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Mapping
from typing import Any

MEASURED = ("seconds", "peak_bytes", "device_peak_bytes")  # report keys that differ between equal runs


def peak_memory() -> int | None:
    """Peak resident bytes since the process began; None where the system does not report it (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measured(began: float, device: str) -> dict[str, Any]:
    """MEASURED keys: seconds since `began` (time.perf_counter), bytes that the process and the device held at most."""
    import torch

    found: Mapping[str, float | None] = {
        "seconds": round(time.perf_counter() - began, 3),
        "peak_bytes": peak_memory(),
        "device_peak_bytes": torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else None,
    }
    return {key: value for key, value in found.items() if value is not None}


def give_memory_back() -> None:
    """glibc keeps freed arenas; without this the process grows with every layer that is read."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):  # musl has neither
            return
