"""From a checkpoint to our decoder: the whole of it, or one layer at a time for whoever streams.

Peak memory of `load_layer`: that layer's weights. `load` keeps 16-bit weights as float32 where they are multiplied.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from squawq.config import ModelConfig
from squawq.families import Family, family_of
from squawq.format.groupwise import GroupwiseTensor
from squawq.format.reader import Checkpoint
from squawq.nn.decoder import Decoder, Layer
from squawq.nn.linear import Linear


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every linear in a layer."""
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


def _float(tensor: Tensor, device: str) -> Tensor:
    return tensor.to(device=device, dtype=torch.float32)


def load_linear(checkpoint: Checkpoint, name: str, shape: tuple[int, int], device: str = "cpu") -> Linear:
    """A linear by its full name, 4-bit or dense, with its bias if it has one."""
    bias = f"{name}.bias"
    loaded_bias = _float(checkpoint.read(bias, shape[:1]), device) if bias in checkpoint.tensors else None
    if not checkpoint.is_quantized(name):
        return Linear(_float(checkpoint.read(f"{name}.weight", shape), device), loaded_bias)
    tensor = checkpoint.read_quantized(name, in_features=shape[1], out_features=shape[0])
    moved = GroupwiseTensor(tensor.q.to(device), tensor.scales.to(device), tensor.zeros.to(device))
    return Linear(moved, loaded_bias)


def load_layer(checkpoint: Checkpoint, index: int, device: str = "cpu") -> Layer:
    """One decoder layer."""
    config = checkpoint.config
    family = family_of(config.model_type)
    prefix = family.layer(index)
    linears = {
        name: load_linear(checkpoint, f"{prefix}.{name}", shape, device)
        for name, shape in linear_shapes(config).items()
    }
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (config.hidden_size,))
    if family.qk_norm:
        norms |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), (config.head_dim,))
    loaded = {n: _float(checkpoint.read(f"{prefix}.{n}.weight", shape), device) for n, shape in norms.items()}
    return Layer(config, index, linears, loaded)


def load_embedding(checkpoint: Checkpoint, family: Family) -> Tensor:
    """The embedding in the checkpoint's own dtype, memory-mapped: rows are read as they are used."""
    config = checkpoint.config
    return checkpoint.read(f"{family.embedding}.weight", (config.vocab_size, config.hidden_size))


def load_head(checkpoint: Checkpoint, family: Family, device: str = "cpu") -> tuple[Tensor, Linear]:
    """The final norm [hidden] and the head, which is the embedding where the two are tied."""
    config = checkpoint.config
    shape = (config.vocab_size, config.hidden_size)
    norm = _float(checkpoint.read(f"{family.norm}.weight", (config.hidden_size,)), device)
    if config.tied_embeddings:
        return norm, Linear(_float(load_embedding(checkpoint, family), device))
    return norm, load_linear(checkpoint, family.head, shape, device)


def load(folder: str | Path, device: str = "cpu") -> Decoder:
    """The whole model. Raises CheckpointError or ConfigError for a folder that cannot be run."""
    checkpoint = Checkpoint(folder)
    family = family_of(checkpoint.config.model_type)
    embedding = load_embedding(checkpoint, family).to(device)
    layers = [load_layer(checkpoint, i, device) for i in range(checkpoint.config.num_layers)]
    norm, head = load_head(checkpoint, family, device)
    return Decoder(checkpoint.config, embedding, layers, norm, head)
