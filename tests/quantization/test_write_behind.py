"""A layer is written while the next one is worked on: the same bytes, the same errors, and nothing half written."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from conftest import MakeModel
from results import settled
from safetensors.torch import load_file, save_file
from torch import Tensor

import squawq
from squawq.commands.stopping import Stopped
from squawq.errors import OutputError
from squawq.format import shards
from squawq.format.shards import write_shard
from squawq.quant_config import QuantConfig
from squawq.quantization import pipeline
from squawq.quantization.job import Job

Rows = list[list[int]]
FIRST, SECOND = (f"model-0000{number}-of-00004.safetensors" for number in (2, 3))
ONES = {"a": torch.ones(8)}
LONG = 20  # seconds until a thread that waits in vain gives up


def quantize(folder: Path, out: Path, rows: Rows | None, observer: Any = None, method: str = "squawq") -> Any:
    config = QuantConfig(group_size=32, seqlen=32, samples=8, n_grid=2, method=method)
    return squawq.quantize(folder, out, config, calibration=rows, observer=observer, progress=False)


class Stopping:
    """An observer that ends the run after the first layer."""

    def __init__(self, ended: threading.Event) -> None:
        self._ended = ended

    def start(self, layers: int, tokens: int, resumed: int, runs_in: str) -> None: ...

    def layer(self, record: object) -> None:
        self._ended.set()
        raise Stopped("stopped", signal.SIGINT)


def before_writing(monkeypatch: pytest.MonkeyPatch, name: str, work: Callable[[], object]) -> None:
    """Have `work` done before the shard of this name is written."""

    def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
        if path.name == name:
            work()
        write_shard(path, tensors)

    monkeypatch.setattr("squawq.quantization.job.write_shard", write)


def begins(monkeypatch: pytest.MonkeyPatch, index: int) -> threading.Event:
    """Set when the work on this layer begins."""
    event = threading.Event()

    def telling(name: str) -> None:
        plain = getattr(pipeline, name)

        def told(block: Any, *given: Any) -> Any:
            if block.index == index:
                event.set()
            return plain(block, *given)

        monkeypatch.setattr(pipeline, name, told)

    telling("quantize_layer")
    telling("round_layer")
    return event


@pytest.mark.parametrize("method", ["squawq", "rtn"])
def test_the_next_layer_begins_while_a_layer_is_written(
    method: str, make_model: MakeModel, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, given, waited = make_model(), None if method == "rtn" else rows, list[bool]()
    quantize(folder, tmp_path / "straight", given, method=method)
    begun = begins(monkeypatch, 1)
    before_writing(monkeypatch, FIRST, lambda: waited.append(begun.wait(LONG)))
    quantize(folder, tmp_path / "out", given, method=method)
    assert waited == [True]
    assert settled(tmp_path / "out") == settled(tmp_path / "straight")


@pytest.mark.parametrize("shard", [FIRST, SECOND])
def test_a_write_that_fails_later_is_the_same_error(
    shard: str, make_model: MakeModel, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first layer while the second is worked on; of the last, when nothing comes after it."""
    folder, out = make_model(), tmp_path / "out"
    quantize(folder, tmp_path / "straight", rows)
    with monkeypatch.context() as patch:
        begun, failed = begins(patch, 1), list[threading.Thread]()

        def full(tensors: Any, path: Path, metadata: Any) -> None:
            if path.name == shard:
                assert begun.wait(LONG)
                path.write_bytes(b"half")
                failed.append(threading.current_thread())
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            save_file(tensors, path, metadata=metadata)

        patch.setattr(shards, "save_file", full)
        wanted = rf"{shard} cannot be written: No space left on device. It needs [\d,]+ bytes, [\d,]+ are free; make"
        with pytest.raises(OutputError, match=wanted):
            quantize(folder, out, rows)
    assert failed != [threading.main_thread()]
    assert not out.exists()
    assert not list(tmp_path.rglob(".squawq-*"))
    assert [path.name for path in tmp_path.glob("out.partial/*") if path.name in (FIRST, SECOND)] == (
        [FIRST] if shard == SECOND else []
    )
    quantize(folder, out, rows)
    assert settled(out) == settled(tmp_path / "straight")


def test_what_is_being_written_is_written_when_the_run_is_stopped(
    make_model: MakeModel, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, stopped = make_model(), tmp_path / "out", threading.Event()
    quantize(folder, tmp_path / "straight", rows)

    def wait() -> None:
        assert stopped.wait(LONG)
        time.sleep(0.3)

    with monkeypatch.context() as patch:
        before_writing(patch, FIRST, wait)
        with pytest.raises(Stopped):
            quantize(folder, out, rows, Stopping(stopped))
        assert (tmp_path / "out.partial" / FIRST).is_file()
    quantize(folder, out, rows)
    assert settled(out) == settled(tmp_path / "straight")


def test_a_stopped_run_says_that_its_last_layer_could_not_be_written(
    make_model: MakeModel, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = threading.Event()

    def fail() -> None:
        assert stopped.wait(LONG)
        raise OutputError("no room")

    before_writing(monkeypatch, FIRST, fail)
    with pytest.raises(OutputError, match="no room"):
        quantize(make_model(), tmp_path / "out", rows, Stopping(stopped))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # no layer is in it


KILLED = """
# Quantizes, and is killed in the second layer while the first is being written.
import json, os, signal, sys, threading
import squawq
from squawq.format import shards
from squawq.quant_config import QuantConfig
from squawq.quantization import pipeline

folder, out, rows = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
writing, save, work = threading.Event(), shards.save_file, pipeline.quantize_layer

def save_file(tensors, path, metadata):
    if "00002-of" not in path.name:
        return save(tensors, path, metadata=metadata)
    path.write_bytes(b"half")
    writing.set()
    threading.Event().wait(20)

def quantize_layer(block, *given):
    if block.index == 1 and writing.wait(20):
        os.kill(os.getpid(), signal.SIGKILL)
    return work(block, *given)

shards.save_file, pipeline.quantize_layer = save_file, quantize_layer
squawq.quantize(folder, out, QuantConfig(group_size=32, seqlen=32, samples=8, n_grid=2), calibration=rows)
"""


def test_killed_while_a_layer_is_written_behind(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    folder, out = make_model(), tmp_path / "out"
    done = programs.run(["-c", KILLED, folder, out, json.dumps(rows)])
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in tmp_path.rglob(FIRST)] == [FIRST]  # the half that was written, in its own folder
    assert not (tmp_path / "out.partial" / FIRST).exists()
    quantize(folder, out, rows)
    quantize(folder, tmp_path / "straight", rows)
    assert settled(out) == settled(tmp_path / "straight")


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing a shard takes a moment, at whose end it is there."""

    def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
        time.sleep(0.3)
        write_shard(path, tensors)

    monkeypatch.setattr("squawq.quantization.job.write_shard", write)


@pytest.mark.usefixtures("slow")
def test_who_reads_a_part_while_it_is_written(tmp_path: Path) -> None:
    """Its tensors are in memory; what is said of the disk is said of the disk."""
    with Job(tmp_path / "out", {}, 3) as job:
        job.commit(1, ONES, {"name": "one"}, behind=True)
        assert torch.equal(job.tensors(1)["a"], ONES["a"])
        assert not job.shard_path(1).exists()
        assert job.record(1) == {"name": "one"}
        assert job.shard_path(1).exists()
        job.commit(2, ONES, {}, behind=True)
        job.verify(2)
        job.commit(2, {"a": torch.zeros(8)}, {}, behind=True)
        job.commit(3, ONES, {}, behind=True)  # at most one is being written
        assert not load_file(job.shard_path(2))["a"].any()
    assert job.shard_path(3).exists()


@pytest.mark.usefixtures("slow")
def test_a_job_is_not_finished_before_its_parts_are_written(tmp_path: Path) -> None:
    with Job(tmp_path / "out", {}, 1) as job:
        job.commit(1, ONES, {}, behind=True)
        job.finish()
    assert (tmp_path / "out" / job.shard_path(1).name).is_file()
