"""Reports as squawq quantize writes them, of any size, without quantizing: every value by a fixed rule."""

from __future__ import annotations

import math
from typing import Any

LINEARS = {
    "self_attn.q_proj": (256, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.gate_proj": (768, 256),
    "mlp.up_proj": (768, 256),
    "mlp.down_proj": (256, 768),
}
GROUPS = (
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
)


def report(layers: int = 8, **changes: Any) -> dict[str, Any]:
    """A report of so many layers; changes replace its keys."""
    config = {"bits": 4, "group_size": 128, "zero_point": True, "method": "awq", "clip": True, "seqlen": 512}
    return {
        "squawq": "0.1.0",
        "model": "tiny-llama",
        "method": "awq",
        "source_bytes": 14_688_768,
        "bytes": 5_374_464,
        "parameters": 7_344_384,
        "calibration_tokens": 65_536,
        "kept_in_16_bits": [],
        "notes": [],
        "layers": [layer(index) for index in range(layers)],
        "job": {"squawq": "0.1.0", "source": "", "calibration": "", "config": config, "device": "cpu"},
        **changes,
    }


def layer(index: int) -> dict[str, Any]:
    """A layer's record; losses grow with depth and differ by linear."""
    size = 4e-4 * 1.15**index
    linears = []
    for place, (name, (out, in_)) in enumerate(LINEARS.items()):
        ratio = 2 ** (0.4 - 1.4 * abs(math.sin(place * 1.7 + index * 0.6)))
        row = {"name": name, "out_features": out, "in_features": in_}
        row |= {"loss_rounded": size / (place + 1), "loss": size / (place + 1) * ratio}
        if place >= 2:
            row["clip"] = [0.55, 0.7, 0.8 + 0.02 * (index % 8), 1.0, 1.0]
        linears.append(row)
    spread = 2 ** (0.5 + 0.05 * (index % 9))
    scales = [
        {"linears": names, "formula": "x", "ratio": 0.1 * (1 + index % 5)}
        | {"quantiles": [spread**-2, spread**-1, 1.0, spread, spread**3]}
        for names in GROUPS
    ]
    return {
        "name": f"model.layers.{index}",
        "method": "awq",
        "loss_rounded": size,
        "loss": size * 0.4,
        "scales": scales,
        "linears": linears,
        "notes": [],
        "seconds": 6.5 + index % 3,
        "peak_bytes": 900_000_000 + 1_000_000 * index,
    }


def evaluation(positions: int = 1023) -> dict[str, Any]:
    """What `squawq eval --reference` measures."""
    return {
        "reference": "tiny-llama",
        "tokens": 16_384,
        "window": positions + 1,
        "stride": (positions + 1) // 2,
        "perplexity": 19.1,
        "reference_perplexity": 18.8,
        "kl_mean": 0.0123,
        "kl_p99": 0.21,
        "top1_agreement": 0.947,
        "kl_by_position": [0.01 + 0.004 * math.sin(i / 60) ** 2 for i in range(positions)],
    }
