"""The calibration on its way through the layers: each layer is seen, quantized and left behind.

Every rank runs its hidden states, the first chooses, all go on with what was chosen. Where layers are calibrated behind
quantized ones, the states travel twice, through the 16-bit model and through the quantized one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from squawq.quantization.blocks import Block
from squawq.quantization.drift import Drift, Recording, Stage, stages
from squawq.quantization.inputs import LayerInputs
from squawq.quantization.layer import Chosen, LayerQuantizer, LayerResult, Packed
from squawq.quantization.linear import LinearRounder
from squawq.quantization.ranks import Ranks
from squawq.quantization.replay import Replay
from squawq.quantization.states import Sample, hidden_states
from squawq.quantization.work import Work

T = TypeVar("T")
ANEW = nullcontext()


@dataclass(frozen=True)
class Streams:
    """This rank's hidden states [blocks, tokens, hidden] before a layer. reference: of the 16-bit model. quantized: the
    same through quantized layers, None where that is not wanted. sample: which blocks stand for all. states_memory: GiB
    that each of them, and a layer's record, may take in memory."""

    reference: Tensor
    quantized: Tensor | None
    sample: Sample
    states_memory: float

    @classmethod
    def embedded(cls, work: Work, share: slice, states_memory: float) -> Streams:
        """Before the first layer, where both are the same."""
        assert work.tokens is not None
        blocks, length = work.tokens.shape
        tokens, device = work.tokens[share], work.blocks.device
        shape = len(tokens), length, work.blocks.checkpoint.config.hidden_size
        states = hidden_states(shape, work.out.parent, device, states_memory)
        work.blocks.embed(tokens, states)
        quantized = None
        if work.config.sequential:
            quantized = hidden_states(shape, work.out.parent, device, states_memory).copy_(states)
        return cls(states, quantized, Sample.spread(blocks, length, share), states_memory)

    def skip(self, block: Block, stored: Callable[[], Mapping[str, Tensor]], ranks: Ranks) -> None:
        """Go on behind a layer that was quantized in an earlier run."""
        with ranks.together():
            block.run(self.reference, in_place=True)
        self.leave(block, ranks.on_first(stored) if self.quantized is not None else {}, ranks)

    def leave(
        self, block: Block, stored: Mapping[str, Tensor], ranks: Ranks, replay: AbstractContextManager[None] = ANEW
    ) -> None:
        """The quantized stream through the layer as it lies on disk. replay: spares what was computed before."""
        if self.quantized is not None:
            with ranks.together(), replay:
                block.fill(stored)
                block.run(self.quantized, in_place=True)


class LayerPass:
    """One layer's way: seen, scaled, its linears rounded in turn. replay: what the quantized run need not repeat."""

    def __init__(self, work: Work, block: Block, streams: Streams, ranks: Ranks) -> None:
        self.config, self.block, self.streams, self.ranks = work.config, block, streams, ranks
        self.worker, self.folder = LayerQuantizer(block, work.plan(block.index)), work.out.parent

    def run(self, commit: Callable[[LayerResult], T]) -> T:
        """What `commit` makes, on the first rank, of what is to be written; told to all."""
        streams, ranks, block = self.streams, self.ranks, self.block
        inputs = LayerInputs(block)
        with ranks.together():
            before = None if streams.quantized is None else streams.sample.of(streams.quantized)
            todo = [] if before is None else stages(block, inputs, self.worker.converted)
            recording = self._recording(todo)
            staged = {name for stage in todo for name in stage.linears}
            lasting = {inputs.watched(name) for name in self.worker.converted if name not in staged}
            self.replay = Replay(block, staged, self.folder, streams.states_memory / 4)
            inputs.collect(streams.reference, streams.sample, recording.watchers, lasting)
        ranks.add_up(inputs.sums if before is None else [*inputs.sums, before])
        chosen = ranks.on_first(lambda: self._scales(inputs, lasting))
        chosen.folding = chosen.folding.to(block.device)
        with ranks.together():
            self.worker.fold_in(chosen.folding)
        inputs.keep(lasting)
        for place, stage in enumerate(todo):
            drift = self._observed(stage, recording, chosen)
            recording.keep(todo[place + 1 :])
            packed = self._round(stage.linears, LinearRounder(drift.inputs, self.config, drift), chosen)
            del drift  # large, and so is what `put` takes
            self._put(packed)
            with ranks.together():
                self.replay.settle()
        for watched, linears in inputs.readers(self.worker.converted).items():
            stats = inputs.take(watched)
            with ranks.together():
                if (scales := chosen.folding.columns.get(linears[0])) is not None:
                    stats.divide(scales)
            self._put(self._round(linears, LinearRounder(stats, self.config), chosen))
        given = inputs.before if before is None else before
        return ranks.on_first(lambda: commit(self.worker.finish(chosen, given, inputs.after)))

    def _recording(self, todo: list[Stage]) -> Recording:
        features = {stage.watched: self.block.weight(stage.linears[0]).shape[1] for stage in todo}
        hidden = self.streams.reference.shape[-1]
        features |= {stage.residual: hidden for stage in todo if stage.residual}
        return Recording(features, self.folder, self.streams.states_memory / 2)

    def _scales(self, inputs: LayerInputs, lasting: Collection[str]) -> Chosen:
        inputs.complete(inspected=not self.config.error_feedback)
        chosen = self.worker.choose_scales(inputs, lasting)
        chosen.folding = chosen.folding.to("cpu")
        return chosen

    def _observed(self, stage: Stage, recording: Recording, chosen: Chosen) -> Drift:
        """What the quantized stages before it hand over to a stage."""
        assert self.streams.quantized is not None
        with self.ranks.together():
            drift = Drift(self.block, stage, chosen.folding.columns.get(stage.linears[0]))
            with self.replay.playing():
                drift.observe(self.streams.quantized, recording, self.replay.watchers(stage.linears))
        self.ranks.add_up(drift.sums)
        return drift

    def _round(self, linears: Sequence[str], rounder: LinearRounder, chosen: Chosen) -> dict[str, Packed]:
        return self.ranks.on_first(lambda: self.worker.choose_integers(linears, rounder, chosen))

    def _put(self, packed: Mapping[str, Packed]) -> None:
        with self.ranks.together():
            for name, tensors in packed.items():
                self.block.put(name, **tensors)
