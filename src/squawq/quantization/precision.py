"""Precision of float32 matrix products on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_products(device: str | torch.device, exact: bool) -> Iterator[None]:
    """While open, products on an NVIDIA GPU are exact, or round their inputs to TF32 (10 bits of mantissa).

    TF32 is many times as fast. Sums are float32 either way; other devices are not changed.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if exact else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
