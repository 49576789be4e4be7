"""What the linears of one layer are given while calibration runs through it: statistics, and samples of whole inputs.

Linears that share an input share its statistics; each expert has its own, of the tokens that the router sends to it.
Other processes may hold further tokens: what each collects is added up before anything is read. Peak memory: the Gram
matrices of the layer's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
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


class LayerInputs:
    """statistics: by the module whose input it is. before, after: the sampled blocks of hidden states, and what the
    layer made of them. tokens: how many each expert was sent, by its name."""

    def __init__(self, block: Block) -> None:
        self.block, self.groups = block, block.groups
        self.tokens: dict[str, int] = {}
        self.rare: list[str] = []
        self.statistics: dict[str, InputStatistics] = {}
        self._capture_module: dict[str, str] = {}
        first: dict[object, str] = {}
        for number, group in enumerate(self.groups):
            for name in group.linears:
                expert = expert_of(name)
                self._capture_module[name] = (
                    first.setdefault((number, expert), name) if expert else group.capture_module
                )

    def collect(
        self,
        states: Tensor,
        sample: Sample,
        record: Mapping[str, InputHook] = MappingProxyType({}),
        lasting: Collection[str] | None = None,
    ) -> None:
        """Run this process's hidden states [blocks, tokens, hidden] through the layer, in place. record: what else sees
        the inputs of modules. lasting: modules whose statistics serve more than the choice of scales (None: all)."""
        self.before = sample.of(states)
        modules = dict.fromkeys(
            place for g in self.groups for place in (g.capture_module, *(self._capture_module[n] for n in g.linears))
        )
        self.statistics = {name: self._empty(name) for name in modules}
        step = max(1, sample.tokens // SCALING_TOKENS) | 1  # odd: else it would meet the same places of every block
        whole = self.statistics if lasting is None else lasting
        watchers = {n: s.update if n in whole else _thinned(s, step) for n, s in self.statistics.items()}
        with self.block.input_hooks(watchers), self.block.input_hooks(record):
            self.block.run(states, in_place=True)
        self.after = sample.of(states)

    @property
    def sums(self) -> list[Tensor]:
        """All that was collected: added up over processes, it is what one process collects of all their tokens."""
        return [self.before, self.after, *(t for s in self.statistics.values() for t in s.sums)]

    def complete(self, inspected: bool) -> None:
        """Once it is added up: the sampled blocks' inputs of modules, and tokens for experts that saw too few.
        inspected: whether those of modules that scales are judged by are wanted."""
        self._inputs = self._sample(inspected)
        self._route_to_rare()

    def capture_module(self, linear: str) -> str:
        """The module whose input a linear's is."""
        return self._capture_module[linear]

    def of_group(self, group: ScalingGroup) -> InputStatistics:
        return self.statistics[group.capture_module]

    def whole(self, module: str) -> Tensor:
        """The sampled blocks' input of an inspected module, float32 [blocks, tokens, hidden]."""
        return self._inputs[module]

    def readers(self, linears: Iterable[str]) -> dict[str, list[str]]:
        """Those of the linears whose inputs' statistics are still here, by the modules whose inputs these are."""
        found: dict[str, list[str]] = {}
        for name in linears:
            if self._capture_module[name] in self.statistics:
                found.setdefault(self._capture_module[name], []).append(name)
        return found

    def keep(self, modules: Collection[str]) -> None:
        """Give up the statistics of all others."""
        self.statistics = {name: stats for name, stats in self.statistics.items() if name in modules}

    def take(self, module: str) -> InputStatistics:
        """The statistics of a module's input, which are large, for the last time."""
        return self.statistics.pop(module)

    def _empty(self, module: str) -> InputStatistics:
        features = self.before.shape[-1] if module not in self._capture_module else self.block.weight(module).shape[1]
        return InputStatistics(features, self.block.device)

    def _sample(self, inspected: bool) -> dict[str, Tensor]:
        """Inputs of the modules that are inspected or hold experts, for the sampled blocks."""
        names = {n for group in self.groups for n in (group.inspect if inspected else "", group.input) if n}
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        if seen:
            with self.block.input_hooks({name: pieces.append for name, pieces in seen.items()}):
                self.block.run(self.before)
        return {"": self.before} | {name: torch.cat(pieces) for name, pieces in seen.items()}

    def _route_to_rare(self) -> None:
        """Send all sampled tokens through the experts that saw too few, and measure those instead."""
        block_of = {expert_of(name): group.input for group in self.groups if group.input for name in group.linears}
        for expert, block in block_of.items():
            if expert is None:
                continue
            watched = {place for name, place in self._capture_module.items() if expert_of(name) == expert}
            self.tokens[expert] = max(self.statistics[name].rows for name in watched)
            if self.tokens[expert] < MIN_TOKENS:
                self.rare.append(expert)
                fresh = {name: self._empty(name) for name in watched}
                with self.block.input_hooks({name: s.update for name, s in fresh.items()}), torch.no_grad():
                    self.block.module.get_submodule(expert)(self._inputs[block].flatten(0, -2))
                self.statistics |= fresh

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
    """Every so many-th token, counted on from batch to batch."""
    ahead = 0

    def update(x: Tensor) -> None:
        nonlocal ahead
        rows = x.reshape(-1, x.shape[-1])
        statistics.update(rows[ahead::step])
        ahead = (ahead - len(rows)) % step

    return update
