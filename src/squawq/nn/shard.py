"""Tensor parallelism: which part of each weight a rank has (Megatron-LM, Shoeybi et al., arXiv 1909.08053).

Query and key-value heads, and the inner features of the MLP, or of every expert, are split over the ranks: q_proj,
k_proj, v_proj, gate_proj and up_proj by their outputs, o_proj and down_proj by their inputs, whose products the ranks
then add up. With more ranks than key-value heads, a head is on several ranks. Embedding and output head are split by
tokens. Norms and routers are on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from squawq.config import ModelConfig
from squawq.errors import ConfigError
from squawq.families import family_of

UNIT = 16  # features and tokens are split at multiples of this: the kernels' vectors
MOST = 64  # ranks


@dataclass(frozen=True)
class Shard:
    """One rank's part of a model. The default is the whole of it."""

    rank: int = 0
    size: int = 1

    def config(self, whole: ModelConfig) -> ModelConfig:
        """The model's config with this rank's heads and inner features. Raises ConfigError if it cannot be split so."""
        if self.size == 1:
            return whole
        if reason := refused(whole, self.size):
            fitting = ", ".join(str(size) for size in sizes(whole))
            raise ConfigError(f"tensor_parallel_size is {self.size}, but {reason}; this model can take {fitting}")
        moe = whole.moe
        if moe is not None:
            moe = replace(moe, inner=self._inner(whole, moe.inner), shared_inner=self._inner(whole, moe.shared_inner))
        return replace(
            whole,
            num_heads=whole.num_heads // self.size,
            num_kv_heads=max(1, whole.num_kv_heads // self.size),
            intermediate_size=self._inner(whole, whole.intermediate_size),
            moe=moe,
        )

    def vocabulary(self, whole: ModelConfig) -> slice:
        """This rank's tokens."""
        return self._part(whole.vocab_size, UNIT)

    def vocabularies(self, whole: ModelConfig) -> list[int]:
        """How many tokens each rank has."""
        parts = [Shard(rank, self.size).vocabulary(whole) for rank in range(self.size)]
        return [part.stop - part.start for part in parts]

    def inner(self, whole: ModelConfig, features: int) -> slice:
        """This rank's part of an MLP's inner features: whole groups, if there are enough of them."""
        return self._part(features, _unit(whole, features, self.size))

    def _inner(self, whole: ModelConfig, features: int) -> int:
        return len(range(features)[self.inner(whole, features)])

    def part(self, linear: str, whole: ModelConfig) -> tuple[slice, slice]:
        """This rank's (outputs, inputs) of a linear, by its name in the layer."""
        every, dim = slice(None), whole.head_dim
        heads = self._part(whole.num_heads, 1)
        shared = whole.num_heads // whole.num_kv_heads
        kv = slice(heads.start // shared, -(-heads.stop // shared))
        match linear.rpartition(".")[2]:
            case "q_proj":
                return slice(heads.start * dim, heads.stop * dim), every
            case "k_proj" | "v_proj":
                return slice(kv.start * dim, kv.stop * dim), every
            case "o_proj":
                return every, slice(heads.start * dim, heads.stop * dim)
            case "gate_proj" | "up_proj" | "w1" | "w3":
                return self.inner(whole, _features(linear, whole)), every
            case "down_proj" | "w2":
                return every, self.inner(whole, _features(linear, whole))
        raise AssertionError(linear)

    def _part(self, count: int, unit: int) -> slice:
        """This rank's share: whole units, but for the last rank's rest."""
        units = -(-count // unit)
        cuts = (units * self.rank // self.size, units * (self.rank + 1) // self.size)
        return slice(*(min(count, cut * unit) for cut in cuts))


ALONE = Shard()


def refused(whole: ModelConfig, size: int) -> str | None:
    """Why `size` ranks cannot share this model; None if they can."""
    heads, kv = whole.num_heads, whole.num_kv_heads
    if not 1 <= size <= MOST:
        return f"1 to {MOST} processes can share a model"
    traits = family_of(whole.model_type).decoder
    if size > 1 and traits is not None and traits.qk_norm == "whole":
        return "its norms of queries and keys are of all heads together"
    if heads % size:
        return f"its {heads} attention heads do not divide by that"
    if kv % size and size % kv:
        return f"its {kv} key-value heads can neither be split nor repeated so"
    if size > 1 and whole.head_dim % UNIT:
        return f"its head_dim of {whole.head_dim} is no multiple of {UNIT}"
    if min(_inner_sizes(whole)) // UNIT < size or whole.vocab_size // UNIT < size:
        return "it is too small"
    return None


def sizes(whole: ModelConfig) -> list[int]:
    """The numbers of ranks that can share this model."""
    return [size for size in range(1, MOST + 1) if refused(whole, size) is None]


def splits_groups(whole: ModelConfig, size: int, group: int) -> bool:
    """Whether a rank's inputs of o_proj or down_proj would end inside a group; vLLM and TGI refuse that.

    Args:
        group: Inputs that share a scale; -1: a whole row.
    """
    rows = whole.num_heads * whole.head_dim, *_inner_sizes(whole)
    return size > 1 and any(row % (size * (row if group == -1 else group)) for row in rows)


def _inner_sizes(whole: ModelConfig) -> list[int]:
    """Inner features of each kind of MLP that the model has."""
    moe = whole.moe
    if moe is None:
        return [whole.intermediate_size]
    dense = [] if all(moe.layers) else [whole.intermediate_size]
    return [*dense, moe.inner, *([moe.shared_inner] if moe.shared else [])]


def _features(linear: str, whole: ModelConfig) -> int:
    """Inner features of the MLP that a linear belongs to, by its name in the layer."""
    if whole.moe is None or "expert" not in linear:
        return whole.intermediate_size
    return whole.moe.shared_inner if "shared_expert" in linear else whole.moe.inner


def _unit(whole: ModelConfig, features: int, size: int) -> int:
    """What inner features are split in: a quantization group, or a part of one where there are too few groups."""
    group = whole.quant.group_size if whole.quant is not None and whole.quant.group_size > 0 else 128
    while group > UNIT and (features % group or features // group < size):
        group //= 2
    return group
