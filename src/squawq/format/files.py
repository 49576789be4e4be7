"""Opens, writes and locks the files of a model folder, which is untrusted: links that leave it, devices, huge JSON.

Every file of a folder is opened here, so that what is read is a regular file that lies in the folder. The files of a
snapshot in the Hub's cache are links to the blobs beside it, and may be. Files are written beside their place and
renamed, so that a name never holds half a file; what writes raises OutputError, for a full disk above all.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError

from squawq.errors import CheckpointError, OutputError

if sys.platform != "win32":  # where nothing is locked
    import fcntl

MAX_FILE = 64 * 2**20  # bytes of a file that is read whole
MAX_VALUES = 2**22  # brackets, colons and commas of a JSON file: each value takes up to a hundred bytes in memory
MAX_DEPTH = 64
TEMPORARY = ".squawq-tmp-"
LEGACY = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # older forms, and the method where none is named
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        raise CheckpointError(f"{path}: larger than {MAX_FILE} bytes; this is not a file of this kind")
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


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, with the `quantization_config` of an older form's file where it has none itself.

    Raises CheckpointError where there is no config.json, or a file cannot be read.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder")
    if not has_file(folder / "config.json"):
        raise CheckpointError(f"{folder}: has no config.json, so it is not a model folder")
    raw = read_json(folder / "config.json")
    if raw.get("quantization_config") is None:
        for name, method in LEGACY.items():
            if has_file(folder / name):
                raw["quantization_config"] = {"quant_method": method, **read_json(folder / name)}
    return raw


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
def renamed_when_written(target: Path, size: int) -> Iterator[Path]:
    """Where to write a file of about `size` bytes; it gets its name when the context ends.

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
    with renamed_when_written(path, len(content)) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Atomically write a JSON file, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def copy_file(source: Path, target: Path) -> None:
    """Atomically copy a small file."""
    content = read_bytes(source)
    with renamed_when_written(target, len(content)) as temporary:
        temporary.write_bytes(content)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock on `folder`, which is made if it is not there, until the context ends.

    The lock stays with the folder when that is renamed, and goes with the process, however it ends. It holds among the
    processes of one machine.

    Args:
        wait: Wait for a process that holds the lock, instead of raising.

    Raises:
        OutputError: Another process is at work on the folder, or it cannot be made or locked.
    """
    try:
        handle = _locked_handle(folder, wait)
    except BlockingIOError as error:
        raise OutputError(f"another process is at work on {folder}; wait until it ends, or stop it") from error
    except OSError as error:
        raise OutputError(f"{folder} cannot be made or locked: {error.strerror}") from error
    try:
        yield
    finally:
        if handle is not None:
            fcntl.flock(handle, fcntl.LOCK_UN)  # said, since a forked child may hold the handle, too
            os.close(handle)


def _locked_handle(folder: Path, wait: bool) -> int | None:
    """A locked handle of the folder that has this path now: while we wait, another may remove or rename it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if sys.platform == "win32":
            return None
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(handle), folder.stat()):
                return handle
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
