"""A finished model folder to the place that `save_quantized` names. Knows file names, no tensors."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from squawq.errors import CheckpointError, ConfigError, OutputError
from squawq.format.reader import INDEX
from squawq.format.writer import clear_temporary, copy_file
from squawq.quantization.job import REPORT

BESIDE = ("generation_config.json", "LICENSE", "NOTICE", "USE_POLICY", REPORT)
LAST = (INDEX, "config.json")  # what makes a folder a model comes when the weights are there
WEIGHTS = re.compile(r"(model|model-\d+-of-\d+|pytorch_model.*)\.(safetensors|bin)")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def save(source: Path, target: Path, shard_size: str | int, *, move: bool) -> None:
    """Files of `source` into `target`, which is made if need be; weights of another model there are replaced.

    move: take the weight files from `source`, which costs nothing on one file system.
    Raises ConfigError when a file is larger than shard_size, OutputError when `target` cannot be written.
    """
    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(f"{source}: the weights saved here before are gone; quantize again")
    limit, largest = _bytes(shard_size), max(path.stat().st_size for path in shards)
    if largest > limit:
        raise ConfigError(f"shard_size is {shard_size!r}; the largest layer takes a file of {largest / 1e6:,.1f} MB")
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in LAST:
            (target / name).unlink(missing_ok=True)
        for path in shards:
            (shutil.move if move else shutil.copyfile)(path, target / path.name)
        for path in target.iterdir():
            if WEIGHTS.fullmatch(path.name) and path.name not in {shard.name for shard in shards}:
                path.unlink()
        small = [path for path in sorted(source.iterdir()) if path.name.startswith(BESIDE)]
        for path in (*small, *(source / name for name in LAST if (source / name).is_file())):
            copy_file(path, target / path.name)
        clear_temporary(target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}") from error


def _bytes(size: str | int) -> int:
    """5_000_000_000 from "5GB", as the Hub's tools read it."""
    match = re.fullmatch(r"(\d+)\s*([KMG]I?)?B?", str(size).strip().upper())
    if isinstance(size, bool) or match is None or int(match[1]) == 0:
        raise ConfigError(f"shard_size is {size!r}; write it as '5GB', '500MB' or a number of bytes")
    return int(match[1]) * UNITS[match[2] or ""]
