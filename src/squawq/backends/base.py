"""The interface of a device backend: what it can run, how it holds weights and KV cache, and its operations.

A new backend is a class of this kind (or of `Reference`, replacing one operation after another) and a row in `BACKENDS`
(`backends/__init__.py`). `reference.py` defines in plain torch what each operation computes; tests compare with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from squawq.backends.layer_ops import (
    ActivationMul,
    AddResidual,
    Attention,
    Buffer,
    Matmul,
    MixtureOfExperts,
    Norm,
    Operation,
    Packed,
    RotateAndStore,
)
from squawq.backends.sampling import Chunk, Sampling, StepOutput, sample, sampler
from squawq.errors import KernelError
from squawq.format.groupwise import quantize, to_gemm

PAGE = 16  # tokens per page, unless a backend has another size
ROUNDED_ROWS = 4096

Heads = tuple[int, int, int]  # query heads, key-value heads, head_dim
Rotary = tuple[Tensor, Tensor]  # cos and sin, float32 [rows, rotated dimensions / 2]
Norms = tuple[Tensor | None, Tensor | None]  # of queries and keys, float32 [head_dim]
Pages = tuple[Tensor, Tensor]  # keys and values of one layer: [pages, *Backend.page_shapes()]
# AWQ GEMM tensors: qweight int32 [in, n / 8], scales [groups, n], qzeros int32 [groups, n / 8] or None for zeros of 8
Gemm = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Batch:
    """The tokens of one step, one row each, sequence after sequence. int64, but for `pages`."""

    ids: Tensor  # [rows]
    positions: Tensor  # [rows]; start, start + 1 ... in a sequence
    slots: Tensor  # [rows]; page * page_size + place in the page
    sequences: Tensor  # [sequences, 4]: first row, rows, start, offset of the page table in `pages`
    pages: Tensor  # int32; all page tables
    outputs: Tensor  # rows whose logits are needed


@dataclass(frozen=True)
class Layers:
    """All decoder layers of a model as one list of operations."""

    operations: tuple[Operation, ...]
    heads: Heads
    eps: float


RunLayers = Callable[[Tensor, Rotary, Batch], None]  # hidden [rows, hidden_size] goes through all layers in place


class Backend(ABC):
    """Operations on one device. Rows are tokens.

    exact: compute 4-bit products in float32, where the backend would round or narrow activations otherwise.
    """

    name: ClassVar[str]
    page_size: ClassVar[int] = PAGE  # tokens per page of the KV cache
    cache_dtype: ClassVar[torch.dtype] = torch.float16
    activation_dtype: ClassVar[torch.dtype] = torch.float32  # of hidden states
    traceable: ClassVar[bool] = False  # the operations are torch's own, which autograd and torch.compile can trace
    head: str = "16-bit"  # default format of the output head: "16-bit" or "int8"

    def __init__(self, device: torch.device, *, exact: bool = False) -> None:
        self.device, self.exact = device, exact

    # Does it fit? Each answer is the reason why not, or None.
    @classmethod
    @abstractmethod
    def declines(cls, device: torch.device) -> str | None:
        """Why it cannot run on this device."""

    def int4_declines(self, out: int, in_: int, group: int) -> str | None:  # noqa: ARG002
        """Why `pack_int4` does not take such a weight."""
        return None

    def int8_declines(self, out: int, in_: int, dtype: torch.dtype) -> str | None:  # noqa: ARG002
        """Why `pack_int8` does not take such a weight."""
        return f"the {self.name} backend has no int8 weights"

    # Weights [out, in], in the backend's own layout.
    @abstractmethod
    def pack_int4(self, out: int, in_: int, group: int, parts: Iterable[Gemm], bias: Tensor | None = None) -> Packed:
        """Linears with the same input, stacked along `out`; 4 bits per weight. `parts` are read one at a time."""

    @abstractmethod
    def pack_dense(self, parts: Sequence[Tensor], bias: Tensor | None = None) -> Packed:
        """Floating-point weights [out_i, in], stacked along `out`."""

    def pack_int8(self, weight: Tensor) -> Packed:  # noqa: ARG002
        """Round [out, in] to int8 with one scale per row."""
        raise KernelError(f"the {self.name} backend has no int8 weights")

    def round_int4(self, weight: Tensor, group: int) -> Packed:
        """Round a dense [out, in] to nearest. Memory beside the result: some thousand rows."""
        parts = (to_gemm(quantize(rows, group, zero_point=True)) for rows in torch.split(weight, ROUNDED_ROWS))
        gemms = ((part["qweight"], part["scales"], part["qzeros"]) for part in parts)
        return self.pack_int4(weight.shape[0], weight.shape[1], group, gemms)

    # KV cache.
    @abstractmethod
    def page_shapes(self, kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of one page's keys and values; each has kv_heads * head_dim * page_size elements."""

    # Operations.
    @abstractmethod
    def matmul(self, x: Tensor, weight: Packed) -> Tensor:
        """x [..., in] -> x @ weight.T + bias [..., out], in x's dtype."""

    def embedding(self, ids: Tensor, weight: Tensor) -> Tensor:
        """Rows `ids` (int64 [rows]) of weight [vocab, hidden], in activation_dtype."""
        return weight[ids.to(weight.device)].to(self.device, self.activation_dtype)

    @abstractmethod
    def add_rms_norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """hidden += delta in place, where given; the RMS norm of the sum [rows, n]."""

    def rotary(self, positions: Tensor, frequencies: Tensor) -> Rotary:
        """cos and sin of positions int64 [rows] times frequencies float32 [rotated dimensions / 2]."""
        angles = positions.float()[:, None] * frequencies[None, :]
        return angles.cos(), angles.sin()

    @abstractmethod
    def rotate_and_store(
        self, qkv: Tensor, heads: Heads, rotary: Rotary, norms: Norms, eps: float, slots: Tensor, pages: Pages
    ) -> None:
        """Norm and rotate the queries and keys of qkv [rows, (query + 2 kv) * head_dim] in place, then write keys and
        values to their slots in the cache."""

    @abstractmethod
    def attention(
        self, qkv: Tensor, heads: Heads, sequences: Tensor, tables: Tensor, window: int | None, pages: Pages
    ) -> Tensor:
        """Causal attention over the paged cache -> [rows, query heads * head_dim].

        Args:
            sequences, tables: `Batch.sequences` and `Batch.pages`.
            window: Tokens that a query sees; None for all.
        """

    @abstractmethod
    def activation_mul(self, gate_up: Tensor, activation: str) -> Tensor:
        """gate_up [rows, 2n] -> activation(gate) * up [rows, n]."""

    def experts(self, x: Tensor, layer: MixtureOfExperts) -> Tensor:
        """A mixture-of-experts MLP, [rows, hidden] -> [rows, hidden]; sums in float32, in the order of the experts."""
        shares, chosen = self.matmul(x, layer.router).float().softmax(-1).topk(layer.top_k)
        if layer.renormalize:
            shares = shares / shares.sum(-1, keepdim=True)
        total = torch.zeros_like(x, dtype=torch.float32)
        for index in sorted(set(chosen.flatten().tolist())):
            row, place = torch.where(chosen == index)
            inner = self.activation_mul(self.matmul(x[row], layer.gate_up[index]), layer.activation)
            y = self.matmul(inner, layer.down[index])
            total.index_add_(0, row, y.float() * shares[row, place, None])
        return total.to(x.dtype)

    def round_columns(
        self, wanted: Tensor, base: Tensor, feedback: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, top: int
    ) -> tuple[Tensor, Tensor]:
        """For quantization: round a block of columns with error feedback (GPTQ), the last one first.

        Args:
            wanted, base: float32 [columns, out]: the targets before feedback, and what errors are measured against.
            feedback: float32 [columns, columns]: the weights of later columns' errors in a column's target.
            scales, zeros: float32 [groups, out].
            groups: int64 [columns], on the CPU.
            top: Integers are 0 to top.

        Returns:
            Integers as float32, and errors (base minus rounded), each [columns, out].
        """
        levels, errors = torch.empty_like(wanted), torch.empty_like(wanted)
        of = groups.tolist()
        for own in range(len(wanted) - 1, -1, -1):
            after, scale, zero = slice(own + 1, None), scales[of[own]], zeros[of[own]]
            column = torch.addmv(wanted[own], errors[after].T, feedback[own, after])
            torch.div(column, scale, out=levels[own]).round_().add_(zero).clamp_(0, top)
            torch.sub(zero, levels[own], out=errors[own]).mul_(scale).add_(base[own])
        return levels, errors

    # Sampling: here on the host, one sequence after another.
    def prepare_sampling(self, sampling: Sampling) -> None:
        """Set `sampling.state`, which `sample` keeps for a sequence; called in the thread that submits the request."""
        sampling.state = sampler(sampling)

    def sample(self, logits: Tensor, batch: Sequence[Chunk]) -> list[StepOutput]:
        """logits float32 [rows, vocab], `chunk.logits` rows of each chunk in order -> an output for each chunk.

        An output depends on the chunk's own rows, never on the batch.
        """
        return sample(logits.cpu().numpy(), batch)

    # The host.
    def set_threads(self, count: int) -> None:  # noqa: B027 (most devices have none)
        """Set the number of host threads. Raises ConfigError unless it is 1 to 1024."""

    def describe(self) -> dict[str, object]:
        """Facts about the device for logs."""
        return {}

    # A whole step: one native call, a captured graph, or by default one operation after another.
    def prepare(self, layers: Layers, cache: Sequence[Pages]) -> RunLayers:
        """All layers over this cache (one Pages per layer) as one call."""

        def run(hidden: Tensor, rotary: Rotary, batch: Batch) -> None:
            buffers = {Buffer.HIDDEN: hidden}
            for operation in layers.operations:
                self._apply(operation, layers, buffers, rotary, batch, cache)

        return run

    def runs_whole(self, run: RunLayers) -> bool:  # noqa: ARG002
        """Whether what `prepare` returned runs without torch's own threads."""
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
                buffers[target] = self.matmul(buffers[source], weight)
            case RotateAndStore(layer, query_norm, key_norm):
                norms = query_norm, key_norm
                qkv = buffers[Buffer.WIDE]
                self.rotate_and_store(qkv, layers.heads, rotary, norms, layers.eps, batch.slots, cache[layer])
            case Attention(layer, window):
                sequences = batch.sequences, batch.pages
                found = self.attention(buffers[Buffer.WIDE], layers.heads, *sequences, window, cache[layer])
                buffers[Buffer.NARROW] = found
            case ActivationMul(activation):
                buffers[Buffer.NARROW] = self.activation_mul(buffers[Buffer.WIDE], activation)
            case MixtureOfExperts():
                buffers[Buffer.DELTA] = self.experts(buffers[Buffer.NORMED], operation)
            case AddResidual():
                buffers[Buffer.HIDDEN] += buffers[Buffer.DELTA]
