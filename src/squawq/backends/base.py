"""The interface of a device backend: what it can run, how it holds weights and KV cache, and its operations.

A new backend is a subclass of `Backend` (or of `Reference`, to override single operations) and a row in `BACKENDS`
(`backends/__init__.py`). `reference.py` defines in plain torch what each operation computes; tests compare with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from squawq.backends.layer_ops import (
    ActivationMul,
    AddResidual,
    AllReduce,
    Attention,
    Buffer,
    Matmul,
    MixtureOfExperts,
    Norm,
    Operation,
    Packed,
    RotateAndStore,
    Routing,
)
from squawq.backends.sampling import Chunk, Sampling, StartedStep, StepOutput, sample, sampler
from squawq.config import ModelConfig
from squawq.errors import ConfigError, KernelError
from squawq.format.groupwise import quantize, to_gemm

PAGE = 16  # default page size of the KV cache, in tokens
FP8 = torch.float8_e4m3fn  # of a KV cache, by choice
ROUNDED_ROWS = 4096  # that round_int4 quantizes at a time

Heads = tuple[int, int, int]  # query heads, key-value heads, head_dim
Rotary = tuple[Tensor, Tensor]  # cos and sin, float32 [rows, columns]: the rotated pairs of each kind of layer
Pages = tuple[Tensor, Tensor]  # keys and values of one layer: [num_pages, *shape], shapes by Backend.page_shapes
# AWQ tensors of n outputs: qweight int32 [in, n / 8], scales [groups, n], qzeros int32 [groups, n / 8] or None (all 8)
Gemm = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Batch:
    """The tokens of one step, one row each, sequence after sequence. int64 except `pages`."""

    ids: Tensor  # [rows]
    positions: Tensor  # [rows]; each token's position in its sequence
    slots: Tensor  # [rows]; slot mapping: page * page_size + offset in the page
    # [sequences, 4], on the CPU: first row, rows, position of the first row, offset of its page table in `pages`
    sequences: Tensor
    pages: Tensor  # int32 [entries]; all page tables (vLLM's block tables), one after another
    outputs: Tensor  # [outputs]; rows whose logits are needed


@dataclass(frozen=True)
class Layers:
    """All decoder layers of a model as one list of operations."""

    operations: tuple[Operation, ...]
    heads: Heads
    eps: float


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that this process has of the embedding and the output head, and how many each rank has."""

    own: slice
    each: Sequence[int]


@dataclass(frozen=True)
class Model:
    """A whole model, or this process's part of it: the attributes are `Decoder`'s."""

    layers: Layers
    embedding: Tensor
    frequencies: Tensor
    norm: Tensor
    head: Packed
    vocabulary: Vocabulary | None = None
    embedding_scale: float = 1.0
    logits_cap: float = 0.0


@dataclass(frozen=True)
class NextTokens:
    """What the other ranks must know of a step that runs the next token of sequences. All on the CPU."""

    inputs: Tensor  # int64 [4, rows], see `cuda.decode.DecodeGraphs`
    rows: Tensor  # int64 [n]: that have new page tables
    tables: Tensor  # int32 [n, pages]


class Group(Protocol):
    """The ranks that run a model together (tensor parallelism), seen from one of them.

    Every rank makes the same calls in the same order. They raise RankError if another rank has ended.
    """

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> None:
        """Replace x, of activation_dtype and the same shape on all ranks, with its sum: the same bits on all ranks."""

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """On rank 0, x [rows, widths[rank]] of all ranks side by side; on others x itself."""

    def watch(self, processes: Sequence[int]) -> None:
        """End the group when one of these child processes has ended, as far as this rank waits for others."""

    def end(self) -> None:
        """Make every rank that waits for another, now or later, raise RankError. Any thread may call it."""


class Steps(Protocol):
    """Runs and samples whole steps."""

    def start(self, batch: Sequence[Chunk], prompts: Callable[[Sequence[Chunk]], Tensor]) -> StartedStep:
        """Start a step.

        Args:
            prompts: Computes logits, float32 [rows, vocab], of the chunks that are not one generated token,
                `chunk.logits` rows of each in order.
        """


Tell = Callable[[NextTokens], None]  # rank 0 tells the other ranks of a step
Follow = Callable[[NextTokens], None]  # they run it as well

# ids int64 [rows] on the device, the position and page table of each -> float32 [rows, vocab]
NextLogits = Callable[[Tensor, Sequence[int], Sequence[Sequence[int]]], Tensor]
RunLayers = Callable[[Tensor, Rotary, Batch], None]  # updates hidden [rows, hidden_size] in place


class Backend(ABC):
    """Operations on one device. Rows are tokens.

    Args:
        exact: Multiply INT4 weights by float32 activations; otherwise a backend may round them to int8 or 16 bits.
        dtype: Of activations: "auto", "float16" or "bfloat16". The KV cache's is the same unless chosen.
        kv_cache_dtype: "auto", "float16", "fp8" or "fp8_e4m3" (both FP8); computation does not change.

    Raises:
        ConfigError: The backend does not have that dtype.
    """

    name: ClassVar[str]
    page_size: ClassVar[int] = PAGE  # tokens per page of the KV cache
    cache_dtype: torch.dtype = torch.float16
    activation_dtype: torch.dtype = torch.float32  # of hidden states
    traceable: ClassVar[bool] = False  # the operations are torch's own, which autograd and torch.compile can trace
    computes_exactly: ClassVar[bool] = True  # if asked: float32 activations in products of INT4 weights
    head: str = "16-bit"  # default format of the output head: "16-bit" or "int8"
    group: Group | None = None  # the ranks that share the model; None: this process has all of it

    def __init__(
        self, device: torch.device, *, exact: bool = False, dtype: str = "auto", kv_cache_dtype: str = "auto"
    ) -> None:
        self.device, self.exact = device, exact
        if dtype != "auto":
            if reason := self.dtype_declines():
                raise ConfigError(f"dtype is {dtype!r}, but {reason}; choose auto, or leave it out")
            self.activation_dtype = self.cache_dtype = getattr(torch, dtype)
        if kv_cache_dtype in ("fp8", "fp8_e4m3"):
            if reason := self.fp8_declines():
                raise ConfigError(f"kv_cache_dtype is {kv_cache_dtype!r}, but {reason}; choose auto, or leave it out")
            self.cache_dtype = FP8
        elif kv_cache_dtype != "auto":
            self.cache_dtype = getattr(torch, kv_cache_dtype)

    # Support checks. Each returns the reason why not, or None if it is supported.
    @classmethod
    @abstractmethod
    def declines(cls, device: torch.device) -> str | None:
        """Why this backend cannot run on `device`."""

    def dtype_declines(self) -> str | None:
        """Why activations can have no dtype but `activation_dtype`."""
        return f"activations of the {self.name} backend are {str(self.activation_dtype).removeprefix('torch.')}"

    def fp8_declines(self) -> str | None:
        """Why the KV cache cannot be FP8."""
        return f"the {self.name} backend has no fp8"

    def int4_declines(self, out: int, in_: int, group: int) -> str | None:  # noqa: ARG002
        """Why `pack_int4` does not take a weight [out, in_] in groups of `group` inputs."""
        return None

    def int8_declines(self, out: int, in_: int, dtype: torch.dtype) -> str | None:  # noqa: ARG002
        """Why `pack_int8` does not take a weight [out, in_] of this dtype."""
        return f"the {self.name} backend has no int8 weights"

    # Weights [out, in], in the backend's own layout.
    @abstractmethod
    def pack_int4(self, out: int, in_: int, group: int, parts: Iterable[Gemm], bias: Tensor | None = None) -> Packed:
        """Pack INT4 linears with the same input, stacked along `out`. `parts` are read one at a time; bias is [out]."""

    @abstractmethod
    def pack_dense(self, parts: Sequence[Tensor], bias: Tensor | None = None) -> Packed:
        """Pack floating-point weights [out_i, in], stacked along `out`; bias is [out]."""

    def pack_int8(self, weight: Tensor) -> Packed:  # noqa: ARG002
        """Round a weight [out, in] to int8 with one scale per output row."""
        raise KernelError(f"the {self.name} backend has no int8 weights")

    def round_int4(self, weight: Tensor, group: int) -> Packed:
        """Quantize a weight [out, in] to INT4 by round-to-nearest, ROUNDED_ROWS rows at a time to save memory."""
        parts = (to_gemm(quantize(rows, group, zero_point=True)) for rows in torch.split(weight, ROUNDED_ROWS))
        gemms = ((part["qweight"], part["scales"], part["qzeros"]) for part in parts)
        return self.pack_int4(weight.shape[0], weight.shape[1], group, gemms)

    # KV cache.
    @abstractmethod
    def page_shapes(self, kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of one page's keys and values; each has kv_heads * head_dim * page_size elements."""

    @classmethod
    def step_bytes(cls, config: ModelConfig, rows: int, tokens: int, ranks: int = 1) -> int:  # noqa: ARG003
        """About what steps take beside weights and KV cache: decode steps of so many rows, others of so many tokens.

        config: Of the whole model, or of one rank's part. It needs no such device.
        """
        return 0

    def working_bytes(self, config: ModelConfig, rows: int, tokens: int) -> int:
        """`step_bytes` with this backend's ranks."""
        return self.step_bytes(config, rows, tokens, 1 if self.group is None else self.group.size)

    # Operations.
    @abstractmethod
    def matmul(self, x: Tensor, weight: Packed) -> Tensor:
        """x [..., in] -> x @ weight.T + bias [..., out], in x's dtype."""

    def layer_matmul(self, x: Tensor, weight: Packed) -> Tensor:
        """`matmul` in a decoder layer, where a row's bits must not depend on the number of rows."""
        return self.matmul(x, weight)

    def logits(self, x: Tensor, head: Packed) -> Tensor:
        """The output head: x [rows, hidden] -> float32 [rows, vocab]."""
        return self.matmul(x, head).float()

    def embedding(self, ids: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
        """Rows `ids` (int64 [rows]) of weight [vocab, hidden] times scale, in the dtype of the residual stream."""
        rows = weight[ids.to(weight.device)].to(self.device, self.residual_dtype)
        return rows if scale == 1 else rows.mul_(scale)

    @property
    def residual_dtype(self) -> torch.dtype:
        """Of the residual stream."""
        return self.activation_dtype

    @abstractmethod
    def add_rms_norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """Add delta to hidden [rows, n] in place, if given; return the RMS norm of the sum, times weight [n]."""

    def soft_cap(self, logits: Tensor, cap: float) -> Tensor:
        """cap * tanh(logits / cap), in place; float32 [rows, vocab]."""
        return logits.div_(cap).tanh_().mul_(cap)

    def rotary(self, positions: Tensor, frequencies: Tensor) -> Rotary:
        """cos and sin of positions (int64 [rows]) times frequencies, times a magnitude.

        frequencies: float32 [2, columns]: radians per position, and magnitudes.
        """
        angles = positions.float()[:, None] * frequencies[0]
        return angles.cos() * frequencies[1], angles.sin() * frequencies[1]

    @abstractmethod
    def rotate_and_store(
        self,
        qkv: Tensor,
        heads: Heads,
        operation: RotateAndStore,
        rotary: Rotary,
        eps: float,
        slots: Tensor,
        pages: Pages,
    ) -> None:
        """Norm and rotate the queries and keys of qkv [rows, (query + 2 kv) * head_dim] in place, then write keys and
        values to their slots in the cache."""

    @abstractmethod
    def attention(
        self, qkv: Tensor, heads: Heads, operation: Attention, sequences: Tensor, tables: Tensor, pages: Pages
    ) -> Tensor:
        """Causal attention over the paged cache -> [rows, query heads * head_dim].

        sequences, tables: `Batch.sequences` and `Batch.pages`.
        """

    @abstractmethod
    def activation_mul(self, gate_up: Tensor, activation: str) -> Tensor:
        """gate_up [rows, 2n], gate first -> activation(gate) * up [rows, n]. See `reference.ACTIVATIONS`."""

    def experts_declines(self, layer: MixtureOfExperts) -> str | None:  # noqa: ARG002
        """Why `experts` does not run a layer."""
        return None

    def part(self, weight: Packed, first: int, out: int) -> Packed:  # noqa: ARG002
        """Outputs [first, first + out) of a packed weight. Raises KernelError where the layout cannot be cut so."""
        raise KernelError(f"the {self.name} backend has no experts")

    def experts(self, x: Tensor, layer: MixtureOfExperts, shared: Tensor | None) -> Tensor:
        """A mixture-of-experts MLP, [rows, hidden] -> [rows, hidden]; sums in float32, in the order of the experts.

        shared: The shared expert's output, if `layer` has one.
        """
        routing, hidden = layer.routing, x.shape[1]
        inner = layer.down.shape[1]
        logits = self.layer_matmul(x, layer.router).float()
        topk_weights, topk_ids = route(logits[:, : routing.experts], routing)
        total = torch.zeros_like(x, dtype=torch.float32) if shared is None else shared.float()
        if layer.shared == "gated":
            total = total * logits[:, -1:].sigmoid()
        for index in sorted(set(topk_ids.flatten().tolist())):
            row, rank = torch.where(topk_ids == index)
            gate_up = self.part(layer.gate_up, 2 * inner * index, 2 * inner)
            y = self.activation_mul(self.layer_matmul(x[row], gate_up), layer.activation)
            y = self.layer_matmul(y, self.part(layer.down, hidden * index, hidden))
            total = total.index_add(0, row, y.float() * topk_weights[row, rank, None])
        return total.to(x.dtype)

    def round_columns(
        self, wanted: Tensor, base: Tensor, feedback: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, top: int
    ) -> tuple[Tensor, Tensor]:
        """For quantization: round a block of columns with error feedback (GPTQ), the last column first.

        Args:
            wanted, base: float32 [columns, out]: targets before feedback, and the values that errors are relative to.
            feedback: float32 [columns, columns]; [i, j > i] is the factor of column j's error in column i's target.
            scales, zeros: float32 [groups, out].
            groups: int64 [columns], on the CPU: the group of each column.
            top: The largest integer, 15 for 4 bits; the smallest is 0.

        Returns:
            Integers as float32, and errors (base minus dequantized) in float32, each [columns, out].
        """
        levels, errors = torch.empty_like(wanted), torch.empty_like(wanted)
        group_of = groups.tolist()
        for i in range(len(wanted) - 1, -1, -1):
            after, scale, zero = slice(i + 1, None), scales[group_of[i]], zeros[group_of[i]]
            target = torch.addmv(wanted[i], errors[after].T, feedback[i, after])
            torch.div(target, scale, out=levels[i]).round_().add_(zero).clamp_(0, top)
            torch.sub(zero, levels[i], out=errors[i]).mul_(scale).add_(base[i])
        return levels, errors

    # Sampling: by default on the host, one sequence after another.
    def prepare_sampling(self, sampling: Sampling) -> None:
        """Set `sampling.state`, which `sample` updates in each step; called in the thread that submits the request."""
        sampling.state = sampler(sampling)

    def sample(self, logits: Tensor, batch: Sequence[Chunk]) -> list[StepOutput]:
        """logits float32 [rows, vocab], `chunk.logits` rows of each chunk in order -> an output for each chunk.

        An output depends on the chunk's own rows, never on the batch.
        """
        return sample(logits.cpu().numpy(), batch)

    # Ranks that share a model.
    def group_declines(self, size: int) -> str | None:  # noqa: ARG002
        """Why so many processes cannot share a model."""
        return f"the {self.name} backend cannot share a model yet"

    def rank_device(self, rank: int) -> str:  # noqa: ARG002
        """The device of another rank of a group whose first rank has this backend."""
        return str(self.device)

    def group_memory(self, size: int) -> int:  # noqa: ARG002
        """A file descriptor of memory for so many ranks, which they inherit. Raises ConfigError if there is none."""
        raise KernelError(str(self.group_declines(1)))

    def join(self, rank: int, size: int, memory: int) -> Group:  # noqa: ARG002
        """This process's end of a group, which `group` is from now on. `memory` may be closed afterwards."""
        raise KernelError(str(self.group_declines(1)))

    # Host threads, and facts for logs.
    def threads(self) -> int:
        """Host threads that the backend computes with."""
        return torch.get_num_threads()

    def default_threads(self) -> int:
        """As many as this process may use."""
        return torch.get_num_threads()

    def set_threads(self, count: int) -> None:  # noqa: B027 (most devices have none)
        """Set the number of host threads. Raises ConfigError unless it is 1 to 1024."""

    def use_openmp(self, count: int) -> bool:  # noqa: ARG002
        """Run on so many of this process's OpenMP threads (torch's) instead of its own; whether that is possible."""
        return False

    def describe(self) -> dict[str, object]:
        """Facts about the device for logs."""
        return {}

    # A whole step: one native call, a captured graph, or by default one operation after another.
    def prepare(self, layers: Layers, cache: Sequence[Pages]) -> RunLayers:
        """Return a function that runs all layers on this KV cache (one Pages per layer)."""

        def run(hidden: Tensor, rotary: Rotary, batch: Batch) -> None:
            buffers = {Buffer.HIDDEN: hidden}
            for operation in layers.operations:
                self._apply(operation, layers, buffers, rotary, batch, cache)

        return run

    def prepare_steps(
        self,
        model: Model,  # noqa: ARG002
        cache: Sequence[Pages],  # noqa: ARG002
        rows: int,  # noqa: ARG002
        pages: int,  # noqa: ARG002
        tell: Tell | None = None,  # noqa: ARG002
    ) -> Steps | None:
        """A faster way to run steps, of so many sequences of so many pages at most.

        None where there is no other: then all tokens run as those of prompts do, and `sample` samples.

        Args:
            tell: For the first rank of a group. The others call `follow_steps` meanwhile.
        """
        return None

    def follow_steps(
        self,
        model: Model,  # noqa: ARG002
        cache: Sequence[Pages],  # noqa: ARG002
        rows: int,  # noqa: ARG002
        pages: int,  # noqa: ARG002
    ) -> Follow | None:
        """The other ranks' part of `prepare_steps`."""
        return None

    def prepare_next_logits(
        self,
        model: Model,  # noqa: ARG002
        cache: Sequence[Pages],  # noqa: ARG002
        rows: int,  # noqa: ARG002
        pages: int,  # noqa: ARG002
    ) -> NextLogits | None:
        """A faster way to run one token of each of `rows` sequences of at most `pages` pages; None where there is no
        other."""
        return None

    def runs_whole(self, run: RunLayers) -> bool:  # noqa: ARG002
        """Whether `run`, which `prepare` returned, is one native call: it uses none of torch's threads."""
        return False

    def _apply(
        self,
        operation: Operation,
        layers: Layers,
        buffers: dict[Buffer, Tensor],
        rotary: Rotary,
        batch: Batch,
        cache: Sequence[Pages],
    ) -> None:
        match operation:
            case Norm(weight, source, target, add):
                delta = buffers[Buffer.DELTA] if add else None
                buffers[target] = self.add_rms_norm(buffers[source], delta, weight, layers.eps)
            case Matmul(weight, source, target):
                buffers[target] = self.layer_matmul(buffers[source], weight)
            case RotateAndStore(layer):
                qkv = buffers[Buffer.WIDE]
                self.rotate_and_store(qkv, layers.heads, operation, rotary, layers.eps, batch.slots, cache[layer])
            case Attention(layer):
                sequences = batch.sequences, batch.pages
                found = self.attention(buffers[Buffer.WIDE], layers.heads, operation, *sequences, cache[layer])
                buffers[Buffer.NARROW] = found
            case ActivationMul(activation):
                buffers[Buffer.NARROW] = self.activation_mul(buffers[Buffer.WIDE], activation)
            case MixtureOfExperts():
                shared = buffers[Buffer.DELTA] if operation.shared else None
                buffers[Buffer.DELTA] = self.experts(buffers[Buffer.NORMED], operation, shared)
            case AddResidual():
                buffers[Buffer.HIDDEN] += buffers[Buffer.DELTA]
            case AllReduce():
                assert self.group is not None
                self.group.all_reduce(buffers[Buffer.DELTA])


def route(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Weights, float32 [rows, top_k], and numbers, int64 [rows, top_k], of the experts of each row.

    logits: float32 [rows, experts].
    """
    scores = logits.sigmoid() if routing.scoring == "sigmoid" else logits.softmax(-1)
    keys = scores if routing.bias is None else scores + routing.bias
    if routing.groups > 1:
        grouped = keys.view(len(keys), routing.groups, -1)
        sums = grouped.topk(min(2, grouped.shape[2])).values.sum(-1)
        kept = torch.zeros_like(sums, dtype=torch.bool).scatter(1, sums.topk(routing.top_groups).indices, True)
        keys = grouped.masked_fill(~kept[:, :, None], -torch.inf).flatten(1)
    topk_ids = keys.topk(routing.top_k).indices
    topk_weights = scores.gather(1, topk_ids)
    if routing.renormalize:
        topk_weights = topk_weights / (topk_weights.sum(-1, keepdim=True) + 1e-20)
    return topk_weights * routing.scale, topk_ids
