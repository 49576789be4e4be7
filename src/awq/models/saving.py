"""A finished model folder to the place that `save_quantized` names. Knows file names, no tensors."""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from awq.models._config import AwqConfig
from squawq.errors import CheckpointError, ConfigError, OutputError
from squawq.format.files import (
    LEGACY,
    beside,
    clear_temporary,
    copy_file,
    has_file,
    locked,
    read_config,
    read_json,
    write_json,
)
from squawq.format.reader import COMPANIONS
from squawq.format.shards import INDEX
from squawq.report.files import PAGE, REPORT

CALLERS = (  # what a tokenizer or processor saves is the caller's, as with AutoAWQ
    *("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template"),
    *("preprocessor_config", "processor_config"),
)
LAST = (INDEX, "config.json")  # what makes a folder a model comes when the weights are there
WEIGHTS = re.compile(r"(model|model-\d+-of-\d+|pytorch_model.*)\.(safetensors|bin)")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def save(source: Path, target: Path, shard_size: str | int, *, move: bool) -> None:
    """Files of `source` into `target`, which is made if need be; weights of another model there are replaced.

    move: take the weight files from `source`, which costs nothing on one file system; they leave `source` when all is
    in place, so that after a failure this can be done again, to another place too.
    Raises CheckpointError when weights are missing or a file is a link out of `source`, ConfigError when a file is
    larger than shard_size, OutputError when `target` cannot be written.
    """
    shards, small, older = _weights(source), _small(source), _older_config(source)
    limit, largest = _bytes(shard_size), max(path.stat().st_size for path in shards)
    if largest > limit:
        raise ConfigError(f"shard_size is {shard_size!r}; the largest layer takes a file of {largest / 1e6:,.1f} MB")
    with locked(target):
        clear_temporary(target)
        try:
            _fill(target, shards, small, move=move)
            for path in (source / name for name in LAST if has_file(source / name)):
                if path.name == "config.json" and older is not None:
                    write_json(target / path.name, older)
                else:
                    copy_file(path, target / path.name)
        except OSError as error:
            raise OutputError(f"{target} cannot be written: {error.strerror or error}") from error
    for path in shards if move else ():
        with suppress(OSError):  # the temporary folder is removed later in any case
            path.unlink()


def _fill(target: Path, shards: list[Path], small: list[Path], *, move: bool) -> None:
    """Weights and what goes along into the folder, which is no model any more until the rest has come."""
    for name in (*LAST, *LEGACY):
        (target / name).unlink(missing_ok=True)
    for path in shards:
        _put(path, target / path.name, link=move)
    for path in target.iterdir():
        if WEIGHTS.fullmatch(path.name) and path.name not in {shard.name for shard in shards}:
            path.unlink()
    for path in small:
        copy_file(path, target / path.name)


def _weights(source: Path) -> list[Path]:
    """The files that the index names, or all. Raises CheckpointError if one is missing."""
    if has_file(source / INDEX):
        weight_map = read_json(source / INDEX).get("weight_map")
        names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    else:
        names = sorted(path.name for path in source.glob("*.safetensors"))
    if not names or not all(Path(name).name == name and has_file(source / name) for name in names):
        raise CheckpointError(f"{source}: the weights saved here before are gone; quantize again")
    return [source / name for name in names]


def _small(source: Path) -> list[Path]:
    """What goes along: generation config, licence, report."""
    found = [
        path for path in sorted(source.iterdir()) if COMPANIONS.fullmatch(path.name) or path.name in (REPORT, PAGE)
    ]
    return [path for path in found if not path.name.startswith(CALLERS) and has_file(path)]


def _older_config(source: Path) -> dict[str, Any] | None:
    """config.json with the settings of an older form's file in today's keys; None where it has its own or none."""
    raw = read_config(source)
    if raw == read_json(source / "config.json"):
        return None
    found = AwqConfig.from_transformers_dict(raw["quantization_config"], str(source))
    return {**raw, "quantization_config": found.to_transformers_dict()}


def _put(path: Path, target: Path, *, link: bool) -> None:
    """A weight file to its place, whole or not at all. link: the same bytes under two names, where that can be."""
    with beside(target) as temporary:
        with suppress(OSError):  # another file system, or one without links
            if link:
                temporary.hardlink_to(path)
        if not temporary.exists():
            shutil.copyfile(path, temporary)


def _bytes(size: str | int) -> int:
    """5_000_000_000 from "5GB", as the Hub's tools read it."""
    match = re.fullmatch(r"(\d+)\s*([KMG]I?)?B?", str(size).strip().upper())
    if isinstance(size, bool) or match is None or int(match[1]) == 0:
        raise ConfigError(f"shard_size is {size!r}; write it as '5GB', '500MB' or a number of bytes")
    return int(match[1]) * UNITS[match[2] or ""]
