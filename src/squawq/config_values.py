"""Checks single values of config.json, an untrusted file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from squawq.errors import CheckpointError

MAX_LAYERS = 1024
MAX_SIZES = {  # of what determines memory; MAX_SIZE for anything else
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**14,
    "vocab_size": 2**24,
}
MAX_SIZE = 2**31 - 1
MAX_REAL = 1e30  # within float32's range


def whole(key: str, value: object, least: int, where: str) -> int:
    """The value, if it is a whole number within its bounds; else raises CheckpointError."""
    most = MAX_SIZES.get(key, MAX_SIZE)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        kind = "a positive whole number" if least else "a whole number from 0"
        raise CheckpointError(f"{where}: {key} is {value!r:.100}; it must be {kind} up to {most}")
    return value


def number(values: Mapping[str, Any], key: str, default: float, where: str) -> float:
    """The key's value, or the default. Raises CheckpointError unless it is positive and finite."""
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_REAL:
        raise CheckpointError(f"{where}: {key} is {value!r:.100}; it must be a positive number up to {MAX_REAL:g}")
    return float(value)


def optional(values: Mapping[str, Any], key: str, default: float, where: str) -> float:
    """As `number`; the default, which may be 0, also for null and 0."""
    return number(values, key, default, where) if values.get(key) else default
