"""A job's folder: OUT.partial while it runs, OUT when it is done, and what makes two runs the same job.

OUT appears whole, by one rename. A folder that is not ours is never touched; a run that was killed goes on from
the layers that lie in OUT.partial.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from squawq import __version__
from squawq.errors import CheckpointError, ConfigError, OutputError, SquawqError
from squawq.format.files import has_file, read_bytes, read_json
from squawq.format.locking import locked
from squawq.format.reader import Checkpoint
from squawq.format.shards import read_header, read_shard
from squawq.format.writer import clear_temporary, is_temporary, refuse_link, shard_name, write_json, write_shard
from squawq.quant_config import QuantConfig
from squawq.report.files import REPORT

JOB = "squawq_job.json"
PART = "squawq_part_"
SCRATCH = ".squawq-scratch"


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
    return _partial(out) / SCRATCH


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


def _differing(theirs: object, ours: Mapping[str, Any]) -> str:
    """What of a job's identity another has not: its keys, and of the config each setting with both values."""
    other: Mapping[str, Any] = theirs if isinstance(theirs, Mapping) else {}
    names = sorted(key for key in {*ours, *other} if other.get(key) != ours.get(key))
    before, now = other.get("config"), ours.get("config")
    if "config" in names and isinstance(before, Mapping) and isinstance(now, Mapping):
        settings = [f"{key} {before.get(key)}, now {now[key]}" for key in now if before.get(key) != now[key]]
        names[names.index("config")] = f"config ({'; '.join(settings)})"
    return ", ".join(names)


class Job:
    """The folders of one job. `finished` says that OUT already holds its result.

    Holds the lock on OUT.partial until `with` ends, which after a SquawqError removes what it wrote there, unless a
    layer is among it. Raises OutputError when OUT or OUT.partial belongs to something else, or another process works
    there.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], layers: int) -> None:
        self.out, self.partial = out, _partial(out)
        self.identity, self.layers = dict(identity), layers
        self._held = ExitStack()
        self.finished = self._is_finished()
        if not self.finished:
            self._begin()

    def _begin(self) -> None:
        """Lock first, then look: what was seen before the lock may be another's since."""
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
        _ = Checkpoint(self.out).tensors  # reads all headers: raises where a file has gone or is damaged
        self._tidy()  # of what a run killed at its last moment left
        return True

    def _claim(self) -> None:
        job = self.partial / JOB
        if has_file(job):
            if (begun := read_json(job)) != self.identity:
                other = _differing(begun, self.identity)
                raise OutputError(
                    f"{self.partial} holds an unfinished run with another {other}; "
                    "remove that folder to start anew, or choose another OUT"
                )
        elif any(not is_temporary(path.name) for path in self.partial.iterdir()):
            raise OutputError(f"{self.partial} exists and squawq did not make it; move it, or choose another OUT")
        else:
            write_json(job, self.identity)
        self._clear()

    def _clear(self) -> None:
        """Remove what only a running process needs."""
        clear_temporary(self.partial)
        shutil.rmtree(self.partial / SCRATCH, ignore_errors=True)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._held:
            if self.finished:
                return
            self._clear()
            if kind is not None and issubclass(kind, SquawqError):
                self._abandon()

    def _abandon(self) -> None:
        """Where nothing is lost by it, let other settings be tried at once."""
        if any(self.shard_path(part).exists() for part in range(1, self.layers + 1)):
            return
        with suppress(OSError):  # another's files stay
            for path in (self.shard_path(0), self.shard_path(self.layers + 1), *self._notes(self.partial)):
                path.unlink(missing_ok=True)
            self.partial.rmdir()

    def _notes(self, folder: Path) -> list[Path]:
        """The files that only resuming needs."""
        return [folder / JOB, *(folder / self._record_path(part).name for part in range(self.layers + 2))]

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
