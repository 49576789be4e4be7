"""Backend for NVIDIA GPUs: activations in 16 bits beside a float32 residual stream, INT4 weights in 4 bits.

Prompts dequantize each weight once a step and multiply by cuBLAS, always with so many rows that it adds in one order; a
sequence's next tokens take the kernels for few rows. So a token's bits depend on its sequence alone.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from squawq.backends.base import (
    ROUNDED_ROWS,
    Follow,
    Gemm,
    Group,
    Heads,
    LayerCache,
    Model,
    NextLogits,
    Pages,
    Rotary,
    States,
    Steps,
    Tell,
)
from squawq.backends.layer_ops import Attention, GatedDeltaRule, MixtureOfExperts, Packed, RotateAndStore
from squawq.backends.reference import Reference, round_int8
from squawq.backends.sampling import Sampling
from squawq.config import ModelConfig
from squawq.errors import KernelError
from squawq.format.groupwise import PER_WORD, check_gemm

if TYPE_CHECKING:
    from squawq.backends.cuda.decode import DecodeGraphs
    from squawq.backends.cuda.delta_rule import Rows
    from squawq.backends.cuda.group import CudaGroup
    from squawq.backends.cuda.launch import Weight

# Rows up to which a product that is not a prompt's takes the kernels of decode steps. With more, cuBLAS takes less time
# even where the weight must be dequantized first.
FEW_ROWS, FEW_ROWS_INT4 = 64, 384
MIN_ROWS = 512  # of a product by cuBLAS: with fewer it may split the inputs, and add in another order
OVERHEAD = 2**29  # bytes for CUDA graphs, compiled kernels and cuBLAS's workspace: an estimate, on the safe side
QUERIES = 64  # of a program of prefill attention
HEADS_EACH = 8  # that a program rotates in a prompt


class CudaBackend(Reference):
    """See `Backend` for shapes and dtypes."""

    name = "cuda"
    traceable = False
    activation_dtype = torch.float16
    cache_dtype = torch.float16
    computes_exactly = False
    group: CudaGroup | None = None

    def __init__(self, device: torch.device, *, exact: bool = False, **dtypes: str) -> None:
        super().__init__(device, exact=exact, **dtypes)
        self._scratch = torch.empty(0)
        self._blocks: tuple[Tensor, Tensor] | None = None  # for the latest `sequences`
        self._owners: tuple[Tensor, Rows] | None = None  # the same

    @classmethod
    def declines(cls, device: torch.device) -> str | None:
        if device.type != "cuda" or torch.version.cuda is None:
            return "it is for NVIDIA GPUs"
        if find_spec("triton") is None:
            return "triton is not installed"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return f"{torch.cuda.get_device_name(device)} is older than Ampere (compute capability 8.0)"
        return None

    def dtype_declines(self) -> str | None:
        return None

    def fp8_declines(self) -> str | None:
        if self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) < (8, 9):
            return f"{torch.cuda.get_device_name(self.device)} has no fp8, which begins with compute capability 8.9"
        return None

    def int4_declines(self, out: int, in_: int, group: int) -> str | None:
        if in_ % group or out % 8:
            return f"[{out}, {in_}] has no groups of {group} or is no multiple of 8"
        return None if self._group(in_, group) is not None else f"groups of {group} are not 32, 64 or multiples of 128"

    @staticmethod
    def _group(in_: int, group: int) -> int | None:
        """The kernels' GROUP: inputs of a group, 0 for all."""
        return 0 if group == in_ else group if group in (32, 64) or group % 128 == 0 else None

    def pack_int4(self, out: int, in_: int, group: int, parts: Iterable[Gemm], bias: Tensor | None = None) -> Packed:
        from squawq.backends.cuda import int4

        kernel_group, needed = self._group(in_, group), f"{[out, in_]} in {in_ // group} groups"
        if kernel_group is None:
            return super().pack_int4(out, in_, group, parts, bias)
        weight, row = int4.empty(out, in_, kernel_group, self.activation_dtype, self.device), 0
        for part in parts:
            qweight, scales, qzeros = (None if tensor is None else tensor.to(self.device) for tensor in part)
            assert qweight is not None
            assert scales is not None
            check_gemm(qweight, scales, qzeros)
            end = row + scales.shape[1]
            if end > out or len(qweight) != in_ or len(scales) != len(weight.grids):
                raise KernelError(f"int4 tensors are {[end, len(qweight)]} in {len(scales)} groups; {needed} is needed")
            int4.pack(weight, slice(row, end), qweight, scales, qzeros)
            row = end
        if row != out:
            raise KernelError(f"int4 tensors are {[row, in_]}; {needed} is needed")
        weight.bias = self._bias(bias)
        return weight

    def pack_dense(self, parts: Sequence[Tensor], bias: Tensor | None = None) -> Packed:
        from squawq.backends.cuda.launch import DenseWeight

        weights = [part.to(self.device, self.activation_dtype) for part in parts]
        return DenseWeight(weights[0] if len(weights) == 1 else torch.cat(weights), self._bias(bias))

    def pack_int8(self, weight: Tensor) -> Packed:
        from squawq.backends.cuda.launch import DenseWeight

        parts = (round_int8(rows.to(self.device)) for rows in torch.split(weight, ROUNDED_ROWS))  # to save memory
        weights, scales = map(list, zip(*parts, strict=True))
        return DenseWeight(torch.cat(weights), None, torch.cat(scales))

    def _bias(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias.to(self.device, torch.float32)

    def page_shapes(self, kv_heads: int, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Keys and values, [kv_heads, 16, head_dim]."""
        return (kv_heads, self.page_size, head_dim), (kv_heads, self.page_size, head_dim)

    @classmethod
    def step_bytes(cls, config: ModelConfig, rows: int, tokens: int, ranks: int = 1) -> int:
        """Buffers of DecodeGraphs, activations and one dequantized weight for prompts, and OVERHEAD."""
        from squawq.backends.cuda import tiles

        query, kv, dim = config.heads
        hidden, inner = config.hidden_size, config.intermediate_size
        linears = [((query + 2 * kv) * dim, hidden), (hidden, query * dim), (2 * inner, hidden), (hidden, inner)]
        mixed = 0  # between the kernels of a delta rule
        if rule := config.delta_rule:
            linears += [(rule.channels + rule.values, hidden), (hidden, rule.values), (query * dim, hidden)]
            mixed = rule.channels + rule.values
        wide, narrow = max(out for out, _ in linears), max(in_ for _, in_ in linears)
        sums = max(out * tiles.split_count(out, -(-in_ // 64)) for out, in_ in linears)
        attended = query * tiles.CHUNKS * (dim + 2)
        pages = -(-config.max_positions // cls.page_size)
        sampled = 2 * config.vocab_size + config.vocab_size // 2 + config.vocab_size // 32  # logits, and sampling's
        exchanged = 0 if ranks == 1 else 3 * ranks * hidden + config.vocab_size
        numbers = (
            hidden + (3 if rule else 2) * sums + mixed + sampled + attended + dim + pages + exchanged
        )  # of 4 bytes
        row = 4 * numbers + 2 * (2 * hidden + narrow + query * dim)
        row += 8 * config.vocab_size  # logits after prompts, and a copy
        token = 4 * (hidden + mixed) + 2 * (2 * hidden + 2 * wide + narrow)
        dense = 2 * max(out * in_ for out, in_ in linears)
        moe, experts = config.moe, 0
        if moe is not None:
            experts = tiles.expert_bytes(moe, hidden, rows, split=True)
            experts += tiles.expert_bytes(moe, hidden, min(tokens, tiles.PROMPT_ROWS), split=False)
        return rows * row + max(tokens, MIN_ROWS) * token + dense + experts + OVERHEAD

    @property
    def residual_dtype(self) -> torch.dtype:
        return torch.float32

    def matmul(self, x: Tensor, weight: Packed) -> Tensor:
        """Few rows by the kernels of decode steps, more by cuBLAS."""
        from squawq.backends.cuda import int4, launch

        if not isinstance(weight, int4.Int4Weight | launch.DenseWeight):
            return super().matmul(x, weight)
        rows = x.reshape(-1, x.shape[-1]).to(self.activation_dtype).contiguous()
        if len(rows) > (FEW_ROWS_INT4 if isinstance(weight, int4.Int4Weight) else FEW_ROWS):
            return self._matmul_many(x, weight)
        parts = torch.empty(launch.splits(weight), len(rows), weight.shape[0], device=self.device)
        y = launch.matmul(rows, weight, parts).parts.sum(0)
        y = y if weight.bias is None else y + weight.bias
        return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    def _matmul_many(self, x: Tensor, weight: Weight) -> Tensor:
        """By cuBLAS, whose sums run in one order from MIN_ROWS rows on."""
        rows = x.reshape(-1, x.shape[-1]).to(self.activation_dtype)
        count = len(rows)
        if count < MIN_ROWS:
            rows = F.pad(rows, (0, 0, 0, MIN_ROWS - count))
        y = F.linear(rows, self._dense(weight))[:count]
        if weight.bias is not None:
            y = (y.float() + weight.bias).to(y.dtype)
        return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    def layer_matmul(self, x: Tensor, weight: Packed) -> Tensor:
        """By cuBLAS whatever the number of rows, so that a prompt's bits do not depend on where it is cut."""
        from squawq.backends.cuda import int4, launch

        if x.dtype == torch.float32:  # the residual stream itself
            limit = torch.finfo(self.activation_dtype).max
            x = x.clamp(-limit, limit).to(self.activation_dtype)
        if not isinstance(weight, int4.Int4Weight | launch.DenseWeight):
            return super().matmul(x, weight)
        return self._matmul_many(x, weight)

    def _dense(self, weight: Weight) -> Tensor:
        from squawq.backends.cuda import launch

        if isinstance(weight, launch.DenseWeight):
            if weight.scales is None:
                return weight.weight
            return (weight.weight.float() * weight.scales[:, None]).to(self.activation_dtype)
        out, in_ = weight.shape
        if self._scratch.numel() < out * in_:
            self._scratch = torch.empty(out * in_, dtype=self.activation_dtype, device=self.device)
        found = self._scratch[: out * in_].view(out, in_)
        launch.dequantize(weight, found)
        return found

    def logits(self, x: Tensor, head: Packed) -> Tensor:
        from squawq.backends.cuda import int4, launch

        if not isinstance(head, int4.Int4Weight | launch.DenseWeight):
            return super().logits(x, head)
        out = torch.empty(1, len(x), head.shape[0], dtype=torch.float32, device=self.device)
        return launch.matmul(x.contiguous(), head, out).parts[0]

    def round_columns(
        self, wanted: Tensor, base: Tensor, feedback: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, top: int
    ) -> tuple[Tensor, Tensor]:
        from squawq.backends.cuda import launch, rounding

        if len(wanted) > rounding.MAX_COLUMNS:
            return super().round_columns(wanted, base, feedback, scales, zeros, groups, top)
        return launch.round_columns(wanted, base, feedback, scales, zeros, groups, top)

    def prepare_sampling(self, sampling: Sampling) -> None:
        """The host's sampler, for sequences that the card does not sample."""
        from squawq.backends.cuda.parameters import samples

        if not samples(sampling):
            super().prepare_sampling(sampling)

    def prepare_steps(
        self, model: Model, cache: Sequence[LayerCache], rows: int, pages: int, tell: Tell | None = None
    ) -> Steps | None:
        from squawq.backends.cuda import steps

        graphs = self._graphs(model, cache, rows, pages)
        return None if graphs is None else steps.CudaSteps(graphs, tell)

    def follow_steps(self, model: Model, cache: Sequence[LayerCache], rows: int, pages: int) -> Follow | None:
        from squawq.backends.cuda import steps

        graphs = self._graphs(model, cache, rows, pages)
        return None if graphs is None else steps.follow(graphs)

    def _graphs(self, model: Model, cache: Sequence[LayerCache], rows: int, pages: int) -> DecodeGraphs | None:
        from squawq.backends.cuda import decode

        declined = decode.declines(model) is not None
        if declined if self.group is None else self.group.any(declined):
            return None
        return decode.DecodeGraphs(model, cache, self.activation_dtype, rows, pages, self.group)

    def prepare_next_logits(
        self, model: Model, cache: Sequence[LayerCache], rows: int, pages: int
    ) -> NextLogits | None:
        from squawq.backends.cuda import decode

        graphs = self._graphs(model, cache, rows, pages)
        return None if graphs is None else decode.next_logits(graphs)

    def group_declines(self, size: int) -> str | None:
        if self.device.type != "cuda":
            return None
        first, count = self.device.index or 0, torch.cuda.device_count()
        if first + size > count:
            visible = "1 GPU is visible" if count == 1 else f"{count} GPUs are visible"
            return f"{visible}, and it would take {size} from {self.device} on"
        return None if torch.distributed.is_nccl_available() else "this build of torch has no NCCL"

    def rank_device(self, rank: int) -> str:
        return f"cuda:{(self.device.index or 0) + rank}" if self.device.type == "cuda" else str(self.device)

    def group_memory(self, size: int) -> int:  # noqa: ARG002
        """Of an empty file, in which the ranks find each other."""
        with tempfile.TemporaryFile(prefix="squawq-") as file:
            return os.dup(file.fileno())

    def join(self, rank: int, size: int, memory: int) -> Group:
        from squawq.backends.cuda.group import CudaGroup

        self.group = group = CudaGroup(rank, size, memory, self.device)
        return group

    def add_rms_norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        from squawq.backends.cuda import launch

        hidden_rows = hidden.view(-1, hidden.shape[-1])
        out = torch.empty_like(hidden_rows, dtype=self.activation_dtype)
        sums = None if delta is None else launch.Sums(delta.reshape(1, *hidden_rows.shape))
        launch.add_norm(sums, hidden_rows, weight, eps, out)
        return out.view(hidden.shape)

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
        from squawq.backends.cuda import launch

        scales = torch.empty(len(qkv), 2, device=self.device) if operation.whole else None
        sums = launch.Sums(qkv[None])
        launch.rotate_and_store(sums, heads, operation, rotary, eps, slots, qkv, pages, HEADS_EACH, scales)

    def attention(
        self, qkv: Tensor, heads: Heads, operation: Attention, sequences: Tensor, tables: Tensor, pages: Pages
    ) -> Tensor:
        from squawq.backends.cuda import launch

        if self._blocks is None or self._blocks[0] is not sequences:
            blocks = [
                (first + at, min(QUERIES, rows - at), start + at, place)
                for first, rows, start, place in sequences.tolist()
                for at in range(0, rows, QUERIES)
            ]
            self._blocks = sequences, torch.tensor(blocks, dtype=torch.int32).to(self.device, non_blocking=True)
        out = qkv.new_empty(qkv.shape[0], heads[0] * heads[2])
        launch.prefill_attention(qkv, heads, operation, pages, self._blocks[1], tables, out, QUERIES)
        return out

    def output_gate(self, x: Tensor, gates: Tensor) -> Tensor:
        from squawq.backends.cuda import launch

        y = x.clone()
        launch.output_gate(launch.Sums(gates[None]), y)
        return y

    def gated_delta_rule(
        self,
        wide: Tensor,
        gates: Tensor,
        rule: GatedDeltaRule,
        eps: float,
        sequences: Tensor,
        places: Tensor,
        states: States,
    ) -> Tensor:
        from squawq.backends.cuda import delta_rule, launch

        if self._owners is None or self._owners[0] is not sequences:
            first, count, start, _ = sequences.unbind(1)
            firsts, at, starts = (each.repeat_interleave(count) for each in (first, places, start))
            positions = starts + torch.arange(len(firsts)) - firsts
            listed = torch.stack((first, count, start, places), 1)
            rows = [each.to(self.device, non_blocking=True) for each in (firsts, at, positions, listed)]
            self._owners = sequences, delta_rule.Rows(*rows)
        between = delta_rule.space(len(wide), rule.sizes, self.device)
        out = wide.new_empty(len(wide), rule.sizes.values)
        sums = launch.Sums(wide[None]), launch.Sums(gates[None])
        delta_rule.gated_delta_rule(*sums, rule, eps, self._owners[1], states, between, out)
        return out

    def part(self, weight: Packed, first: int, out: int) -> Packed:
        from squawq.backends.cuda.launch import DenseWeight

        if isinstance(weight, DenseWeight) and weight.bias is None and weight.scales is None:
            return DenseWeight(weight.weight[first : first + out])
        return super().part(weight, first, out)

    def experts_declines(self, layer: MixtureOfExperts) -> str | None:
        from squawq.backends.cuda import experts

        if experts.declines(layer) is None:
            return None
        try:
            for weight in (layer.gate_up, layer.down):
                self.part(weight, 0, PER_WORD)
        except KernelError:
            return "they are INT4 in part"
        return None

    def experts(self, x: Tensor, layer: MixtureOfExperts, shared: Tensor | None) -> Tensor:
        """INT4 experts by kernels that read each chosen one once, PROMPT_ROWS rows at a time."""
        from squawq.backends.cuda import experts, launch, tiles

        if experts.declines(layer):
            return super().experts(x, layer, shared)
        count = min(len(x), tiles.PROMPT_ROWS)
        space = experts.expert_space([layer], count, self.activation_dtype, self.device, split=False)
        found = []
        for at in range(0, len(x), count):
            rows = slice(at, at + count)
            sums = None if shared is None else launch.Sums(shared[None, rows])
            found.append(experts.run(x[rows], layer, sums, space, split=False).parts[0].to(x.dtype))
        return torch.cat(found)

    def activation_mul(self, gate_up: Tensor, activation: str) -> Tensor:
        from squawq.backends.cuda import launch

        rows = gate_up.reshape(-1, gate_up.shape[-1])
        out = rows.new_empty(len(rows), rows.shape[1] // 2)
        launch.activation_mul(launch.Sums(rows[None]), activation, out)
        return out.view(*gate_up.shape[:-1], out.shape[1])
