"""Computes the size of a result from names and shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from squawq.format.groupwise import PER_WORD
from squawq.format.shards import TensorInfo
from squawq.quant_config import QuantConfig


def result_bytes(tensors: Mapping[str, TensorInfo], converted: Mapping[str, int], config: QuantConfig) -> int:
    """Bytes of the tensors to be written. `converted`: in_features of the weights to be quantized, by name."""
    total = 0
    for name, info in tensors.items():
        count = math.prod(info.shape)
        if name in converted:
            groups = count // config.group_of(converted[name])
            total += 4 * count // PER_WORD + 2 * groups + 4 * groups // PER_WORD  # integers, scales, zeros
        else:
            total += 2 * count
    return total
