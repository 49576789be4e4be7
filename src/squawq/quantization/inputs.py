"""Collects calibration statistics of the inputs of one layer's linears, and samples of its hidden states.

Linears that share an input share its statistics; each expert has its own, of the tokens routed to it. Peak memory: the
Hessians of the layer's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from squawq.families import ScalingGroup, expert_of
from squawq.layerwise.blocks import Block
from squawq.quantization.states import Sample
from squawq.quantization.statistics import InputStatistics

InputHook = Callable[[Tensor], object]
SCALING_TOKENS = 4096  # are enough to choose scales by
MIN_TOKENS = 256  # an expert that saw fewer is calibrated on all sampled tokens instead


def capture_modules(groups: Sequence[ScalingGroup]) -> dict[str, str]:
    """Module whose hook captures a linear's input, by linear; an expert's linears have one of their own."""
    found: dict[str, str] = {}
    first: dict[object, str] = {}
    for number, group in enumerate(groups):
        for name in group.linears:
            expert = expert_of(name)
            found[name] = first.setdefault((number, expert), name) if expert else group.capture_module
    return found


class LayerInputs:
    """Statistics of one layer's inputs in the 16-bit run.

    Attributes:
        statistics: By the module whose hook captures the input.
        before: Hidden states before the layer, float32 [sampled blocks, tokens, hidden].
        after: The same behind it.
        tokens: How many tokens were routed to each expert, by its name.
    """

    def __init__(self, block: Block) -> None:
        self.block, self.groups = block, block.groups
        self.tokens: dict[str, int] = {}
        self.rare: list[str] = []
        self.statistics: dict[str, InputStatistics] = {}
        self._capture = capture_modules(block.groups)

    def collect(
        self,
        states: Tensor,
        sample: Sample,
        hooks: Mapping[str, InputHook] = MappingProxyType({}),
        whole: Collection[str] | None = None,
    ) -> None:
        """Run this rank's hidden states through the layer.

        Args:
            states: float32 [blocks, tokens, hidden], replaced with the layer's output.
            sample: Blocks that losses are measured on.
            hooks: Further input hooks.
            whole: Capture modules whose statistics cover all tokens, None for all; of others a part is enough, by which
                scales are chosen.
        """
        self.before = sample.of(states)
        modules = dict.fromkeys(
            module for g in self.groups for module in (g.capture_module, *(self._capture[n] for n in g.linears))
        )
        self.statistics = {name: self._empty(name) for name in modules}
        step = max(1, sample.tokens // SCALING_TOKENS) | 1  # odd: else it would meet the same positions of every block
        full = self.statistics if whole is None else whole
        own = {n: s.update if n in full else _thinned(s, step) for n, s in self.statistics.items()}
        with self.block.input_hooks(own), self.block.input_hooks(hooks):
            self.block.run(states, in_place=True)
        self.after = sample.of(states)

    @property
    def sums(self) -> list[Tensor]:
        """All that was collected; an all-reduce of these gives what one rank collects of all tokens."""
        return [self.before, self.after, *(t for s in self.statistics.values() for t in s.sums)]

    def sample_modules(self, inspected: bool) -> dict[str, Tensor]:
        """Inputs of modules that hold experts and, if `inspected`, of those that scales are judged by.

        Returns:
            float32 [sampled blocks, tokens, hidden] by module; "" is the layer.
        """
        names = {n for group in self.groups for n in (group.inspect if inspected else "", group.input) if n}
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        if seen:
            with self.block.input_hooks({name: pieces.append for name, pieces in seen.items()}):
                self.block.run(self.before)
        return {"": self.before} | {name: torch.cat(pieces) for name, pieces in seen.items()}

    def route_to_rare(self, samples: Mapping[str, Tensor]) -> None:
        """Collect anew for experts that saw too few tokens, from all tokens of `sample_modules`."""
        block_of = {expert_of(name): group.input for group in self.groups if group.input for name in group.linears}
        for expert, block in block_of.items():
            if expert is None:
                continue
            modules = {module for name, module in self._capture.items() if expert_of(name) == expert}
            self.tokens[expert] = max(self.statistics[name].rows for name in modules)
            if self.tokens[expert] < MIN_TOKENS:
                self.rare.append(expert)
                fresh = {name: self._empty(name) for name in modules}
                with self.block.input_hooks({name: s.update for name, s in fresh.items()}), torch.no_grad():
                    self.block.module.get_submodule(expert)(samples[block].flatten(0, -2))
                self.statistics |= fresh

    def of_group(self, group: ScalingGroup) -> InputStatistics:
        """Statistics of the input that a group's linears share."""
        return self.statistics[group.capture_module]

    def keep(self, modules: Collection[str]) -> None:
        """Drop the statistics of all other capture modules."""
        self.statistics = {name: stats for name, stats in self.statistics.items() if name in modules}

    def take(self, module: str) -> InputStatistics:
        """Statistics captured at a module, which are large, for the last time."""
        return self.statistics.pop(module)

    def _empty(self, module: str) -> InputStatistics:
        features = self.before.shape[-1] if module not in self._capture else self.block.weight(module).shape[1]
        return InputStatistics(features, self.block.device)

    def notes(self) -> Iterable[str]:
        """What is out of the ordinary, for the report."""
        for name, stats in self.statistics.items():
            yield from stats.notes(name)
            if stats.has_signal and (dead := int((stats.absolute == 0).sum())):
                yield f"{name}: {dead} input channels without signal keep scale 1"
        if self.rare:
            few, all_ = len(self.rare), len(self.tokens)
            yield f"{few} of {all_} experts saw fewer than {MIN_TOKENS} tokens; calibrated on all sampled tokens"


def _thinned(statistics: InputStatistics, step: int) -> InputHook:
    """Every `step`-th token, counted on from batch to batch."""
    ahead = 0

    def update(x: Tensor) -> None:
        nonlocal ahead
        rows = x.reshape(-1, x.shape[-1])
        statistics.update(rows[ahead::step])
        ahead = (ahead - len(rows)) % step

    return update
