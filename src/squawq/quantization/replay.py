"""Replays outputs of modules that are quantized completely, so that later runs of the layer do not compute them.

A layer runs once for each stage of its linears, and once more for the next layer's input. A module that ends in a
linear (attention in o, the MLP in down) is final once that linear is quantized: its output is computed from the
captured inputs of that linear, bit for bit what the module would return. Peak memory: the inputs of one such linear and
each module's output, in float32, in files when large.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from squawq.layerwise.blocks import Block
from squawq.quantization.inputs import InputHook
from squawq.quantization.states import Spool


class Replay:
    """For the modules of a layer that end in one of `linears`; each spool keeps up to `in_memory` GiB in memory."""

    def __init__(self, block: Block, linears: Iterable[str], folder: Path, in_memory: float) -> None:
        self._block, self._folder, self._in_memory = block, folder, in_memory
        self._endings = block.output_modules(linears)
        self._inputs: dict[str, Spool] = {}
        self._outputs: dict[str, Spool] = {}

    def hooks(self, linears: Iterable[str]) -> Mapping[str, InputHook]:
        """Hooks that capture the inputs of linears in the run before they are rounded."""
        self._inputs = {name: Spool(self._folder, self._in_memory) for name in linears if name in self._endings}
        return {name: spool.add for name, spool in self._inputs.items()}

    @torch.no_grad()
    def settle(self) -> None:
        """Compute the outputs of the linears captured last, whose weights are now final."""
        for name, inputs in self._inputs.items():
            linear = self._block.module.get_submodule(name)
            outputs = self._outputs[name] = Spool(self._folder, self._in_memory)
            for x in inputs:
                outputs.add(linear(x))
        self._inputs = {}

    @contextmanager
    def playing(self) -> Iterator[None]:
        """While open, the layer may run over all tokens once; final modules return their recorded outputs."""
        outputs: dict[str, Iterator[Tensor]] = {name: iter(spool) for name, spool in self._outputs.items()}
        with self._block.replaying({self._endings[name]: pieces for name, pieces in outputs.items()}):
            yield
