"""The tensors of a GGUF file: what each holds, which tensors of the checkpoint it is made of, and how.

4-bit linears keep their integers and scales in blocks of 32 (Q4_1). llama.cpp's own package names the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from squawq.decoder_support import traits_of
from squawq.delta_config import DeltaRuleConfig
from squawq.errors import CheckpointError, ConfigError, DependencyError
from squawq.export.gguf_architectures import Architecture
from squawq.export.gguf_blocks import BLOCK, by_columns, q4_1
from squawq.format.groupwise import GroupwiseTensor
from squawq.format.reader import Checkpoint
from squawq.nn.delta_rule import by_heads
from squawq.nn.experts import SPELLINGS, STACKED, is_turned
from squawq.nn.layers import is_linear, norm_sizes
from squawq.nn.loader import layer_shapes, stored_family
from squawq.nn.moe import BIASES, SHARED, block_of

ROUTERS = ("mlp.gate", "mlp.shared_expert_gate")  # in float32, so that the same experts are chosen


@dataclass(frozen=True)
class Entry:
    """A tensor of the file.

    Attributes:
        kind: "Q4_1", "F16" or "F32".
        shape: torch's, with the experts first where it holds all of them.
        source: The linear (Q4_1) or tensor that it is made of. * stands for an expert's number.
        stored: Shape of the source, without experts.
        experts: How many sources or, if the source stacks them, parts of it; 0: one source.
        rows, columns: Which outputs and inputs of the source, in order; None: all.
        change: Applied to the values.
        turned: The source is [in, out].
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    source: str
    stored: tuple[int, ...]
    experts: int = 0
    rows: Tensor | None = None
    columns: Tensor | None = None
    change: Callable[[Tensor], Tensor] | None = None
    turned: bool = False

    @property
    def sources(self) -> list[tuple[str, int | None]]:
        """Names of all sources, and the index of a part of one."""
        if not self.experts:
            return [(self.source, None)]
        parts = range(self.experts)
        return [(self.source.replace("*", str(i)), None if "*" in self.source else i) for i in parts]

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise CheckpointError for a 16-bit source that is missing or has another shape."""
        for name, index in self.sources:
            checkpoint.check_shape(name, self.stored if index is None else (self.experts, *self.stored))


def neighbour_order(heads: int, head_dim: int, rotated: int) -> Tensor:
    """Row indices that interleave rotary pairs: checkpoints have the rows of a pair half the rotated part apart."""
    rows = torch.arange(heads * head_dim).view(heads, head_dim)
    pairs = rows[:, :rotated].reshape(heads, 2, -1).transpose(1, 2).reshape(heads, -1)
    return torch.cat([pairs, rows[:, rotated:]], 1).reshape(-1)


def value_head_order(sizes: DeltaRuleConfig, width: int) -> Tensor:
    """Indices of value heads' parts of `width`: llama.cpp tiles key heads over value heads (0 1 0 1), checkpoints
    repeat each (0 0 1 1)."""
    rows = torch.arange(sizes.value_heads * width).view(sizes.key_heads, -1, width)
    return rows.transpose(0, 1).reshape(-1)


def plan(checkpoint: Checkpoint, row: Architecture) -> Iterator[Entry]:
    """Every tensor of the file but rotary divisors, in order.

    Raises CheckpointError or ConfigError for what GGUF cannot store, DependencyError without the package gguf.
    """
    used = set()
    for entry in _Plan(checkpoint, row).entries():
        if entry.kind != "Q4_1":
            entry.check(checkpoint)
        used |= {name for name, _ in entry.sources}
        yield entry
    family = stored_family(checkpoint)
    layers = tuple(f"{family.layer(index)}." for index in range(checkpoint.config.num_layers))
    for name in checkpoint.tensors:
        parent, _, last = name.rpartition(".")
        known = name in used or (parent in used and last != "bias") or last == "inv_freq"
        if name.startswith(layers) and not known:
            raise CheckpointError(f"{checkpoint.folder}: tensor {name!r} has no place in llama.cpp's {row.name}")


class _Plan:
    def __init__(self, checkpoint: Checkpoint, row: Architecture) -> None:
        try:
            import gguf
        except ImportError as error:
            raise DependencyError("GGUF needs the package gguf: pip install gguf") from error
        self._checkpoint, self._config, self._row = checkpoint, checkpoint.config, row
        self._family = stored_family(checkpoint)
        self._traits = traits_of(self._family)
        self._shapes = checkpoint.quantized_linears()
        self._orders: dict[str, Tensor | None] = {}
        self._block = block_of(checkpoint, self._family)
        found = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == row.name)
        self._names = gguf.get_tensor_name_map(found, self._config.num_layers)

    def entries(self) -> Iterator[Entry]:
        config, family = self._config, self._family
        table = (config.vocab_size, config.hidden_size)
        yield Entry("token_embd.weight", "F16", table, f"{family.embedding}.weight", table)
        for index in range(config.num_layers):
            yield from self._layer(index)
        yield self._norm("output_norm", family.norm, config.hidden_size)
        if not config.tied_embeddings:
            yield from self._linear(family.head, "output", table)
        elif self._row.head == "own":
            yield Entry("output.weight", "F16", table, f"{family.embedding}.weight", table)

    def _layer(self, index: int) -> Iterator[Entry]:
        prefix = self._family.layer(index)
        for name, size in norm_sizes(self._config, self._family, index).items():
            yield self._norm(self._name(index, name), f"{prefix}.{name}", size)
        for name, shape in layer_shapes(self._config, index).items():
            if ".experts." not in name:
                yield from self._linear(self._stored(prefix, name), name, shape, index)
        if is_linear(self._config, index):
            yield from self._delta_rule(index, f"{prefix}.linear_attn")
        moe = self._config.moe
        if moe is not None and moe.layers[index]:
            yield from self._experts(index, f"{prefix}.{self._block}")

    def _name(self, index: int, module: str) -> str:
        """llama.cpp's name of a layer's module. Raises ConfigError where it has none."""
        found: Any = self._names.get_name(f"model.layers.{index}.{module}")
        if found is None:
            raise ConfigError(f"llama.cpp's {self._row.name} has no {module}, which layer {index} has")
        return str(found)

    def _stored(self, prefix: str, name: str) -> str:
        """The full name of a linear in this checkpoint, which may name the MLP or its shared expert differently."""
        if not name.startswith("mlp."):
            return f"{prefix}.{name}"
        found = f"{prefix}.{self._block}.{name.removeprefix('mlp.')}"
        spellings = [found.replace(f".{SHARED[0]}.", f".{shared}.") for shared in SHARED]
        return next(filter(self._has, spellings), found)

    def _norm(self, name: str, source: str, size: int) -> Entry:
        offset = self._family.norm_offset
        change = (lambda values: values + offset) if offset else None
        return Entry(f"{name}.weight", "F32", (size,), f"{source}.weight", (size,), change=change)

    def _linear(self, source: str, name: str, shape: tuple[int, int], index: int | None = None) -> Iterator[Entry]:
        """A linear and its bias; name: in the layer, or llama.cpp's outside of one."""
        self._check(source, shape)  # before anything is as large as config.json says
        if name == "linear_attn.in_proj_qkvz" and index is not None:
            yield from self._inputs_of_delta_rule(source, shape, index)
            return
        rows, columns = self._rows(name), self._columns(name)
        theirs = name if index is None else self._name(index, name)
        size: tuple[int, ...] = shape if shape[0] > 1 else shape[1:]
        kind = "F32" if name in ROUTERS else "F16"
        yield self._matrix(theirs, source, shape, size, kind, rows, columns)
        if f"{source}.bias" in self._checkpoint.tensors:
            if name not in self._row.biases:
                raise ConfigError(f"{source} has a bias, which llama.cpp's {self._row.name} does not support")
            yield Entry(f"{theirs}.bias", "F32", shape[:1], f"{source}.bias", shape[:1], rows=rows)

    def _matrix(
        self,
        name: str,
        source: str,
        stored: tuple[int, int],
        shape: tuple[int, ...],
        kind: str = "F16",
        rows: Tensor | None = None,
        columns: Tensor | None = None,
        experts: int = 0,
    ) -> Entry:
        first = source.replace("*", "0")
        if not self._checkpoint.is_quantized(first):
            return Entry(f"{name}.weight", kind, shape, f"{source}.weight", stored, experts, rows, columns)
        if self._checkpoint.input_order(first, stored[1]) is not None:
            raise ConfigError(
                f"{first} has its groups in activation order (desc_act), which GGUF does not have; export the model "
                "as dense"
            )
        group = self._checkpoint.group_of(stored[1])
        if group % BLOCK:
            raise ConfigError(f"{first} has groups of {group}; GGUF's Q4_1 takes groups of a multiple of {BLOCK}")
        return Entry(f"{name}.weight", "Q4_1", shape, source, stored, experts, rows, columns)

    def _check(self, linear: str, shape: tuple[int, int]) -> None:
        """Raise CheckpointError for a linear that is missing or has another shape."""
        if not self._checkpoint.is_quantized(linear):
            self._checkpoint.check_shape(f"{linear}.weight", shape)
        elif self._shapes.get(linear) != shape:
            found = list(self._shapes.get(linear, ()))
            raise CheckpointError(f"{self._checkpoint.folder}: {linear} has shape {found}; {list(shape)} is needed")

    def _rows(self, name: str) -> Tensor | None:
        if name not in self._orders:
            self._orders[name] = self._order(name)
        return self._orders[name]

    def _order(self, name: str) -> Tensor | None:
        config, sizes = self._config, self._config.delta_rule
        heads = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}.get(name)
        if heads is not None and self._row.neighbours and not self._traits.interleaved:
            return neighbour_order(heads, config.head_dim, 2 * config.rope.pairs(config.head_dim))
        if sizes is None or self._traits.by_key_heads:
            return None
        match name:
            case "linear_attn.in_proj_qkv":
                return self._channels(sizes)
            case "linear_attn.in_proj_z":
                return value_head_order(sizes, sizes.value_dim)
            case "linear_attn.in_proj_a" | "linear_attn.in_proj_b":
                return value_head_order(sizes, 1)
        return None

    def _columns(self, name: str) -> Tensor | None:
        sizes = self._config.delta_rule
        if sizes is None or self._traits.by_key_heads or name != "linear_attn.out_proj":
            return None
        return value_head_order(sizes, sizes.value_dim)

    def _channels(self, sizes: DeltaRuleConfig) -> Tensor:
        """Queries and keys as they are, values in the order of llama.cpp's heads."""
        keys = sizes.channels - sizes.values
        return torch.cat([torch.arange(keys), keys + value_head_order(sizes, sizes.value_dim)])

    def _inputs_of_delta_rule(self, source: str, shape: tuple[int, int], index: int) -> Iterator[Entry]:
        """Qwen3-Next stores q, k, v and z per key head; llama.cpp stores each for all heads."""
        sizes = self._config.delta_rule
        assert sizes is not None
        values = sizes.values // sizes.key_heads
        parts = by_heads(sizes.key_heads, (sizes.key_dim, sizes.key_dim, values, values))
        for name, rows in (("attn_qkv", torch.cat(parts[:3])), ("attn_gate", parts[3])):
            yield self._matrix(f"blk.{index}.{name}", source, shape, (len(rows), shape[1]), rows=rows)

    def _delta_rule(self, index: int, source: str) -> Iterator[Entry]:
        sizes = self._config.delta_rule
        assert sizes is not None
        heads, channels = (sizes.value_heads,), sizes.channels
        by_key_heads = self._traits.by_key_heads
        order = None if by_key_heads else value_head_order(sizes, 1)
        convolution = None if by_key_heads else self._channels(sizes)
        blk = f"blk.{index}"
        yield Entry(f"{blk}.ssm_a", "F32", heads, f"{source}.A_log", heads, rows=order, change=lambda a: -a.exp())
        yield Entry(f"{blk}.ssm_dt.bias", "F32", heads, f"{source}.dt_bias", heads, rows=order)
        yield Entry(
            f"{blk}.ssm_conv1d.weight",
            "F32",
            (channels, sizes.kernel),
            f"{source}.conv1d.weight",
            (channels, 1, sizes.kernel),
            rows=convolution,
        )
        size = (sizes.value_dim,)
        yield Entry(f"{blk}.ssm_norm.weight", "F32", size, f"{source}.norm.weight", size)

    def _experts(self, index: int, block: str) -> Iterator[Entry]:
        moe, tensors = self._config.moe, self._checkpoint.tensors
        assert moe is not None
        if moe.biased:
            bias = next((name for name in (f"{block}.{bias}" for bias in BIASES) if name in tensors), None)
            if bias is None:
                raise CheckpointError(f"{self._checkpoint.folder}: tensor {f'{block}.{BIASES[0]}'!r} is missing")
            shape = tuple(self._checkpoint.info(bias).shape)
            if math.prod(shape) != moe.experts:
                raise CheckpointError(
                    f"{self._checkpoint.folder}: {bias} has shape {list(shape)}; {moe.experts} numbers are needed"
                )
            yield Entry(f"blk.{index}.exp_probs_b.bias", "F32", (moe.experts,), bias, shape)
        hidden, inner = self._config.hidden_size, moe.inner
        shapes = (inner, hidden), (inner, hidden), (hidden, inner)
        theirs = [f"blk.{index}.ffn_{name}_exps" for name in ("gate", "up", "down")]
        if f"{block}.experts.{STACKED[0]}" in tensors:
            both, down = (f"{block}.experts.{name}" for name in STACKED)
            each = (moe.experts, inner, hidden)
            for name, rows in zip(theirs, torch.arange(2 * inner).view(2, inner), strict=False):
                yield self._stack(f"{name}.weight", each, both, (2 * inner, hidden), rows)
            yield self._stack(f"{theirs[2]}.weight", (moe.experts, hidden, inner), down, (hidden, inner))
            return
        first = f"{block}.experts.0"
        names = next((names for names in SPELLINGS if self._has(f"{first}.{names[0]}")), SPELLINGS[0])
        for name, ours, size in zip(theirs, names, shapes, strict=True):
            linears = [f"{block}.experts.{expert}.{ours}" for expert in range(moe.experts)]
            for linear in linears:
                self._check(linear, size)
            if len(set(map(self._checkpoint.is_quantized, linears))) > 1:
                raise ConfigError(f"{block}: some experts are quantized and others are not; GGUF stores all alike")
            yield self._matrix(name, f"{block}.experts.*.{ours}", size, (moe.experts, *size), experts=moe.experts)

    def _stack(
        self, name: str, shape: tuple[int, ...], source: str, stored: tuple[int, int], rows: Tensor | None = None
    ) -> Entry:
        turned = is_turned(self._checkpoint, source, stored)
        stored = stored[::-1] if turned else stored
        return Entry(name, "F16", shape, source, stored, shape[0], rows, turned=turned)

    def _has(self, linear: str) -> bool:
        return self._checkpoint.is_quantized(linear) or f"{linear}.weight" in self._checkpoint.tensors


def read_entry(checkpoint: Checkpoint, entry: Entry) -> Tensor:
    """A tensor in the file's encoding, all experts if it holds them. Raises CheckpointError naming the source."""
    parts = [_read(checkpoint, entry, name, index) for name, index in entry.sources]
    return torch.stack(parts) if entry.experts else parts[0]


def _read(checkpoint: Checkpoint, entry: Entry, name: str, index: int | None) -> Tensor:
    rows = slice(None) if entry.rows is None else entry.rows
    if entry.kind == "Q4_1":
        out, columns = entry.stored
        tensor = checkpoint.read_quantized(name, columns, out)
        found = GroupwiseTensor(tensor.q[rows], tensor.scales[rows], tensor.zeros[rows])
        try:
            return q4_1(found if entry.columns is None else by_columns(found, entry.columns))
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint.folder}: {name}: {error}") from error
    shape = entry.stored if index is None else (entry.experts, *entry.stored)
    values = checkpoint.read(name, shape, index)
    values = (values.T if entry.turned else values)[rows]
    if entry.columns is not None:
        values = values[:, entry.columns]
    if entry.change is not None:
        values = entry.change(values.float())
    values = values.to(torch.float16 if entry.kind == "F16" else torch.float32)
    if not values.isfinite().all():
        raise CheckpointError(f"{checkpoint.folder}: {name} has values that {entry.kind} cannot hold")
    return values.reshape(entry.shape[1:] if entry.experts else entry.shape).contiguous()
