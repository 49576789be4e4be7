"""AWQ's GEMM layout from any other: the same integers, zeros and scales. Knows one linear at a time, no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from squawq.errors import CheckpointError
from squawq.format.groupwise import GroupwiseTensor, to_gemm
from squawq.quant_config import QuantConfig


@dataclass(frozen=True)
class Awq:
    """Converts linears of a checkpoint quantized with `quant`."""

    quant: QuantConfig
    settings_file: None = None

    def linear(self, name: str, tensor: GroupwiseTensor) -> dict[str, Tensor]:
        """qweight, qzeros, and scales in their own dtype. Raises CheckpointError for groups in activation order."""
        if tensor.order is not None:
            raise self.activation_order(name)
        return to_gemm(tensor)

    @staticmethod
    def activation_order(name: str) -> CheckpointError:
        """AWQ's groups are neighbours."""
        return CheckpointError(
            f"{name} has its groups in activation order (desc_act), which AWQ cannot store; export the model as gptq "
            "or compressed-tensors, or as dense and quantize that"
        )

    def config(self, raw: dict[str, Any], kept: Sequence[str], targets: Sequence[str]) -> dict[str, Any]:  # noqa: ARG002
        """The new config.json. Zeros are stored in any case, so that engines without symmetric AWQ read it, too."""
        written = replace(self.quant, zero_point=True).to_quantization_config(list(kept))
        return {**raw, "quantization_config": written}
