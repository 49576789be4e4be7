"""Hidden states of the calibration text on their way through the 16-bit model and through the quantized one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from squawq.layerwise.blocks import Block
from squawq.quantization.replay import Replay
from squawq.quantization.states import Sample, hidden_states
from squawq.quantization.work import Work


@dataclass(frozen=True)
class Streams:
    """This rank's hidden states before a layer, float32 [blocks, tokens, hidden].

    Attributes:
        reference: Of the 16-bit model.
        quantized: The same tokens behind quantized layers; None if calibration is not sequential.
        sample: Blocks that losses are measured on.
        folder: Where files of states go that exceed their memory.
        states_memory: GiB of memory for each stream, and for the record of one layer's inputs.
    """

    reference: Tensor
    quantized: Tensor | None
    sample: Sample
    folder: Path
    states_memory: float

    @classmethod
    def embedded(cls, work: Work, share: slice, states_memory: float) -> Streams:
        """Before the first layer, where both streams are the same. `share`: this rank's calibration blocks."""
        assert work.tokens is not None
        blocks, length = work.tokens.shape
        tokens, device, folder = work.tokens[share], work.blocks.device, work.out.parent
        shape = len(tokens), length, work.blocks.checkpoint.config.hidden_size
        states = hidden_states(shape, folder, device, states_memory)
        work.blocks.embed(tokens, states)
        quantized = None
        if work.config.sequential:
            quantized = hidden_states(shape, folder, device, states_memory).copy_(states)
        return cls(states, quantized, Sample.spread(blocks, length, share), folder, states_memory)

    def sampled(self) -> Tensor:
        """The states that a quantized layer is judged on, float32 [sampled blocks, tokens, hidden]."""
        return self.sample.of(self.reference if self.quantized is None else self.quantized)

    def skip(self, block: Block, stored: Mapping[str, Tensor]) -> None:
        """Run both streams through a layer that an earlier run has quantized."""
        block.run(self.reference, in_place=True)
        self.advance(block, stored)

    def advance(self, block: Block, stored: Mapping[str, Tensor], replay: Replay | None = None) -> None:
        """Run the quantized stream through the layer as stored; `replay` saves computing module outputs again."""
        if self.quantized is not None:
            with nullcontext() if replay is None else replay.playing():
                block.load_stored(stored)
                block.run(self.quantized, in_place=True)
