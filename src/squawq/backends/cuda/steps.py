"""Whole steps on a GPU: prompts, next tokens by CUDA graphs, and the sampling of both, without waiting for the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from squawq.backends.base import Follow, NextTokens, Tell
from squawq.backends.cuda import launch
from squawq.backends.cuda.decode import DecodeGraphs
from squawq.backends.cuda.parameters import counts, parameters, samples
from squawq.backends.sampling import (
    SAMPLED,
    Chunk,
    NoTokenError,
    Sampling,
    StartedStep,
    StepOutput,
    sample,
    token_logprob,
)
from squawq.engine.request import TokenLogprob

NO_INPUTS = torch.tensor([[0], [-1], [-1], [-1]])  # of a row of padding


@dataclass(slots=True)
class Seat:
    """A sequence's row in the decode step, which the sampling kernels call its place.

    What lies there on the card: its page table, sampling parameters, counts of tokens, and the token sampled last.
    """

    row: int
    position: int  # of its next token
    on_card: bool  # whether its tokens are sampled there
    pages: Sequence[int] = ()  # the page table that is on the card; the scheduler makes a new list at each admission


class Seats:
    """The rows of sequences. Each keeps its row from step to step, with what lies there."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._known: dict[Sampling, Seat] = {}
        self._free = list(range(rows - 1, -1, -1))

    def take(self, chunks: Sequence[Chunk]) -> tuple[list[Seat], list[int]]:
        """The seat of each chunk's sequence, and the indices of those that are new there."""
        now = {_sequence(chunk) for chunk in chunks}
        if not self.compact(len(now)) and not any(chunk.ids[0] == SAMPLED for chunk in chunks):
            self._known, self._free = {}, list(range(self._rows - 1, -1, -1))
        if any(sampling not in self._known for sampling in now):
            for left in [known for known in self._known if known not in now]:
                self._free.append(self._known.pop(left).row)
            self._free.sort(reverse=True)
        seats, fresh = [], []
        for index, chunk in enumerate(chunks):
            sampling = _sequence(chunk)
            assert sampling is not None
            seat = self._known.get(sampling)
            if seat is None:
                seat = self._known[sampling] = Seat(self._free.pop(), -1, samples(sampling))
            if seat.position != chunk.start or seat.pages is not chunk.pages:  # new, or preempted since
                fresh.append(index)
            seat.position, seat.pages = chunk.start + len(chunk.ids), chunk.pages
            seats.append(seat)
        return seats, fresh

    def compact(self, count: int) -> bool:
        """Whether the rows in use fit `count` sequences. If not, they close up, so that a smaller graph will do."""
        return max((seat.row for seat in self._known.values()), default=0) < 2 * count + 8


class CudaSteps:
    """Starts steps; see `Backend.prepare_steps`.

    Args:
        graphs: Not yet captured.
        tell: Sends what the other ranks must run as well.
    """

    def __init__(self, graphs: DecodeGraphs, tell: Tell | None = None) -> None:
        rows, space = graphs.rows, graphs.space
        assert space is not None
        self._device = device = graphs.inputs.device
        self._graphs, self._space, self._seats, self._page = graphs, space, Seats(rows), graphs.page
        self._tell = tell
        self._untold: dict[int, NDArray[np.int32]] = {}  # page tables of rows, since the last decode step
        pinned = device.type == "cuda"  # or, in tests, the kernels are interpreted on the CPU
        self._stream = captured(graphs)
        # Two of each: those of the step before are in use while a step is prepared.
        self._inputs = [torch.zeros(4, rows, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self._results = [torch.zeros(2, rows, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self._events = [torch.cuda.Event() if pinned else None for _ in range(2)]  # type: ignore[no-untyped-call]
        self._turn = 0

    @torch.inference_mode()
    def start(self, batch: Sequence[Chunk], prompts: Callable[[Sequence[Chunk]], Tensor]) -> StartedStep:
        """Start a step. `prompts` computes the logits of chunks that are not the one next token of a sequence."""
        self._turn = 1 - self._turn
        event, results = self._events[self._turn], self._results[self._turn]
        if event is not None:
            event.synchronize()  # the step before last
        seated = [chunk for chunk in batch if _sequence(chunk) is not None]
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            seats, fresh = self._seats.take(seated)
            seat_of = dict(zip(map(id, seated), seats, strict=True))
            self._set([(seated[i], seats[i]) for i in fresh])
            logits: dict[int, Tensor] = {}  # of each chunk
            if decodes := [(chunk, seat) for chunk, seat in zip(seated, seats, strict=True) if _is_decode(chunk)]:
                found = self._decode(decodes)
                logits.update((id(chunk), found[seat.row : seat.row + 1]) for chunk, seat in decodes)
            if others := [chunk for chunk in batch if not _is_decode(chunk)]:
                parts = torch.split(prompts(others), [chunk.logits for chunk in others])
                logits.update(zip(map(id, others), parts, strict=True))
                ended = [(chunk, seat_of[id(chunk)], logits[id(chunk)]) for chunk in others if id(chunk) in seat_of]
                self._sample([(c, seat, part) for c, seat, part in ended if seat.on_card])
            results.copy_(self._space.results, non_blocking=True)
            if event is not None:
                event.record()

        def outputs() -> list[StepOutput]:
            if event is not None:
                event.synchronize()
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                return [_output(chunk, seat_of.get(id(chunk)), logits[id(chunk)], results) for chunk in batch]

        waits = any(_needs_logits(chunk, seat_of.get(id(chunk))) for chunk in batch)
        return StartedStep(outputs, next_may_start=not waits and self._seats.compact(len(seated)))

    def _decode(self, decodes: Sequence[tuple[Chunk, Seat]]) -> Tensor:
        rows = 1 + max(seat.row for _, seat in decodes)
        inputs = self._inputs[self._turn].numpy()
        inputs[:, : self._graphs.size(rows)] = NO_INPUTS
        for chunk, seat in decodes:
            page, place = divmod(chunk.start, self._page)
            slot, sampled_at = chunk.pages[page] * self._page + place, -1 if chunk.again else chunk.start
            inputs[:, seat.row] = chunk.ids[0], chunk.start, slot, sampled_at
        if self._tell is not None:
            told = torch.tensor(list(self._untold)), torch.from_numpy(np.array([*self._untold.values()], np.int32))
            self._tell(NextTokens(torch.from_numpy(inputs[:, :rows]), *told))
            self._untold = {}
        self._graphs.inputs.copy_(self._inputs[self._turn], non_blocking=True)
        return self._graphs.run(rows)

    def _sample(self, ended: Sequence[tuple[Chunk, Seat, Tensor]]) -> None:
        """The tokens after prompts."""
        if ended:
            rows = torch.cat([logits[-1:] for _, _, logits in ended])
            places = self._to_card([seat.row for _, seat, _ in ended], torch.int32)
            positions = self._to_card([chunk.start + len(chunk.ids) - 1 for chunk, _, _ in ended], torch.int64)
            launch.sample(rows, places, positions, self._space)

    def _set(self, fresh: Sequence[tuple[Chunk, Seat]]) -> None:
        """Page tables and sampling parameters of sequences that are new in their rows."""
        if not fresh:
            return
        space, tables = self._space, self._graphs.tables
        pages = np.zeros((len(fresh), tables.shape[1]), np.int32)
        floats = np.zeros((len(fresh), space.floats.shape[1]), np.float32)
        ints = np.zeros((len(fresh), space.ints.shape[1]), np.int32)
        for index, (chunk, seat) in enumerate(fresh):
            pages[index, : len(chunk.pages)] = chunk.pages
            if seat.on_card and (sampling := _sequence(chunk)) is not None:
                own, whole, penalized = parameters(sampling)
                floats[index, : len(own)], ints[index, : len(whole)] = own, whole
                if penalized:
                    space.counts[seat.row] = self._to_card(counts(sampling, space.vocab), torch.int16)
        if self._tell is not None:
            self._untold.update({seat.row: table for (_, seat), table in zip(fresh, pages, strict=True)})
        rows = self._to_card([seat.row for _, seat in fresh], torch.int64)
        tables.index_copy_(0, rows, self._to_card(pages, torch.int32))
        states = self._to_card([chunk.slot for chunk, _ in fresh], torch.int64)
        self._graphs.states.index_copy_(0, rows, states)
        space.floats.index_copy_(0, rows, self._to_card(floats, torch.float32))
        space.ints.index_copy_(0, rows, self._to_card(ints, torch.int32))

    def _to_card(self, values: object, kind: torch.dtype) -> Tensor:
        return torch.as_tensor(values, dtype=kind).to(self._device, non_blocking=True)


def captured(graphs: DecodeGraphs) -> torch.cuda.Stream | None:
    """Capture the graphs on a stream of their own; None where the kernels are interpreted on the CPU."""
    device = graphs.inputs.device
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)  # the weights are there
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.inference_mode(), torch.cuda.stream(stream):
        graphs.capture()
    return stream


def follow(graphs: DecodeGraphs) -> Follow:
    """A function that runs the steps of another rank's `CudaSteps` with this one's graphs, not yet captured.

    Whatever else this thread runs from now on is in the same stream.
    """
    if (stream := captured(graphs)) is not None:
        torch.cuda.set_stream(stream)

    @torch.inference_mode()
    def run(step: NextTokens) -> None:
        device, rows = graphs.inputs.device, step.inputs.shape[1]
        if len(step.rows):
            graphs.tables.index_copy_(0, step.rows.to(device), step.tables.to(device))
        inputs = NO_INPUTS.repeat(1, graphs.size(rows))
        inputs[:, :rows] = step.inputs
        graphs.inputs[:, : inputs.shape[1]].copy_(inputs)
        graphs.run(rows)

    return run


def _sequence(chunk: Chunk) -> Sampling | None:
    """The sequence of a chunk that has a row: one that samples, or a generated token that runs again."""
    return chunk.sampling or chunk.again


def _is_decode(chunk: Chunk) -> bool:
    """Whether a chunk is one generated token of a sequence."""
    sampling = _sequence(chunk)
    return len(chunk.ids) == 1 and sampling is not None and chunk.start >= len(sampling.prompt) and not chunk.targets


def _needs_logits(chunk: Chunk, seat: Seat | None) -> bool:
    """Whether the host needs a chunk's logits: to sample, to score a prompt, or for likely alternatives."""
    sampling = chunk.sampling
    return bool(chunk.targets) or (sampling is not None and (bool(sampling.logprobs) or not (seat and seat.on_card)))


def _output(chunk: Chunk, seat: Seat | None, logits: Tensor, results: Tensor) -> StepOutput:
    sampling = chunk.sampling
    if seat is not None and not seat.on_card and chunk.sampling is not None:
        return sample(logits.cpu().numpy(), [chunk])[0]
    rows = (logits if _needs_logits(chunk, seat) else logits[:0]).cpu().numpy()
    scores = [token_logprob(row, token, chunk.top) for row, token in zip(rows, chunk.targets, strict=False)]
    if sampling is None or seat is None:
        return StepOutput(prompt_logprobs=scores)
    tokens, bits = results.numpy()
    token, logprob = int(tokens[seat.row]), float(bits.view(np.float32)[seat.row])
    if not math.isfinite(logprob):
        return StepOutput(error=NoTokenError("no token can be chosen: the model's logits are not finite"))
    if sampling.logprobs is None:
        return StepOutput(token, None, scores)
    found = token_logprob(rows[-1], token, sampling.logprobs) if sampling.logprobs else TokenLogprob(token, logprob, ())
    return StepOutput(token, found, scores)
