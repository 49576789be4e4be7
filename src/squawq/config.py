"""Reads a model's config.json into frozen dataclasses, and validates it: the file is untrusted."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from squawq.config_values import MAX_LAYERS, number, optional, whole
from squawq.delta_config import DELTA_RULE, LINEAR, DeltaRuleConfig, hybrid_layers, read_delta_rule
from squawq.errors import CheckpointError
from squawq.moe_config import MoeConfig, read_moe
from squawq.quant_config import QuantConfig
from squawq.rope_config import RopeConfig, layer_ropes
from squawq.stored_quant import method_of, read_quantization

MAX_LATENT = 2**14  # qk_nope_head_dim, qk_rope_head_dim
CODE = (  # keys that name code that transformers would fetch or run
    *("auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
)
TIED = (  # where config.json does not say
    *("cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "gemma", "gemma2", "gemma3_text", "granite_swa", "minicpm3"),
    *("smollm3", "starcoder2", "vaultgemma", "youtu"),
)
WINDOWLESS = (  # that have none, whatever config.json says
    *("llama", "gemma", "granite", "olmo2", "helium", "ernie4_5", "hunyuan_v1_dense", "glm", "glm4", "qwen3_vl_text"),
    *("arcee", "internlm3", "iquestcoder", "seed_oss", "ernie4_5_moe", "glm4_moe", "minimax_m2", "olmoe"),
    "qwen3_vl_moe_text",
)
SWITCHED = (  # that have windows only where use_sliding_window is true
    *("qwen2", "qwen2_moe", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3", "qwen3_moe", "smollm3"),
)
WINDOWS = {"gemma2": 4096, "gemma3_text": 4096, "cwm": 8192}  # where config.json does not say
PATTERNS = {  # one layer of so many is full
    "gemma2": 2,
    "gemma3_text": 6,
    "olmo3": 4,
    "exaone4": 4,
    "cohere2": 4,
    "cwm": 4,
}
FLAT = {"qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text"}  # multimodal model_type -> its text model's
TIED_OUTSIDE = ("qwen3_vl_moe",)  # multimodal ones whose text_config says that it is tied, in files by transformers
LEFT_OUT = {
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
    }
}


def without(config: Any, keys: Collection[str]) -> Any:
    """config.json without some keys, at any depth."""
    if not isinstance(config, Mapping):
        return config
    return {key: without(value, keys) for key, value in config.items() if key not in keys}


def with_text_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A multimodal model's config.json with the text model's keys in `text_config`: early ones have them at the top."""
    text, text_type = raw.get("text_config"), FLAT.get(str(raw.get("model_type")))
    if raw.get("model_type") in TIED_OUTSIDE and isinstance(text, Mapping):
        return {**raw, "text_config": {**text, "tie_word_embeddings": raw.get("tie_word_embeddings", False)}}
    if text_type is None or "text_config" in raw:
        return raw
    text = {key: value for key, value in raw.items() if key not in ("vision_config", "quantization_config")}
    return {**raw, "text_config": {**text, "model_type": text_type}}


@dataclass(frozen=True)
class Scales:
    """Factors and soft caps of a model: a cap of c makes c * tanh(x / c) of x; 0 is none.

    Attributes:
        attention: Of scores, 1 / sqrt(head_dim) in most families.
        residual: Of the outputs of attention and MLP before they are added.
    """

    attention: float
    attention_cap: float = 0.0
    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0
    logits_cap: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's config.json, or the `text_config` in a multimodal model's.

    `raw` is the whole file; `quant` is None for a 16-bit checkpoint. Families that our decoder does not run are refused
    by `nn/loader.py`, not here. `ropes`: of each layer, None for a layer without RoPE. `moe`: the experts of a family
    whose router that decoder computes.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    ropes: tuple[RopeConfig | None, ...]
    scales: Scales
    tied_embeddings: bool
    sliding_window: int | None
    layer_types: tuple[str, ...]
    activation: str
    delta_rule: DeltaRuleConfig | None
    moe: MoeConfig | None
    quant: QuantConfig | None
    raw: Mapping[str, Any]

    @property
    def text(self) -> Mapping[str, Any]:
        """config.json with the keys of `text_config` in place of the outer ones."""
        return {**self.raw, **(self.raw.get("text_config") or {})}

    @property
    def bos_id(self) -> int | None:
        """The BOS token's id, if config.json has one that the model knows."""
        found = self.text.get("bos_token_id")
        return found if isinstance(found, int) and 0 <= found < self.vocab_size else None

    @property
    def rope(self) -> RopeConfig:
        """RoPE of the first layer with full attention, or of the first that has any."""
        pairs = zip(self.layer_types, self.ropes, strict=True)
        found = sorted(
            ((kind != "full_attention", i, rope) for i, (kind, rope) in enumerate(pairs) if rope is not None)
        )
        return found[0][2] if found else RopeConfig()

    @property
    def heads(self) -> tuple[int, int, int]:
        """(query heads, key-value heads, head_dim)."""
        return self.num_heads, self.num_kv_heads, self.head_dim

    @property
    def cached_heads(self) -> tuple[int, int]:
        """Key-value heads and their head_dim, as a KV cache holds them.

        Of DeepSeek's latent attention (MLA) that is every head's keys, to which its values are padded.
        """
        text = self.text
        dims = [text.get(name, size) for name, size in (("qk_nope_head_dim", 128), ("qk_rope_head_dim", 64))]
        if not text.get("kv_lora_rank") or not all(isinstance(dim, int) and 0 <= dim <= MAX_LATENT for dim in dims):
            return self.num_kv_heads, self.head_dim
        return self.num_heads, sum(dims)

    @property
    def layout(self) -> str:
        """How the quantized linears lie on disk: a key of `format.layouts.LAYOUTS`."""
        stated = {} if self.quant is None else self.raw.get("quantization_config")
        return read_quantization(stated or {}, "config.json")[1]

    @property
    def quant_method(self) -> str:
        """The method that a quantized checkpoint names, as in "gptq"."""
        return method_of(self.raw.get("quantization_config") or {})

    @property
    def kv_layers(self) -> int:
        """Layers that have keys and values of their own, not a state or those of another layer; 1 if none has any."""
        shared = self.text.get("num_kv_shared_layers") if self.model_type == "gemma4_text" else 0
        shared = shared if isinstance(shared, int) and 0 <= shared <= self.num_layers else 0
        return max(1, sum(kind != LINEAR for kind in self.layer_types) - shared)

    def window(self, layer: int) -> int | None:
        """The layer's sliding window in tokens; None for full attention."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Read config.json in transformers 4's or 5's spelling. Raises CheckpointError naming `where` and the key."""
        file, raw = raw, _text_config(raw, where)

        def size(key: str, default: int | None = None) -> int:
            value = raw.get(key, default)
            value = default if value is None else value
            return whole(key, value, 1, where)

        model_type = raw.get("model_type")
        if not isinstance(model_type, str):
            raise CheckpointError(f"{where}: model_type is {model_type!r:.200}; it must name the architecture")
        layers, heads = size("num_hidden_layers"), size("num_attention_heads")
        if layers > MAX_LAYERS:
            raise CheckpointError(f"{where}: num_hidden_layers is {layers}; more than {MAX_LAYERS} is no model")
        kv_heads, head_dim = size("num_key_value_heads", heads), size("head_dim", size("hidden_size") // heads)
        if heads % kv_heads:
            raise CheckpointError(f"{where}: {heads} attention heads cannot share {kv_heads} key-value heads")
        if head_dim % 2:
            raise CheckpointError(f"{where}: head_dim is {head_dim}; rotary embedding needs an even one")
        quant = file.get("quantization_config")
        if quant is not None and not isinstance(quant, Mapping):
            raise CheckpointError(f"{where}: quantization_config must be an object")
        if quant is not None and quant.get("quant_method") == "mxfp4":
            quant = None  # as trained: what gpt-oss has in place of 16 bits
        window = _sliding_window(raw, where)
        layer_types = _layer_types(raw, layers, window, where)
        return cls(
            model_type=model_type,
            hidden_size=size("hidden_size"),
            intermediate_size=size("intermediate_size", raw.get("moe_intermediate_size")),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=size("vocab_size"),
            max_positions=size("max_position_embeddings", 2048),
            norm_eps=number(raw, "rms_norm_eps", 1e-6, where),
            ropes=layer_ropes(raw, layer_types, window, head_dim, where),
            scales=_scales(raw, size("hidden_size"), head_dim, where),
            tied_embeddings=bool(raw.get("tie_word_embeddings", model_type in TIED)),
            sliding_window=window,
            layer_types=layer_types,
            activation=_activation(raw),
            delta_rule=read_delta_rule(raw, where),
            moe=read_moe(raw, layers, where),
            quant=None if quant is None else read_quantization(quant, where)[0],
            raw=file,
        )


def _text_config(raw: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The keys of the text model, with what its configs leave out because transformers has it as a default."""
    raw = with_text_config(raw)
    text = raw.get("text_config")
    if text is None:
        return raw
    if not isinstance(text, Mapping):
        raise CheckpointError(f"{where}: text_config must be an object")
    outer = {key: value for key, value in raw.items() if key != "text_config"}
    return {**LEFT_OUT.get(str(text.get("model_type")), {}), **outer, **text}


def _activation(raw: Mapping[str, Any]) -> str:
    """Gemma 2 and 3 have it as `hidden_activation` alone; the first Gemma means the approximation by tanh."""
    if raw.get("model_type") in ("gemma2", "gemma3_text"):
        return str(raw.get("hidden_activation") or "gelu_pytorch_tanh")
    found = str(raw.get("hidden_act") or raw.get("hidden_activation") or "silu")
    return "gelu_pytorch_tanh" if raw.get("model_type") == "gemma" and found == "gelu" else found


def _scales(raw: Mapping[str, Any], hidden: int, head_dim: int, where: str) -> Scales:
    """The numbers of a family that has them, with transformers' defaults."""

    def cap(key: str, default: float) -> float:
        return optional({key: raw.get(key, default)}, key, 0.0, where)

    def factor(key: str) -> float:
        value = number(raw, key, 1.0, where)
        if not 1e-6 <= value <= 1e6:
            raise CheckpointError(f"{where}: {key} is {value:g}; it must be from 1e-6 to 1e6")
        return value

    plain = 1 / math.sqrt(head_dim)
    match raw.get("model_type"):
        case "gemma":
            return Scales(plain, embedding=math.sqrt(hidden))
        case "gemma2" | "gemma3_text" as kind:
            caps = (50.0, 30.0) if kind == "gemma2" else (0.0, 0.0)
            return Scales(
                1 / math.sqrt(number(raw, "query_pre_attn_scalar", 256, where)),
                attention_cap=cap("attn_logit_softcapping", caps[0]) if kind == "gemma2" else 0.0,
                embedding=math.sqrt(hidden),
                logits_cap=cap("final_logit_softcapping", caps[1]),
            )
        case "granite":
            return Scales(
                factor("attention_multiplier"),
                embedding=factor("embedding_multiplier"),
                residual=factor("residual_multiplier"),
                logits=1 / factor("logits_scaling"),
            )
    return Scales(plain)


def _sliding_window(raw: Mapping[str, Any], where: str) -> int | None:
    """Mistral uses its window wherever it is set; Qwen only where `use_sliding_window` says so."""
    window, model_type = raw.get("sliding_window"), raw.get("model_type")
    if window is None and model_type in WINDOWS:
        window = WINDOWS[model_type]
    if window is None or raw.get("use_sliding_window") is False or model_type in WINDOWLESS:
        return None
    if model_type in SWITCHED and not raw.get("use_sliding_window", False):
        return None
    return whole("sliding_window", window, 1, where)


def _layer_types(raw: Mapping[str, Any], layers: int, window: int | None, where: str) -> tuple[str, ...]:
    types = raw.get("layer_types")
    if types is None and raw.get("model_type") in DELTA_RULE:
        return hybrid_layers(raw, layers, where)
    if types is None:
        if window is None:
            return ("full_attention",) * layers
        if (model_type := raw.get("model_type")) in PATTERNS:
            every = whole("sliding_window_pattern", raw.get("sliding_window_pattern", PATTERNS[model_type]), 1, where)
            full = 0 if model_type == "cwm" else every - 1  # of so many layers, this one
            return tuple("full_attention" if i % every == full else "sliding_attention" for i in range(layers))
        given = raw.get("max_window_layers", 28) if "use_sliding_window" in raw else 0
        first = whole("max_window_layers", given, 0, where)
        return tuple("full_attention" if i < first else "sliding_attention" for i in range(layers))
    if not isinstance(types, list) or len(types) != layers or not all(isinstance(t, str) for t in types):
        raise CheckpointError(f"{where}: layer_types must list the attention of {layers} layers")
    return tuple(types)
