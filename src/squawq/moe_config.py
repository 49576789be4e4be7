"""The mixture-of-experts part of config.json, for families whose router our decoder computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from squawq.config_values import number, whole
from squawq.errors import CheckpointError

MAX_EXPERTS = 2**14
MAX_INNER = 2**22
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "moe_k")
SHARED = ("n_shared_experts", "moe_num_shared_experts")


@dataclass(frozen=True)
class _Kind:
    """A family's router, and what transformers, or the published model, has where config.json does not say.

    Attributes:
        inner: 0: experts have `intermediate_size`.
        deepseek: Sigmoid scores, groups and a factor, as DeepSeek-V3 (arXiv 2412.19437).
        always: Weights are renormalized whatever norm_topk_prob says.
        shared: Shared experts as large as the others, for "added"; inner features of the shared expert, for "gated".
        first: The first layer with experts.
    """

    experts: int
    top_k: int
    inner: int = 0
    deepseek: bool = False
    sigmoid: bool = False
    biased: bool = False
    renormalize: bool = False
    always: bool = False
    gated: bool = False
    shared: int | None = None
    first: int = 0


MOE_FAMILIES = {
    "mixtral": _Kind(8, 2, always=True),
    "olmoe": _Kind(64, 8),
    "minimax_m2": _Kind(256, 8, sigmoid=True, biased=True, always=True),
    "qwen3_moe": _Kind(128, 8, 768),
    "qwen3_vl_moe_text": _Kind(60, 4, 1408, always=True),
    "qwen2_moe": _Kind(60, 4, 1408, gated=True, shared=5632),
    "qwen3_next": _Kind(512, 10, 512, renormalize=True, gated=True, shared=512),
    "qwen3_5_moe_text": _Kind(256, 8, 512, always=True, gated=True, shared=512),
    "ernie4_5_moe": _Kind(64, 6, 1536, biased=True, always=True, shared=2, first=1),
    "glm4_moe": _Kind(128, 8, 1408, deepseek=True, sigmoid=True, biased=True, renormalize=True, shared=1, first=1),
    "dots1": _Kind(128, 6, 1408, deepseek=True, sigmoid=True, biased=True, shared=0),
}


@dataclass(frozen=True)
class MoeConfig:
    """A mixture-of-experts MLP; see `backends.layer_ops.Routing` for how experts are chosen.

    Attributes:
        experts: Number of experts.
        inner: Inner features of an expert.
        biased: The checkpoint has a bias that is added to the scores to choose.
        shared: The output of a shared expert is "added", or "gated": multiplied by a sigmoid first.
        shared_inner: Inner features of the shared expert.
        layers: Whether each layer has experts; the others have one MLP.
    """

    experts: int
    top_k: int
    inner: int
    scoring: Literal["softmax", "sigmoid"]
    renormalize: bool
    biased: bool
    groups: int
    top_groups: int
    scale: float
    shared: Literal["", "added", "gated"]
    shared_inner: int
    layers: tuple[bool, ...]


def read_moe(raw: Mapping[str, Any], layers: int, where: str) -> MoeConfig | None:
    """The experts of a model of MOE_FAMILIES; None for others. Raises CheckpointError naming `where` and the key."""
    kind = MOE_FAMILIES.get(str(raw.get("model_type")))
    if kind is None:
        return None

    def size(keys: tuple[str, ...], default: int, least: int = 1, most: int = MAX_EXPERTS) -> int:
        key, value = _first(raw, keys)
        found = whole(key, default if value is None else value, least, where)
        if found > most:
            raise CheckpointError(f"{where}: {key} is {found}; it must be at most {most}")
        return found

    experts, top_k = size(EXPERTS, kind.experts), size(TOP_K, kind.top_k)
    if top_k > experts:
        raise CheckpointError(f"{where}: a token cannot take {top_k} of {experts} experts")
    groups, top_groups = (size((key,), 1) if kind.deepseek else 1 for key in ("n_group", "topk_group"))
    if groups > 1 and experts // groups < 2:
        raise CheckpointError(f"{where}: {groups} groups of {experts} experts have fewer than two each")
    if experts % groups or top_groups > groups or top_k > experts // groups * top_groups:
        raise CheckpointError(
            f"{where}: a token cannot take {top_k} experts from {top_groups} of {groups} groups of {experts} experts"
        )
    key = "moe_intermediate_size" if kind.inner else "intermediate_size"
    inner = size((key,), kind.inner, most=MAX_INNER)
    if kind.gated:
        shared_inner = size(("shared_expert_intermediate_size",), kind.shared or 0, most=MAX_INNER)
    else:
        shared_inner = 0 if kind.shared is None else inner * size(SHARED, kind.shared, least=0)
    renormalize = raw.get("norm_topk_prob", kind.renormalize)
    if not isinstance(renormalize, bool):
        raise CheckpointError(f"{where}: norm_topk_prob is {renormalize!r:.100}; it must be true or false")
    return MoeConfig(
        experts=experts,
        top_k=top_k,
        inner=inner,
        scoring="sigmoid" if kind.sigmoid else "softmax",
        renormalize=renormalize or kind.always,
        biased=kind.biased,
        groups=groups,
        top_groups=top_groups,
        scale=number(raw, "routed_scaling_factor", 1.0, where) if kind.deepseek else 1.0,
        shared="" if not shared_inner else "gated" if kind.gated else "added",
        shared_inner=shared_inner,
        layers=_sparse_layers(raw, kind.first, layers, where),
    )


def _first(raw: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, Any]:
    """The first of these keys that has a value."""
    key = next((key for key in keys if raw.get(key) is not None), keys[0])
    return key, raw.get(key)


def _sparse_layers(raw: Mapping[str, Any], first: int, layers: int, where: str) -> tuple[bool, ...]:
    """Which layers have experts."""
    dense = [] if raw.get("mlp_only_layers") is None else raw["mlp_only_layers"]
    if not isinstance(dense, list) or not all(isinstance(index, int) for index in dense):
        raise CheckpointError(f"{where}: mlp_only_layers must list numbers of layers")

    def index(keys: tuple[str, ...], default: int, least: int = 0) -> int:
        key, value = _first(raw, keys)
        return default if value is None or value == -1 else whole(key, value, least, where)

    every = index(("decoder_sparse_step", "moe_layer_interval"), 1, 1)
    first = index(("first_k_dense_replace", "moe_layer_start_index"), first)
    last = index(("moe_layer_end_index",), layers - 1)
    return tuple(first <= i <= last and (i + 1) % every == 0 and i not in dense for i in range(layers))
