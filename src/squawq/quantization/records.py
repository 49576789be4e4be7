"""The rows of squawq_report.json: what is kept of a layer, of the linears that share its inputs, of each linear.

The one place that knows the rows' keys where they are written. Takes results, computes summaries of them; searches
nothing. MEASURED are the keys whose values differ between equal runs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from squawq.memory import peak_memory

MEASURED = ("seconds", "peak_bytes", "device_peak_bytes")
QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
SAMPLED = 1 << 20  # values that the inner quantiles are taken from


@dataclass(frozen=True)
class LinearRecord:
    """A linear's shape, and the tokens that an expert saw. Why it is not quantized; or its mean squared output error by
    plain rounding and as kept, and QUANTILES over its groups of the share of the range that is kept (None: never
    narrowed)."""

    name: str
    out_features: int
    in_features: int
    tokens: int | None = None
    kept_in_16_bits: str | None = None
    loss_rounded: float | None = None
    loss: float | None = None
    clip: list[float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types, without what is not known."""
        found = {**asdict(self), "loss_rounded": finite(self.loss_rounded), "loss": finite(self.loss)}
        return {key: value for key, value in found.items() if value is not None}


@dataclass(frozen=True)
class GroupRecord:
    """The scales of linears that share an input: their formula, and quantiles over the input's channels."""

    linears: Sequence[str]
    formula: str
    ratio: float
    quantiles: list[float]

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        return {**asdict(self), "linears": list(self.linears)}


@dataclass(frozen=True)
class LayerRecord:
    """A layer: the method that was kept, mean squared error of its output by plain rounding and as kept (None: not
    measured), the relative errors of its output (a token's, root mean square), its groups and linears, notes."""

    name: str
    method: str
    loss_rounded: float | None
    loss: float | None
    scales: Sequence[GroupRecord]
    linears: Sequence[LinearRecord]
    notes: Sequence[str]
    relative_error_rounded: float | None = None
    relative_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types, which have no NaN and no infinity."""
        return {
            "name": self.name,
            "method": self.method,
            "loss_rounded": finite(self.loss_rounded),
            "loss": finite(self.loss),
            "relative_error_rounded": finite(self.relative_error_rounded),
            "relative_error": finite(self.relative_error),
            "scales": [row.to_dict() for row in self.scales],
            "linears": [row.to_dict() for row in self.linears],
            "notes": list(self.notes),
        }


def finite(value: float | None) -> float | None:
    """The value, or None for one that JSON does not have."""
    return value if value is not None and abs(value) < float("inf") else None


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
