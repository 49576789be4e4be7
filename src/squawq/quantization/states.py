"""Keeps hidden states of all calibration tokens, of the 16-bit and the quantized model, and outputs of modules.

States are in memory while small, else in a temporary file, which is unlinked at once: no file remains, even if the
process is killed. Hidden states between layers (`Streams`) are one tensor, memory-mapped from its file. Tensors that
are read in the order in which they were written are a `Spool`.
"""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from squawq.errors import OutputError
from squawq.layerwise.blocks import Block, Blocks, InputHook
from squawq.layerwise.extra_inputs import ExtraInputs

IN_MEMORY = 1.0  # GiB, without a GPU
SAMPLED_TOKENS = 1024  # tokens that losses of modules and of the whole layer are measured on
ZEROS = bytes(1 << 24)


def default_states_memory(device: str) -> float:
    """GiB of `Streams.states_memory`: IN_MEMORY, or a quarter of what is free on an NVIDIA GPU."""
    if torch.device(device).type != "cuda":
        return IN_MEMORY
    return torch.cuda.mem_get_info(device)[0] / 2**32


def hidden_states(shape: tuple[int, ...], folder: Path, device: str, in_memory: float = IN_MEMORY) -> Tensor:
    """Allocate float32 [calibration blocks, ...]: on `device` up to `in_memory` GiB, else in a file.

    The file's disk space is taken at once: a mapped file that finds none later kills the process (SIGBUS).

    Raises:
        OutputError: The disk is full.
    """
    size = torch.float32.itemsize * math.prod(shape)
    if size <= in_memory * 2**30:
        return torch.empty(shape, device=device)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            for start in range(0, size, len(ZEROS)):
                file.write(ZEROS[: size - start])
            file.flush()
            return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=shape))
    except OSError as error:
        raise _no_room(folder, size, error) from error


def _no_room(folder: Path, size: int, error: OSError) -> OutputError:
    return OutputError(
        f"{folder}: the calibration's hidden states need {size / 1e9:.1f} GB of disk there: {error.strerror}. Make "
        "room, take fewer or shorter samples, or keep more of them in memory (--states-memory)"
    )


class Spool:
    """Tensors that are read in the order in which they were added, any number of times.

    Up to `in_memory` GiB stay in memory, the rest goes to a file in `folder`. A tensor must not change once added.
    """

    def __init__(self, folder: Path, in_memory: float) -> None:
        self._folder, self._room = folder, in_memory * 2**30
        self._pieces: list[Tensor] = []
        self._file: FileIO | None = None
        self._filed: list[tuple[torch.Size, torch.dtype, torch.device]] = []

    def add(self, piece: Tensor) -> None:
        """Append a tensor. Raises OutputError if the disk is full."""
        self._room -= piece.nbytes
        if self._file is None and self._room >= 0:
            self._pieces.append(piece)
            return
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            self._file.seek(0, os.SEEK_END)
            left = piece.contiguous().cpu().view(torch.uint8).numpy().ravel()
            while len(left):
                left = left[self._file.write(left.data) :]
        except OSError as error:
            raise _no_room(self._folder, piece.nbytes, error) from error
        self._filed.append((piece.shape, piece.dtype, piece.device))

    def __iter__(self) -> Iterator[Tensor]:
        yield from self._pieces
        yield from self._read()

    def drain(self) -> Iterator[Tensor]:
        """Yield the tensors, for the last time: those in memory are freed one by one."""
        self._pieces.reverse()
        while self._pieces:
            yield self._pieces.pop()
        yield from self._read()

    def _read(self) -> Iterator[Tensor]:
        place = 0
        for shape, dtype, device in self._filed:
            assert self._file is not None
            found = torch.empty(shape, dtype=dtype)
            left = found.view(torch.uint8).numpy().ravel()
            self._file.seek(place)
            place += len(left)
            while len(left):
                left = left[self._file.readinto(left.data) :]
            yield found.to(device)


@dataclass(frozen=True)
class Sample:
    """The calibration blocks that losses are measured on."""

    blocks: Tensor  # indices among those of all ranks, int64
    share: slice  # the blocks that this rank holds
    tokens: int  # calibration tokens of all ranks

    @classmethod
    def spread(cls, blocks: int, tokens: int, share: slice) -> Sample:
        """Choose evenly spaced blocks of `tokens` tokens each: at most SAMPLED_TOKENS in all, at least one block."""
        count = max(1, min(blocks, SAMPLED_TOKENS // tokens))
        return cls(torch.linspace(0, blocks - 1, count).round().long(), share, blocks * tokens)

    def of(self, states: Tensor) -> Tensor:
        """The sampled states [sampled blocks, tokens, ...]; zero where another rank has the block."""
        here = (self.blocks >= self.share.start) & (self.blocks < self.share.stop)
        found = torch.zeros(len(self.blocks), *states.shape[1:], dtype=states.dtype, device=states.device)
        found[here] = states[self.blocks[here] - self.share.start]
        return found


class Replay:
    """Replays outputs of completely quantized modules, so that later runs of the layer do not compute them again.

    A layer runs once for each stage of its linears, and once more for the next layer's input. A module that ends in a
    linear (attention in o_proj, the MLP in down_proj) is final once that linear is quantized: its output is computed
    from that linear's captured inputs, bit-identical to what the module returns. Peak memory: the inputs of one such
    linear and each module's output, in float32; at most `in_memory` GiB of each, the rest is in files.
    """

    def __init__(
        self, block: Block, linears: Iterable[str], folder: Path, in_memory: float, extra: ExtraInputs | None = None
    ) -> None:
        self._block, self._folder, self._in_memory = block, folder, in_memory
        self._endings = block.output_modules(linears, extra)
        self._inputs: dict[str, Spool] = {}
        self._outputs: dict[str, Spool] = {}

    def hooks(self, linears: Iterable[str]) -> Mapping[str, InputHook]:
        """Hooks for the run before these linears are rounded: they capture the inputs that `settle` needs."""
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
        """While open, final modules return their recorded outputs; for a single run over all tokens."""
        outputs: dict[str, Iterator[Tensor]] = {name: iter(spool) for name, spool in self._outputs.items()}
        with self._block.replaying({self._endings[name]: pieces for name, pieces in outputs.items()}):
            yield


@dataclass(frozen=True)
class Streams:
    """This rank's hidden states before a layer, float32 [calibration blocks, tokens, hidden]."""

    reference: Tensor  # of the 16-bit model
    quantized: Tensor | None  # of the quantized model, the same tokens; None if calibration is not sequential
    reference_extra: ExtraInputs  # what layers read beside them
    quantized_extra: ExtraInputs
    sample: Sample  # calibration blocks that losses are measured on
    folder: Path  # for what exceeds `states_memory`
    states_memory: float  # GiB for each stream, and for the record of one layer's inputs
    weights: Mapping[str, Tensor] | None = None  # of the tokens, by `token_weights.weights_key`; None: ones

    @classmethod
    def embedded(
        cls, blocks: Blocks, tokens: Tensor, share: slice, sequential: bool, folder: Path, states_memory: float
    ) -> Streams:
        """Both streams before the first layer, where they are the same.

        Args:
            blocks: The 16-bit model.
            tokens: All calibration blocks, int64 [blocks, seqlen]; those of `share` are this rank's.
            sequential: Whether there is a quantized stream.
        """
        count, length = tokens.shape
        own = tokens[share]
        shape = len(own), length, blocks.checkpoint.config.hidden_size
        states = hidden_states(shape, folder, blocks.device, states_memory)
        blocks.embed(own, states)
        quantized = hidden_states(shape, folder, blocks.device, states_memory).copy_(states) if sequential else None

        def make(_: Tensor, shape: tuple[int, ...]) -> Tensor:
            return hidden_states(shape, folder, blocks.device, states_memory)

        one, other = (replace(blocks.extra_inputs(own), make=make) for _ in range(2))
        return cls(states, quantized, one, other, Sample.spread(count, length, share), folder, states_memory)

    def token_weights(self, key: str) -> Tensor | None:
        """Weights of this rank's tokens by `token_weights.weights_key`, [calibration blocks, tokens]; None: ones."""
        return None if self.weights is None else self.weights[key]

    def sampled(self) -> Tensor:
        """The states that a quantized layer is judged on, float32 [sampled blocks, tokens, hidden]."""
        return self.sample.of(self.reference if self.quantized is None else self.quantized)

    def sampled_extra(self) -> ExtraInputs:
        """What the layer reads beside those."""
        return (self.reference_extra if self.quantized is None else self.quantized_extra).each(self.sample.of)

    def skip(self, block: Block, stored: Mapping[str, Tensor]) -> None:
        """Run both streams through a layer that an earlier process quantized: `block` in 16 bits, then `stored`."""
        block.run(self.reference, in_place=True, extra=self.reference_extra)
        self.advance(block, stored)

    def advance(self, block: Block, stored: Mapping[str, Tensor], replay: Replay | None = None) -> None:
        """Run the quantized stream through the layer as stored; `replay` has outputs that need no computing."""
        if self.quantized is not None:
            with nullcontext() if replay is None else replay.playing():
                block.load_stored(stored)
                block.run(self.quantized, in_place=True, extra=self.quantized_extra)
