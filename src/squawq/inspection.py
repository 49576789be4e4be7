"""squawq inspect: a model's architecture, sizes and memory, from config.json and safetensors headers alone.

Without headers (a config.json alone, a Hub id) the tensors are those of transformers' model. Memory is the model's own:
no Python, no driver, no allocator.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from squawq.backends.base import PAGE
from squawq.backends.devices import gpus
from squawq.compatibility import compatible_engines
from squawq.config import ModelConfig
from squawq.decoder_support import decoder_declines
from squawq.engine.capacity import GPU_SHARE, gpu_share
from squawq.errors import CheckpointError, ConfigError
from squawq.families import expert_of, family_of
from squawq.format.files import has_file, read_json
from squawq.format.layouts import Layout
from squawq.format.mxfp4 import BLOCKS, SCALES
from squawq.format.reader import Checkpoint
from squawq.format.shards import INDEX, TensorInfo
from squawq.hub.download import hub_file
from squawq.layerwise.meta_model import MetaModel
from squawq.layerwise.plan import LayerPlan
from squawq.layerwise.tensor_names import OF_STACK, TensorNames
from squawq.nn.cache import Cache
from squawq.nn.experts import STACKED
from squawq.nn.loader import rank_bytes
from squawq.nn.shard import Shard, sizes, splits_groups
from squawq.quant_config import QuantConfig

STEP_TOKENS = 512  # that run through the model at once: the engine's chunk of a prompt
DEFAULT_CONTEXT = 8192
INTEGERS = ("qweight", "scales", "qzeros", "g_idx", "sizes")  # in place of a linear's weight, whatever the layout
KINDS = {
    "quantized_linears": "linears in INT4, with scales and zeros",
    "dense_linears": "linears that are not quantized",
    "embedding": "embedding, also of per-layer inputs",
    "head": "head",
    "small": "norms and biases",
    "beside": "parts that are no text model",
}


@dataclass(frozen=True)
class Stored:
    """A tensor: its bytes on disk, how many weights of the model it holds, and their dtype."""

    nbytes: int
    weights: int
    dtype: str


def inspect(
    model: str | Path, context: int | None = None, batch: int = 1, device_memory: int | None = None
) -> dict[str, Any]:
    """A model's architecture, quantization, sizes and memory.

    Args:
        model: A folder, a config.json, or a Hub id, of which only config.json is fetched.
        context: Tokens of a sequence, by default the model's positions up to 8,192.
        batch: Sequences at once.
        device_memory: Bytes of an NVIDIA GPU, to tell how many of them the model needs.

    Returns:
        JSON types; sizes in bytes. `memory` has, for "fp16" and "int4", weights (as stored, or as squawq would store
        them), kv_cache (float16), workspace (activations of a step of 512 tokens, float32) and their total. `tensors`
        says where sizes come from: "headers" or "shapes". `tensor_parallel` has how many processes can share the model
        in squawq ("squawq") and in engines that keep quantization groups whole ("whole_groups"); nothing for a model
        that squawq's decoder does not run. `devices` is None without `device_memory`; else it has the memory, the share
        of it that is used, and a list of `GpuShare`s, one for each number of GPUs, for "int4" and, of a model that is
        not quantized, "fp16". `gpus` are this machine's: name, total and free memory.

    Raises:
        ConfigError: The context is longer than the model's positions.
        CheckpointError: The model is damaged.
    """
    config, meta_model, found = _open(model)
    family = meta_model.family
    context = min(DEFAULT_CONTEXT, config.max_positions) if context is None else context
    counts = {"context": context, "batch": batch}
    for name, value in (counts if device_memory is None else {**counts, "device_memory": device_memory}).items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")
    if context > config.max_positions:
        raise ConfigError(f"context is {context}; the model has {config.max_positions} positions")
    tensors = expected(config, config.quant, meta_model) if found is None else found
    quant = config.quant or QuantConfig()
    dense, small = (expected(config, each, meta_model) for each in (None, quant))
    forms = {"int4": tensors} if config.quant else {"fp16": tensors, "int4": small}
    own = _total(tensors)
    weights = {"fp16": _total(dense), "int4": own if config.quant else _total(small)}
    cache = -(-context // PAGE) * PAGE * batch * Cache.token_bytes(config)
    cache += batch * Cache.state_bytes(config)
    work = _workspace(config, batch)
    devices: dict[str, Any] | None = None
    if device_memory is not None:
        rows = {form: _gpu_shares(config, quant, held, device_memory, context, batch) for form, held in forms.items()}
        devices = {"memory": device_memory, "share": GPU_SHARE, **rows}
    return {
        "model": str(model),
        "architecture": _architecture(config),
        "model_type": config.model_type,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_positions": config.max_positions,
        "tied_embeddings": config.tied_embeddings,
        "tensor_parallel": _shares(config),
        "parameters": sum(tensor.weights for tensor in tensors.values()),
        "quantization": _quantization(config),
        "runs_in": compatible_engines(config),
        "head": "tied" if config.tied_embeddings else _form(tensors, family.head),
        "linears": _linears(meta_model, tensors),
        "kept_in_16_bits": _kept(config, meta_model, tensors),
        "tensors": "shapes" if found is None else "headers",
        "bytes": {**_by_kind(meta_model, tensors), "total": own},
        "memory": {
            "context": context,
            "batch": batch,
            **{
                form: {"weights": size, "kv_cache": cache, "workspace": work, "total": size + cache + work}
                for form, size in weights.items()
            },
        },
        "devices": devices,
        "gpus": gpus(),
    }


def _gpu_shares(
    config: ModelConfig, quant: QuantConfig, tensors: Mapping[str, Stored], memory: int, context: int, batch: int
) -> list[dict[str, Any]]:
    """A `GpuShare` for each number of GPUs; for one alone if transformers' model class runs the model."""
    family = family_of(config.model_type)
    if decoder_declines(config):
        return [asdict(gpu_share(config, 1, memory, lambda _: _total(tensors), context, batch))]
    embedding = tensors.get(f"{family.embedding}.weight")
    if embedding is None:
        raise CheckpointError(f"the model has no {family.embedding}.weight")

    def group_of(linear: str, in_: int) -> int | None:
        return quant.group_of(in_) if f"{linear}.qweight" in tensors else None

    def weights(shard: Shard) -> int:
        return rank_bytes(config, shard, "16-bit", group_of, embedding.nbytes, embedding.dtype == "float16")

    return [asdict(gpu_share(config, size, memory, weights, context, batch)) for size in sizes(config)]


def _shares(config: ModelConfig) -> dict[str, list[int]]:
    """How many processes can share the model: in squawq, and in engines that keep groups whole (vLLM, TGI)."""
    if decoder_declines(config):
        return {}
    found, quant = sizes(config), config.quant
    whole = [size for size in found if quant is None or not splits_groups(config, size, quant.group_size)]
    return {"squawq": found, "whole_groups": whole}


def missing(checkpoint: Checkpoint) -> list[str]:
    """Names of tensors that the checkpoint should have and lacks."""
    meta_model = _meta_model(checkpoint.config, str(checkpoint.folder))
    names, quant = TensorNames(checkpoint, meta_model), checkpoint.config.quant
    layout = checkpoint.layout
    kinds = (layout.integers, layout.scales, *((layout.zeros,) if quant is not None and quant.zero_point else ()))
    lost = []
    for name in expected(checkpoint.config, None, meta_model):
        base = name.removesuffix("weight")
        if f"{base}{layout.integers}" in names.on_disk:
            lost += [names.stored_name(base + kind) for kind in kinds if base + kind not in names.on_disk]
        elif not names.has(name):
            lost.append(names.stored_name(name))
    return lost


def expected(config: ModelConfig, quant: QuantConfig | None, meta_model: MetaModel | None = None) -> dict[str, Stored]:
    """Every tensor of a model of this config by name, in 16 bits, or quantized by `quant`."""
    meta_model = meta_model or _meta_model(config, "config.json")
    family = meta_model.family
    dtype = str(config.raw.get("dtype") or config.raw.get("torch_dtype") or "float16")
    if dtype != "bfloat16":
        dtype = "float16"  # a float32 checkpoint is run in 16 bits
    tensors = {name: _stored(shape, dtype) for name, shape in meta_model.outer.items()}
    for index, layer in enumerate(meta_model.layers):
        prefix, shapes = family.layer(index), meta_model.shapes(index)
        kept = shapes if quant is None else LayerPlan(shapes, family, quant, prefix).kept
        for name, tensor in layer.state_dict().items():
            linear, _, kind = name.rpartition(".")
            if quant is None or kind != "weight" or linear not in shapes or linear in kept:
                tensors[f"{prefix}.{name}"] = _stored(tensor.shape, dtype)
            else:
                out, inputs = shapes[linear]
                groups = inputs // quant.group_of(inputs)
                tensors[f"{prefix}.{linear}.qweight"] = Stored(inputs * out // 2, inputs * out, "int4")
                tensors[f"{prefix}.{linear}.qzeros"] = Stored(groups * out // 2, 0, "int4")
                tensors[f"{prefix}.{linear}.scales"] = Stored(groups * out * 2, 0, "float16")
    return tensors


def _stored(shape: Sequence[int], dtype: str) -> Stored:
    return Stored(2 * math.prod(shape), math.prod(shape), dtype)


def _meta_model(config: ModelConfig, where: str) -> MetaModel:
    return MetaModel(config.raw, where, family_of(config.model_type))


def _open(model: str | Path) -> tuple[ModelConfig, MetaModel, dict[str, Stored] | None]:
    """The config, its meta model and, if there are weights, the tensors of their headers."""
    path = Path(model)
    if not path.is_dir():
        file = path if path.is_file() else hub_file(str(model), "config.json")
        config = ModelConfig.from_dict(read_json(file), str(model))
        return config, _meta_model(config, str(model)), None
    checkpoint = Checkpoint(path)
    meta_model = _meta_model(checkpoint.config, str(path / "config.json"))
    if not has_file(path / INDEX) and not checkpoint.shards.names():
        return checkpoint.config, meta_model, None
    names = TensorNames(checkpoint, meta_model)
    stored = {**names.on_disk, **{name: name for name in names.other_tensors}}
    named = ((_in_gemm(name, checkpoint.layout), checkpoint.info(own)) for name, own in stored.items())
    return checkpoint.config, meta_model, {name: _from_header(name, info) for name, info in named}


def _in_gemm(name: str, layout: Layout) -> str:
    """The tensor's name with the part that INTEGERS has for it."""
    owner, _, kind = name.rpartition(".")
    parts = (layout.integers, layout.scales, layout.zeros, layout.groups, layout.sizes)
    return f"{owner}.{INTEGERS[parts.index(kind)]}" if kind in parts else name


def _from_header(name: str, info: TensorInfo) -> Stored:
    part, dtype = name.rpartition(".")[2], str(info.dtype).removeprefix("torch.")
    if part.endswith((BLOCKS, SCALES)):
        return Stored(info.nbytes, 2 * info.nbytes if part.endswith(BLOCKS) else 0, "mxfp4")
    weights = 2 * info.nbytes if part == "qweight" else 0 if part in INTEGERS else info.nbytes // info.dtype.itemsize
    return Stored(info.nbytes, weights, "int4" if part in ("qweight", "qzeros") else dtype)


def _total(tensors: Mapping[str, Stored]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _workspace(config: ModelConfig, batch: int) -> int:
    """Bytes of a step's activations, float32: hidden states, attention, MLP, and a row of logits for each sequence."""
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    row = 3 * config.hidden_size + 2 * query + 2 * key + 3 * config.intermediate_size
    return 4 * (max(STEP_TOKENS, batch) * row + batch * config.vocab_size)


def _architecture(config: ModelConfig) -> str:
    """The first architecture of config.json, if it is an identifier: it reaches terminals and model cards."""
    names = config.raw.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    is_name = isinstance(first, str) and re.fullmatch(r"\w+", first, re.ASCII)
    return str(first) if is_name else config.model_type


def _quantization(config: ModelConfig) -> dict[str, Any] | None:
    quant = config.quant
    if quant is None:
        return None
    return {
        "method": config.quant_method,
        "format": config.layout,
        "bits": quant.bits,
        "group_size": quant.group_size,
        "zero_point": quant.zero_point,
    }


def _linears(meta_model: MetaModel, tensors: Mapping[str, Stored]) -> list[dict[str, Any]]:
    """A row for each linear of a layer: its shape, and how many layers store it in which form; * is any expert."""
    shapes: dict[str, tuple[int, int]] = {}
    forms: dict[str, dict[str, set[int]]] = {}
    for index in range(len(meta_model.layers)):
        for name, shape in meta_model.shapes(index).items():
            each = re.sub(r"\.experts\.\d+\.", ".experts.*.", name)
            shapes[each] = shape
            form = _form(tensors, f"{meta_model.family.layer(index)}.{name}")
            forms.setdefault(each, {}).setdefault(form, set()).add(index)
    return [
        {
            "name": name,
            "out_features": out,
            "in_features": inputs,
            "layers": {form: len(layers) for form, layers in forms[name].items()},
        }
        for name, (out, inputs) in shapes.items()
    ]


def _form(tensors: Mapping[str, Stored], linear: str) -> str:
    if f"{linear}.qweight" in tensors:
        return "int4"
    experts = (expert_of(linear) or "").rpartition(".")[0]
    names = f"{linear}.weight", f"{experts}.{STACKED[0]}", f"{experts}.{STACKED[0]}{BLOCKS}"
    weight = next((tensors[name] for name in names if name in tensors), None)
    return "missing" if weight is None else weight.dtype


def _kept(config: ModelConfig, meta_model: MetaModel, tensors: Mapping[str, Stored]) -> list[str]:
    """Full names of linears that a quantized model stores in 16 bits."""
    if config.quant is None:
        return []
    layers = range(len(meta_model.layers))
    names = [f"{meta_model.family.layer(index)}.{name}" for index in layers for name in meta_model.shapes(index)]
    return [name for name in (*names, *meta_model.outer_linears) if f"{name}.weight" in tensors]


def _by_kind(meta_model: MetaModel, tensors: Mapping[str, Stored]) -> dict[str, int]:
    sizes, family = dict.fromkeys(KINDS, 0), meta_model.family
    layers = range(len(meta_model.layers))
    linears = {f"{family.layer(index)}.{name}.weight" for index in layers for name in meta_model.shapes(index)}
    linears |= {f"{name}.weight" for name in meta_model.outer_linears}
    embeddings = f"{family.embedding}.weight", *meta_model.per_layer[:1]
    for name, tensor in tensors.items():
        base, _, part = name.rpartition(".")
        if name in embeddings or base == family.head:
            kind = "embedding" if name in embeddings else "head"
        elif part in INTEGERS:
            kind = "quantized_linears"
        elif name in linears or (OF_STACK.fullmatch(part) and base.endswith(".experts")):
            kind = "dense_linears"
        else:
            kind = "small" if base.startswith(family.layers) or name in meta_model.outer else "beside"
        sizes[kind] += tensor.nbytes
    return sizes
