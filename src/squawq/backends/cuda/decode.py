"""The next token of each of many sequences on a GPU: the whole model and sampling as one CUDA graph a batch size."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from squawq.backends.base import PAGE, LayerCache, Model, NextLogits
from squawq.backends.cuda import delta_rule, experts, int4, launch
from squawq.backends.cuda.group import CudaGroup
from squawq.backends.cuda.launch import Sums
from squawq.backends.cuda.peers import Place, exchange_for
from squawq.backends.layer_ops import (
    ActivationMul,
    AddResidual,
    AllReduce,
    Attention,
    Buffer,
    GatedDeltaRule,
    Matmul,
    MixtureOfExperts,
    Norm,
    OutputGate,
    Packed,
    RotateAndStore,
)

# Programmatic dependent launch gains on a Hopper card with so few rows; with more, the next kernel's programs take the
# place of running ones.
DEPENDENT_ROWS = 8
SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def declines(model: Model) -> str | None:
    """Why a model has no graph: then its steps run one operation after another."""
    for operation in (*model.layers.operations, Matmul(model.head, Buffer.NORMED, Buffer.WIDE)):
        if isinstance(operation, MixtureOfExperts) and (reason := experts.declines(operation)):
            return reason
        if isinstance(operation, Matmul) and not isinstance(operation.weight, int4.Int4Weight | launch.DenseWeight):
            return f"{type(operation.weight).__name__} has no kernel for few rows"
    return None


class DecodeGraphs:
    """Runs and samples the next token of up to `rows` sequences. Each has its own row.

    Args:
        pages: Most pages of a sequence.
        group: The ranks that have the other parts of the model. Rank 0 samples.

    Attributes:
        inputs: int64 [4, rows]: tokens, positions, slots, positions again if the next token is to be sampled. A token
            below 0 is the one that the row sampled last. A position below 0 is a row of padding.
        tables: int32 [rows, pages]: page tables. A step adds the page of its slot itself.
        space: Parameters and results of sampling; None on ranks that do not sample.
        states: int64 [rows]: each row's place among the states of delta rules.
        page: Tokens of a page.
    """

    def __init__(
        self,
        model: Model,
        cache: Sequence[LayerCache],
        dtype: torch.dtype,
        rows: int,
        pages: int,
        group: CudaGroup | None = None,
    ) -> None:
        device = model.norm.device
        hidden, heads, vocab = len(model.norm), model.layers.heads, model.head.shape[0]
        vocabulary = model.vocabulary
        self._exchange = None
        if group is not None and vocabulary is not None:
            self._exchange = exchange_for(group, vocabulary, rows, hidden)
        self._first = 0 if vocabulary is None else vocabulary.own.start  # of the embedding's tokens
        self._model, self._cache, self.rows = model, cache, rows
        operations = model.layers.operations
        self.page = next((cache[op.layer][0].shape[2] for op in operations if isinstance(op, Attention)), PAGE)
        products = [(op.target, _weight(op.weight)) for op in operations if isinstance(op, Matmul)]
        widths: dict[Buffer, int] = {}
        for target, weight in products:
            widths[target] = max(widths.get(target, 0), weight.shape[0] * launch.splits(weight))
        weights = [weight for _, weight in products]
        narrow = max(weight.shape[1] for weight in weights)

        def empty(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=kind, device=device)

        self._hidden, self._normed = empty(rows, hidden), empty(rows, hidden, kind=dtype)
        self._narrow = empty(rows * narrow, kind=dtype)
        self._queries = empty(rows * heads[0] * heads[2], kind=dtype)
        self._parts = {target: empty(rows * width) for target, width in widths.items()}
        self._delta = empty(rows, hidden, kind=dtype)
        sparse = [op for op in operations if isinstance(op, MixtureOfExperts)]
        self._experts = experts.expert_space(sparse, rows, dtype, device, split=True) if sparse else None
        columns = model.frequencies.shape[1]
        self._rotary = empty(rows, columns), empty(rows, columns)
        self._scales = empty(rows, 2)  # of norms of all heads together
        self._logits = empty(rows * vocab)
        self._attention = launch.decode_space(rows, heads, device)
        self._places = torch.arange(rows, dtype=torch.int32, device=device)
        self.inputs = empty(4, rows, kind=torch.int64)
        self.tables = empty(rows, pages, kind=torch.int32)
        self.space: launch.SamplingSpace | None = None
        if group is None or group.rank == 0:
            tokens = vocab if vocabulary is None else sum(vocabulary.each)
            self.space = launch.sampling_space(rows, tokens, device)
        self.inputs[1:] = -1
        self.states = empty(rows, kind=torch.int64)
        rules = [op.sizes for op in operations if isinstance(op, GatedDeltaRule)]
        self._between = delta_rule.space(rows, rules[0], device) if rules else None
        self._each = torch.arange(rows, device=device)
        self._hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # and the logits that it computes
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def size(self, rows: int) -> int:
        """Rows of the graph that runs the first `rows` rows."""
        return min(next((size for size in SIZES if size >= rows), self.rows), self.rows)

    def capture(self, sizes: Sequence[int] = SIZES) -> None:
        """Compile the kernels and capture a graph for each batch size up to `rows`, on the current stream, with rows of
        padding."""
        wanted = sorted({self.size(size) for size in (*sizes, self.rows)}, reverse=True)
        with ThreadPoolExecutor(min(len(wanted), os.cpu_count() or 1)) as pool, self._alone():
            list(pool.map(self._compile, wanted))
        for size in wanted:
            gc.collect()  # a graph that is freed during the capture would end it
            torch.cuda.synchronize()
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                logits = self._run(size)
            self._graphs[size] = graph, logits

    def _alone(self) -> AbstractContextManager[None]:
        """See `Exchange.alone`."""
        return nullcontext() if self._exchange is None else self._exchange.alone()

    @torch.inference_mode()
    def _compile(self, size: int) -> None:
        """Run rows of padding on a stream of the calling thread: what the kernels write is of no use to anybody."""
        with torch.cuda.stream(torch.cuda.Stream(self.inputs.device)):  # type: ignore[no-untyped-call]
            self._run(size)

    def run(self, rows: int) -> Tensor:
        """Run the first `rows` rows on the current stream; return their logits, float32 [rows, vocab].

        On ranks but the first, logits of their own tokens.
        """
        size = self.size(rows)
        if self._pool is None:  # in tests, the kernels are interpreted on the CPU
            return self._run(size)[:rows]
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:rows]

    def _run(self, size: int) -> Tensor:
        model, layers = self._model, self._model.layers
        dependent = self._hopper and size <= DEPENDENT_ROWS
        heads, eps = layers.heads, layers.eps
        ids, positions, slots, sampled_at = self.inputs[:, :size]
        hidden, normed = self._hidden[:size], self._normed[:size]
        rotary = self._rotary[0][:size], self._rotary[1][:size]
        exchange, space = self._exchange, self.space
        sampled = ids if space is None else space.results[0, :size]
        if exchange is not None:
            sampled = exchange.tokens(None if space is None else sampled, size, dependent)
        embedding = model.embedding, self._first, model.frequencies, model.embedding_scale
        launch.embed(ids, positions, slots, sampled, *embedding, hidden, rotary, self.tables, self.page)
        sums: dict[Buffer, Sums | None] = {Buffer.DELTA: None}
        if exchange is not None:
            sums[Buffer.DELTA] = exchange.all_reduce(Sums(hidden[None]), Place.EMBEDDING, False)
            hidden.zero_()
        narrow, place = self._narrow, Place.MLP
        for operation in layers.operations:
            match operation:
                case Norm(weight, Buffer.HIDDEN, _, _):
                    launch.add_norm(sums[Buffer.DELTA], hidden, weight, eps, normed, True, dependent)
                case Norm(weight, _, _, _):
                    launch.add_norm(sums[Buffer.DELTA], hidden, weight, eps, self._delta[:size], False, dependent)
                    sums[Buffer.DELTA] = Sums(self._delta[None, :size])
                case Matmul(weight, source, target):
                    if source == Buffer.HIDDEN:
                        launch.add_norm(sums[Buffer.DELTA], hidden, None, eps, normed, True, dependent)
                    x = narrow if source == Buffer.NARROW else normed
                    sums[target] = self._matmul(x, weight, self._parts[target], dependent)
                case RotateAndStore(layer):
                    queries = self._queries[: size * heads[0] * heads[2]].view(size, -1)
                    wide = sums[Buffer.WIDE]
                    assert wide is not None
                    scales = self._scales[:size] if operation.whole else None
                    pages = self._cache[layer]
                    launch.rotate_and_store(
                        wide, heads, operation, rotary, eps, slots, queries, pages, 1, scales, dependent
                    )
                case Attention(layer):
                    narrow = self._narrow[: size * heads[0] * heads[2]].view(size, -1)
                    launch.decode_attention(
                        queries,
                        heads,
                        operation,
                        self._cache[layer],
                        self.tables[:size],
                        positions,
                        narrow,
                        self._attention,
                        dependent,
                    )
                case OutputGate():
                    gates = sums[Buffer.GATES]
                    assert gates is not None
                    launch.output_gate(gates, narrow, dependent)
                case GatedDeltaRule(layer, sizes):
                    wide, gates, between = sums[Buffer.WIDE], sums[Buffer.GATES], self._between
                    assert wide is not None
                    assert gates is not None
                    assert between is not None
                    narrow = self._narrow[: size * sizes.values].view(size, -1)
                    of = delta_rule.Rows(self._each[:size], self.states[:size], positions)
                    state = self._cache[layer]
                    delta_rule.gated_delta_rule(wide, gates, operation, eps, of, state, between, narrow, dependent)
                case ActivationMul(activation):
                    wide = sums[Buffer.WIDE]
                    assert wide is not None
                    narrow = self._narrow[: size * (wide.parts.shape[2] // 2)].view(size, -1)
                    launch.activation_mul(wide, activation, narrow, dependent)
                case MixtureOfExperts(shared=kind):
                    shared = sums[Buffer.DELTA] if kind else None
                    assert self._experts is not None
                    sums[Buffer.DELTA] = experts.run(
                        normed, operation, shared, self._experts, split=True, dependent=dependent
                    )
                case AllReduce():
                    delta, place = sums[Buffer.DELTA], Place.MLP if place == Place.ATTENTION else Place.ATTENTION
                    assert exchange is not None
                    assert delta is not None
                    sums[Buffer.DELTA] = exchange.all_reduce(delta, place, dependent)
                case AddResidual():
                    pass  # part of what reads the residual stream next
        launch.add_norm(sums[Buffer.DELTA], hidden, model.norm, eps, normed, True, dependent)
        logits = self._logits_of(size)
        launch.matmul(normed, _weight(model.head), logits[None], dependent)
        if model.logits_cap:
            launch.soft_cap(logits, model.logits_cap, dependent)
        if exchange is not None:
            logits = exchange.gather(logits, dependent)
        if space is not None:
            launch.sample(logits, self._places[:size], sampled_at, space, dependent)
        return logits

    def _logits_of(self, size: int) -> Tensor:
        vocab = self._model.head.shape[0]
        return self._logits[: size * vocab].view(size, vocab)

    @staticmethod
    def _matmul(x: Tensor, packed: Packed, flat: Tensor, dependent: bool) -> Sums:
        weight = _weight(packed)
        shape = launch.splits(weight), len(x), weight.shape[0]
        return launch.matmul(packed.ordered(x), weight, flat[: math.prod(shape)].view(shape), dependent)


def next_logits(graphs: DecodeGraphs) -> NextLogits:
    """A function that runs the next token of each of `graphs.rows` sequences, with one graph, and samples none."""
    rows, inputs = graphs.rows, graphs.inputs
    device, page = inputs.device, graphs.page
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the weights are there
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
            graphs.capture((rows,))
            torch.cuda.synchronize(device)
    known: list[list[int]] = []  # page tables that are on the card

    def run(ids: Tensor, positions: Sequence[int], tables: Sequence[Sequence[int]]) -> Tensor:
        slots = [table[at // page] * page + at % page for table, at in zip(tables, positions, strict=True)]
        with torch.inference_mode():
            inputs[0].copy_(ids)
            inputs[1:3].copy_(torch.tensor([list(positions), slots]))
            if known != tables:
                known[:] = map(list, tables)
                padded = [[*table, *[0] * (graphs.tables.shape[1] - len(table))] for table in tables]
                graphs.tables.copy_(torch.tensor(padded, dtype=torch.int32))
            logits = graphs.run(rows)
        return logits.clone()

    return run


def _weight(packed: Packed) -> launch.Weight:
    assert isinstance(packed, int4.Int4Weight | launch.DenseWeight)  # see `declines`
    return packed
