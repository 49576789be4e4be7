"""A quantization job's folder: OUT.partial while it runs, OUT when it is done, and what makes two runs the same job.

OUT appears whole, by one rename. A folder that is not ours is never touched; a run that was killed goes on from
the layers that lie in OUT.partial.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from squawq import __version__
from squawq.config import QuantConfig
from squawq.errors import OutputError
from squawq.format.reader import Checkpoint, read_json
from squawq.format.writer import shard_name, write_json, write_shard

REPORT = "squawq_report.json"
JOB = "squawq_job.json"
PART = "squawq_part_"


def identity(checkpoint: Checkpoint, config: QuantConfig, tokens: Tensor | None) -> dict[str, Any]:
    """What must be equal for a run to go on from another's files."""
    source = hashlib.sha256((checkpoint.folder / "config.json").read_bytes())
    for file in sorted({info.file for info in checkpoint.tensors.values()}):
        status = file.stat()
        source.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    calibration = None if tokens is None else hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    return {
        "squawq": __version__,
        "source": source.hexdigest(),
        "calibration": calibration,
        "config": config.to_dict(),
    }


class Job:
    """The folders of one job. `finished` says that OUT already holds its result.

    Raises OutputError when OUT or OUT.partial belongs to something else.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], layers: int) -> None:
        self.out, self.partial = out, out.with_name(out.name + ".partial")
        self.identity, self.layers = dict(identity), layers
        self.finished = self._is_finished()
        if not self.finished:
            self._claim()

    def _is_finished(self) -> bool:
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return False
        report = self.out / REPORT
        if not report.is_file():
            raise OutputError(f"{self.out} exists and squawq did not make it; choose another folder")
        if read_json(report).get("job") != self.identity:
            raise OutputError(
                f"{self.out} holds the result of another quantization (other model, settings or calibration); "
                "choose another folder, or remove it first"
            )
        self._tidy()  # of what a run killed at its last moment left
        return True

    def _claim(self) -> None:
        job = self.partial / JOB
        if self.partial.exists() and any(path.name != JOB + ".tmp" for path in self.partial.iterdir()):
            if not job.is_file():
                raise OutputError(
                    f"{self.partial} exists and squawq did not make it; move it away or choose another OUT"
                )
            if (begun := read_json(job)) != self.identity:
                other = ", ".join(sorted(k for k in self.identity if begun.get(k) != self.identity[k]))
                raise OutputError(
                    f"{self.partial} holds an unfinished quantization with another {other}; "
                    "run that one again to finish it, or remove the folder, or choose another OUT"
                )
            return
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.partial} cannot be made: {error.strerror}") from error
        write_json(job, self.identity)

    def _record_path(self, part: int) -> Path:
        return self.partial / f"{PART}{part:05d}.json"

    def shard_path(self, part: int) -> Path:
        """Part 0 is the embedding, parts 1 to `layers` the decoder layers, the last the final norm and head."""
        return self.partial / shard_name(part + 1, self.layers + 2)

    def record(self, part: int) -> dict[str, Any] | None:
        """What was noted of a part that is on disk; None for one that is not."""
        if not self.shard_path(part).is_file() or not self._record_path(part).is_file():
            return None
        return read_json(self._record_path(part))

    def commit(self, part: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Put a part on disk. The shard comes last: where it lies, the part is done."""
        write_json(self._record_path(part), record)
        write_shard(self.shard_path(part), tensors)

    def finish(self) -> None:
        """Give the folder its name, then clear what only resuming needs."""
        if self.out.is_dir():
            self.out.rmdir()  # empty, as was checked
        os.replace(self.partial, self.out)  # noqa: PTH105 (the tests kill here)
        self._tidy()

    def _tidy(self) -> None:
        for path in sorted(self.out.iterdir()):
            if path.name == JOB or path.name.startswith(PART) or path.suffix == ".tmp":
                path.unlink()
