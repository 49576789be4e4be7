"""Which linears of a layer become integers and which stay in 16 bits, and why. Knows names and shapes, no tensors."""

from __future__ import annotations

from collections.abc import Mapping

from squawq.families import Family
from squawq.format.packing import PER_WORD
from squawq.quant_config import QuantConfig


class LayerPlan:
    """Which linears of a layer are converted, and why the others are `kept` in 16 bits.

    shapes: (out_features, in_features) by name. prefix: the layer's full name. Linears that share an input are kept
    together, since engines fuse them and refuse a mixture.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], family: Family, config: QuantConfig, prefix: str) -> None:
        self.family, self.config, self.prefix = family, config, prefix
        self.kept: dict[str, str] = {}
        for group in family.groups:
            reasons = {n: r for n in group.linears if (r := self._kept_reason(n, *shapes[n])) is not None}
            if reasons:
                first = next(iter(reasons))
                for name in group.linears:
                    self.kept[name] = reasons.get(name, f"shares its input with {first}, which stays in 16 bits")
        self.converted = [name for name in family.linears if name not in self.kept]

    def _kept_reason(self, name: str, out_features: int, in_features: int) -> str | None:
        if self.config.skips(f"{self.prefix}.{name}"):
            return "listed in modules_to_not_convert"
        if in_features % self.config.group_of(in_features):
            return f"in_features {in_features} is not a multiple of group size {self.config.group_size}"
        if out_features % PER_WORD:
            return f"out_features {out_features} is not a multiple of {PER_WORD}"
        return None
