"""GPTQ's layout, as GPTQModel 7 writes it: the same integers, zeros and scales. Knows one linear, no files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from squawq import __version__
from squawq.export.compressed_tensors import pack_rows
from squawq.export.plan import Plan
from squawq.format.groupwise import GroupwiseTensor
from squawq.quant_config import QuantConfig


@dataclass(frozen=True)
class Gptq:
    """Converts linears of a checkpoint quantized with `quant`.

    first: In the first version (checkpoint_format gptq), which stores zeros minus one and so has none of 0; the second
    stores them as they are. ordered: some linear has its groups in activation order.
    """

    quant: QuantConfig
    first: bool = True
    ordered: bool = False
    settings_file: str = "quantize_config.json"

    def linear(self, name: str, tensor: GroupwiseTensor) -> dict[str, Tensor]:  # noqa: ARG002
        """qweight int32 [in/8, out], qzeros int32 [groups, out/8], scales [groups, out] as stored, g_idx int32 [in]."""
        zeros = tensor.zeros.to(torch.int32) - int(self.first)
        assert zeros.min() >= 0, "the caller has looked"
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
            "checkpoint_format": "gptq" if self.first else "gptq_v2",
            "desc_act": self.ordered,
            **({"dynamic": {pattern: {} for pattern in dense}} if dense else {}),
            "format": "gptq" if self.first else "gptq_v2",
            "group_size": self.quant.group_size,
            "lm_head": bool(plan.targets[1:]),
            "meta": {"quantizer": [f"squawq:{__version__}"]},
            "pack_dtype": "int32",
            "quant_method": "gptq",
            "sym": not self.quant.zero_point,
        }
        return {**raw, "quantization_config": written}
