"""Writes checkpoint files beside their place and renames them in, so that a name never holds half a file.

All that writes raises OutputError when it cannot, for a full disk above all.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from squawq.errors import OutputError
from squawq.format.files import read_bytes
from squawq.format.reader import INDEX
from squawq.format.shards import read_header

TEMPORARY = ".squawq-tmp-"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_temporary(name: str) -> bool:
    """Whether this is the name of a folder that `beside` made."""
    return re.fullmatch(re.escape(TEMPORARY) + "[a-z0-9_]{8}", name) is not None


def refuse_link(path: Path) -> None:
    """Raises OutputError for a link where squawq makes a file or folder of its own: it leads to somebody else's."""
    if path.is_symlink():
        raise OutputError(f"{path} is a link to {path.readlink()}; remove it, or choose another place")


def clear_temporary(folder: Path) -> None:
    """Remove what a killed process of ours left half written. For a caller that holds the folder's lock."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if is_temporary(path.name):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A path on the target's disk, in a new folder of our own; what is written there replaces the target at the end.

    The folder is removed whatever goes wrong: safetensors makes a temporary file of its own in it.
    """
    with TemporaryDirectory(prefix=TEMPORARY, dir=target.parent, ignore_cleanup_errors=True) as folder:
        temporary = Path(folder, target.name)
        yield temporary
        os.replace(temporary, target)  # noqa: PTH105 (the tests kill here)


@contextmanager
def _named_at_the_end(target: Path, size: int) -> Iterator[Path]:
    """Where to write a file of about so many bytes; it gets its name when the context ends.

    Raises OutputError, for a full disk too, and gives the room back.
    """
    try:
        with beside(target) as temporary:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        room = ""
        if isinstance(error, SafetensorError) or error.errno in NO_ROOM:
            free = shutil.disk_usage(target.parent).free
            room = f". It needs {size:,} bytes, {free:,} are free; make room and run the same again"
        raise OutputError(f"{target} cannot be written: {reason}{room}") from error


def write_text(path: Path, text: str) -> None:
    """Atomically write a text file (UTF-8)."""
    content = text.encode()
    with _named_at_the_end(path, len(content)) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Atomically write a JSON file, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def copy_file(source: Path, target: Path) -> None:
    """Atomically copy a small file."""
    content = read_bytes(source)
    with _named_at_the_end(target, len(content)) as temporary:
        temporary.write_bytes(content)


def shard_name(index: int, count: int) -> str:
    """The file name of shard `index` (from 1) of `count`, as transformers spells it."""
    return f"model-{index:05d}-of-{count:05d}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Atomically write one safetensors file. Peak memory: the tensors given."""
    with _named_at_the_end(path, sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777  # the user's umask; save_file itself leaves 0600
        contents = {name: tensor.contiguous().cpu() for name, tensor in sorted(tensors.items())}
        save_file(contents, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)


def write_index(folder: Path) -> int:
    """Write the index over all shards in `folder`; returns the bytes of all tensors."""
    shards = {path.name: read_header(path) for path in sorted(folder.glob("model-*.safetensors"))}
    total = sum(info.nbytes for header in shards.values() for info in header.values())
    weight_map = {name: file for file, header in shards.items() for name in header}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    return total
