"""Reads and writes a checkpoint's safetensors files; headers are checked before anything is allocated.

`Shards` is how a checkpoint gets at its files. `FolderShards` has them in a folder; others may bring a file when it is
opened. Knows no model.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from squawq.errors import CheckpointError
from squawq.format.files import has_file, open_file, parse_json, renamed_when_written, write_json

INDEX = "model.safetensors.index.json"
MAX_HEADER = 100 * 2**20  # safetensors' own limit
DTYPES = {
    "F64": (torch.float64, 8),
    "F32": (torch.float32, 4),
    "F16": (torch.float16, 2),
    "BF16": (torch.bfloat16, 2),
    "I64": (torch.int64, 8),
    "I32": (torch.int32, 4),
    "I16": (torch.int16, 2),
    "I8": (torch.int8, 1),
    "U8": (torch.uint8, 1),
    "BOOL": (torch.bool, 1),
}
MAX_DIMENSIONS = 8
CHUNK = 32 * 2**20  # bytes of a buffer between a file and a GPU
MAX_NAME = 1024  # characters: names are shown in errors
Stamp = tuple[int, int, int]  # of a file: its size, time of change and number


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, as its header says and its file confirms. start: its first byte there."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def part(self, index: int) -> TensorInfo:
        """What lies at an index of the first dimension."""
        size = self.nbytes // self.shape[0]
        return replace(self, shape=self.shape[1:], start=self.start + index * size, nbytes=size)

    def rows(self, rows: slice) -> TensorInfo:
        """What lies at some indices of the first dimension, in one piece."""
        start, stop, _ = rows.indices(self.shape[0])
        size = self.nbytes // self.shape[0] if self.shape[0] else 0
        shape = (stop - start, *self.shape[1:])
        return replace(self, shape=shape, start=self.start + start * size, nbytes=size * (stop - start))


ReadTensor = Callable[[BufferedReader, TensorInfo], Tensor]


class Shards(Protocol):
    """The safetensors files of one checkpoint, by their names. All raise CheckpointError."""

    def names(self) -> list[str]:
        """All there are, sorted."""

    def header(self, name: str) -> dict[str, TensorInfo]:
        """The tensors of a file."""

    def open(self, name: str) -> AbstractContextManager[BufferedReader]:
        """The file, whose header was read before; it is an error if it changed since, even while it is open."""

    def fingerprint(self, name: str) -> bytes:
        """What tells the file from others of its name."""

    def room(self) -> int:
        """Bytes that bringing the files takes on disk at most; 0 where they lie already."""


class FolderShards:
    """Files that all lie in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stamps: dict[str, Stamp] = {}

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("*.safetensors") if has_file(path))

    def header(self, name: str) -> dict[str, TensorInfo]:
        self._stamps[name] = stamp(self.folder / name)
        return read_header(self.folder / name)

    def open(self, name: str) -> AbstractContextManager[BufferedReader]:
        return open_unchanged(self.folder / name, self._stamps[name])

    def fingerprint(self, name: str) -> bytes:
        """Pieces evenly spread over the file: enough to tell two checkpoints apart without reading all of them."""
        size, count = (self.folder / name).stat().st_size, 32
        with self.open(name) as file:
            pieces = []
            for index in range(count):
                file.seek(size * index // count)
                pieces.append(file.read(1 << 14))
        return f"{name} {size}\n".encode() + b"".join(pieces)

    def room(self) -> int:
        return 0


def read_shard(path: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """All tensors of a file, or those of some names. Raises CheckpointError for a file that is damaged."""
    known = stamp(path)
    header = read_header(path)
    with open_unchanged(path, known) as file:
        wanted = header if names is None else [name for name in header if name in names]
        return {name: read_tensor(file, header[name]) for name in wanted}


def stamp(path: Path) -> Stamp:
    """What changes when the file does."""
    try:
        return _stamp(path.stat())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_size, status.st_mtime_ns, status.st_ino


@contextmanager
def open_unchanged(path: Path, known: Stamp) -> Iterator[BufferedReader]:
    """A file that must be the one that had this stamp, from its opening to the end of the context."""
    try:
        with open_file(path) as file:
            yield file
            now = _stamp(os.fstat(file.fileno()))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if now != known:
        raise CheckpointError(
            f"{path}: has changed since its header was read: it had {known[0]:,} bytes, now {now[0]:,}"
        )


def read_tensor(file: BufferedReader, info: TensorInfo) -> Tensor:
    """A tensor copied out of its open file, which may have got shorter: what is missing is left as it comes."""
    data = torch.empty(info.nbytes, dtype=torch.uint8)
    file.seek(info.start)
    file.readinto(data.numpy().data)
    return data.view(info.dtype).reshape(info.shape)


class DeviceReader:
    """Reads tensors as `read_tensor` does, but into a GPU's memory, through two pinned buffers of CHUNK bytes.

    One is filled from the file while the other is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._gpu = device, device.type == "cuda"
        buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=self._gpu) for _ in range(2)]
        self._buffers = cycle([(buffer, self._event()) for buffer in buffers])

    def _event(self) -> torch.cuda.Event | None:
        return torch.cuda.Event() if self._gpu else None  # type: ignore[no-untyped-call]

    def __call__(self, file: BufferedReader, info: TensorInfo) -> Tensor:
        found = torch.empty(info.nbytes, dtype=torch.uint8, device=self._device)
        file.seek(info.start)
        for target in torch.split(found, CHUNK):
            buffer, copied = next(self._buffers)
            if copied is not None:
                copied.synchronize()
            part = buffer[: len(target)]
            file.readinto(part.numpy().data)
            target.copy_(part, non_blocking=True)
            if copied is not None:
                copied.record(torch.cuda.current_stream(self._device))
        return found.view(info.dtype).reshape(info.shape)


def read_header(path: Path, known_as: Path | None = None) -> dict[str, TensorInfo]:
    """Tensor names and places of one safetensors file, checked: sizes fit the file, no overlap, no gap.

    known_as: what to call the file in the result and in errors. Raises CheckpointError naming file and tensor.
    """
    name = known_as or path
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise CheckpointError(f"{name}: damaged: the header says {length} bytes, the file has {size}")
            header = parse_json(file.read(length))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: cannot be read as safetensors: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{name}: damaged: the header is not an object")
    header.pop("__metadata__", None)
    return check_header(name, header, 8 + length, size)


def check_header(path: Path, header: Mapping[str, Any], start: int, size: int) -> dict[str, TensorInfo]:
    """The tensors of a header whose file has so many bytes, data from `start` on. Raises CheckpointError."""
    if longest := next((name for name in header if len(name) > MAX_NAME), None):
        raise CheckpointError(f"{path}: damaged: a tensor's name has {len(longest):,} characters")
    infos = {name: _tensor_info(path, name, entry, start) for name, entry in header.items()}
    end = start
    for info in sorted(infos.values(), key=lambda info: (info.start, info.nbytes)):
        if info.start != end:
            raise CheckpointError(
                f"{path}: damaged: tensor data overlap or leave a gap at byte {min(info.start, end) - start}"
            )
        end += info.nbytes
    if end != size:
        raise CheckpointError(f"{path}: damaged: its tensors need {end - start} bytes of data, it has {size - start}")
    return infos


def _tensor_info(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    try:
        dtype, itemsize = DTYPES[entry["dtype"]]
        shape = tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**48 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: tensor {name!r}: unreadable entry or unknown dtype in the header") from error
    possible = whole and len(shape) <= MAX_DIMENSIONS and math.prod(n or 1 for n in shape) < 2**60  # also if empty
    if not possible or end - begin != math.prod(shape) * itemsize:
        raise CheckpointError(
            f"{path}: tensor {name!r}: shape {list(shape)!s:.100} and bytes {begin!r:.20} to {end!r:.20} disagree"
        )
    return TensorInfo(path, dtype, shape, start + begin, end - begin)


def shard_name(index: int, count: int) -> str:
    """The file name of shard `index` (from 1) of `count`, as transformers spells it."""
    return f"model-{index:05d}-of-{count:05d}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Atomically write one safetensors file. Peak memory: the tensors given."""
    with renamed_when_written(path, sum(tensor.nbytes for tensor in tensors.values())) as temporary:
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
