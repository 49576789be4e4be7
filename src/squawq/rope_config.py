"""Reads the parameters of rotary position embeddings (RoPE) from config.json, layer by layer, and validates them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from squawq.config_values import MAX_REAL, MAX_SIZE, number, optional
from squawq.delta_config import DELTA_RULE
from squawq.errors import CheckpointError

PARTIAL = "partial_rotary_factor"
ORIGINAL = "original_max_position_embeddings"
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")  # their parameters are read
STRETCHED = ("yarn", "longrope")
THETA = {  # where config.json does not say
    **dict.fromkeys(("gemma3_text", "cwm", "qwen2_vl_text", "qwen2_5_vl_text", "ministral3", "mixtral"), 1e6),
    **dict.fromkeys(("cohere", "ernie4_5", "ernie4_5_moe", "olmo3", "qwen3_vl_text", "qwen3_vl_moe_text"), 5e5),
    "minimax_m2": 5e6,
    "helium": 1e5,
    "smollm3": 2e6,
}
# where config.json does not say
PARTIALS = {
    **dict.fromkeys(("glm", "glm4", "glm4_moe"), 0.5),
    **dict.fromkeys(DELTA_RULE, 0.25),
}
LAYER_TYPES = ("full_attention", "sliding_attention")
BY_LAYER_TYPE = ("gemma3_text", "olmo3")  # rope_scaling is that of full attention alone
ROPE_IN_WINDOWS = ("exaone4", "cohere2")  # where a model has windows, layers without one have no RoPE


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding with base `theta`.

    Attributes:
        type: One of ROPE_TYPES; another type is kept by name alone.
        factor: Of the context, or of wavelengths.
        partial: The share of a head that is rotated.
        beta_fast, beta_slow, truncate: YaRN (Peng et al., arXiv 2309.00071): rotations within the original context
            from which on a frequency is kept, and up to which it is interpolated; whether the bounds become integers.
        magnitude: Factor of cos and sin: attention_factor of YaRN and LongRoPE.
        factors: LongRoPE (Ding et al., arXiv 2402.13753): each wavelength's factor.
        query_beta: Queries are multiplied by 1 + query_beta * log(1 + floor(position / original)), as Llama 4 does.
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    partial: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    magnitude: float = 1.0
    factors: tuple[float, ...] = ()
    query_beta: float = 0.0

    def pairs(self, head_dim: int) -> int:
        """Rotated pairs of a head."""
        return int(head_dim * self.partial) // 2


def layer_ropes(
    raw: Mapping[str, Any], layer_types: Sequence[str], window: int | None, head_dim: int, where: str
) -> tuple[RopeConfig | None, ...]:
    """RoPE of each layer; None for a layer without (NoPE).

    transformers 5 keeps all in `rope_parameters`, by layer type in some families; 4 has `rope_theta` and `rope_scaling`
    (type or rope_type). Raises CheckpointError naming `where` and the key.
    """
    parts = [raw.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(part, Mapping) for part in parts):
        raise CheckpointError(f"{where}: rope_scaling and rope_parameters must be objects")
    scaling, parameters = parts
    nested = {key: value for key, value in parameters.items() if key in LAYER_TYPES}
    if not all(value is None or isinstance(value, Mapping) for value in nested.values()):
        raise CheckpointError(f"{where}: rope_parameters must have an object for each type of layer")
    model_type, found = raw.get("model_type"), {}
    for kind in set(layer_types):
        values = {**scaling, **parameters}
        if nested or model_type in BY_LAYER_TYPE:
            values = {**(scaling if kind == "full_attention" else {}), **(nested.get(kind) or {})}
        if kind == "sliding_attention" and model_type == "gemma3_text":
            values.setdefault("rope_theta", raw.get("rope_local_base_freq", 10000.0))
        found[kind] = _rope(raw, values, head_dim, where)
    rotated = _rotated(raw, layer_types, window, where)
    return tuple(found[kind] if turns else None for kind, turns in zip(layer_types, rotated, strict=True))


def _rotated(raw: Mapping[str, Any], layer_types: Sequence[str], window: int | None, where: str) -> Sequence[bool]:
    """Whether each layer has RoPE."""
    model_type, layers = raw.get("model_type"), len(layer_types)
    if model_type in ROPE_IN_WINDOWS and window is not None:
        return [kind == "sliding_attention" for kind in layer_types]
    if model_type != "smollm3":
        return [True] * layers
    given = raw.get("no_rope_layers")
    if given is None:
        every = int(optional(raw, "no_rope_layer_interval", 4, where))
        return [(index + 1) % max(1, every) != 0 for index in range(layers)]
    if not isinstance(given, list) or len(given) != layers or any(value not in (0, 1) for value in given):
        raise CheckpointError(f"{where}: no_rope_layers must be a list of 0 and 1 for {layers} layers")
    return [bool(value) for value in given]


def _rope(raw: Mapping[str, Any], values: Mapping[str, Any], head_dim: int, where: str) -> RopeConfig:
    model_type = str(raw.get("model_type"))
    kind = str(values.get("rope_type", values.get("type")) or "default")
    if model_type == "phi3" and kind in ("su", "yarn"):  # what Phi-3's first releases call LongRoPE
        kind = "longrope"
    bases = {"rope_theta": raw.get("rope_theta", THETA.get(model_type, 10000.0)), **values}
    theta = number(bases, "rope_theta", 1, where)
    if kind == "dynamic" and values.get("alpha"):  # Hunyuan's: a fixed change of the base
        kind, theta = "default", theta * number(values, "alpha", 1, where) ** (head_dim / max(1, head_dim - 2))
    if kind in ("mrope", "axial"):  # Qwen's: text has equal positions on all three axes
        kind = "default"
    partial = raw.get(PARTIAL, values.get(PARTIAL)) or PARTIALS.get(model_type, 1.0)
    if model_type == "minimax_m2" and raw.get("rotary_dim") is not None:
        partial = number(raw, "rotary_dim", head_dim, where) / head_dim
    if kind not in ROPE_TYPES:
        values = {}
    context = (raw.get("max_position_embeddings") or 2048) if kind in STRETCHED else 8192
    contexts = {ORIGINAL: raw.get(ORIGINAL) or values.get(ORIGINAL) or context}
    rope = RopeConfig(
        theta=number({"rope_theta": theta}, "rope_theta", 1, where),
        type=kind,
        factor=optional(values, "factor", 1.0, where),
        low_freq_factor=number(values, "low_freq_factor", 1.0, where),
        high_freq_factor=number(values, "high_freq_factor", 4.0, where),
        original_max_position_embeddings=max(1, min(MAX_SIZE, int(number(contexts, ORIGINAL, 1, where)))),
        partial=min(1.0, number({PARTIAL: partial}, PARTIAL, 1, where)),
        query_beta=optional(values, "llama_4_scaling_beta", 0.0, where) if model_type == "ministral3" else 0.0,
    )
    return _stretched(raw, values, rope, head_dim, where) if kind in STRETCHED else rope


def _stretched(
    raw: Mapping[str, Any], values: Mapping[str, Any], rope: RopeConfig, head_dim: int, where: str
) -> RopeConfig:
    """YaRN or LongRoPE: what depends on the ratio of the contexts."""
    original = rope.original_max_position_embeddings
    context = number(
        {"max_position_embeddings": raw.get("max_position_embeddings") or 2048}, "max_position_embeddings", 1, where
    )
    factor = optional(values, "factor", context / original, where)
    if rope.type == "longrope":
        name = "long_factor" if context > original else "short_factor"
        factors, pairs = values.get(name), rope.pairs(head_dim)
        if not isinstance(factors, list) or len(factors) != pairs:
            raise CheckpointError(f"{where}: {name} must be a list of {pairs} numbers, one for each rotated pair")
        found = tuple(number({name: factor}, name, 1, where) for factor in factors)
        spread = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
        return replace(rope, factors=found, magnitude=optional(values, "attention_factor", spread, where))
    if rope.theta <= 1:
        raise CheckpointError(f"{where}: rope_theta is {rope.theta:g}; YaRN needs more than 1")
    for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        if not 1e-6 <= optional(values, name, default, where) <= 1e6:
            raise CheckpointError(f"{where}: {name} is {values[name]!r:.100}; it must be from 1e-6 to 1e6")
    scales = [optional(values, name, 0.0, where) for name in ("mscale", "mscale_all_dim")]
    over, under = scales if all(scales) else (1.0, 0.0)
    spread = _mscale(factor, over) / _mscale(factor, under)
    if not 0 < spread <= MAX_REAL:
        raise CheckpointError(f"{where}: mscale is {values.get('mscale')!r:.100}; it is out of range")
    return replace(
        rope,
        factor=factor,
        beta_fast=optional(values, "beta_fast", 32.0, where),
        beta_slow=optional(values, "beta_slow", 1.0, where),
        truncate=values.get("truncate") is not False,
        magnitude=optional(values, "attention_factor", spread, where),
    )


def _mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
