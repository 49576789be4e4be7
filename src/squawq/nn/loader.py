"""Loads a checkpoint into our decoder: reads one linear at a time and has the backend pack it.

Peak memory of `load`: the packed weights, the embedding, and one linear as stored; for a GPU, all of it in the GPU's
memory (DeviceReader). Nothing stays mapped from the files, which may change while the model runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from squawq.backends import backend_for
from squawq.backends.base import Backend, Vocabulary
from squawq.backends.layer_ops import Operation, Packed
from squawq.config import ModelConfig
from squawq.decoder_support import check_decoder, traits_of
from squawq.errors import ConfigError
from squawq.families import Family, family_of
from squawq.format.reader import WHOLE, Checkpoint
from squawq.format.shards import DeviceReader, read_tensor
from squawq.memory import give_memory_back
from squawq.nn.decoder import Decoder
from squawq.nn.delta_rule import delta_linears, delta_shapes, load_delta_rule, without_gates
from squawq.nn.layers import DOWN, GATE, GATE_UP, OUT, QKV, is_linear, layer_operations, norm_sizes
from squawq.nn.linears import Linear, load_linear
from squawq.nn.moe import block_of, load_experts, moe_shapes
from squawq.nn.shard import ALONE, Shard

BODIES = ("model.language_model", "language_model.model")  # where multimodal models have the text model
HEADS = ("int8", "int4", "16-bit")
HEAD_GROUP = 32  # of an int4 head: finer than the layers', since nothing was searched for it


@dataclass(frozen=True)
class Options:
    """How to load a model; the same as in `EngineConfig`, and the backend.

    Attributes:
        head: Output head: "int8" rounds to 8 bits per row, "int4" to 4 bits in groups of 32, "16-bit" keeps the stored
            dtype; None: the backend's default.
        backend: A name in `squawq.backends.BACKENDS`; None: the first that runs on the device.
        shard: The part of the model that this process has.
    """

    device: str = "cpu"
    exact: bool = False
    head: str | None = None
    backend: str | None = None
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    shard: Shard = ALONE

    def __post_init__(self) -> None:
        if self.head is not None and self.head not in HEADS:
            raise ConfigError(f"head is {self.head!r}; choose one of {', '.join(HEADS)}")


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every linear in a layer with attention and one MLP.

    Raises ConfigError for families unlike Llama.
    """
    family = family_of(config.model_type)
    traits_of(family)
    return {name: shape for name, shape in _every_shape(config).items() if name in family.linears}


def _every_shape(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """With separate linears, and with those that some families have in their place."""
    traits = traits_of(family_of(config.model_type))
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        QKV: (query + 2 * key, hidden),
        "self_attn.q_proj": (2 * query if traits.gated else query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        GATE_UP: (2 * inner, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def layer_shapes(config: ModelConfig, index: int) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every linear in this layer, router and experts included."""
    family, shapes = family_of(config.model_type), linear_shapes(config)
    mlp = {name: shape for name, shape in shapes.items() if name.startswith("mlp.")}
    mixer = {name: shape for name, shape in shapes.items() if name not in mlp}
    if is_linear(config, index):
        mixer = delta_shapes(config, traits_of(family).by_key_heads)
    if config.moe is not None and config.moe.layers[index]:
        mlp = moe_shapes(config.moe, config.hidden_size, family.experts)
    return mixer | mlp


FUSED = {
    QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    OUT: ("self_attn.o_proj",),
    GATE_UP: ("mlp.gate_proj", "mlp.up_proj"),
    DOWN: ("mlp.down_proj",),
}
MLP = (GATE_UP, DOWN)


def stored_family(checkpoint: Checkpoint) -> Family:
    """The row of the checkpoint's text model, with the names that this checkpoint gives its modules.

    Multimodal models have the text model within another module, under one of the two names of `BODIES`.
    """
    family, tensors = family_of(checkpoint.config.model_type), checkpoint.tensors

    def stored(name: str) -> bool:
        return f"{name}.weight" in tensors or checkpoint.is_quantized(name)

    if stored(family.embedding) or family.embedding != "model.embed_tokens":
        return family
    body = next((body for body in BODIES if stored(f"{body}.embed_tokens")), "model")
    heads = (f"{prefix}{family.head}" for prefix in ("", "language_model.", "model.language_model."))
    names = {name: body + getattr(family, name).removeprefix("model") for name in ("layers", "embedding", "norm")}
    return replace(family, **names, head=next(filter(stored, heads), family.head))


def _norm(checkpoint: Checkpoint, name: str, size: int, family: Family, device: torch.device) -> Tensor:
    return checkpoint.read(f"{name}.weight", (size,)).to(device, torch.float32) + family.norm_offset


def load_layer(checkpoint: Checkpoint, index: int, backend: Backend, shard: Shard = ALONE) -> list[Operation]:
    """One decoder layer, or a rank's part of it."""
    config = checkpoint.config
    family = stored_family(checkpoint)
    prefix, shapes, device = family.layer(index), _every_shape(config), backend.device

    def parts(packed: str) -> list[Linear]:
        """Linears that make up one of FUSED: several, or as many parts of one."""
        found, first = [], 0
        for name in FUSED[packed]:
            outputs, inputs = shard.part(name, config) if shard.size > 1 else WHOLE
            if packed not in family.linears:
                found.append(Linear(f"{prefix}.{name}", *shapes[name], (outputs, inputs)))
                continue
            start, stop, _ = outputs.indices(shapes[name][0])
            found.append(Linear(f"{prefix}.{packed}", *shapes[packed], (slice(first + start, first + stop), inputs)))
            first += shapes[name][0]
        return found

    traits, linear = traits_of(family), is_linear(config, index)
    sparse = config.moe is not None and config.moe.layers[index]
    if linear:
        named = delta_linears(config, prefix, traits.by_key_heads)
    else:
        named = {name: parts(name) for name in (QKV, OUT)}
        if traits.gated:
            named[QKV], named[GATE] = without_gates(config, named[QKV])
    named |= {name: parts(name) for name in MLP if not sparse}
    linears = {name: load_linear(checkpoint, found, backend, ordered=True) for name, found in named.items()}
    mlp = load_experts(checkpoint, prefix, backend, shard) if sparse else None
    rule = load_delta_rule(checkpoint, prefix, index, device) if linear else None
    norms = {
        name: _norm(checkpoint, f"{prefix}.{name}", size, family, device)
        for name, size in norm_sizes(config, family, index).items()
    }
    return layer_operations(config, family, index, linears, norms, mlp, shard.size > 1, rule)


def load_embedding(checkpoint: Checkpoint, family: Family, shard: Shard = ALONE) -> Tensor:
    """The embedding in the checkpoint's own dtype, or a rank's tokens of it."""
    config, tokens = checkpoint.config, shard.vocabulary(checkpoint.config)
    return checkpoint.read_part(f"{family.embedding}.weight", (config.vocab_size, config.hidden_size), tokens)


def head_kind(checkpoint: Checkpoint, family: Family, options: Options, backend: Backend) -> str:
    """Format of the output head, one of HEADS. Raises ConfigError if the one asked for is not possible."""

    def declines(kind: str) -> str | None:
        return head_declines(checkpoint, family, backend, kind)

    return choose_head(options.head, backend.head, declines, str(checkpoint.folder))


def choose_head(asked: str | None, default: str, declines: Callable[[str], str | None], model: str) -> str:
    """The format asked for; if none is, the default where it is possible, else "16-bit".

    Args:
        asked: One of HEADS or None.
        default: The backend's.
        declines: Why the head cannot be rounded to "int8" or "int4".
        model: For the message.

    Raises:
        ConfigError: The one asked for is not possible.
    """
    kind = asked or default
    reason = None if kind == "16-bit" else declines(kind)
    if reason is None:
        return kind
    if asked is None:
        return "16-bit"
    raise ConfigError(
        f"head is {kind!r}, which the head of {model} cannot be here: {reason}; leave it out or choose 16-bit"
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
    checkpoint: Checkpoint, family: Family, backend: Backend, embedding: Tensor, kind: str, shard: Shard = ALONE
) -> tuple[Tensor, Packed]:
    """The final norm [hidden] and the output head [vocab, hidden] (the embedding, if tied) in a format of HEADS.

    Of the head only a rank's tokens, like those of `embedding`.
    """
    config, name = checkpoint.config, _head_name(checkpoint, family)
    shape, tokens = (config.vocab_size, config.hidden_size), shard.vocabulary(config)
    norm = _norm(checkpoint, family.norm, config.hidden_size, family, backend.device) * config.scales.logits
    tied = name == family.embedding
    if kind == "16-bit" and tied:
        return norm, backend.pack_dense([embedding])
    if kind == "16-bit":
        return norm, load_linear(checkpoint, [Linear(name, *shape, (tokens, slice(None)))], backend)
    weight = embedding if tied else checkpoint.read_part(f"{name}.weight", shape, tokens)
    return norm, backend.round_int4(weight, HEAD_GROUP) if kind == "int4" else backend.pack_int8(weight)


def _head_name(checkpoint: Checkpoint, family: Family) -> str:
    return family.embedding if checkpoint.config.tied_embeddings else family.head


def int4_bytes(out: int, in_: int, group: int) -> int:
    """Bytes of a packed INT4 weight [out, in_]: 4 bits for each input, in blocks of 128, and 32 bits a group."""
    return out * (64 * -(-in_ // 128) + 4 * (in_ // group))


def rank_bytes(
    whole: ModelConfig,
    shard: Shard,
    head: str,
    group_of: Callable[[str, int], int | None],
    embedding: int,
    same_dtype: bool,
    itemsize: int = 2,
) -> int:
    """Bytes of a rank's weights on a GPU, without norms and biases.

    Args:
        whole: The whole model's config.
        head: Format of the output head, one of HEADS.
        group_of: The quantization group of a linear, by its full name and number of inputs; None: it is not quantized.
        embedding: Bytes of the whole embedding as stored.
        same_dtype: It is stored in the activations' dtype, so a tied head needs no copy of it.
        itemsize: Bytes of an activation.
    """
    config, family, tokens = shard.config(whole), family_of(whole.model_type), shard.vocabulary(whole)
    count = tokens.stop - tokens.start

    def linear(name: str, out: int, in_: int) -> int:
        group = group_of(name, in_)
        return out * in_ * itemsize if group is None else int4_bytes(out, in_, group)

    total: int = embedding * count // whole.vocab_size
    if head == "int4":
        total += int4_bytes(count, whole.hidden_size, HEAD_GROUP)
    elif head == "int8":
        total += count * whole.hidden_size + 4 * count
    elif not (whole.tied_embeddings and same_dtype):
        total += linear(family.embedding if whole.tied_embeddings else family.head, count, whole.hidden_size)
    for index in range(config.num_layers):
        shapes = layer_shapes(config, index)
        total += sum(linear(f"{family.layer(index)}.{name}", *shape) for name, shape in shapes.items())
    return total


@dataclass(frozen=True)
class OpenModel:
    """A checkpoint that can be run, not yet loaded.

    Attributes:
        head: Format of the output head, one of HEADS.
        shard: The part of the model that this process has.
    """

    checkpoint: Checkpoint
    backend: Backend
    head: str
    shard: Shard = ALONE

    @property
    def config(self) -> ModelConfig:
        """The model's config, with this process's part of the heads and inner features."""
        return self.shard.config(self.checkpoint.config)

    @property
    def family(self) -> Family:
        """With the names that the checkpoint has."""
        return stored_family(self.checkpoint)

    def head_declines(self, kind: str) -> str | None:
        """Why the output head cannot be rounded to "int8" or "int4"."""
        return head_declines(self.checkpoint, self.family, self.backend, kind)

    def weight_bytes(self, head: str | None = None) -> int:
        """Bytes of this process's weights on a GPU, from the headers, without norms and biases.

        head: Instead of `self.head`.
        """
        checkpoint, dtype = self.checkpoint, self.backend.activation_dtype
        family, block = self.family, block_of(checkpoint, self.family)
        embedding = checkpoint.info(f"{family.embedding}.weight")

        def group_of(name: str, in_: int) -> int | None:
            stored = name.replace(".mlp.experts.", f".{block}.experts.")
            return checkpoint.group_of(in_) if checkpoint.is_quantized(stored) else None

        sizes = embedding.nbytes, embedding.dtype == dtype, dtype.itemsize
        return rank_bytes(checkpoint.config, self.shard, head or self.head, group_of, *sizes)

    def load(self) -> Decoder:
        """Load this process's part. Raises CheckpointError for a folder that cannot be run."""
        checkpoint, backend, family, shard = self.checkpoint, self.backend, self.family, self.shard
        embedding = load_embedding(checkpoint, family, shard).to(backend.device)
        norm, head = load_head(checkpoint, family, backend, embedding, self.head, shard)
        layers = []
        for index in range(checkpoint.config.num_layers):
            layers.append(load_layer(checkpoint, index, backend, shard))
            if shard.size > 1:
                give_memory_back()  # of the whole rows that columns were cut from
        tokens = shard.vocabulary(checkpoint.config), shard.vocabularies(checkpoint.config)
        vocabulary = None if shard.size == 1 else Vocabulary(*tokens)
        return Decoder(self.config, backend, embedding, tuple(chain(*layers)), norm, head, vocabulary)


def open_model(folder: str | Path, options: Options | None = None) -> OpenModel:
    """Check that a model can be run. Raises CheckpointError or ConfigError for one that cannot."""
    options = options or Options()
    device = torch.device(options.device)
    checkpoint = Checkpoint(folder, read_data=DeviceReader(device) if device.type == "cuda" else read_tensor)
    check_decoder(checkpoint.config)
    family = stored_family(checkpoint)
    dtypes = {"dtype": options.dtype, "kv_cache_dtype": options.kv_cache_dtype}
    backend = backend_for(device, options.backend, exact=options.exact, **dtypes)
    if options.dtype == "auto" and traits_of(family).wide and backend.dtype_declines() is None:
        dtypes["dtype"] = "bfloat16"
        backend = backend_for(device, options.backend, exact=options.exact, **dtypes)
    options.shard.config(checkpoint.config)  # raises if the model cannot be split so
    return OpenModel(checkpoint, backend, head_kind(checkpoint, family, options, backend), options.shard)


def load(folder: str | Path, options: Options | None = None) -> Decoder:
    """Load a model. Raises CheckpointError or ConfigError for a folder that cannot be run."""
    return open_model(folder, options).load()
