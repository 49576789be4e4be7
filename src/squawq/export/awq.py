"""AWQ's GEMM layout from any other: the same integers, zeros and scales. Knows one linear at a time, no files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from squawq.export.plan import Plan
from squawq.format.groupwise import GroupwiseTensor, to_gemm
from squawq.quant_config import QuantConfig


@dataclass(frozen=True)
class Awq:
    """Converts linears of a checkpoint quantized with `quant`."""

    quant: QuantConfig
    settings_file: None = None

    def linear(self, name: str, tensor: GroupwiseTensor) -> dict[str, Tensor]:  # noqa: ARG002
        """qweight, qzeros, and scales in their own dtype."""
        return to_gemm(tensor)

    def config(self, raw: dict[str, Any], plan: Plan) -> dict[str, Any]:
        """The new config.json. Zeros are stored in any case, so that engines without symmetric AWQ read it, too."""
        written = replace(self.quant, zero_point=True).to_quantization_config([*plan.kept, *plan.beside])
        return {**raw, "quantization_config": written}
