"""What a device backend is: whether it fits, how it holds weights and cache, and the operations.

`reference.py` (plain torch) defines what every operation computes; a backend may decline a device, a weight or a whole
step, with the reason. `backend_for` (`backends/__init__.py`) chooses one.
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
from squawq.format.groupwise import quantize, to_gemm

Heads = tuple[int, int, int]  # query heads, key-value heads, head_dim
Rotary = tuple[Tensor, Tensor]  # cos and sin, float32 [rows, rotated dimensions / 2]
Gemm = tuple[
    Tensor, Tensor, Tensor | None
]  # AWQ GEMM: qweight int32 [in, n/8], scales [groups, n], qzeros or None for 8
Norms = tuple[Tensor | None, Tensor | None]  # of queries and keys, float32 [head_dim]
Pages = tuple[Tensor, Tensor]  # keys and values of one layer: [pages, *Backend.page_shapes()]


@dataclass(frozen=True)
class Batch:
    """One step's tokens, one row each, sequence after sequence.

    ids, positions, slots: int64 [rows]; a slot is page * page_size + place in the page. sequences: int64 [sequences, 4]
    of (first row, rows, start, offset of its page table in `pages`); its tokens are at positions start, start + 1 ...
    pages: int32. outputs: int64, the rows whose logits are wanted.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    sequences: Tensor
    pages: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class Layers:
    """All decoder layers of a model as one list of operations."""

    operations: tuple[Operation, ...]
    heads: Heads
    eps: float


PAGE = 16  # tokens of a page, unless a backend says otherwise
ROUNDED_ROWS = 4096
RunLayers = Callable[[Tensor, Rotary, Batch], None]  # hidden [rows, hidden_size] goes through all layers in place


class Backend(ABC):
    """Operations on one device.

    exact: compute 4-bit products in float32, where the backend would round or narrow activations otherwise.
    """

    name: ClassVar[str]
    page_size: ClassVar[int] = PAGE
    cache_dtype: ClassVar[torch.dtype] = torch.float16
    activation_dtype: ClassVar[torch.dtype] = torch.float32
    traceable: ClassVar[bool] = False  # made of torch's operations, which autograd and torch.compile see
    head: str = "16-bit"  # how the output head is held unless told: "16-bit" or "int8"

    def __init__(self, device: torch.device, *, exact: bool = False) -> None:
        self.device, self.exact = device, exact

    # Does it fit, and why not.
    @classmethod
    @abstractmethod
    def declines(cls, device: torch.device) -> str | None:
        """Why it cannot run on this device; None where it can."""

    @abstractmethod
    def int4_declines(self, out: int, in_: int, group: int) -> str | None:
        """Why `pack_int4` does not take such a weight; None where it does."""

    @abstractmethod
    def int8_declines(self, out: int, in_: int, dtype: torch.dtype) -> str | None:
        """Why `pack_int8` does not take such a weight; None where it does."""

    # Weights.
    @abstractmethod
    def pack_int4(self, out: int, in_: int, group: int, parts: Iterable[Gemm], bias: Tensor | None = None) -> Packed:
        """Linears that read the same input, stacked along `out` as they come; 4 bits a weight in memory."""

    def round_int4(self, weight: Tensor, group: int) -> Packed:
        """Round a dense [out, in] to nearest. Memory beside the result: some thousand rows."""
        parts = (to_gemm(quantize(rows, group, zero_point=True)) for rows in torch.split(weight, ROUNDED_ROWS))
        gemms = ((part["qweight"], part["scales"], part["qzeros"]) for part in parts)
        return self.pack_int4(weight.shape[0], weight.shape[1], group, gemms)

    @abstractmethod
    def pack_int8(self, weight: Tensor) -> Packed:
        """Round [out, in] to int8 with one scale per row."""

    @abstractmethod
    def pack_dense(self, parts: Sequence[Tensor], bias: Tensor | None = None) -> Packed:
        """Floating-point weights [out_i, in], stacked along `out`."""

    # Cache.
    @abstractmethod
    def page_shapes(self, kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Layout of one page's keys and values; each kv_heads * head_dim * page_size elements."""

    # Operations. Rows are tokens.
    @abstractmethod
    def matmul(self, x: Tensor, weight: Packed) -> Tensor:
        """x [..., in] -> [..., out] plus bias, in x's dtype."""

    @abstractmethod
    def embedding(self, ids: Tensor, weight: Tensor) -> Tensor:
        """Rows `ids` of weight [vocab, hidden], in activation_dtype."""

    @abstractmethod
    def add_rms_norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """hidden += delta in place, where given; the RMS norm of the sum [..., n]."""

    @abstractmethod
    def rotary(self, positions: Tensor, frequencies: Tensor) -> Rotary:
        """cos and sin of positions int64 [rows] times frequencies float32 [rotated dimensions / 2]."""

    @abstractmethod
    def rotate_and_store(
        self, qkv: Tensor, heads: Heads, rotary: Rotary, norms: Norms, eps: float, slots: Tensor, pages: Pages
    ) -> None:
        """Norm and rotate the queries and keys of qkv [rows, (query + 2 kv) * head_dim] in place; write keys and values
        to the slots of the cache."""

    @abstractmethod
    def attention(
        self, qkv: Tensor, heads: Heads, sequences: Tensor, tables: Tensor, window: int | None, pages: Pages
    ) -> Tensor:
        """Causal attention over the paged cache -> [rows, query heads * head_dim].

        sequences, tables: `Batch.sequences` and `Batch.pages`. window: tokens that a query sees; None for all.
        """

    @abstractmethod
    def activation_mul(self, gate_up: Tensor, activation: str) -> Tensor:
        """[..., 2n] of gate and up -> activation(gate) * up, [..., n]."""

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

    @abstractmethod
    def round_columns(
        self, wanted: Tensor, base: Tensor, feedback: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, top: int
    ) -> tuple[Tensor, Tensor]:
        """Quantization: integers and errors of a block of columns with error feedback. See `reference`."""

    # The machine.
    def set_threads(self, count: int) -> None:  # noqa: B027 (a device without threads of its own)
        """Threads of the operations on the host. Raises ConfigError unless it is 1 to 1024."""

    def describe(self) -> dict[str, object]:
        """What it runs on, for logs."""
        return {}

    # A whole step.
    def prepare(self, layers: Layers, cache: Sequence[Pages]) -> RunLayers:
        """All layers over this cache (one Pages per layer) as one call; here one operation after another."""

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
