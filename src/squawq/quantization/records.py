"""Measures what the report says of a layer: quantiles, seconds, memory.

MEASURED are the keys whose values differ between equal runs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from squawq.memory import peak_memory

MEASURED = ("seconds", "peak_bytes", "device_peak_bytes")
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
SAMPLED = 1 << 20  # values that the inner quantiles are taken from


def quantiles(values: Tensor) -> list[float]:
    """QUANTILES of all values; the inner ones on at most 2 * SAMPLED of them, evenly spread."""
    flat = values.flatten().float()
    inner = torch.quantile(flat[:: max(1, len(flat) // SAMPLED)], torch.tensor(QUANTILES[1:-1], device=flat.device))
    return [round(float(value), 6) for value in (flat.min(), *inner, flat.max())]


def clip_quantiles(weight: Tensor, limits: tuple[Tensor, Tensor]) -> list[float]:
    """QUANTILES of the share of its range that each group keeps. weight [out, in]; limits (low, high) [out, groups]."""
    low, high = limits
    least, most = weight.view(*low.shape, -1).aminmax(dim=-1)
    full = most - least
    return quantiles(torch.where(full > 0, (high - low) / full, torch.ones_like(full)))


def measured(began: float, device: str) -> dict[str, Any]:
    """MEASURED keys: seconds since `began` (time.perf_counter), bytes that the process and the device held at most."""
    found: Mapping[str, float | None] = {
        "seconds": round(time.perf_counter() - began, 3),
        "peak_bytes": peak_memory(),
        "device_peak_bytes": torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else None,
    }
    return {key: value for key, value in found.items() if value is not None}
