"""Reads a model's config.json into frozen dataclasses, and validates it: the file is untrusted."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from squawq.errors import CheckpointError
from squawq.quant_config import LAYOUTS, QuantConfig, stated_layout

MAX_LAYERS = 1024
MAX_SIZES = {  # of what determines memory; MAX_SIZE for anything else
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**14,
    "vocab_size": 2**24,
}
MAX_SIZE = 2**31 - 1
MAX_REAL = 1e30  # within float32's range
PARTIAL = "partial_rotary_factor"
ROPE_TYPES = ("default", "linear", "llama3")  # their parameters are read
CODE = (  # keys that name code that transformers would fetch or run
    *("auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
)
TIED = (  # where config.json does not say
    *("cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "gemma", "gemma2", "gemma3_text", "granite_swa", "minicpm3"),
    *("smollm3", "starcoder2", "vaultgemma", "youtu"),
)
FLAT = {"qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text"}  # multimodal model_type -> its text model's
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
    text_type = FLAT.get(str(raw.get("model_type")))
    if text_type is None or "text_config" in raw:
        return raw
    text = {key: value for key, value in raw.items() if key not in ("vision_config", "quantization_config")}
    return {**raw, "text_config": {**text, "model_type": text_type}}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding with base `theta`.

    `type` is one of ROPE_TYPES, another type by name only, or "by layer type" where layers differ (`ModelConfig.raw`).
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    partial: float = 1.0  # rotated share of a head


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's config.json, or the `text_config` in a multimodal model's.

    `raw` is the whole file; `quant` is None for a 16-bit checkpoint. Families that our decoder does not run are refused
    by `nn/loader.py`, not here.
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
    rope: RopeConfig
    tied_embeddings: bool
    sliding_window: int | None
    layer_types: tuple[str, ...]
    activation: str
    quant: QuantConfig | None
    raw: Mapping[str, Any]

    @property
    def bos_id(self) -> int | None:
        """The BOS token's id, if config.json has one that the model knows."""
        found = {**self.raw, **(self.raw.get("text_config") or {})}.get("bos_token_id")
        return found if isinstance(found, int) and 0 <= found < self.vocab_size else None

    @property
    def heads(self) -> tuple[int, int, int]:
        """(query heads, key-value heads, head_dim)."""
        return self.num_heads, self.num_kv_heads, self.head_dim

    @property
    def layout(self) -> str:
        """How the quantized linears lie on disk: one of LAYOUTS."""
        return str(stated_layout(self.raw.get("quantization_config") or {}))

    def window(self, layer: int) -> int | None:
        """The layer's sliding window in tokens; None for full attention."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Read config.json in transformers 4's or 5's spelling. Raises CheckpointError naming `where` and the key."""
        whole, raw = raw, _text_config(raw, where)

        def size(key: str, default: int | None = None) -> int:
            value = raw.get(key, default)
            value = default if value is None else value
            return _whole(key, value, 1, where)

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
        quant = whole.get("quantization_config")
        if quant is not None and not isinstance(quant, Mapping):
            raise CheckpointError(f"{where}: quantization_config must be an object")
        if quant is not None and quant.get("quant_method") == "mxfp4":
            quant = None  # as trained: what gpt-oss has in place of 16 bits
        window = _sliding_window(raw, where)
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
            norm_eps=_number(raw, "rms_norm_eps", 1e-6, where),
            rope=_rope(raw, where),
            tied_embeddings=bool(raw.get("tie_word_embeddings", model_type in TIED)),
            sliding_window=window,
            layer_types=_layer_types(raw, layers, window, where),
            activation=str(raw.get("hidden_act") or raw.get("hidden_activation") or "silu"),
            quant=None if quant is None else QuantConfig.from_quantization_config(quant, where, LAYOUTS),
            raw=whole,
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


def _whole(key: str, value: object, least: int, where: str) -> int:
    """The value, if it is a whole number within its bounds; else raises CheckpointError."""
    most = MAX_SIZES.get(key, MAX_SIZE)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        kind = "a positive whole number" if least else "a whole number from 0"
        raise CheckpointError(f"{where}: {key} is {value!r:.100}; it must be {kind} up to {most}")
    return value


def _number(values: Mapping[str, Any], key: str, default: float, where: str) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_REAL:
        raise CheckpointError(f"{where}: {key} is {value!r:.100}; it must be a positive number up to {MAX_REAL:g}")
    return float(value)


def _rope(raw: Mapping[str, Any], where: str) -> RopeConfig:
    """transformers 5 keeps all in `rope_parameters`; 4 has `rope_theta` and `rope_scaling` (type or rope_type)."""
    parts = [raw.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(part, Mapping) for part in parts):
        raise CheckpointError(f"{where}: rope_scaling and rope_parameters must be objects")
    values = {**parts[0], **parts[1]}
    if values and all(value is None or isinstance(value, Mapping) for value in values.values()):
        return RopeConfig(type="by layer type")
    values.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    kind = values.get("rope_type", values.get("type", "default"))
    partial = raw.get(PARTIAL, values.get(PARTIAL, 1.0))
    if kind not in ROPE_TYPES:
        values = {"rope_theta": values["rope_theta"]}
    original = _number(values, "original_max_position_embeddings", 8192, where)
    return RopeConfig(
        theta=_number(values, "rope_theta", 10000.0, where),
        type=str(kind),
        partial=1.0 if partial is None else _number({PARTIAL: partial}, PARTIAL, 1, where),
        factor=_number(values, "factor", 1.0, where),
        low_freq_factor=_number(values, "low_freq_factor", 1.0, where),
        high_freq_factor=_number(values, "high_freq_factor", 4.0, where),
        original_max_position_embeddings=min(MAX_SIZE, int(original)),
    )


def _sliding_window(raw: Mapping[str, Any], where: str) -> int | None:
    """Mistral uses its window wherever it is set; Qwen only where `use_sliding_window` says so."""
    window = raw.get("sliding_window")
    if window is None or raw.get("use_sliding_window") is False:
        return None
    if raw.get("model_type") in ("qwen2", "qwen3") and not raw.get("use_sliding_window", False):
        return None
    return _whole("sliding_window", window, 1, where)


def _layer_types(raw: Mapping[str, Any], layers: int, window: int | None, where: str) -> tuple[str, ...]:
    types = raw.get("layer_types")
    if types is None:
        if window is None or raw.get("model_type") == "llama":
            return ("full_attention",) * layers
        given = raw.get("max_window_layers", 28) if "use_sliding_window" in raw else 0
        first = _whole("max_window_layers", given, 0, where)
        return tuple("full_attention" if i < first else "sliding_attention" for i in range(layers))
    if not isinstance(types, list) or len(types) != layers or not all(isinstance(t, str) for t in types):
        raise CheckpointError(f"{where}: layer_types must list the attention of {layers} layers")
    return tuple(types)
