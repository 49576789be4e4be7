"""A job's folder: OUT.partial while it runs, OUT when it is done, and what makes two runs the same job.

OUT appears whole, by one rename. A folder that is not ours is never touched; a run that was killed goes on from
the layers that lie in OUT.partial.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from squawq import __version__
from squawq.errors import CheckpointError, ConfigError, OutputError, SquawqError
from squawq.format.files import has_file, open_file, read_bytes, read_json
from squawq.format.reader import Checkpoint
from squawq.format.shards import read_header, read_shard
from squawq.format.writer import TEMPORARY, clear_temporary, refuse_link, shard_name, write_json, write_shard
from squawq.quant_config import QuantConfig
from squawq.report.files import REPORT

JOB = "squawq_job.json"
PART = "squawq_part_"


def identity(checkpoint: Checkpoint, config: QuantConfig, tokens: Tensor | None, device: str) -> dict[str, Any]:
    """What must be equal for a run to go on from another's files."""
    source = hashlib.sha256(read_bytes(checkpoint.folder / "config.json"))
    for name in sorted({info.file.name for info in checkpoint.tensors.values()}):
        source.update(checkpoint.shards.fingerprint(name))
    calibration = None if tokens is None else hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    return {
        "squawq": __version__,
        "source": source.hexdigest(),
        "calibration": calibration,
        "config": config.to_dict(),
        "device": device.partition(":")[0],
    }


def scratch_folder(out: Path) -> Path:
    """A place for what a job needs only while it runs; whatever is in it goes with the job, however that ends."""
    return _partial(out) / TEMPORARY / "scratch"


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def target_path(out: str | Path, source: Path) -> Path:
    """What to make, as an absolute path. Raises ConfigError or OutputError for one that cannot appear by a rename."""
    path = Path(out).resolve()
    if path == source.resolve():
        raise ConfigError(f"{str(out)!r} is the model itself; choose another place")
    if not path.name or path.is_mount():
        raise OutputError(f"{str(out)!r} is a mount point; give a name inside it")
    return path


class Job:
    """The folders of one job. `finished` says that OUT already holds its result.

    Holds a lock on OUT.partial until `with` ends, which removes OUT.partial after a SquawqError if no layer lies there.
    Raises OutputError when OUT or OUT.partial belongs to something else, or another run works there.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], layers: int) -> None:
        self.out, self.partial = out, _partial(out)
        self.identity, self.layers = dict(identity), layers
        self.finished = self._is_finished()
        if not self.finished:
            self._claim()
            self._lock = self._take_lock()

    def _is_finished(self) -> bool:
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return False
        report = self.out / REPORT
        if not has_file(report):
            raise OutputError(f"{self.out} exists and squawq did not make it; choose another folder")
        if read_json(report).get("job") != self.identity:
            raise OutputError(
                f"{self.out} holds the result of another run (other model, settings, calibration, device or "
                "squawq version); choose another folder, or remove it first"
            )
        assert Checkpoint(self.out).tensors  # raises when a file of it has gone or is damaged
        self._tidy()  # of what a run killed at its last moment left
        return True

    def _claim(self) -> None:
        job = self.partial / JOB
        refuse_link(self.partial)
        refuse_link(self.partial / TEMPORARY)
        if self.partial.exists() and not self.partial.is_dir():
            raise OutputError(f"{self.partial} exists and squawq did not make it; move it, or choose another OUT")
        if self.partial.exists() and any(path.name != TEMPORARY for path in self.partial.iterdir()):
            if not has_file(job):
                raise OutputError(f"{self.partial} exists and squawq did not make it; move it, or choose another OUT")
            if (begun := read_json(job)) != self.identity:
                other = ", ".join(sorted(k for k in self.identity if begun.get(k) != self.identity[k]))
                raise OutputError(
                    f"{self.partial} holds an unfinished run with another {other}; "
                    "remove that folder to start anew, or choose another OUT"
                )
            return
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.partial} cannot be made: {error.strerror}") from error
        write_json(job, self.identity)

    def _take_lock(self) -> IO[bytes] | None:
        """One run at a time; the lock goes with the process, however it ends."""
        try:
            import fcntl
        except ImportError:  # not on Windows
            return None
        handle = open_file(self.partial / JOB)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.close()
            raise OutputError(f"another run is working in {self.partial}; wait for it or stop it") from error
        clear_temporary(self.partial)
        return handle

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.finished:
            return
        clear_temporary(self.partial)
        if kind is not None and issubclass(kind, SquawqError):
            self._abandon()
        if self._lock is not None:
            self._lock.close()

    def _abandon(self) -> None:
        """Nothing is lost, and other settings may be tried at once."""
        if not any(self.shard_path(part).exists() for part in range(1, self.layers + 1)):
            shutil.rmtree(self.partial, ignore_errors=True)

    def _record_path(self, part: int) -> Path:
        return self.partial / f"{PART}{part:05d}.json"

    def shard_path(self, part: int) -> Path:
        """Part 0 is the embedding, parts 1 to `layers` the decoder layers, the last the final norm and head."""
        return self.partial / shard_name(part + 1, self.layers + 2)

    def record(self, part: int) -> dict[str, Any] | None:
        """What was noted of a part that is on disk; None for one that is not."""
        if not self.shard_path(part).is_file() or not self._record_path(part).is_file():
            return None
        try:
            read_header(self.shard_path(part))
            return read_json(self._record_path(part))
        except CheckpointError:  # damaged since: done again
            return None

    def tensors(self, part: int) -> dict[str, Tensor]:
        """What was put on disk of a part."""
        return read_shard(self.shard_path(part))

    def commit(self, part: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Put a part on disk. The shard comes last: where it lies, the part is done."""
        write_json(self._record_path(part), record)
        write_shard(self.shard_path(part), tensors)

    def require_room(self, size: int, scratch: int = 0) -> None:
        """Raises OutputError when the disk cannot take a result of about so many bytes and as many beside it."""
        there = sum(path.lstat().st_size for path in self.partial.iterdir())
        needed, free = max(0, size - there) + scratch, shutil.disk_usage(self.partial).free
        if needed > free:
            raise OutputError(
                f"{self.out} needs about {needed / 1e6:,.1f} MB more, and its disk has {free / 1e6:,.1f} MB free; "
                "make room and run the same again, or choose another place"
            )

    def finish(self) -> None:
        """Give the folder its name, then clear what only resuming needs."""
        clear_temporary(self.partial)
        try:
            if self.out.is_dir():
                self.out.rmdir()  # empty, as was checked
            os.replace(self.partial, self.out)  # noqa: PTH105 (the tests kill here)
        except OSError as error:
            raise OutputError(f"{self.partial} is done, and cannot be renamed: {error.strerror}") from error
        self._tidy()

    def _tidy(self) -> None:
        for path in sorted(self.out.iterdir()):
            if path.name == JOB or path.name.startswith(PART):
                path.unlink()
