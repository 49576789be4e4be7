"""One GGUF file for llama.cpp: the same 4-bit integers and scales in blocks of 32 (Q4_1); the rest is F16 and F32.

One tensor is in memory at a time. Names, keys and row order are those of llama.cpp's own conversion script. Which
models it takes is in gguf_architectures.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from squawq.config import ModelConfig
from squawq.errors import OutputError
from squawq.export.gguf_architectures import Architecture, architecture_of
from squawq.export.gguf_blocks import BLOCK, BLOCK_BYTES
from squawq.export.gguf_metadata import describe, rope_tensors
from squawq.export.gguf_tensors import Entry, plan, read_entry
from squawq.export.gguf_tokenizer import Vocabulary, read_vocabulary
from squawq.format.reader import Checkpoint

Progress = Callable[[int, int], None]


def _writer(path: Path, name: str, config: ModelConfig, row: Architecture, entries: list[Entry]) -> Any:
    """A GGUFWriter with all metadata but the vocabulary."""
    import gguf

    writer = gguf.GGUFWriter(path, row.name)
    quantized = any(entry.kind == "Q4_1" for entry in entries)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1 if quantized else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    describe(writer, config, row)
    return writer


def _declare(writer: Any, entries: list[Entry], divisors: dict[str, Tensor]) -> None:
    """Write the names, types and sizes, which precede the data."""
    import gguf
    import numpy as np

    for name, values in divisors.items():
        writer.add_tensor_info(name, tuple(values.shape), np.dtype(np.float32), values.nbytes)
    for entry in entries:
        if entry.kind == "Q4_1":
            shape = (*entry.shape[:-1], entry.shape[-1] // BLOCK * BLOCK_BYTES)
            raw = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), math.prod(shape), raw)
        else:
            dtype: np.dtype[Any] = np.dtype(np.float16 if entry.kind == "F16" else np.float32)
            writer.add_tensor_info(entry.name, entry.shape, dtype, math.prod(entry.shape) * dtype.itemsize)


def export_gguf(folder: Path, out: Path, *, progress: Progress | None = None) -> None:
    """Write the checkpoint in `folder`, AWQ or 16-bit, as the one GGUF file `out`, which must not exist.

    4-bit linears become Q4_1 (see `q4_1`), other matrices F16, norms and biases F32; tokenizer and chat template go
    along. progress: called with tensors done and all. The file gets its name when it is whole.
    Raises ConfigError for what GGUF or llama.cpp has no place for, CheckpointError for a damaged folder, OutputError
    for an `out` that is taken or cannot be written, DependencyError without the package gguf.
    """
    if out.exists():
        raise _taken(out)
    checkpoint = Checkpoint(folder)
    row = architecture_of(checkpoint.config)
    entries, divisors = list(plan(checkpoint, row)), rope_tensors(checkpoint.config, row)
    vocabulary = read_vocabulary(folder, checkpoint.config)
    name = folder.resolve().name
    if vocabulary.strips and "phi-3" not in name.lower():
        name += " (phi-3)"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as temporary:  # nobody else's, and on its disk
            partial = Path(temporary, out.name)
            with closing(_writer(partial, name, checkpoint.config, row, entries)) as writer:
                _write(writer, checkpoint, entries, divisors, vocabulary, progress)
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
    writer: Any,
    checkpoint: Checkpoint,
    entries: list[Entry],
    divisors: dict[str, Tensor],
    vocabulary: Vocabulary,
    progress: Progress | None,
) -> None:
    vocabulary.write(writer)
    _declare(writer, entries, divisors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in divisors.values():
        writer.write_tensor_data(values.numpy())
    for done, entry in enumerate(entries, 1):
        writer.write_tensor_data(read_entry(checkpoint, entry).numpy())
        if progress is not None:
            progress(done, len(entries))
