"""The one door to the files of a model folder, which is untrusted: links that leave it, fifos and devices, huge JSON.

Every file of a folder is opened here, so that what is read is a regular file that lies in the folder. The files of a
snapshot in the Hub's cache are links to the blobs beside it, and may be. Knows no model.
"""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from io import BufferedReader
from pathlib import Path
from typing import Any

from squawq.errors import CheckpointError

MAX_FILE = 64 * 2**20  # bytes of a file that is read whole
MAX_VALUES = 2**22  # brackets, colons and commas of a JSON file: each value takes up to a hundred bytes in memory
MAX_DEPTH = 64


def check_inside(path: Path, folder: Path | None = None) -> Path:
    """What a path leads to. folder: the model folder, where that is not the file's own.

    Raises CheckpointError for a link out of the folder: what it leads to was never part of the model.
    """
    try:
        root, target = (folder or path.parent).resolve(), path.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not target.is_relative_to(root) and target.parent != blobs:
        raise CheckpointError(f"{path}: is a link out of its folder, to {target}; put the file itself there")
    return target


def has_file(path: Path, folder: Path | None = None) -> bool:
    """Whether a regular file is there. Raises CheckpointError for a link out of the folder."""
    try:
        return check_inside(path, folder).is_file()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def open_file(path: Path, folder: Path | None = None) -> BufferedReader:
    """A file, open to be read. Raises CheckpointError for a link out of the folder and for what is no regular file."""
    target = check_inside(path, folder)
    try:
        return open(target, "rb", opener=_open_regular)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _open_regular(name: str, flags: int) -> int:
    """Opening a fifo would wait for a writer, and opening a device may do something."""
    if not stat.S_ISREG(os.lstat(name).st_mode):
        raise OSError("is not a regular file")
    descriptor = os.open(name, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("is not a regular file")
    return descriptor


def read_bytes(path: Path, folder: Path | None = None) -> bytes:
    """A small file. Raises CheckpointError naming it."""
    with open_file(path, folder) as file:
        try:
            data = file.read(MAX_FILE + 1)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_FILE:
        raise CheckpointError(f"{path}: larger than {MAX_FILE} bytes; this is no file of this kind")
    return data


def read_text(path: Path, folder: Path | None = None) -> str:
    """A small text file. Raises CheckpointError naming it, also where it is not UTF-8."""
    try:
        return read_bytes(path, folder).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: cannot be read as text: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object within the bounds of `parse_json`. Raises CheckpointError naming the file."""
    data = read_bytes(path)
    try:
        value = parse_json(data)
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value


def parse_json(data: bytes) -> Any:
    """JSON that is safe to work with: bounded values and levels, finite numbers, no half surrogate pairs.

    Values are counted by brackets, colons and commas, those in texts too. A text with half a surrogate pair could not
    be written again. Raises ValueError saying what is wrong.
    """
    if sum(map(data.count, b"{[:,")) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES:,} brackets, colons and commas")
    try:
        level = [value := json.loads(data.decode())]
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from error
    surrogates = b"\\ud" in data or b"\\uD" in data
    for _ in range(MAX_DEPTH):
        level = [inner for item in level for inner in _contents(item, surrogates)]
    if level:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    return value


def _contents(item: Any, surrogates: bool) -> list[Any]:
    """What lies one level deeper. Raises ValueError for a bad number or text."""
    if isinstance(item, dict):
        return [*item, *item.values()] if surrogates else list(item.values())
    if isinstance(item, list):
        return item
    if isinstance(item, str):
        if surrogates:
            item.encode()
    elif isinstance(item, int | float) and not (abs(item) <= sys.float_info.max):
        shown = item if isinstance(item, float) and not math.isfinite(item) else f"of {len(str(item))} digits"
        raise ValueError(f"a number is {shown}; it must be finite")
    return []
