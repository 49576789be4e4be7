"""Settings as frozen dataclasses: the model's (from config.json) and the quantization's (to and from
`quantization_config`). Knows the spellings on disk; knows nothing of tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from squawq.errors import CheckpointError, ConfigError

GROUP_SIZES = (16, 32, 64, 128, 256, -1)
METHODS = ("awq", "rtn")
DTYPES = ("float16", "bfloat16")
LAYOUTS = ("gemm", "gemv", "gemv_fast", "llm-awq")
MAX_LAYERS = 4096


def _choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices or isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(str(c) for c in choices)}")


def _integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least {least}")


@dataclass(frozen=True)
class QuantConfig:
    """How to quantize. The first four fields are written to `quantization_config`; the rest steer the search.

    bits: 4. group_size: weights along in_features that share a scale, -1 for a whole row.
    zero_point: asymmetric (True) or symmetric around 8 (False).
    modules_to_not_convert: linears whose full name contains one of these stay in 16 bits.
    method: "awq" (activation-aware scales, Lin et al., arXiv 2306.00978) or "rtn" (plain rounding).
    clip: search a narrower range per group, as AutoAWQ does. duo_scaling: try scales from activations and weights
    as well as from activations alone. n_grid: steps of the scale search between 0 and 1.
    dtype: of the tensors that stay in 16 bits.
    samples, seqlen: calibration blocks and tokens in each. None takes what there is, up to 128 blocks, and 512
    tokens or the model's context if that is shorter.
    Raises ConfigError for any value that cannot work.
    """

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True
    modules_to_not_convert: tuple[str, ...] = ()
    method: str = "awq"
    clip: bool = True
    duo_scaling: bool = True
    n_grid: int = 20
    dtype: str = "float16"
    samples: int | None = None
    seqlen: int | None = None

    def __post_init__(self) -> None:
        _choice("bits", self.bits, (4,))
        _choice("group_size", self.group_size, GROUP_SIZES)
        _choice("method", self.method, METHODS)
        _choice("dtype", self.dtype, DTYPES)
        _integer("n_grid", self.n_grid, 1)
        for name, least in (("samples", 1), ("seqlen", 8)):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), least)
        for name in ("zero_point", "clip", "duo_scaling"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        names: object = self.modules_to_not_convert
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) and n for n in names):
            raise ConfigError(f"modules_to_not_convert is {names!r}; it must be a list of module names")
        object.__setattr__(self, "modules_to_not_convert", tuple(names))

    def group_of(self, in_features: int) -> int:
        """The group size for a linear with this many inputs."""
        return in_features if self.group_size == -1 else self.group_size

    def skips(self, name: str) -> bool:
        """Whether the linear of this full name stays in 16 bits by `modules_to_not_convert`."""
        return any(part in name for part in self.modules_to_not_convert)

    def to_dict(self) -> dict[str, Any]:
        """Every field, in JSON's types."""
        return {**asdict(self), "modules_to_not_convert": list(self.modules_to_not_convert)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """From a mapping of field names or AutoAWQ's spellings (w_bit, q_group_size, version); unknown keys raise."""
        values = dict(values)
        for ours, theirs in (("bits", "w_bit"), ("group_size", "q_group_size")):
            if theirs in values:
                values[ours] = values.pop(theirs)
        if (version := values.pop("version", None)) is not None:
            _check_layout(version, ("GEMM",))
        values.pop("quant_method", None)
        if values.get("modules_to_not_convert") is None:
            values.pop("modules_to_not_convert", None)
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ConfigError(f"unknown quantization setting {unknown[0]!r}; the settings are {', '.join(known)}")
        return cls(**values)

    def to_quantization_config(self, not_converted: list[str]) -> dict[str, Any]:
        """The `quantization_config` that transformers, vLLM, TGI and SGLang read, key for key AutoAWQ's."""
        return {
            "quant_method": "awq",
            "bits": self.bits,
            "group_size": self.group_size,
            "zero_point": self.zero_point,
            "version": "gemm",
            "modules_to_not_convert": not_converted or None,
        }

    @classmethod
    def from_quantization_config(
        cls, values: Mapping[str, Any], where: str, layouts: tuple[str, ...] = ("gemm",)
    ) -> QuantConfig:
        """From `quantization_config` or a legacy quant_config.json. Other writers add keys; they are left aside.

        Raises CheckpointError naming `where` for another method or size than AWQ of 4 bits, and for a layout that is
        not one of `layouts`.
        """
        method = values.get("quant_method", "awq")
        if method != "awq":
            raise CheckpointError(
                f"{where}: quant_method is {method!r}; squawq reads 'awq' and unquantized checkpoints"
            )
        names = ("bits", "w_bit", "group_size", "q_group_size", "zero_point", "modules_to_not_convert")
        try:
            _check_layout(stated_layout(values), layouts)
            return cls.from_dict({k: values[k] for k in names if k in values})
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{where}: {error}") from error


def stated_layout(values: Mapping[str, Any]) -> object:
    """The layout that a `quantization_config` names, in whichever of its writers' spellings, in lower case."""
    if values.get("backend") == "llm-awq":  # transformers' older way to say so
        return "llm-awq"
    keys = ("version", "format", "checkpoint_format")  # AutoAWQ and transformers; GPTQModel; its older releases
    stated = next((values[key] for key in keys if values.get(key) is not None), "gemm")
    return stated.lower() if isinstance(stated, str) else stated


def _check_layout(stated: object, layouts: tuple[str, ...]) -> None:
    name = stated.lower() if isinstance(stated, str) else ""
    if name not in map(str.lower, layouts):
        elsewhere = " (squawq.LLM and `squawq serve` read the others)" if name in LAYOUTS else ""
        raise ConfigError(f"version is {stated!r}; choose one of {', '.join(map(repr, layouts))}{elsewhere}")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base `theta`; type "llama3" scales frequencies as Llama 3.1 does, "linear" by a factor."""

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """What config.json says of a decoder; `raw` is the whole of it, `quant` None for a 16-bit checkpoint."""

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
    quant: QuantConfig | None
    raw: Mapping[str, Any]

    @property
    def heads(self) -> tuple[int, int, int]:
        """(query heads, key-value heads, head_dim)."""
        return self.num_heads, self.num_kv_heads, self.head_dim

    @property
    def layout(self) -> str:
        """How the quantized linears lie on disk: one of LAYOUTS."""
        return str(stated_layout(self.raw.get("quantization_config") or {}))

    def window(self, layer: int) -> int | None:
        """Tokens that this layer's attention looks back over; None for all."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Read config.json in transformers 4's or 5's spelling. Raises CheckpointError naming `where` and the key."""

        def size(key: str, default: int | None = None) -> int:
            value = raw.get(key, default)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
                raise CheckpointError(f"{where}: {key} is {value!r}; it must be a positive whole number")
            return value

        model_type = raw.get("model_type")
        if not isinstance(model_type, str):
            raise CheckpointError(f"{where}: model_type is {model_type!r}; it must name the architecture")
        layers, heads = size("num_hidden_layers"), size("num_attention_heads")
        if layers > MAX_LAYERS:
            raise CheckpointError(f"{where}: num_hidden_layers is {layers}; more than {MAX_LAYERS} is no model")
        activation = raw.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise CheckpointError(f"{where}: hidden_act is {activation!r}; squawq runs silu")
        kv_heads, head_dim = size("num_key_value_heads", heads), size("head_dim", size("hidden_size") // heads)
        if heads % kv_heads:
            raise CheckpointError(f"{where}: {heads} attention heads cannot share {kv_heads} key-value heads")
        if head_dim % 2:
            raise CheckpointError(f"{where}: head_dim is {head_dim}; rotary embedding needs an even one")
        quant = raw.get("quantization_config")
        if quant is not None and not isinstance(quant, Mapping):
            raise CheckpointError(f"{where}: quantization_config must be an object")
        window = _sliding_window(raw)
        if window is not None and window < 1:
            raise CheckpointError(f"{where}: sliding_window is {window}; it must be at least 1")
        return cls(
            model_type=model_type,
            hidden_size=size("hidden_size"),
            intermediate_size=size("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=size("vocab_size"),
            max_positions=size("max_position_embeddings", 2048),
            norm_eps=_number(raw, "rms_norm_eps", 1e-6, where),
            rope=_rope(raw, where),
            tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
            sliding_window=window,
            layer_types=_layer_types(raw, layers, window, where),
            quant=None if quant is None else QuantConfig.from_quantization_config(quant, where, LAYOUTS),
            raw=raw,
        )


def _number(values: Mapping[str, Any], key: str, default: float, where: str) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"{where}: {key} is {value!r}; it must be a positive number")
    return float(value)


def _rope(raw: Mapping[str, Any], where: str) -> RopeConfig:
    """transformers 5 keeps all in `rope_parameters`; 4 has `rope_theta` and `rope_scaling` (type or rope_type)."""
    parts = [raw.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(part, Mapping) for part in parts):
        raise CheckpointError(f"{where}: rope_scaling and rope_parameters must be objects")
    values = {**parts[0], **parts[1]}
    values.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in ("default", "llama3", "linear"):
        raise CheckpointError(f"{where}: rope type is {kind!r}; squawq knows default, linear and llama3")
    if raw.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) not in (1, 1.0, None):
        raise CheckpointError(f"{where}: partial_rotary_factor other than 1 is not supported")
    return RopeConfig(
        theta=_number(values, "rope_theta", 10000.0, where),
        type=kind,
        factor=_number(values, "factor", 1.0, where),
        low_freq_factor=_number(values, "low_freq_factor", 1.0, where),
        high_freq_factor=_number(values, "high_freq_factor", 4.0, where),
        original_max_position_embeddings=int(_number(values, "original_max_position_embeddings", 8192, where)),
    )


def _sliding_window(raw: Mapping[str, Any]) -> int | None:
    """Mistral uses its window wherever it is set; Qwen only where `use_sliding_window` says so."""
    window = raw.get("sliding_window")
    if not isinstance(window, int) or raw.get("use_sliding_window") is False:
        return None
    if raw.get("model_type") in ("qwen2", "qwen3") and not raw.get("use_sliding_window", False):
        return None
    return window


def _layer_types(raw: Mapping[str, Any], layers: int, window: int | None, where: str) -> tuple[str, ...]:
    types = raw.get("layer_types")
    if types is None:
        if window is None or raw.get("model_type") == "llama":
            return ("full_attention",) * layers
        first = int(raw.get("max_window_layers", 28)) if "use_sliding_window" in raw else 0
        return tuple("full_attention" if i < first else "sliding_attention" for i in range(layers))
    if not isinstance(types, list) or len(types) != layers or set(types) - {"full_attention", "sliding_attention"}:
        raise CheckpointError(f"{where}: layer_types must list full_attention or sliding_attention for {layers} layers")
    return tuple(types)
