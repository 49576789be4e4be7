"""What has been chosen for a layer, as tensors to store and as its row of the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from squawq.errors import CheckpointError
from squawq.families import expert_of
from squawq.format.groupwise import quantize, to_gemm
from squawq.layerwise.blocks import EXACT, Block
from squawq.layerwise.fold import Folding
from squawq.layerwise.plan import LayerPlan
from squawq.layerwise.tensor_names import all_finite
from squawq.report.schema import LayerRow, LinearRow, ScaleRow

PackedLinear = dict[str, Tensor]  # qweight, scales and qzeros, on the CPU


@dataclass(frozen=True)
class LayerResult:
    """A layer's tensors to store, by name in the layer, and its row of the report.

    kept: whether they are what was searched, not plain rounding that turned out better.
    """

    tensors: dict[str, Tensor]
    record: dict[str, Any]
    kept: bool = True


@dataclass
class LayerQuantization:
    """What has been chosen for a layer so far.

    Attributes:
        folding: Of the scales.
        packed: AWQ integers, by linear.
        losses: Mean squared error of a linear's output by plain rounding and as quantized, by linear.
        clips: Quantiles of the range that is kept, by linear.
        scales: Report rows of the scales.
        notes: What is out of the ordinary.
        tokens: How many tokens each expert saw.
    """

    folding: Folding = field(default_factory=Folding)
    packed: dict[str, PackedLinear] = field(default_factory=dict)
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)
    clips: dict[str, list[float]] = field(default_factory=dict)
    scales: list[ScaleRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tokens: Mapping[str, int] = field(default_factory=dict)

    def tensors(self, block: Block, plan: LayerPlan) -> dict[str, Tensor]:
        """The tensors of the layer to store; linears without packed integers are rounded to nearest."""
        tensors: dict[str, Tensor] = {}
        converted = set(plan.converted)
        for name, tensor in block.state().items():
            module, _, kind = name.rpartition(".")
            if kind == "weight" and module in converted:
                packed = self.packed.get(module)
                if packed is None:
                    packed = to_gemm(quantize(tensor, plan.config.group_of(tensor.shape[1]), plan.config.zero_point))
                if not all_finite(packed["scales"]):
                    raise CheckpointError(
                        f"tensor {f'{plan.prefix}.{name}'!r} holds values too large for float16 scales; "
                        f"use --skip {module}"
                    )
                tensors |= {f"{module}.{part}": packed[part] for part in packed}
            else:
                tensors[name] = stored(plan, name, tensor)
        return tensors

    def record(
        self,
        block: Block,
        plan: LayerPlan,
        kept: bool,
        losses: tuple[float, float] | None = None,
        relative: tuple[float | None, float | None] = (None, None),
    ) -> dict[str, Any]:
        """The layer's row of the report.

        Args:
            block: The layer.
            plan: Its plan.
            kept: Whether what was chosen is stored; else plain rounding is.
            losses: Mean squared error of the layer's output by plain rounding and as stored.
            relative: Relative errors of the same.
        """
        linears = []
        for name in (name for group in block.groups for name in (*group.linears, *group.unquantized_consumers)):
            out_features, in_features = block.weight(name).shape
            rounded, loss = self.losses.get(name, (None, None))
            linears.append(
                LinearRow(
                    name=name,
                    out_features=out_features,
                    in_features=in_features,
                    tokens=self.tokens.get(expert_of(name) or ""),
                    kept_in_16_bits=plan.kept.get(name),
                    loss_rounded=rounded,
                    loss=loss if kept else rounded,
                    clip=self.clips.get(name) if kept else None,
                )
            )
        before, after = losses or (None, None)
        return LayerRow(
            name=plan.prefix,
            method=plan.config.method if kept else "rtn",
            loss_rounded=before,
            loss=after,
            relative_error_rounded=relative[0],
            relative_error=relative[1],
            scales=self.scales if kept else [],
            linears=linears,
            notes=self.notes,
        ).to_dict()


def stored(plan: LayerPlan, name: str, tensor: Tensor) -> Tensor:
    """A tensor of the layer that is not quantized, in its dtype on disk."""
    return tensor if name.endswith(EXACT) else cast(tensor, getattr(torch, plan.config.dtype), f"{plan.prefix}.{name}")


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Convert to the 16-bit dtype on disk. Raises CheckpointError if a finite value overflows."""
    result = tensor.to(dtype)
    if not all_finite(result):
        raise CheckpointError(f"tensor {name!r} holds values beyond {dtype}; use dtype bfloat16 (--dtype bfloat16)")
    return result
