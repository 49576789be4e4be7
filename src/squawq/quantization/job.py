"""Keeps a job's folder: OUT.partial while it runs, renamed to OUT when it is done.

A killed run resumes from OUT.partial. A folder that squawq did not make is never touched.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squawq import __version__
from squawq.errors import CheckpointError, ConfigError, OutputError, SquawqError
from squawq.format.files import (
    clear_temporary,
    has_file,
    is_temporary,
    locked,
    read_bytes,
    read_config,
    read_json,
    refuse_link,
    write_json,
)
from squawq.format.reader import Checkpoint, read_headers
from squawq.format.shards import FolderShards, read_header, read_shard, shard_name, write_shard
from squawq.quant_config import QuantConfig
from squawq.quantization.self_calibration import SelfCalibration
from squawq.report.files import REPORT

JOB = "squawq_job.json"
PART = "squawq_part_"
TUNING = "squawq_tuning.json"  # the report's row, once scales are tuned
TUNED = "squawq_tuned_scales"  # a safetensors file, until they are in the parts
GENERATED = "squawq_calibration.ids"  # a safetensors file by another name: no loader may take it for weights
TOKEN_WEIGHTS = "squawq_token_weights"  # likewise
SCRATCH = ".squawq-scratch"  # in OUT.partial, for temporary files; removed when the job ends


def identity(
    checkpoint: Checkpoint, config: QuantConfig, tokens: Tensor | SelfCalibration | None, device: str
) -> dict[str, Any]:
    """What must be equal for a run to resume another. tokens: calibration blocks, or how they are generated."""
    source = hashlib.sha256(read_bytes(checkpoint.folder / "config.json"))
    for name in sorted({info.file.name for info in checkpoint.tensors.values()}):
        source.update(checkpoint.shards.fingerprint(name))
    if isinstance(tokens, SelfCalibration):
        calibration: str | None = tokens.fingerprint()
    else:
        calibration = None if tokens is None else hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    return {
        "squawq": __version__,
        "source": source.hexdigest(),
        "calibration": calibration,
        "config": config.to_dict(),
        "device": device.partition(":")[0],
    }


def partial_path(out: Path) -> Path:
    """The folder OUT.partial."""
    return out.with_name(out.name + ".partial")


def target_path(out: str | Path, source: Path) -> Path:
    """OUT as an absolute path. Raises ConfigError or OutputError if it cannot be created by a rename."""
    path = Path(out).resolve()
    if path == source.resolve():
        raise ConfigError(f"{str(out)!r} is the model itself; choose another place")
    if not path.name or path.is_mount():
        raise OutputError(f"{str(out)!r} is a mount point; give a name inside it")
    return path


def _differing(theirs: object, ours: Mapping[str, Any]) -> str:
    """The keys in which two identities differ, and for the config each differing setting with both values."""
    other: Mapping[str, Any] = theirs if isinstance(theirs, Mapping) else {}
    names = sorted(key for key in {*ours, *other} if other.get(key) != ours.get(key))
    before, now = other.get("config"), ours.get("config")
    if "config" in names and isinstance(before, Mapping) and isinstance(now, Mapping):
        settings = [f"{key} {before.get(key)}, now {now[key]}" for key in now if before.get(key) != now[key]]
        names[names.index("config")] = f"config ({'; '.join(settings)})"
    return ", ".join(names)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors' names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


class Job:
    """The folders of one job; `finished` if OUT already holds its result.

    Locks OUT.partial until the context ends, which waits for what is being written. A SquawqError removes OUT.partial,
    unless a layer is in it.

    Raises:
        OutputError: OUT or OUT.partial belongs to something else, or another process works there.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], layers: int) -> None:
        self.out, self.partial = out, partial_path(out)
        self.identity, self.layers = dict(identity), layers
        self._held = ExitStack()
        self._writer = ThreadPoolExecutor(1)
        self._pending: tuple[int, dict[str, Tensor], Future[None]] | None = None  # the part that is being written
        self.finished = self._is_finished()
        if not self.finished:
            self._begin()

    def _begin(self) -> None:
        """Lock before looking: the folder may have changed hands since it was seen."""
        refuse_link(self.partial)
        refuse_link(self.partial / SCRATCH)
        if self.partial.exists() and not self.partial.is_dir():
            raise OutputError(f"{self.partial} exists and squawq did not make it; move it, or choose another OUT")
        with ExitStack() as stack:
            stack.enter_context(locked(self.partial))
            try:
                self.finished = self._is_finished()  # by a run that ended meanwhile
                if self.finished:
                    return
                self._claim()
            finally:
                with suppress(OSError):  # it is not empty: begun, or another's
                    self.partial.rmdir()
            stack.enter_context(self._writer)
            self._held = stack.pop_all()

    def _is_finished(self) -> bool:
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return False
        report = self.out / REPORT
        if not has_file(report):
            raise OutputError(f"{self.out} exists and squawq did not make it; choose another folder")
        made = read_json(report).get("job")
        if made != self.identity:
            other = _differing(made, self.identity)
            raise OutputError(
                f"{self.out} holds the result of another run, with another {other}; choose another folder, or remove "
                "it first"
            )
        read_config(self.out)  # raises where it has gone; squawq need not read what an export says there
        read_headers(self.out, FolderShards(self.out))  # raises where a file has gone or is damaged
        self._tidy()  # of what a run killed at its last moment left
        return True

    def _claim(self) -> None:
        job = self.partial / JOB
        if has_file(job):
            if (begun := read_json(job)) != self.identity:
                other = _differing(begun, self.identity)
                raise OutputError(
                    f"{self.partial} holds an unfinished run with another {other}; "
                    "remove that folder to start over, or choose another OUT"
                )
        elif any(not is_temporary(path.name) for path in self.partial.iterdir()):
            raise OutputError(f"{self.partial} exists and squawq did not make it; move it, or choose another OUT")
        else:
            write_json(job, self.identity)
        self._clear()

    def _clear(self) -> None:
        """Remove temporary files."""
        clear_temporary(self.partial)
        shutil.rmtree(self.partial / SCRATCH, ignore_errors=True)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._held:
            if self.finished:
                return
            try:
                self._settle()
            except SquawqError as error:
                kind = type(error)
                raise
            finally:
                self._clear()
                if kind is not None and issubclass(kind, SquawqError):
                    self._abandon()

    def _abandon(self) -> None:
        """Remove OUT.partial if no layer is in it, so that other settings can be tried at once."""
        if any(self.shard_path(part).exists() for part in range(1, self.layers + 1)):
            return
        with suppress(OSError):  # another's files stay
            for path in (self.shard_path(0), self.shard_path(self.layers + 1), *self._notes(self.partial)):
                path.unlink(missing_ok=True)
            self.partial.rmdir()

    def _notes(self, folder: Path) -> list[Path]:
        """The files that are only needed to resume."""
        parts = (folder / self._record_path(part).name for part in range(self.layers + 2))
        return [folder / JOB, folder / GENERATED, folder / TOKEN_WEIGHTS, folder / TUNING, folder / TUNED, *parts]

    def _record_path(self, part: int) -> Path:
        return self.partial / f"{PART}{part:05d}.json"

    def shard_path(self, part: int) -> Path:
        """Part 0 is the embedding, parts 1 to `layers` the decoder layers, the last the final norm and head."""
        return self.partial / shard_name(part + 1, self.layers + 2)

    def record(self, part: int) -> dict[str, Any] | None:
        """The report's row of a part on disk; None if it is not there."""
        self._settle()
        if not self.shard_path(part).is_file() or not self._record_path(part).is_file():
            return None
        try:
            read_header(self.shard_path(part))
            found = read_json(self._record_path(part)).get("row")
            return found if isinstance(found, dict) else None
        except CheckpointError:  # damaged since: done again
            return None

    def verify(self, part: int) -> None:
        """Read a part back. Raises CheckpointError if it is not what `commit` was given."""
        self._settle()
        path = self.shard_path(part)
        again = "remove this file and run the same command again: only this part is done anew"
        try:
            found = _digest(self.tensors(part))
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {again}") from error
        if found != read_json(self._record_path(part)).get("sha256"):
            raise CheckpointError(f"{path}: read back, its tensors are not what was written; {again}")

    def tensors(self, part: int, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """The stored tensors of a part, by name in the checkpoint; from memory while the part is being written.

        names: Only these are read.
        """
        if self._pending is not None and self._pending[0] == part:
            return dict(self._pending[1])
        return read_shard(self.shard_path(part), names)

    def commit(
        self, part: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any], *, behind: bool = False
    ) -> None:
        """Write a part. The shard is written last: if it is there, the part is done.

        Args:
            part: Which one.
            tensors: Its tensors by name in the checkpoint.
            record: Its row of the report.
            behind: Write in a thread, and return at once. An error is raised by what next waits for the part: at the
                latest the next commit or the end of the job.
        """
        self._settle()
        if behind:
            kept = {name: tensor.cpu() for name, tensor in tensors.items()}
            self._pending = part, kept, self._writer.submit(self._write, part, kept, record)
        else:
            self._write(part, tensors, record)

    def _settle(self) -> None:
        """Wait for the part that is being written; raises its error."""
        if self._pending is not None:
            written = self._pending[2]
            try:
                written.result()
            finally:
                if written.done():  # not when waiting was interrupted
                    self._pending = None

    def _write(self, part: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        write_json(self._record_path(part), {"row": dict(record), "sha256": _digest(tensors)})
        write_shard(self.shard_path(part), tensors)

    def generated_tokens(self, shape: tuple[int, int], generate: Callable[[], Tensor]) -> Tensor:
        """Calibration blocks that the model generated, int64 of this shape: those on disk, or new ones, then on disk.

        Raises CheckpointError for a file that is damaged.
        """
        path = self.partial / GENERATED
        if not has_file(path):
            write_shard(path, {"ids": generate()})
        ids = read_shard(path).get("ids")
        if ids is None or ids.dtype != torch.int64 or tuple(ids.shape) != shape:
            raise CheckpointError(f"{path}: damaged; remove {self.partial} to start over")
        return ids

    def token_weights(self, shape: tuple[int, int], weigh: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Weights of the calibration tokens, float16 of this shape by key: those on disk, or new ones, then on disk.

        Raises CheckpointError for a file that is damaged.
        """
        path = self.partial / TOKEN_WEIGHTS
        if not has_file(path):
            write_shard(path, weigh())
        found = read_shard(path)
        if not found or any(w.dtype != torch.float16 or tuple(w.shape) != shape for w in found.values()):
            raise CheckpointError(f"{path}: damaged; remove {self.partial} to start over")
        return found

    def tuning(self) -> dict[str, Any] | None:
        """The report's row of tuning; None if scales are not tuned yet. Writes what an earlier run has tuned."""
        self._settle()
        if not has_file(self.partial / TUNING):
            return None
        row = read_json(self.partial / TUNING)
        if row.pop("pending"):
            if not has_file(self.partial / TUNED):
                return None
            self._write_scales(row)
        return row

    def commit_tuning(self, scales: Mapping[str, Tensor], row: Mapping[str, Any]) -> None:
        """Replace scales, by name in the checkpoint, in all parts. A killed run does the rest when it resumes."""
        write_json(self.partial / TUNING, {**row, "pending": True})
        write_shard(self.partial / TUNED, scales)
        self._write_scales(row)

    def _write_scales(self, row: Mapping[str, Any]) -> None:
        scales = read_shard(self.partial / TUNED)
        for part in range(1, self.layers + 1):
            tensors = {name: scales.get(name, tensor) for name, tensor in self.tensors(part).items()}
            self.commit(part, tensors, self.record(part) or {})
        write_json(self.partial / TUNING, {**row, "pending": False})

    def forget_tuning(self) -> None:
        """A layer is quantized anew: scales are tuned again."""
        for name in (TUNING, TUNED):
            (self.partial / name).unlink(missing_ok=True)

    def require_room(self, size: int, scratch: int = 0) -> None:
        """Raise OutputError if the disk lacks room for a result of `size` bytes and `scratch` bytes beside it."""
        there = sum(path.lstat().st_size for path in self.partial.iterdir())
        needed, free = max(0, size - there) + scratch, shutil.disk_usage(self.partial).free
        if needed > free:
            raise OutputError(
                f"{self.out} needs about {needed / 1e6:,.1f} MB more, and its disk has {free / 1e6:,.1f} MB free; "
                "make room and run the same again, or choose another place"
            )

    def finish(self) -> None:
        """Rename OUT.partial to OUT and remove what is only needed to resume."""
        self._settle()
        self._clear()
        try:
            if self.out.is_dir():
                self.out.rmdir()  # empty, as was checked
            os.replace(self.partial, self.out)  # noqa: PTH105 (the tests kill here)
        except OSError as error:
            raise OutputError(f"{self.partial} is done, and cannot be renamed: {error.strerror}") from error
        self.finished = True
        self._tidy()

    def _tidy(self) -> None:
        for path in self._notes(self.out):
            path.unlink(missing_ok=True)
