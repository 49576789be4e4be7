"""Decides which linears of a layer are quantized, and which stay in 16 bits and why. Knows shapes, no tensors."""

from __future__ import annotations

from collections.abc import Mapping

from squawq.families import Family, expert_of
from squawq.format.groupwise import PER_WORD
from squawq.quant_config import QuantConfig

GATE = "a router or gate"


class LayerPlan:
    """Which linears of a layer are quantized (`converted`), and why the others are `kept` in 16 bits.

    Linears of a module that share an input are kept together, and so are all experts of a layer: engines fuse them and
    refuse a mixture. `shapes` has (out_features, in_features) by linear, `prefix` is the layer's full name.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], family: Family, config: QuantConfig, prefix: str) -> None:
        self.family, self.config, self.prefix = family, config, prefix
        self.groups = family.layer_groups(list(shapes))
        self.kept: dict[str, str] = {}
        together: dict[object, list[str]] = {}
        for place, group in enumerate(self.groups):
            for name in group.linears:
                together.setdefault(_fused_with(place, name), []).append(name)
        for names in together.values():
            reasons = {n: r for n in names if (r := self._kept_reason(n, *shapes[n])) is not None}
            for name in names if reasons else ():
                first = next(iter(reasons))
                self.kept[name] = reasons.get(name, f"shares its input with {first}, which stays in 16 bits")
        self.converted = [name for name in self.linears if name not in self.kept]
        self.kept |= dict.fromkeys((name for group in self.groups for name in group.unquantized_consumers), GATE)

    @property
    def linears(self) -> list[str]:
        """Every linear of the groups, in order of use."""
        return [name for group in self.groups for name in group.linears]

    def _kept_reason(self, name: str, out_features: int, in_features: int) -> str | None:
        if self.config.skips(f"{self.prefix}.{name}"):
            return "listed in modules_to_not_convert"
        if in_features % self.config.group_of(in_features):
            return f"in_features {in_features} is not a multiple of group size {self.config.group_size}"
        if out_features % PER_WORD:
            return f"out_features {out_features} is not a multiple of {PER_WORD}"
        return None


def _fused_with(group: int, linear: str) -> object:
    """Equal for linears that engines fuse."""
    expert = expert_of(linear)
    return expert.rpartition(".")[0] if expert else (group, linear.rpartition(".")[0])
