"""Loads a checkpoint into our decoder: reads one linear at a time and has the backend pack it.

Peak memory of `load`: the packed weights, the embedding, and one linear as stored; for a GPU, all of it in the GPU's
memory (DeviceReader). Nothing stays mapped from the files, which may change while the model runs.
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
from squawq.format.shards import DeviceReader, read_tensor
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
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"

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
    biases = []
    for name, out in parts.items():
        known = f"{name}.bias" in checkpoint.tensors
        bias = checkpoint.read(f"{name}.bias", (out,)) if known else torch.zeros(out)
        biases.append(bias.to(device, torch.float32))
    return torch.cat(biases)


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
    kind = options.head or backend.head
    if kind == "16-bit":
        return kind
    reason = head_declines(checkpoint, family, backend, kind)
    if reason is None:
        return kind
    if options.head is None:
        return "16-bit"
    raise ConfigError(
        f"head is {kind!r}, which the head of {checkpoint.folder} cannot be here: {reason}; leave it out or choose "
        "16-bit"
    )


def head_declines(checkpoint: Checkpoint, family: Family, backend: Backend, kind: str) -> str | None:
    """Why the output head cannot be rounded to "int8" or "int4"."""
    name, (out, in_) = _head_name(checkpoint, family), (checkpoint.config.vocab_size, checkpoint.config.hidden_size)
    if checkpoint.is_quantized(name):
        return "it is quantized"
    if kind == "int4":
        return backend.int4_declines(out, in_, HEAD_GROUP)
    return backend.int8_declines(out, in_, checkpoint.info(f"{name}.weight").dtype)


def load_head(
    checkpoint: Checkpoint, family: Family, backend: Backend, embedding: Tensor, kind: str
) -> tuple[Tensor, Packed]:
    """The final norm [hidden] and the output head [vocab, hidden] (the embedding, if tied) in a format of HEADS."""
    config, name = checkpoint.config, _head_name(checkpoint, family)
    norm = _norm(checkpoint, family.norm, config.hidden_size, backend.device)
    tied = name == family.embedding
    if kind == "16-bit" and tied:
        return norm, backend.pack_dense([embedding])
    if kind == "16-bit":
        return norm, load_linear(checkpoint, {name: config.vocab_size}, config.hidden_size, backend)
    weight = embedding if tied else checkpoint.read(f"{name}.weight", (config.vocab_size, config.hidden_size))
    return norm, backend.round_int4(weight, HEAD_GROUP) if kind == "int4" else backend.pack_int8(weight)


def _head_name(checkpoint: Checkpoint, family: Family) -> str:
    return family.embedding if checkpoint.config.tied_embeddings else family.head


def int4_bytes(out: int, in_: int, group: int) -> int:
    """Bytes of a packed INT4 weight [out, in_]: 4 bits for each input, in blocks of 128, and 32 bits a group."""
    return out * (64 * -(-in_ // 128) + 4 * (in_ // group))


@dataclass(frozen=True)
class OpenModel:
    """A checkpoint that can be run, not yet loaded. head: format of the output head, one of HEADS."""

    checkpoint: Checkpoint
    backend: Backend
    head: str

    @property
    def family(self) -> Family:
        return family_of(self.checkpoint.config.model_type)

    def head_declines(self, kind: str) -> str | None:
        """Why the output head cannot be rounded to "int8" or "int4"."""
        return head_declines(self.checkpoint, self.family, self.backend, kind)

    def weight_bytes(self, head: str | None = None) -> int:
        """Bytes of the weights on a GPU, from the headers, without norms and biases. head: instead of `self.head`."""
        config, family = self.checkpoint.config, self.family
        total = self.checkpoint.info(f"{family.embedding}.weight").nbytes + self._head_bytes(head or self.head)
        for index in range(config.num_layers):
            for name, (out, in_) in linear_shapes(config).items():
                total += self._linear_bytes(f"{family.layer(index)}.{name}", out, in_)
        return total

    def _linear_bytes(self, name: str, out: int, in_: int) -> int:
        if self.checkpoint.is_quantized(name):
            return int4_bytes(out, in_, self.checkpoint.group_of(in_))
        return out * in_ * self.backend.activation_dtype.itemsize

    def _head_bytes(self, kind: str) -> int:
        name, config = _head_name(self.checkpoint, self.family), self.checkpoint.config
        out, in_ = config.vocab_size, config.hidden_size
        if kind == "int4":
            return int4_bytes(out, in_, HEAD_GROUP)
        if kind == "int8":
            return out * in_ + 4 * out
        if config.tied_embeddings and self.checkpoint.info(f"{name}.weight").dtype == self.backend.activation_dtype:
            return 0
        return self._linear_bytes(name, out, in_)

    def load(self) -> Decoder:
        """Raises CheckpointError for a folder that cannot be run."""
        checkpoint, backend, family = self.checkpoint, self.backend, self.family
        embedding = load_embedding(checkpoint, family).to(backend.device)
        norm, head = load_head(checkpoint, family, backend, embedding, self.head)
        layers = [load_layer(checkpoint, index, backend) for index in range(checkpoint.config.num_layers)]
        return Decoder(checkpoint.config, backend, embedding, tuple(chain(*layers)), norm, head)


def open_model(folder: str | Path, options: Options | None = None) -> OpenModel:
    """Check that a model can be run. Raises CheckpointError or ConfigError for one that cannot."""
    options = options or Options()
    device = torch.device(options.device)
    checkpoint = Checkpoint(folder, read_data=DeviceReader(device) if device.type == "cuda" else read_tensor)
    check_decoder(checkpoint.config)
    dtypes = {"dtype": options.dtype, "kv_cache_dtype": options.kv_cache_dtype}
    backend = backend_for(device, options.backend, exact=options.exact, **dtypes)
    family = family_of(checkpoint.config.model_type)
    return OpenModel(checkpoint, backend, head_kind(checkpoint, family, options, backend))


def load(folder: str | Path, options: Options | None = None) -> Decoder:
    """Load a model. Raises CheckpointError or ConfigError for a folder that cannot be run."""
    return open_model(folder, options).load()
