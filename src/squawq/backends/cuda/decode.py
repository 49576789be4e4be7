"""Decode steps on a GPU: one token of each sequence, the whole model as one CUDA graph for each batch size."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from squawq.backends.base import Model, Pages
from squawq.backends.cuda import int4, launch
from squawq.backends.cuda.launch import Sums
from squawq.backends.layer_ops import (
    ActivationMul,
    AddResidual,
    Attention,
    Buffer,
    Matmul,
    MixtureOfExperts,
    Norm,
    Packed,
    RotateAndStore,
)
from squawq.backends.sampling import GREEDY_BELOW, Chunk, NoTokenError, Sampling, StepOutput, sample
from squawq.engine.request import TokenLogprob

# Programmatic dependent launch gains on a Hopper card with so few rows; with more, the next kernel's programs take the
# place of running ones.
DEPENDENT_ROWS = 2
SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def declines(model: Model) -> str | None:
    """Why a model has no graph: then its steps run one operation after another."""
    for operation in (*model.layers.operations, Matmul(model.head, Buffer.NORMED, Buffer.WIDE)):
        if isinstance(operation, MixtureOfExperts):
            return "it has experts"
        if isinstance(operation, Matmul) and not isinstance(operation.weight, int4.Int4Weight | launch.DenseWeight):
            return f"{type(operation.weight).__name__} has no kernel for few rows"
    return None


class DecodeStep:
    """Runs the next tokens of up to `rows` sequences; see `Backend.prepare_decode`.

    A sequence keeps its row from step to step, so that its page table is on the card already.
    """

    def __init__(self, model: Model, cache: Sequence[Pages], dtype: torch.dtype, rows: int, pages: int) -> None:
        device = model.norm.device
        hidden, heads = len(model.norm), model.layers.heads
        self._model, self._cache, self.rows = model, cache, rows
        self._size = 0  # of the latest graph
        self._page = cache[0][0].shape[2]
        weights = [_weight(op.weight) for op in model.layers.operations if isinstance(op, Matmul)]
        widths = [weight.shape[0] * launch.splits(weight) for weight in weights]
        narrow = max(weight.shape[1] for weight in weights)

        def empty(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=kind, device=device)

        self._hidden, self._normed = empty(rows, hidden), empty(rows, hidden, kind=dtype)
        self._narrow = empty(rows * narrow, kind=dtype)
        self._queries = empty(rows * heads[0] * heads[2], kind=dtype)
        self._parts = [empty(rows * max(widths)), empty(rows * max(widths))]  # of WIDE, and of DELTA
        self._delta = empty(rows, hidden, kind=dtype)
        self._rotary = empty(rows, len(model.frequencies)), empty(rows, len(model.frequencies))
        self._logits = empty(rows * model.head.shape[0])
        self._space = launch.decode_space(rows, heads, device)
        self._tables = empty(rows, pages, kind=torch.int32)
        self._input = empty(3, rows, kind=torch.int64)  # ids, positions, slots
        self._tokens, self._logprobs = empty(rows, kind=torch.int64), empty(rows)
        pinned = device.type == "cuda"  # or, in tests, the kernels are interpreted on the CPU
        self._host_input = torch.zeros(3, rows, dtype=torch.int64, pin_memory=pinned)
        self._host_tokens = torch.zeros(rows, dtype=torch.int64, pin_memory=pinned)
        self._host_logprobs = torch.zeros(rows, pin_memory=pinned)
        self._arrays = [t.numpy() for t in (self._host_input, self._host_tokens, self._host_logprobs)]
        self._hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle() if self._stream else None
        self._places: dict[Sampling, tuple[int, int]] = {}  # a sequence's row, and the position after its last step
        self._free = list(range(rows - 1, -1, -1))

    @staticmethod
    def takes(chunk: Chunk) -> bool:
        """Whether a chunk is the one next token of a sequence."""
        return (
            len(chunk.ids) == 1
            and chunk.sampling is not None
            and chunk.start >= len(chunk.sampling.prompt)
            and not chunk.targets
        )

    @torch.inference_mode()
    def step(self, batch: Sequence[Chunk]) -> list[StepOutput]:
        """An output for each chunk, all of which `takes` takes; no more of them than rows."""
        places = self._place(batch)
        size = next((s for s in SIZES if s > max(places)), self.rows)
        size = min(size, self.rows)
        inputs, tokens, logprobs = self._arrays
        inputs[:, :size] = [[0], [-1], [-1]]
        for place, chunk in zip(places, batch, strict=True):
            page = chunk.pages[chunk.start // self._page]
            inputs[:, place] = chunk.ids[0], chunk.start, page * self._page + chunk.start % self._page
        self._size = size
        if self._stream is None:
            self._run(size)
        else:
            self._stream.wait_stream(torch.cuda.current_stream())  # a prompt's step may still write to pages
            with torch.cuda.stream(self._stream):
                (self._graphs.get(size) or self._capture(size)).replay()
                self._stream.synchronize()
        return [self._output(place, chunk, tokens, logprobs) for place, chunk in zip(places, batch, strict=True)]

    def _output(self, place: int, chunk: Chunk, tokens: np.ndarray, logprobs: np.ndarray) -> StepOutput:
        sampling = chunk.sampling
        assert sampling is not None
        if not _greedy(sampling):
            logits = self._logits[: self._size * self._model.head.shape[0]].view(self._size, -1)
            return sample(logits[place : place + 1].cpu().numpy(), [chunk])[0]
        logprob = float(logprobs[place])
        if not math.isfinite(logprob):
            return StepOutput(error=NoTokenError("no token can be chosen: the model's logits are not finite"))
        token = int(tokens[place])
        return StepOutput(token, None if sampling.logprobs is None else TokenLogprob(token, logprob, ()))

    def _place(self, batch: Sequence[Chunk]) -> list[int]:
        """The row of each chunk. Page tables of sequences that are new here go to the card."""
        if len(self._places) > 2 * len(batch) + 8:  # ended ones: rows close up, so that a smaller graph is enough
            self._places, self._free = {}, list(range(self.rows - 1, -1, -1))
        now = {chunk.sampling for chunk in batch}
        if any(sampling not in self._places for sampling in now):
            for sampling in [known for known in self._places if known not in now]:
                self._free.append(self._places.pop(sampling)[0])
            self._free.sort(reverse=True)
        found = []
        for chunk in batch:
            assert chunk.sampling is not None
            row, after = self._places.get(chunk.sampling, (-1, -1))
            if after != chunk.start:  # new here, or preempted since: other pages
                row = self._free.pop() if row < 0 else row
                table = torch.tensor(chunk.pages, dtype=torch.int32)
                with torch.cuda.stream(self._stream):
                    self._tables[row, : len(table)].copy_(table)
            self._places[chunk.sampling] = row, chunk.start + 1
            found.append(row)
        return found

    def _capture(self, size: int) -> torch.cuda.CUDAGraph:
        self._run(size)  # compiles the kernels
        gc.collect()  # a graph that is freed during the capture would end it
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            self._run(size)
        self._graphs[size] = graph
        return graph

    def _run(self, size: int) -> None:
        model, layers = self._model, self._model.layers
        dependent = self._hopper and size <= DEPENDENT_ROWS
        heads, eps = layers.heads, layers.eps
        self._input.copy_(self._host_input, non_blocking=True)
        ids, positions, slots = self._input[:, :size]
        hidden, normed = self._hidden[:size], self._normed[:size]
        rotary = self._rotary[0][:size], self._rotary[1][:size]
        launch.embed(
            ids, positions, slots, model.embedding, model.frequencies, hidden, rotary, self._tables, self._page
        )
        sums: dict[Buffer, Sums | None] = {Buffer.DELTA: None}
        narrow = self._narrow
        for operation in layers.operations:
            match operation:
                case Norm(weight, Buffer.HIDDEN, _, add):
                    launch.add_norm(sums[Buffer.DELTA] if add else None, hidden, weight, eps, normed, True, dependent)
                case Norm(weight, _, _, _):
                    launch.add_norm(sums[Buffer.DELTA], hidden, weight, eps, self._delta[:size], False, dependent)
                    sums[Buffer.DELTA] = Sums(self._delta[None, :size])
                case Matmul(weight, source, target):
                    x = normed if source == Buffer.NORMED else narrow
                    sums[target] = self._matmul(x, weight, self._parts[target == Buffer.DELTA], dependent)
                case RotateAndStore(layer, query_norm, key_norm):
                    queries = self._queries[: size * heads[0] * heads[2]].view(size, -1)
                    wide = sums[Buffer.WIDE]
                    assert wide is not None
                    norms = query_norm, key_norm
                    launch.rotate_and_store(
                        wide, heads, rotary, norms, eps, slots, queries, self._cache[layer], dependent
                    )
                case Attention(layer, window):
                    narrow = self._narrow[: size * heads[0] * heads[2]].view(size, -1)
                    launch.decode_attention(
                        queries,
                        heads,
                        self._cache[layer],
                        self._tables[:size],
                        positions,
                        window,
                        narrow,
                        self._space,
                        dependent,
                    )
                case ActivationMul(activation):
                    wide = sums[Buffer.WIDE]
                    assert wide is not None
                    narrow = self._narrow[: size * (wide.parts.shape[2] // 2)].view(size, -1)
                    launch.activation_mul(wide, activation, narrow, dependent)
                case AddResidual():
                    pass  # part of the final norm
        launch.add_norm(sums[Buffer.DELTA], hidden, model.norm, eps, normed, True, dependent)
        logits = self._logits[: size * model.head.shape[0]].view(1, size, -1)
        launch.matmul(normed, _weight(model.head), logits, dependent)
        launch.likeliest(logits[0], self._tokens[:size], self._logprobs[:size], dependent)
        self._host_tokens[:size].copy_(self._tokens[:size], non_blocking=True)
        self._host_logprobs[:size].copy_(self._logprobs[:size], non_blocking=True)

    @staticmethod
    def _matmul(x: Tensor, packed: Packed, flat: Tensor, dependent: bool) -> Sums:
        weight = _weight(packed)
        shape = launch.splits(weight), len(x), weight.shape[0]
        return launch.matmul(x, weight, flat[: math.prod(shape)].view(shape), dependent)


def _weight(packed: Packed) -> launch.Weight:
    assert isinstance(packed, int4.Int4Weight | launch.DenseWeight)  # see `declines`
    return packed


def _greedy(sampling: Sampling) -> bool:
    """Whether the likeliest token is the one to choose, whatever came before."""
    params = sampling.params
    return (
        params.temperature < GREEDY_BELOW
        and not sampling.logprobs
        and sampling.grammar is None
        and not params.logit_bias
        and params.allowed_ids is None
        and not params.bad_ids
        and params.repetition_penalty == 1
        and not params.frequency_penalty
        and not params.presence_penalty
        and not params.min_tokens
    )
