"""One row per model_type: where a decoder layer's linears are, and which of them share a scale. No code per family.

`blocks.py` materializes transformers' own layer classes by these names; `nn/` builds our decoder from the flags.
"""

from __future__ import annotations

from dataclasses import dataclass

from squawq.errors import ConfigError


@dataclass(frozen=True)
class ScalingGroup:
    """Linears that read the same input, the op before it that takes the inverse scale, and the module whose output
    shows the damage ("" when the linear itself does). `square` groups apply only where the two weights have the
    same shape (AutoAWQ's rule for v_proj -> o_proj, which leaves grouped-query attention out)."""

    previous: str
    linears: tuple[str, ...]
    inspect: str = ""
    square: bool = False


@dataclass(frozen=True)
class Family:
    """A model_type's row. Names are relative to one decoder layer."""

    model_type: str
    groups: tuple[ScalingGroup, ...]
    never_clip: tuple[str, ...] = ("q_proj", "k_proj")  # clipping them hurts attention scores (llm-awq)
    qk_norm: bool = False
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"

    def layer(self, index: int) -> str:
        return f"{self.layers}.{index}"

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear of a layer, in the order in which they are used."""
        return tuple(name for group in self.groups for name in group.linears)


_LLAMA_GROUPS = (
    ScalingGroup("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn"),
    ScalingGroup("self_attn.v_proj", ("self_attn.o_proj",), square=True),
    ScalingGroup("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
    ScalingGroup("mlp.up_proj", ("mlp.down_proj",)),
)

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", _LLAMA_GROUPS),
        Family("mistral", _LLAMA_GROUPS),
        Family("qwen2", _LLAMA_GROUPS),
        Family("qwen3", _LLAMA_GROUPS, qk_norm=True),
    )
}


def family_of(model_type: str) -> Family:
    """The row of a model_type. Raises ConfigError listing the known ones."""
    if model_type not in FAMILIES:
        raise ConfigError(f"model_type is {model_type!r}; squawq knows {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
