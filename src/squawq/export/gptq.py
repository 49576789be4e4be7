"""GPTQ's layout, as GPTQModel 7 writes it: the same integers, zeros and scales. Knows one linear, no files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from squawq import __version__
from squawq.export.compressed_tensors import check_symmetric, pack_rows
from squawq.export.plan import Plan
from squawq.format.groupwise import GroupwiseTensor
from squawq.quant_config import QuantConfig


@dataclass(frozen=True)
class Gptq:
    """Converts linears of a checkpoint quantized with `quant`. ordered: some have their groups in activation order.

    Symmetric ones are in the first version (checkpoint_format gptq), which stores zeros minus one. Others are in the
    second, which stores them as they are: the first has no zero of 0, and GPTQModel reads none of another tool.
    """

    quant: QuantConfig
    ordered: bool = False
    settings_file: str = "quantize_config.json"

    @property
    def version(self) -> str:
        return "gptq_v2" if self.quant.zero_point else "gptq"

    def linear(self, name: str, tensor: GroupwiseTensor) -> dict[str, Tensor]:
        """qweight int32 [in/8, out], qzeros int32 [groups, out/8], scales [groups, out] as stored, g_idx int32 [in].

        Raises CheckpointError where the configuration says symmetric and a zero says otherwise.
        """
        if not self.quant.zero_point:
            check_symmetric(name, tensor)
        zeros = tensor.zeros if self.quant.zero_point else tensor.zeros - 1
        q, groups = tensor.in_own_order()
        return {
            "qweight": pack_rows(q).T.contiguous(),
            "qzeros": pack_rows(zeros.T.contiguous()),
            "scales": tensor.scales.T.contiguous(),
            "g_idx": groups,
        }

    def config(self, raw: dict[str, Any], plan: Plan) -> dict[str, Any]:
        """The new config.json. `dynamic` names what stays in 16 bits beside the head."""
        head = plan.targets[1:] or plan.kept[-1:]
        dense = [f"-:^{re.escape(name)}$" for name in plan.kept if name not in head]
        dense += [f"-:.*{re.escape(part)}.*" for part in plan.beside]
        written: dict[str, Any] = {
            "bits": self.quant.bits,
            "checkpoint_format": self.version,
            "desc_act": self.ordered,
            **({"dynamic": {pattern: {} for pattern in dense}} if dense else {}),
            "format": self.version,
            "group_size": self.quant.group_size,
            "lm_head": bool(plan.targets[1:]),
            "meta": {"quantizer": [f"squawq:{__version__}"]},
            "pack_dtype": "int32",
            "quant_method": "gptq",
            "sym": not self.quant.zero_point,
        }
        return {**raw, "quantization_config": written}
