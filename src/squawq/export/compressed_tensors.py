"""The compressed-tensors layout "pack-quantized": the same integers, zeros and scales, words along in_features.

As compressed-tensors 0.20 writes it (compressors/pack_quantized): a word's lowest nibble is its first value. Integers
are signed there and stored plus 8, so that the nibbles are q and zero themselves. Knows one linear at a time, no files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from squawq.errors import CheckpointError
from squawq.export.plan import Plan
from squawq.format.groupwise import PER_WORD, SYMMETRIC_ZERO, GroupwiseTensor, pack
from squawq.quant_config import QuantConfig


def pack_rows(values: Tensor) -> Tensor:
    """Integers 0..15 [rows, n] -> int32 [rows, ceil(n / 8)]: bits 4i to 4i + 3 of word c hold value 8c + i."""
    return pack(F.pad(values, (0, -values.shape[1] % PER_WORD)), tuple(range(PER_WORD)))


def check_symmetric(name: str, tensor: GroupwiseTensor) -> None:
    """Raise CheckpointError for a zero that the configuration denies."""
    if (tensor.zeros != SYMMETRIC_ZERO).any():
        raise CheckpointError(
            f"{name}: has zeros other than {SYMMETRIC_ZERO}, but quantization_config says it is symmetric "
            "(zero_point false, sym true); change that in config.json and export again"
        )


@dataclass(frozen=True)
class CompressedTensors:
    """Converts linears of a checkpoint quantized with `quant`."""

    quant: QuantConfig
    settings_file: None = None

    def linear(self, name: str, tensor: GroupwiseTensor) -> dict[str, Tensor]:
        """weight_packed int32 [out, in/8], weight_scale [out, groups] as stored, weight_shape int64 [2], and where the
        checkpoint has zero points weight_zero_point int32 [out/8, groups], packed along out.

        Raises CheckpointError where the configuration says symmetric and a zero says otherwise.
        """
        tensors = {
            "weight_packed": pack_rows(tensor.q),
            "weight_scale": tensor.scales,
            "weight_shape": torch.tensor(tensor.q.shape),
        }
        if self.quant.zero_point:
            tensors["weight_zero_point"] = pack_rows(tensor.zeros.T).T
        else:
            check_symmetric(name, tensor)
        return tensors

    def config(self, raw: dict[str, Any], plan: Plan) -> dict[str, Any]:
        """The new config.json."""
        row = self.quant.group_size == -1
        weights = {
            "num_bits": self.quant.bits,
            "type": "int",
            "symmetric": not self.quant.zero_point,
            "group_size": None if row else self.quant.group_size,
            "strategy": "channel" if row else "group",
            "dynamic": False,
        }
        group = {
            "targets": list(plan.targets),
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
        quantization = {
            "config_groups": {"group_0": group},
            "quant_method": "compressed-tensors",
            "kv_cache_scheme": None,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "ignore": [*plan.kept, *(f"re:.*{re.escape(part)}.*" for part in plan.beside)],
            "moe_sparsity_config": None,
        }
        return {**raw, "quantization_config": quantization}
