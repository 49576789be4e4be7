"""The mixture-of-experts part of config.json, for families whose router our decoder computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from squawq.config_values import number, whole
from squawq.errors import CheckpointError

MAX_EXPERTS = 2**14
MAX_INNER = 2**22
SIGMOID = ("dots1", "glm4_moe", "minimax_m2")  # as DeepSeek-V3 (arXiv 2412.19437); the others have softmax
BIASED = (*SIGMOID, "ernie4_5_moe")
GATED = ("qwen2_moe", "qwen3_next", "qwen3_5_moe_text")
MOE_FAMILIES = ("mixtral", "olmoe", "qwen3_moe", *BIASED, *GATED)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "moe_k")
RENORMALIZED = ("ernie4_5_moe", "minimax_m2", "mixtral", "qwen3_5_moe_text")  # always; the others by norm_topk_prob
RENORMALIZED_BY_DEFAULT = ("glm4_moe", "qwen3_next")
SHARED_EXPERTS = {"glm4_moe": 1, "ernie4_5_moe": 2}  # where config.json does not say
FIRST_LAYER = {"glm4_moe": 1, "ernie4_5_moe": 1}


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
    kind = str(raw.get("model_type"))
    if kind not in MOE_FAMILIES:
        return None

    def size(keys: tuple[str, ...], least: int = 1, most: int = MAX_EXPERTS, default: int | None = None) -> int:
        key = next((key for key in keys if raw.get(key) is not None), keys[0])
        value = raw.get(key)
        found = whole(key, default if value is None else value, least, where)
        if found > most:
            raise CheckpointError(f"{where}: {key} is {found}; it must be at most {most}")
        return found

    experts, top_k = size(EXPERTS), size(TOP_K)
    if top_k > experts:
        raise CheckpointError(f"{where}: a token cannot take {top_k} of {experts} experts")
    inner = size(("moe_intermediate_size", "intermediate_size"), most=MAX_INNER)
    grouped = kind in ("dots1", "glm4_moe")
    groups = size(("n_group",), default=1) if grouped else 1
    top_groups = size(("topk_group",), default=1) if grouped else 1
    if experts % groups or top_groups > groups or top_k > experts // groups * top_groups:
        raise CheckpointError(
            f"{where}: a token cannot take {top_k} experts from {top_groups} of {groups} groups of {experts} experts"
        )
    shared_inner = 0
    if kind in GATED:
        shared_inner = size(("shared_expert_intermediate_size",), most=MAX_INNER)
    elif kind in ("dots1", "glm4_moe", "ernie4_5_moe"):
        keys = ("n_shared_experts", "moe_num_shared_experts")
        shared_inner = inner * size(keys, least=0, default=SHARED_EXPERTS.get(kind, 0))
    renormalize = raw.get("norm_topk_prob", kind in RENORMALIZED_BY_DEFAULT)
    if not isinstance(renormalize, bool):
        raise CheckpointError(f"{where}: norm_topk_prob is {renormalize!r:.100}; it must be true or false")
    return MoeConfig(
        experts=experts,
        top_k=top_k,
        inner=inner,
        scoring="sigmoid" if kind in SIGMOID else "softmax",
        renormalize=renormalize or kind in RENORMALIZED,
        biased=kind in BIASED,
        groups=groups,
        top_groups=top_groups,
        scale=number(raw, "routed_scaling_factor", 1.0, where) if grouped else 1.0,
        shared="" if not shared_inner else "gated" if kind in GATED else "added",
        shared_inner=shared_inner,
        layers=_sparse_layers(raw, kind, layers, where),
    )


def _sparse_layers(raw: Mapping[str, Any], kind: str, layers: int, where: str) -> tuple[bool, ...]:
    """Which layers have experts."""
    dense = raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(index, int) for index in dense):
        raise CheckpointError(f"{where}: mlp_only_layers must list numbers of layers")

    def index(keys: tuple[str, ...], default: int, least: int = 0) -> int:
        key = next((key for key in keys if raw.get(key) is not None), keys[0])
        value = raw.get(key)
        return default if value is None or value == -1 else whole(key, value, least, where)

    every = index(("decoder_sparse_step", "moe_layer_interval"), 1, 1)
    first = index(("first_k_dense_replace", "moe_layer_start_index"), FIRST_LAYER.get(kind, 0))
    last = index(("moe_layer_end_index",), layers - 1)
    return tuple(first <= i <= last and (i + 1) % every == 0 and i not in dense for i in range(layers))
