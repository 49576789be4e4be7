"""From a checkpoint to our decoder.

With the native kernels AWQ tensors are read one linear at a time and packed into the kernels' layout. Peak memory of
`load`: the packed weights, the embedding, and one linear as it is stored. Nothing stays mapped from the files, which
may change while the model runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from squawq.backends.cpu import library
from squawq.backends.cpu.packed import DENSE_TYPES, PackedDense, PackedInt4, PackedInt8, kernel_group
from squawq.config import ROPE_TYPES, ModelConfig
from squawq.errors import ConfigError
from squawq.families import FAMILIES, Family, family_of
from squawq.format.groupwise import GroupwiseTensor
from squawq.format.reader import Checkpoint
from squawq.nn.decoder import DOWN, GATE_UP, OUT, QKV, Decoder, Layer
from squawq.nn.linear import Linear

HEADS = ("int8", "int4", "16-bit")
HEAD_GROUP = 32  # of an int4 head: finer than the layers', since nothing was searched for it


@dataclass(frozen=True)
class Options:
    """How weights are held. device: where. exact: activations stay float32 in products with 4-bit weights.

    head: "int8" rounds the head's rows to 8 bits, "int4" to 4 bits in groups of 32, "16-bit" leaves it as it is stored.
    None: int8 where the native kernels take it, else (and with `exact`) as stored. packed: use the native kernels where
    they fit; False gives plain tensors, dense ones in float32.
    Raises ConfigError for another head.
    """

    device: str = "cpu"
    exact: bool = False
    head: str | None = None
    packed: bool = True

    def __post_init__(self) -> None:
        if self.head is not None and self.head not in HEADS:
            raise ConfigError(f"head is {self.head!r}; choose one of {', '.join(HEADS)}")

    @property
    def native(self) -> bool:
        return self.packed and self.device == "cpu" and library.load() is not None


def check_decoder(config: ModelConfig) -> None:
    """Raises ConfigError for a model that our decoder does not run, saying what runs it."""
    unlike = []
    if config.activation not in ("silu", "swish"):
        unlike.append(f"hidden_act is {config.activation!r}, and it has silu")
    if config.rope.type not in ROPE_TYPES:
        unlike.append(f"rope type is {config.rope.type!r}, and it has {', '.join(ROPE_TYPES)}")
    if config.rope.partial != 1:
        unlike.append(f"partial_rotary_factor is {config.rope.partial}, and it rotates whole heads")
    if others := set(config.layer_types) - {"full_attention", "sliding_attention"}:
        unlike.append(f"a layer's attention is {sorted(others)[0]!r}")
    if not family_of(config.model_type).decoder:
        unlike = [f"model_type is {config.model_type!r}"]
    if unlike:
        raise ConfigError(
            f"our decoder does not run this model yet ({unlike[0]}); load it with transformers: import "
            "squawq.transformers, then AutoModelForCausalLM.from_pretrained"
        )


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every linear in a layer. Raises ConfigError for families unlike Llama."""
    if not family_of(config.model_type).decoder:
        known = ", ".join(sorted(name for name, family in FAMILIES.items() if family.decoder))
        raise ConfigError(f"model_type is {config.model_type!r}; our decoder and export take {known} so far")
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


FUSED = {
    QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    OUT: ("self_attn.o_proj",),
    GATE_UP: ("mlp.gate_proj", "mlp.up_proj"),
    DOWN: ("mlp.down_proj",),
}


def _float(tensor: Tensor, device: str) -> Tensor:
    return tensor.to(device=device, dtype=torch.float32)


def load_linear(checkpoint: Checkpoint, parts: Mapping[str, int], in_features: int, options: Options) -> Linear:
    """Linears that read the same input as one, stacked: full name -> out_features, each 4-bit or dense."""
    quantized = [checkpoint.is_quantized(name) for name in parts]
    bias = _bias(checkpoint, parts, options.device)
    if all(quantized):
        return _load_int4(checkpoint, parts, in_features, bias, options)
    if not any(quantized):
        weights = [checkpoint.read(f"{name}.weight", (out, in_features)) for name, out in parts.items()]
    else:  # a checkpoint that quantized only some of them
        weights = [_dense(checkpoint, name, out, in_features) for name, out in parts.items()]
    if options.native:
        same = len({w.dtype for w in weights}) == 1 and weights[0].dtype in DENSE_TYPES
        return Linear(PackedDense(weights if same else [w.float() for w in weights], bias=bias))
    return Linear(torch.cat([_float(w, options.device) for w in weights]), bias)


def _load_int4(
    checkpoint: Checkpoint, parts: Mapping[str, int], in_features: int, bias: Tensor | None, options: Options
) -> Linear:
    group = checkpoint.group_of(in_features)
    if options.native and kernel_group(group) is not None:
        packed = PackedInt4(sum(parts.values()), in_features, group, bias=bias, exact=options.exact)
        row = 0
        for name, out in parts.items():
            packed.fill(row, *checkpoint.read_gemm(name, in_features, out))
            row += out
        return Linear(packed)
    tensors = [checkpoint.read_quantized(name, in_features, out) for name, out in parts.items()]
    fields = [torch.cat([getattr(t, f) for t in tensors]).to(options.device) for f in ("q", "scales", "zeros")]
    return Linear(GroupwiseTensor(*fields), bias)


def _dense(checkpoint: Checkpoint, name: str, out: int, in_features: int) -> Tensor:
    if checkpoint.is_quantized(name):
        return checkpoint.read_quantized(name, in_features, out).dequantize()
    return checkpoint.read(f"{name}.weight", (out, in_features)).float()


def _bias(checkpoint: Checkpoint, parts: Mapping[str, int], device: str) -> Tensor | None:
    if not any(f"{name}.bias" in checkpoint.tensors for name in parts):
        return None
    biases = [
        checkpoint.read(f"{name}.bias", (out,)).float() if f"{name}.bias" in checkpoint.tensors else torch.zeros(out)
        for name, out in parts.items()
    ]
    return torch.cat(biases).to(device)


def load_layer(checkpoint: Checkpoint, index: int, options: Options) -> Layer:
    """One decoder layer."""
    config = checkpoint.config
    family = family_of(config.model_type)
    prefix, shapes = family.layer(index), linear_shapes(config)
    linears = {
        fused: load_linear(checkpoint, {f"{prefix}.{n}": shapes[n][0] for n in names}, shapes[names[0]][1], options)
        for fused, names in FUSED.items()
    }
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (config.hidden_size,))
    if family.qk_norm:
        norms |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), (config.head_dim,))
    loaded = {n: _float(checkpoint.read(f"{prefix}.{n}.weight", shape), options.device) for n, shape in norms.items()}
    return Layer(config, index, linears, loaded)


def load_embedding(checkpoint: Checkpoint, family: Family) -> Tensor:
    """The embedding in the checkpoint's own dtype."""
    config = checkpoint.config
    return checkpoint.read(f"{family.embedding}.weight", (config.vocab_size, config.hidden_size))


def head_kind(checkpoint: Checkpoint, family: Family, options: Options) -> str:
    """How the head is held, one of HEADS; reads no tensor. Raises ConfigError for one asked for that cannot be."""
    config = checkpoint.config
    wanted = options.head or ("16-bit" if options.exact else "int8")
    name = _head_name(checkpoint, family)
    if wanted != "16-bit" and options.native and not checkpoint.is_quantized(name):
        if wanted == "int4" and config.hidden_size % HEAD_GROUP == 0 and config.vocab_size % 8 == 0:
            return wanted
        dtype = checkpoint.info(f"{name}.weight").dtype
        if wanted == "int8" and kernel_group(config.hidden_size) is not None and dtype in DENSE_TYPES:
            return wanted
    if options.head in ("int8", "int4"):
        raise ConfigError(
            f"head is {options.head!r}, which the head of {checkpoint.folder} cannot be here: it takes the native CPU "
            "kernels, a head that is not quantized, hidden_size a multiple of 16 (int4: 32, and a vocabulary a "
            "multiple of 8); leave it out or choose 16-bit"
        )
    return "16-bit"


def load_head(
    checkpoint: Checkpoint, family: Family, options: Options, embedding: Tensor, kind: str
) -> tuple[Tensor, Linear]:
    """The final norm [hidden] and the head of a kind of HEADS, which is the embedding where the two are tied."""
    config, name = checkpoint.config, _head_name(checkpoint, family)
    norm = _float(checkpoint.read(f"{family.norm}.weight", (config.hidden_size,)), options.device)
    if kind == "16-bit":
        return norm, load_linear(checkpoint, {name: config.vocab_size}, config.hidden_size, options)
    tied = name == family.embedding
    weight = embedding if tied else checkpoint.read(f"{name}.weight", (config.vocab_size, config.hidden_size))
    return norm, Linear(PackedInt4.rounded(weight, HEAD_GROUP) if kind == "int4" else PackedInt8(weight))


def _head_name(checkpoint: Checkpoint, family: Family) -> str:
    return family.embedding if checkpoint.config.tied_embeddings else family.head


def load(folder: str | Path, options: Options | None = None) -> Decoder:
    """The whole model. Raises CheckpointError or ConfigError for a folder that cannot be run."""
    options = options or Options()
    checkpoint = Checkpoint(folder)
    check_decoder(checkpoint.config)
    family = family_of(checkpoint.config.model_type)
    kind = head_kind(checkpoint, family, options)  # first: what was asked for it may be refused
    embedding = load_embedding(checkpoint, family)
    norm, head = load_head(checkpoint, family, options, embedding, kind)
    layers = [load_layer(checkpoint, index, options) for index in range(checkpoint.config.num_layers)]
    return Decoder(checkpoint.config, embedding.to(options.device), layers, norm, head)
