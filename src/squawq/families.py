"""One row per model_type: a decoder layer's linears, and which of them share a scale. No code per family.

`quantization/` builds transformers' own layers and finds what a row names in them; `nn/` runs the families that say so.
docs/contributing/adding-a-family.md explains a row. Knows names and no tensors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from squawq.decoder_traits import Traits
from squawq.errors import ConfigError


@dataclass(frozen=True)
class ScalingGroup:
    """Linears that read the same input, and the op before it that takes the inverse scale ("": there is none).

    Names are relative to a layer; * stands for the number of an expert. `inspect`: the module whose output shows the
    damage ("": the whole layer; None: each linear itself). `unquantized_consumers`: modules that read that
    input too and stay in 16 bits. `input`: the module that has the whole input where the linears see parts of it, as
    experts do. `square` groups apply only where the two weights have the same shape (AutoAWQ's rule for v_proj ->
    o_proj, which leaves grouped-query attention out). An op that makes gate and up in one takes the scale in its last
    rows. `residual`: the norm whose input a single linear's output is added to as it is ("": there is none).
    """

    previous: str
    linears: tuple[str, ...]
    inspect: str | None = None
    unquantized_consumers: tuple[str, ...] = ()
    input: str = ""
    square: bool = False
    residual: str = ""

    @property
    def capture_module(self) -> str:
        """Module whose hook captures the input of the linears."""
        return self.input or self.linears[0]


@dataclass(frozen=True)
class Family:
    """A model_type's row. Groups are relative to one decoder layer; layers lack what their kind has not."""

    model_type: str
    groups: tuple[ScalingGroup, ...]
    never_clip: tuple[str, ...] = ("q_proj", "k_proj", "q_a_proj", "q_b_proj")  # it hurts attention scores (llm-awq)
    norm_offset: float = 0.0  # norms multiply by their weight plus this
    experts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")  # as checkpoints spell them
    routers: tuple[str, ...] = ()  # linears in 16 bits whose input no group reads; also those of per-layer inputs
    decoder: Traits | None = None  # for nn/, if it runs the family
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"

    def layer(self, index: int) -> str:
        return f"{self.layers}.{index}"

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear that a layer may have, with * for an expert's number; those that are never converted, too."""
        grouped = (name for group in self.groups for name in (*group.linears, *group.unquantized_consumers))
        return (*grouped, *self.routers)

    def layer_groups(self, modules: Sequence[str]) -> tuple[ScalingGroup, ...]:
        """The groups of a layer that has these modules: stars written out, what the layer has not left out."""
        found = []
        for group in self.groups:
            for each in _each_expert(group, modules):
                linears = tuple(name for pattern in each.linears for name in _matching(pattern, modules))
                if linears:
                    consumers = tuple(name for name in each.unquantized_consumers if name in modules)
                    previous, residual = (name if name in modules else "" for name in (each.previous, each.residual))
                    row = replace(
                        each, previous=previous, linears=linears, unquantized_consumers=consumers, residual=residual
                    )
                    found.append(row)
        return tuple(found)


def _each_expert(group: ScalingGroup, modules: Sequence[str]) -> list[ScalingGroup]:
    """A group for each expert where the previous op is the expert's own."""
    if "*" not in group.previous:
        return [group]
    before, after = group.previous.split("*")
    numbers = [name.removeprefix(before).removesuffix(after) for name in _matching(group.previous, modules)]
    return [
        replace(
            group,
            previous=group.previous.replace("*", number),
            linears=tuple(name.replace("*", number) for name in group.linears),
        )
        for number in numbers
    ]


def _matching(pattern: str, modules: Sequence[str]) -> list[str]:
    if "*" not in pattern:
        return [pattern] if pattern in modules else []
    expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    return [name for name in modules if expression.fullmatch(name)]


def expert_of(linear: str) -> str | None:
    """The expert that a linear is part of (mlp.experts.3), None for one that sees every token."""
    found = re.match(r"((?:.*\.)?experts\.\d+)\.", linear)
    return found.group(1) if found else None


Groups = tuple[ScalingGroup, ...]
_ATTENTION, _MLP = "input_layernorm", "post_attention_layernorm"  # Llama's names for the norms before both
_W123 = ("w1", "w3", "w2")  # Mixtral's names for gate, up, down


def _within(module: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{module}.{name}" for name in names)


def _attention(norm: str = _ATTENTION, out: str = "o_proj", gates: tuple[str, ...] = (), adds: bool = True) -> Groups:
    """q, k and v after a norm; gates of the attention's output, if there are any, read the same. `adds` says that the
    result is added as it is to what the norm is given."""
    return (
        ScalingGroup(norm, _within("self_attn", "q_proj", "k_proj", "v_proj", *gates), "self_attn"),
        ScalingGroup("self_attn.v_proj", (f"self_attn.{out}",), square=True, residual=norm if adds else ""),
    )


def _latent_attention() -> Groups:
    """DeepSeek's: low-rank queries (or whole ones), keys and values, with norms between the factors."""
    return (
        ScalingGroup(_ATTENTION, _within("self_attn", "q_proj", "q_a_proj", "kv_a_proj_with_mqa"), "self_attn"),
        ScalingGroup("self_attn.q_a_layernorm", ("self_attn.q_b_proj",)),
        ScalingGroup("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",)),
        ScalingGroup("", ("self_attn.o_proj",)),
    )


def _delta_or_attention() -> Groups:
    """Qwen's hybrids: most layers have a gated delta rule instead of attention; its per-head gates stay in 16 bits."""
    linears = _within("linear_attn", "in_proj_qkvz", "in_proj_qkv", "in_proj_z")
    gates = _within("linear_attn", "in_proj_ba", "in_proj_b", "in_proj_a")
    return (
        ScalingGroup(_ATTENTION, linears, "linear_attn", gates),
        ScalingGroup("", ("linear_attn.out_proj",)),
        *_attention(),
    )


def _gated(norm: str = _MLP, module: str = "mlp", adds: bool = True) -> Groups:
    """down(act(gate) * up), which may be added as attention's result is."""
    return (
        ScalingGroup(norm, _within(module, "gate_proj", "up_proj"), module),
        ScalingGroup(f"{module}.up_proj", (f"{module}.down_proj",), residual=norm if adds else ""),
    )


def _fused_gated() -> Groups:
    """The same with gate and up in one linear."""
    return (ScalingGroup(_MLP, ("mlp.gate_up_proj",), "mlp"), ScalingGroup("mlp.gate_up_proj", ("mlp.down_proj",)))


def _plain(norm: str, up: str, down: str) -> Groups:
    """down(act(up)): no scale goes through an activation."""
    return ScalingGroup(norm, (up,), "mlp"), ScalingGroup("", (down,))


def _moe(
    *gates: str,
    norm: str = _MLP,
    block: str = "mlp",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    shared: str = "shared_experts",
) -> Groups:
    """Experts, and shared ones where the layer has them; `gates`: router and gates, in 16 bits.

    One scale serves all that reads the norm. No module is inspected: that would take a second copy of every expert.
    """
    gate, up, down = _within(f"{block}.experts.*", *names)
    shared_gate, shared_up, shared_down = _within(f"{block}.{shared}", "gate_proj", "up_proj", "down_proj")
    return (
        ScalingGroup(
            norm, (gate, up, shared_gate, shared_up), unquantized_consumers=_within(block, *gates), input=block
        ),
        ScalingGroup(up, (down,)),
        ScalingGroup(shared_up, (shared_down,)),
    )


def _parallel(linears: tuple[str, ...]) -> ScalingGroup:
    """Attention and MLP read the same norm: the whole layer shows the damage."""
    return ScalingGroup(_ATTENTION, (*_within("self_attn", "q_proj", "k_proj", "v_proj"), *linears), "")


_LLAMA = _attention() + _gated()
_MULTIPLIED = _attention(adds=False) + _gated(adds=False)  # what is added is multiplied or normalized first
_UNSCALED = _attention("") + _gated("")  # norms come after attention and MLP, or have no weight
_GEMMA = _attention(adds=False) + _gated("pre_feedforward_layernorm", adds=False)
_GEMMA4 = (  # a norm without weights comes after v_proj; experts beside the MLP have a norm and a router of their own
    *_attention(adds=False)[:1],
    ScalingGroup("", ("self_attn.o_proj",)),
    *_GEMMA[2:],
    ScalingGroup("pre_feedforward_layernorm_2", ("experts.*.gate_proj", "experts.*.up_proj"), input="experts"),
    ScalingGroup("experts.*.up_proj", ("experts.*.down_proj",)),
)
_DENSE_OR_MOE = _gated() + _moe("gate")  # the first layers of these have no experts
_QWEN_MOE = _gated() + _moe("gate", "shared_expert_gate", shared="shared_expert")
_GRANITE_MOE = _moe("router", block="block_sparse_moe", names=_W123)
_GATED_ATTENTION = Traits(qk_norm="head", gated=True)
_COHERE = (_parallel(_within("mlp", "gate_proj", "up_proj")), *_MULTIPLIED[1:2], *_MULTIPLIED[3:])

# For our decoder: norms before attention, of its output, before the MLP, of its output
_FOUR_NORMS = (_ATTENTION, "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_NORMS_AFTER = ("", "post_attention_layernorm", "", "post_feedforward_layernorm")
_GLM4_NORMS = (_ATTENTION, "post_self_attn_layernorm", _MLP, "post_mlp_layernorm")
_HUNYUAN_NORMS = ("self_attn.query_layernorm", "self_attn.key_layernorm")


def _rows(model_types: str, groups: Groups, **settings: Any) -> dict[str, Family]:
    """Equal rows for several model_types."""
    return {model_type: Family(model_type, groups, **settings) for model_type in model_types.split()}


FAMILIES = {
    **_rows("llama internlm3 iquestcoder ministral mistral qwen2 seed_oss", _LLAMA, decoder=Traits()),
    **_rows("cwm ministral3 qwen2_vl_text qwen2_5_vl_text smollm3", _LLAMA, decoder=Traits()),
    **_rows("qwen3 qwen3_vl_text", _LLAMA, decoder=Traits(qk_norm="head")),
    **_rows("ernie4_5 helium", _LLAMA, decoder=Traits(interleaved=True)),
    **_rows("hunyuan_v1_dense", _LLAMA, decoder=Traits(qk_norm="head", qk_names=_HUNYUAN_NORMS, rope_first=True)),
    **_rows("exaone", _LLAMA),
    **_rows("granite", _MULTIPLIED, decoder=Traits()),
    **_rows("granite_swa hyperclovax", _MULTIPLIED),
    **_rows("gemma", _LLAMA, norm_offset=1.0, decoder=Traits(wide=True)),
    **_rows("gemma2", _GEMMA, norm_offset=1.0, decoder=Traits(_FOUR_NORMS, wide=True)),
    **_rows("gemma3_text", _GEMMA, norm_offset=1.0, decoder=Traits(_FOUR_NORMS, "head", wide=True)),
    **_rows("vaultgemma", _GEMMA, norm_offset=1.0),
    **_rows("gemma4_text", _GEMMA4, routers=("router.proj", "per_layer_input_gate", "per_layer_projection")),
    **_rows("olmo", _UNSCALED),
    **_rows("olmo2 olmo3", _UNSCALED, decoder=Traits(_NORMS_AFTER, "whole")),
    **_rows("exaone4", _UNSCALED, decoder=Traits(_NORMS_AFTER, "head")),
    **_rows("cohere cohere2", _COHERE),
    **_rows("stablelm", _attention("") + _gated()),  # some have no second norm, and the MLP reads the first
    **_rows(
        "phi3",
        (
            ScalingGroup(_ATTENTION, ("self_attn.qkv_proj",), "self_attn"),
            ScalingGroup("", ("self_attn.o_proj",)),
            *_fused_gated(),
        ),
        decoder=Traits(),
    ),
    **_rows("glm", _attention() + _fused_gated(), decoder=Traits(interleaved=True)),
    **_rows("glm4", _attention(adds=False) + _fused_gated(), decoder=Traits(_GLM4_NORMS, interleaved=True)),
    **_rows(
        "phi",
        (_parallel(("mlp.fc1",)), *_attention(out="dense", adds=False)[1:], ScalingGroup("", ("mlp.fc2",))),
        norm="model.final_layernorm",
    ),
    **_rows("starcoder2", _attention() + _plain(_MLP, "mlp.c_fc", "mlp.c_proj")),
    **_rows("nemotron", _attention() + _plain(_MLP, "mlp.up_proj", "mlp.down_proj"), norm_offset=1.0),
    **_rows("arcee jais2", _attention() + _plain(_MLP, "mlp.up_proj", "mlp.down_proj")),
    **_rows(
        "apertus", _attention("attention_layernorm") + _plain("feedforward_layernorm", "mlp.up_proj", "mlp.down_proj")
    ),
    **_rows("minicpm3", _latent_attention() + _gated(adds=False)),
    **_rows("youtu", _latent_attention() + _gated()),
    **_rows("deepseek_v2 deepseek_v3 glm4_moe_lite", _latent_attention() + _DENSE_OR_MOE),
    **_rows("qwen3_moe qwen3_vl_moe_text", _attention() + _DENSE_OR_MOE, decoder=Traits(qk_norm="head")),
    **_rows("dots1", _attention() + _DENSE_OR_MOE, decoder=Traits(qk_norm="head")),
    **_rows("ernie4_5_moe", _attention() + _DENSE_OR_MOE, decoder=Traits(interleaved=True)),
    **_rows("glm4_moe", _attention() + _DENSE_OR_MOE, decoder=Traits(qk_norm="head", qk_flag="use_qk_norm")),
    **_rows("olmoe", _attention() + _DENSE_OR_MOE, decoder=Traits(qk_norm="whole")),
    **_rows("exaone_moe solar_open", _attention() + _DENSE_OR_MOE),
    **_rows("qwen2_moe", _attention() + _QWEN_MOE, decoder=Traits()),
    **_rows(
        "qwen3_next",
        _delta_or_attention() + _QWEN_MOE,
        norm_offset=1.0,
        decoder=replace(_GATED_ATTENTION, by_key_heads=True),
    ),
    **_rows("qwen3_5_text", _delta_or_attention() + _gated(), norm_offset=1.0, decoder=_GATED_ATTENTION),
    **_rows("qwen3_5_moe_text", _delta_or_attention() + _QWEN_MOE, norm_offset=1.0, decoder=_GATED_ATTENTION),
    **_rows("mixtral", _attention() + _moe("gate", names=_W123), experts=_W123, decoder=Traits()),
    **_rows("minimax_m2", _attention() + _moe("gate", names=_W123), experts=_W123, decoder=Traits(qk_norm="whole")),
    **_rows("phimoe", _attention() + _moe("router", names=_W123), experts=_W123),
    **_rows("flex_olmo", _attention("") + _moe("gate", norm="")),
    **_rows("gpt_oss", (*_attention(), *_moe("router")[:1], ScalingGroup("", ("mlp.experts.*.down_proj",)))),
    **_rows("hunyuan_v1_moe", _attention() + _moe("gate.wg", shared="shared_mlp")),
    **_rows("granitemoe granitemoe_swa", _attention(adds=False) + _GRANITE_MOE, experts=_W123),
    **_rows(
        "afmoe",
        _attention(gates=("gate_proj",), adds=False)
        + _gated("pre_mlp_layernorm", adds=False)
        + _moe("router.gate", norm="pre_mlp_layernorm"),
    ),
    **_rows(
        "llama4_text",
        _attention() + _gated(module="feed_forward") + _moe("router", block="feed_forward", shared="shared_expert"),
    ),
}


def family_of(model_type: str) -> Family:
    """The row of a model_type. Raises ConfigError listing the known ones."""
    if model_type not in FAMILIES:
        raise ConfigError(
            f"model_type is {model_type!r}; squawq knows {', '.join(sorted(FAMILIES))}. Another one takes a row in "
            "squawq/families.py"
        )
    return FAMILIES[model_type]
