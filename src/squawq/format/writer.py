"""Writes checkpoint files beside their place and renames them in, so that a name never holds half a file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from squawq.format.reader import INDEX, read_header

TEMPORARY = ".tmp"


def _beside(path: Path) -> Path:
    """Where a file is written before it gets its name: in a folder that `clear_temporary` removes whole."""
    folder = path.parent / TEMPORARY
    folder.mkdir(exist_ok=True)
    return folder / path.name


def clear_temporary(folder: Path) -> None:
    """Remove what a killed run left half written."""
    shutil.rmtree(folder / TEMPORARY, ignore_errors=True)


def _commit(temporary: Path, target: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, target)  # noqa: PTH105 (the tests kill here)


def write_text(path: Path, text: str) -> None:
    """Atomically write a text file (UTF-8)."""
    temporary = _beside(path)
    temporary.write_text(text, encoding="utf-8")
    _commit(temporary, path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Atomically write a JSON file, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def copy_file(source: Path, target: Path) -> None:
    """Atomically copy a small file."""
    temporary = _beside(target)
    temporary.write_bytes(source.read_bytes())
    _commit(temporary, target)


def shard_name(index: int, count: int) -> str:
    """The file name of shard `index` (from 1) of `count`, as transformers spells it."""
    return f"model-{index:05d}-of-{count:05d}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Atomically write one safetensors file. Peak memory: the tensors given. Raises OSError when the disk is full."""
    temporary = _beside(path)
    temporary.touch()
    mode = temporary.stat().st_mode & 0o777  # the user's umask; save_file itself leaves 0600
    try:
        save_file({n: t.contiguous().cpu() for n, t in sorted(tensors.items())}, temporary, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    temporary.chmod(mode)
    _commit(temporary, path)


def write_index(folder: Path) -> int:
    """Write the index over all shards in `folder`; returns the bytes of all tensors."""
    shards = {path.name: read_header(path) for path in sorted(folder.glob("model-*.safetensors"))}
    total = sum(info.nbytes for header in shards.values() for info in header.values())
    weight_map = {name: file for file, header in shards.items() for name in header}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    return total
