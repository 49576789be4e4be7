"""One GGUF file for llama.cpp: the same 4-bit integers and scales in blocks of 32 (Q4_1); the rest is F16 and F32.

One tensor is in memory at a time. Names, keys and row order are those of llama.cpp's own conversion script. What is
said of the vocabulary is gguf_tokenizer.py's part. Knows nothing of how llama.cpp computes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from squawq.config import ModelConfig
from squawq.errors import CheckpointError, ConfigError, DependencyError, OutputError
from squawq.export.gguf_tokenizer import Vocabulary, read_vocabulary
from squawq.families import family_of, traits_of
from squawq.format.groupwise import GroupwiseTensor
from squawq.format.reader import Checkpoint
from squawq.nn.loader import linear_shapes
from squawq.nn.rope import inverse_frequencies

BLOCK = 32  # weights that share a scale and a minimum in Q4_1
BLOCK_BYTES = 2 + 2 + BLOCK // 2
GROUP_SIZES = (32, 64, 128)
Progress = Callable[[int, int], None]

LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}


@dataclass(frozen=True)
class Architecture:
    """A model_type in llama.cpp: its name there, whether rotary pairs are neighbours, which linears may have a bias."""

    name: str
    neighbours: bool
    biases: tuple[str, ...]


ARCHITECTURES = {
    "llama": Architecture("llama", True, tuple(LINEARS)),
    "mistral": Architecture("llama", True, tuple(LINEARS)),
    "qwen2": Architecture("qwen2", False, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "qwen3": Architecture("qwen3", False, ()),
}


@dataclass(frozen=True)
class Entry:
    """A tensor of the file. kind: "Q4_1", "F16" or "F32"; shape: torch's; heads: 0, or rotary rows are reordered."""

    name: str
    kind: str
    shape: tuple[int, ...]
    source: str
    heads: int = 0


def q4_1(tensor: GroupwiseTensor) -> Tensor:
    """Q4_1 rows, uint8 [out, in / 32 * 20], of groups of a multiple of 32: w = d * q + m.

    d is the scale and m is -zero * scale, both float16. Integers and scales stay as they are. m is rounded once, by at
    most zero * scale * 2**-11, so that no weight moves by more than 15 / 2048 (0.74 %) of its scale; for the zeros 0,
    1, 2, 4 and 8 not at all. Raises CheckpointError where float16 cannot hold a scale or minimum.
    """
    out, groups = tensor.scales.shape
    scale = tensor.scales.to(torch.float16)
    minimum = (0 - tensor.zeros.float() * scale.float()).to(torch.float16)
    if not (scale.isfinite().all() and minimum.isfinite().all()):
        raise CheckpointError("a scale, or its product with the zero, is beyond float16")
    head = torch.stack([scale, minimum], -1).view(torch.uint8)
    head = head.repeat_interleave(tensor.q.shape[1] // groups // BLOCK, 1)
    halves = tensor.q.reshape(out, -1, 2, BLOCK // 2)  # the low nibbles hold a block's first half
    return torch.cat([head, halves[:, :, 0] | halves[:, :, 1] << 4], -1).view(out, -1)


def neighbour_order(rows: int, heads: int) -> Tensor:
    """Row indices that interleave rotary pairs: checkpoints have the rows of a pair half a head apart."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def plan(checkpoint: Checkpoint) -> Iterator[Entry]:
    """Every tensor of the file, in order. Raises CheckpointError or ConfigError for what GGUF cannot store."""
    config, family = checkpoint.config, family_of(checkpoint.config.model_type)
    table = (config.vocab_size, config.hidden_size)
    yield Entry("token_embd.weight", "F16", table, f"{family.embedding}.weight")
    for index in range(config.num_layers):
        prefix = family.layer(index)
        for ours, theirs in NORMS.items():
            if traits_of(family).qk_norm or not ours.startswith("self_attn"):
                size = config.head_dim if ours.startswith("self_attn") else config.hidden_size
                yield Entry(f"blk.{index}.{theirs}.weight", "F32", (size,), f"{prefix}.{ours}.weight")
        for ours, shape in linear_shapes(config).items():
            yield from _linear(checkpoint, f"{prefix}.{ours}", f"blk.{index}.{LINEARS[ours]}", shape)
    yield Entry("output_norm.weight", "F32", (config.hidden_size,), f"{family.norm}.weight")
    if not config.tied_embeddings:
        yield from _linear(checkpoint, family.head, "output", table)


def _linear(checkpoint: Checkpoint, source: str, name: str, shape: tuple[int, int]) -> Iterator[Entry]:
    config = checkpoint.config
    architecture = ARCHITECTURES[config.model_type]
    ours = next((linear for linear in LINEARS if source.endswith(f".{linear}")), "")
    paired = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}
    heads = paired.get(ours, 0) if architecture.neighbours else 0
    if checkpoint.is_quantized(source):
        if checkpoint.input_order(source, shape[1]) is not None:
            raise ConfigError(
                f"{source} has its groups in activation order (desc_act), which GGUF does not have; export the model "
                "as dense"
            )
        group = checkpoint.group_of(shape[1])
        if group not in GROUP_SIZES:
            raise ConfigError(f"{source} has groups of {group}; GGUF's Q4_1 takes groups of 32, 64 or 128")
        yield Entry(f"{name}.weight", "Q4_1", shape, source, heads)
    else:
        yield Entry(f"{name}.weight", "F16", shape, f"{source}.weight", heads)
    if f"{source}.bias" in checkpoint.tensors:
        if ours not in architecture.biases:
            raise ConfigError(f"{source} has a bias, which llama.cpp's {architecture.name} does not support")
        yield Entry(f"{name}.bias", "F32", shape[:1], f"{source}.bias", heads)


def read_entry(checkpoint: Checkpoint, entry: Entry) -> Tensor:
    """A tensor in the file's encoding. Raises CheckpointError naming the tensor."""
    order = neighbour_order(entry.shape[0], entry.heads) if entry.heads else slice(None)
    if entry.kind == "Q4_1":
        out, columns = entry.shape
        tensor = checkpoint.read_quantized(entry.source, columns, out)
        try:
            return q4_1(GroupwiseTensor(tensor.q[order], tensor.scales[order], tensor.zeros[order]))
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint.folder}: {entry.source}: {error}") from error
    values = checkpoint.read(entry.source, entry.shape)[order]
    values = values.to(torch.float16 if entry.kind == "F16" else torch.float32).contiguous()
    if not values.isfinite().all():
        raise CheckpointError(f"{checkpoint.folder}: {entry.source} has values that {entry.kind} cannot hold")
    return values


def rope_factors(config: ModelConfig) -> Tensor | None:
    """Divisors of the rotary frequencies, float32 [head_dim / 2]; None without Llama 3.1's scaling."""
    if config.rope.type != "llama3":
        return None
    plain = 1.0 / (config.rope.theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim))
    return plain / inverse_frequencies(config.rope, config.head_dim)


def _writer(path: Path, name: str, config: ModelConfig, entries: list[Entry]) -> Any:
    """A GGUFWriter with all metadata but the vocabulary."""
    try:
        import gguf
    except ImportError as error:
        raise DependencyError("GGUF needs the package gguf: pip install gguf") from error
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type].name)
    quantized = any(entry.kind == "Q4_1" for entry in entries)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1 if quantized else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    if config.rope.type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope.factor)
    return writer


def context_length(config: ModelConfig) -> int:
    """Context length: the positions, or the sliding window if shorter, which llama.cpp does not apply here."""
    windows = [config.window(layer) for layer in range(config.num_layers)]
    return min([config.max_positions, *(window for window in windows if window is not None)])


def _declare(writer: Any, entries: list[Entry], factors: Tensor | None) -> None:
    """Write the names, types and sizes, which precede the data."""
    import gguf
    import numpy as np

    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", tuple(factors.shape), np.dtype(np.float32), factors.nbytes)
    for entry in entries:
        if entry.kind == "Q4_1":
            shape = (entry.shape[0], entry.shape[1] // BLOCK * BLOCK_BYTES)
            raw = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), math.prod(shape), raw)
        else:
            dtype: np.dtype[Any] = np.dtype(np.float16 if entry.kind == "F16" else np.float32)
            writer.add_tensor_info(entry.name, entry.shape, dtype, math.prod(entry.shape) * dtype.itemsize)


def _check(config: ModelConfig, out: Path) -> None:
    if out.exists():
        raise _taken(out)
    if config.model_type not in ARCHITECTURES:
        raise ConfigError(f"model_type is {config.model_type!r}; GGUF takes {', '.join(ARCHITECTURES)}")
    if config.rope.type not in ("default", "linear", "llama3"):
        raise ConfigError(f"rope type is {config.rope.type!r}; GGUF takes default, linear and llama3")
    if config.rope.type == "llama3" and ARCHITECTURES[config.model_type].name != "llama":
        raise ConfigError(f"rope type llama3 is not supported by llama.cpp's {config.model_type}")


def export_gguf(folder: Path, out: Path, *, progress: Progress | None = None) -> None:
    """Write the checkpoint in `folder`, AWQ or 16-bit, as the one GGUF file `out`, which must not exist.

    4-bit linears become Q4_1 (see `q4_1`), other matrices F16, norms and biases F32; tokenizer and chat template go
    along. progress: called with tensors done and all. The file gets its name when it is whole.
    Raises ConfigError for what GGUF or llama.cpp has no place for, CheckpointError for a damaged folder, OutputError
    for an `out` that is taken or cannot be written, DependencyError without the package gguf.
    """
    checkpoint = Checkpoint(folder)
    _check(checkpoint.config, out)
    entries = list(plan(checkpoint))
    for entry in entries:
        if entry.kind != "Q4_1":
            checkpoint.check_shape(entry.source, entry.shape)  # before anything is as large as config.json says
    vocabulary = read_vocabulary(folder, checkpoint.config)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as temporary:  # nobody else's, and on its disk
            partial = Path(temporary, out.name)
            with closing(_writer(partial, folder.resolve().name, checkpoint.config, entries)) as writer:
                _write(writer, checkpoint, entries, vocabulary, progress)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            _name(partial, out)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror or error}") from error


def _taken(out: Path) -> OutputError:
    if out.is_dir():
        return OutputError(f"{out} exists and is a folder; a GGUF file needs a name of its own, such as model.gguf")
    return OutputError(f"{out} exists; remove it, or name another file")


def _name(partial: Path, out: Path) -> None:
    """Rename the file into place. Raises OutputError if the name has been taken meanwhile."""
    try:
        os.link(partial, out)
    except FileExistsError as error:
        raise _taken(out) from error
    except OSError:  # a file system without hard links
        partial.replace(out)


def _write(
    writer: Any, checkpoint: Checkpoint, entries: list[Entry], vocabulary: Vocabulary, progress: Progress | None
) -> None:
    vocabulary.write(writer)
    factors = rope_factors(checkpoint.config)
    _declare(writer, entries, factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for done, entry in enumerate(entries, 1):
        writer.write_tensor_data(read_entry(checkpoint, entry).numpy())
        if progress is not None:
            progress(done, len(entries))
