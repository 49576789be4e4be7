"""AwqConfig: AutoAWQ's `quant_config` in its spelling, and what it is to squawq and on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from squawq.families import Family
from squawq.quant_config import QuantConfig

KEYS = ("zero_point", "q_group_size", "w_bit", "version", "modules_to_not_convert")


@dataclass
class AwqConfig:
    """w_bit: 4. q_group_size: 16 to 256, or -1. version: "GEMM", the layout that squawq writes, in any case.

    modules_to_not_convert: linears with one of these in their name stay in 16 bits.
    """

    quant_method: str = "awq"
    zero_point: bool = True
    q_group_size: int = 128
    w_bit: int = 4
    version: str = "gemm"
    modules_to_not_convert: list[str] | None = None

    @classmethod
    def from_dict(cls, quant_config: Mapping[str, Any] | None = None) -> AwqConfig:
        """Raises TypeError for an unknown key, as AutoAWQ does, and ConfigError for a value that cannot be had."""
        values = dict(quant_config or {})
        known = [field.name for field in fields(cls)]
        if unknown := sorted(str(key) for key in values if key not in known):
            raise TypeError(f"quant_config has an unknown key {unknown[0]!r}; the keys are {', '.join(KEYS)}")
        found = cls(**values)
        QuantConfig.from_dict(found.to_dict())
        found.version = found.version.lower()
        return found

    @classmethod
    def from_transformers_dict(cls, values: Mapping[str, Any], where: str = "config.json") -> AwqConfig:
        """From a checkpoint's `quantization_config`. Raises CheckpointError naming `where`."""
        found = QuantConfig.from_quantization_config(values, where)
        skipped = list(found.modules_to_not_convert) or None
        return cls("awq", found.zero_point, found.group_size, found.bits, "gemm", skipped)

    def to_dict(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in KEYS}

    def to_transformers_dict(self) -> dict[str, Any]:
        """`quantization_config` as it lies in config.json."""
        return self.to_quant_config().to_quantization_config(list(self.modules_to_not_convert or []))

    def to_quant_config(self, family: Family | None = None, **settings: Any) -> QuantConfig:
        """squawq's settings. With `family`, names of modules that are never converted are left out: squawq refuses a
        name that no linear has, and scripts list "lm_head"."""
        names = list(self.modules_to_not_convert or [])
        if family is not None:
            outer = (family.head, family.embedding, family.norm)
            linears = [f"{family.layers}.{linear}" for linear in family.linears]
            names = [n for n in names if any(n in linear for linear in linears) or not any(n in name for name in outer)]
        return QuantConfig.from_dict({**self.to_dict(), "modules_to_not_convert": names, **settings})
