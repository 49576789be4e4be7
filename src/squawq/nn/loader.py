"""Loads a checkpoint into our decoder: reads one linear at a time and has the backend pack it.

Peak memory of `load`: the packed weights, the embedding, and one linear as stored. Nothing stays mapped from the files,
which may change while the model runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from squawq.backends import backend_for
from squawq.backends.base import Backend
from squawq.backends.layer_ops import Operation, Packed
from squawq.config import ROPE_TYPES, ModelConfig
from squawq.errors import ConfigError
from squawq.families import FAMILIES, Family, family_of
from squawq.format.reader import Checkpoint
from squawq.nn.decoder import Decoder
from squawq.nn.layers import DOWN, GATE_UP, OUT, QKV, layer_operations, norm_sizes

HEADS = ("int8", "int4", "16-bit")
HEAD_GROUP = 32  # of an int4 head: finer than the layers', since nothing was searched for it


@dataclass(frozen=True)
class Options:
    """How to load a model; the same as in `EngineConfig`, and the backend.

    Attributes:
        head: Output head: "int8" rounds to 8 bits per row, "int4" to 4 bits in groups of 32, "16-bit" keeps the stored
            dtype; None: the backend's default.
        backend: A name in `squawq.backends.BACKENDS`; None: the first that runs on the device.
    """

    device: str = "cpu"
    exact: bool = False
    head: str | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.head is not None and self.head not in HEADS:
            raise ConfigError(f"head is {self.head!r}; choose one of {', '.join(HEADS)}")


def check_decoder(config: ModelConfig) -> None:
    """Raise ConfigError, saying what runs it, for a model that our decoder does not run."""
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


def load_linear(checkpoint: Checkpoint, parts: Mapping[str, int], in_features: int, backend: Backend) -> Packed:
    """Linears with the same input, by full name -> out_features, stacked to one weight."""
    quantized = [checkpoint.is_quantized(name) for name in parts]
    bias = _bias(checkpoint, parts, backend.device)
    if all(quantized):
        gemms = (checkpoint.read_gemm(name, in_features, out) for name, out in parts.items())
        group = checkpoint.group_of(in_features)
        return backend.pack_int4(sum(parts.values()), in_features, group, gemms, bias)
    if not any(quantized):
        weights = [checkpoint.read(f"{name}.weight", (out, in_features)) for name, out in parts.items()]
    else:  # a checkpoint with some of them quantized
        weights = [_dense(checkpoint, name, out, in_features) for name, out in parts.items()]
    return backend.pack_dense(weights, bias)


def _dense(checkpoint: Checkpoint, name: str, out: int, in_features: int) -> Tensor:
    if checkpoint.is_quantized(name):
        return checkpoint.read_quantized(name, in_features, out).dequantize()
    return checkpoint.read(f"{name}.weight", (out, in_features)).float()


def _bias(checkpoint: Checkpoint, parts: Mapping[str, int], device: torch.device) -> Tensor | None:
    if not any(f"{name}.bias" in checkpoint.tensors for name in parts):
        return None
    names = {f"{name}.bias": out for name, out in parts.items()}
    known = checkpoint.tensors
    biases = [checkpoint.read(n, (out,)).float() if n in known else torch.zeros(out) for n, out in names.items()]
    return torch.cat(biases).to(device)


def _norm(checkpoint: Checkpoint, name: str, size: int, device: torch.device) -> Tensor:
    return checkpoint.read(f"{name}.weight", (size,)).to(device, torch.float32)


def load_layer(checkpoint: Checkpoint, index: int, backend: Backend) -> list[Operation]:
    """One decoder layer."""
    config = checkpoint.config
    family = family_of(config.model_type)
    prefix, shapes = family.layer(index), linear_shapes(config)
    linears = {
        fused: load_linear(checkpoint, {f"{prefix}.{n}": shapes[n][0] for n in names}, shapes[names[0]][1], backend)
        for fused, names in FUSED.items()
    }
    sizes = norm_sizes(config, family)
    norms = {name: _norm(checkpoint, f"{prefix}.{name}", size, backend.device) for name, size in sizes.items()}
    return layer_operations(config, family, index, linears, norms)


def load_embedding(checkpoint: Checkpoint, family: Family) -> Tensor:
    """The embedding in the checkpoint's own dtype."""
    config = checkpoint.config
    return checkpoint.read(f"{family.embedding}.weight", (config.vocab_size, config.hidden_size))


def head_kind(checkpoint: Checkpoint, family: Family, options: Options, backend: Backend) -> str:
    """Format of the output head, one of HEADS. Raises ConfigError if the one asked for is not possible."""
    name = _head_name(checkpoint, family)
    kind = options.head or backend.head
    if kind == "16-bit":
        return kind
    out, in_ = checkpoint.config.vocab_size, checkpoint.config.hidden_size
    if checkpoint.is_quantized(name):
        reason: str | None = "it is quantized"
    elif kind == "int4":
        reason = backend.int4_declines(out, in_, HEAD_GROUP)
    else:
        reason = backend.int8_declines(out, in_, checkpoint.info(f"{name}.weight").dtype)
    if reason is None:
        return kind
    if options.head is None:
        return "16-bit"
    raise ConfigError(
        f"head is {kind!r}, which the head of {checkpoint.folder} cannot be here: {reason}; leave it out or choose "
        "16-bit"
    )


def load_head(
    checkpoint: Checkpoint, family: Family, backend: Backend, embedding: Tensor, kind: str
) -> tuple[Tensor, Packed]:
    """The final norm [hidden] and the output head [vocab, hidden] (the embedding, if tied) in a format of HEADS."""
    config, name = checkpoint.config, _head_name(checkpoint, family)
    norm = _norm(checkpoint, family.norm, config.hidden_size, backend.device)
    if kind == "16-bit":
        return norm, load_linear(checkpoint, {name: config.vocab_size}, config.hidden_size, backend)
    tied = name == family.embedding
    weight = embedding if tied else checkpoint.read(f"{name}.weight", (config.vocab_size, config.hidden_size))
    return norm, backend.round_int4(weight, HEAD_GROUP) if kind == "int4" else backend.pack_int8(weight)


def _head_name(checkpoint: Checkpoint, family: Family) -> str:
    return family.embedding if checkpoint.config.tied_embeddings else family.head


def load(folder: str | Path, options: Options | None = None) -> Decoder:
    """Load a model. Raises CheckpointError or ConfigError for a folder that cannot be run."""
    options = options or Options()
    checkpoint = Checkpoint(folder)
    check_decoder(checkpoint.config)
    config, family = checkpoint.config, family_of(checkpoint.config.model_type)
    backend = backend_for(options.device, options.backend, exact=options.exact)
    kind = head_kind(checkpoint, family, options, backend)  # first, because it may raise
    embedding = load_embedding(checkpoint, family)
    norm, head = load_head(checkpoint, family, backend, embedding, kind)
    layers = [load_layer(checkpoint, index, backend) for index in range(config.num_layers)]
    return Decoder(config, backend, embedding.to(backend.device), tuple(chain(*layers)), norm, head)
