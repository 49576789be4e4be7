"""Loads the mixture-of-experts MLP of a layer as operations.

Experts lie in a checkpoint as separate linears (`mlp.experts.3.gate_proj`, Mixtral's `block_sparse_moe.experts.3.w1`),
quantized or not, or in 16 bits as two tensors that stack them all (transformers 5). Memory beside the packed weights:
one linear if they are quantized, else all gate and up projections of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from squawq.backends.base import Backend
from squawq.backends.layer_ops import (
    ActivationMul,
    Buffer,
    Matmul,
    MixtureOfExperts,
    Operation,
    Packed,
    Routing,
)
from squawq.config import ModelConfig
from squawq.decoder_support import ACTIVATIONS
from squawq.errors import CheckpointError, ConfigError
from squawq.families import Family
from squawq.format.reader import WHOLE, Checkpoint
from squawq.moe_config import MoeConfig
from squawq.nn.experts import SPELLINGS, STACKED, is_turned
from squawq.nn.linears import Linear, load_linear
from squawq.nn.shard import ALONE, Shard

BLOCKS = ("mlp", "block_sparse_moe")  # names of the whole MLP, in a layer
SHARED = ("shared_experts", "shared_expert")  # of the expert that every token takes
BIASES = (  # of the scores that experts are chosen by
    *("gate.e_score_correction_bias", "e_score_correction_bias"),
    *("moe_statics.e_score_correction_bias", "gate.moe_statics.e_score_correction_bias"),
)


def moe_shapes(moe: MoeConfig, hidden: int, names: tuple[str, str, str]) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every linear of the MLP, by its name in a layer. names: gate, up and down."""

    def gated(prefix: str, inner: int, spelled: tuple[str, str, str]) -> dict[str, tuple[int, int]]:
        sizes = (inner, hidden), (inner, hidden), (hidden, inner)
        return {f"mlp.{prefix}.{name}": size for name, size in zip(spelled, sizes, strict=True)}

    shapes = {"mlp.gate": (moe.experts, hidden)}
    if moe.shared:
        name = SHARED[1] if moe.shared == "gated" else SHARED[0]
        shapes |= gated(name, moe.shared_inner, SPELLINGS[0])
    if moe.shared == "gated":
        shapes["mlp.shared_expert_gate"] = (1, hidden)
    for expert in range(moe.experts):
        shapes |= gated(f"experts.{expert}", moe.inner, names)
    return shapes


def block_of(checkpoint: Checkpoint, family: Family) -> str:
    """The name that this checkpoint gives the MLP of its layers."""
    layers = range(checkpoint.config.num_layers)
    names = (
        block for block in BLOCKS for i in layers if f"{family.layer(i)}.{block}.gate.weight" in checkpoint.tensors
    )
    return next(names, BLOCKS[0])


def load_experts(checkpoint: Checkpoint, layer: str, backend: Backend, shard: Shard = ALONE) -> list[Operation]:
    """The MLP of `layer`, a full name. Raises CheckpointError for tensors that are missing or do not fit."""
    config = checkpoint.config
    moe = config.moe
    assert moe is not None
    block = next((b for b in BLOCKS if f"{layer}.{b}.gate.weight" in checkpoint.tensors), BLOCKS[0])
    return _Loader(checkpoint, config, moe, f"{layer}.{block}", backend, shard).operations()


class _Loader:
    """Of one layer's MLP, or a rank's inner features of it."""

    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, moe: MoeConfig, block: str, backend: Backend, shard: Shard
    ) -> None:
        self._checkpoint, self._config, self._moe, self._block = checkpoint, config, moe, block
        self._backend, self._shard = backend, shard

    def operations(self) -> list[Operation]:
        moe, activation = self._moe, ACTIVATIONS[self._config.activation]
        router = [self._linear("gate", moe.experts, self._config.hidden_size)]
        shared: list[Operation] = []
        if moe.shared:
            gate_up, down = self._shared()
            shared = [
                Matmul(gate_up, Buffer.NORMED, Buffer.WIDE),
                ActivationMul(activation),
                Matmul(down, Buffer.NARROW, Buffer.DELTA),
            ]
        if moe.shared == "gated":
            router.append(self._linear("shared_expert_gate", 1, self._config.hidden_size))
        self._refuse_biases(router)
        gate_up, down = self._experts()
        experts = MixtureOfExperts(
            load_linear(self._checkpoint, router, self._backend), gate_up, down, self._routing(), moe.shared, activation
        )
        if reason := self._backend.experts_declines(experts):
            raise ConfigError(f"{self._block}: the {self._backend.name} backend does not run its experts: {reason}")
        return [*shared, experts]

    def _routing(self) -> Routing:
        moe, bias = self._moe, self._bias()
        return Routing(
            moe.experts, moe.top_k, moe.scoring, moe.renormalize, bias, moe.groups, moe.top_groups, moe.scale
        )

    def _bias(self) -> Tensor | None:
        if not self._moe.biased:
            return None
        checkpoint, names = self._checkpoint, [f"{self._block}.{name}" for name in BIASES]
        name = next((name for name in names if name in checkpoint.tensors), names[0])
        bias = checkpoint.read(name).to(self._backend.device, torch.float32).flatten()
        if len(bias) != self._moe.experts or not bool(bias.isfinite().all()):
            raise CheckpointError(f"{checkpoint.info(name).file}: tensor {name!r} must be {self._moe.experts} numbers")
        return bias

    def _shared(self) -> tuple[Packed, Packed]:
        names = [f"{self._block}.{name}" for name in SHARED]
        name = next((n for n in names if self._has(f"{n}.down_proj")), names[self._moe.shared == "gated"])
        gate, up, down = self._gated(name.removeprefix(f"{self._block}."), self._moe.shared_inner, SPELLINGS[0])
        self._refuse_biases([gate, up, down])
        return load_linear(self._checkpoint, [gate, up], self._backend), load_linear(
            self._checkpoint, [down], self._backend
        )

    def _refuse_biases(self, linears: Iterable[Linear]) -> None:
        for linear in linears:
            if f"{linear.name}.bias" in self._checkpoint.tensors:
                raise CheckpointError(f"{self._checkpoint.folder}: {linear.name} has a bias; experts have none")

    def _experts(self) -> tuple[Packed, Packed]:
        """Gate and up projections of all experts, and down projections, each as one weight."""
        if f"{self._block}.experts.{STACKED[0]}" in self._checkpoint.tensors:
            return self._stacked()
        first = f"{self._block}.experts.0."
        names = next((names for names in SPELLINGS if self._has(first + names[0])), SPELLINGS[0])
        experts = [self._gated(f"experts.{e}", self._moe.inner, names) for e in range(self._moe.experts)]
        for linear in (linear for expert in experts for linear in expert):
            if not self._has(linear.name):
                raise CheckpointError(f"{self._checkpoint.folder}: tensor {linear.name + '.weight'!r} is missing")
        self._refuse_biases(linear for expert in experts for linear in expert)
        halves = [linear for gate, up, _ in experts for linear in (gate, up)]
        downs = [down for _, _, down in experts]
        return load_linear(self._checkpoint, halves, self._backend), load_linear(self._checkpoint, downs, self._backend)

    def _stacked(self) -> tuple[Packed, Packed]:
        moe, hidden = self._moe, self._config.hidden_size
        gate, up, down = (linear.part for linear in self._gated("experts.0", moe.inner, SPELLINGS[0]))
        shapes = (2 * moe.inner, hidden), (hidden, moe.inner)
        halves: list[Tensor] = []
        downs: list[Tensor] = []
        for expert in range(moe.experts):
            both, last = (self._of_stack(name, shape, expert) for name, shape in zip(STACKED, shapes, strict=True))
            halves += [both[: moe.inner][gate], both[moe.inner :][up]]
            downs.append(last[down])
        return self._backend.pack_dense(halves), self._backend.pack_dense(downs)

    def _of_stack(self, name: str, shape: tuple[int, int], expert: int) -> Tensor:
        """One expert's weight of `shape` [out, in]."""
        stored = f"{self._block}.experts.{name}"
        if is_turned(self._checkpoint, stored, shape):
            return self._checkpoint.read(stored, (self._moe.experts, *shape[::-1]), expert).T
        return self._checkpoint.read(stored, (self._moe.experts, *shape), expert)

    def _gated(self, prefix: str, inner: int, names: Sequence[str]) -> tuple[Linear, Linear, Linear]:
        hidden = self._config.hidden_size
        gate, up, down = (f"{prefix}.{name}" for name in names)
        return self._linear(gate, inner, hidden), self._linear(up, inner, hidden), self._linear(down, hidden, inner)

    def _linear(self, name: str, out: int, in_: int) -> Linear:
        """Router and gates are on all ranks."""
        whole = self._shard.size == 1 or "expert" not in name.partition(".")[0] or name == "shared_expert_gate"
        part = WHOLE if whole else self._shard.part(name, self._config)
        return Linear(f"{self._block}.{name}", out, in_, part)

    def _has(self, linear: str) -> bool:
        return self._checkpoint.is_quantized(linear) or f"{linear}.weight" in self._checkpoint.tensors
