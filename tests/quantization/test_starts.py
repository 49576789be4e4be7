"""Several processes that start on one folder at once: one works, the others say so, and nobody's own files go."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import programs
import pytest

from awq.models.saving import save
from squawq.errors import ConfigError, OutputError
from squawq.format.files import clear_temporary, locked, read_json, write_json
from squawq.quantization import job as jobs
from squawq.quantization.job import Job
from squawq.report.files import REPORT, add_evaluation

IDENTITY = {"source": "a model", "squawq": "0"}
BUSY = r"another process is at work on .*; wait until it ends, or stop it"

STARTS = """
# Forks `count` children for each round; all start a job on one folder at the same time. Each that gets in puts down a
# mark that must not be there yet, and takes it away. Prints what became of each.
import json, os, sys, time
from pathlib import Path
from squawq.errors import SquawqError
from squawq.quantization.job import Job

folder, rounds, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def work(out, start):
    os.read(start, 1)
    try:
        with Job(out, {"source": "a model"}, 1) as job:
            if job.finished:
                return "finished"
            (job.partial / "mark").mkdir()
            time.sleep(0.001)
            (job.partial / "mark").rmdir()
            raise SquawqError("gone on with by nobody")
    except FileExistsError as error:
        return f"two at once: {error}"
    except SquawqError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

ends = []
for number in range(rounds):
    start, starts = os.pipe()
    output, given = os.pipe()
    children = []
    for _ in range(count):
        children.append(os.fork())
        if children[-1] == 0:
            os.write(given, (work(folder / f"out{number}", start) + "\\n").encode())
            os._exit(0)
    os.write(starts, bytes(count))
    for child in children:
        os.waitpid(child, 0)
    ends += os.read(output, 1 << 16).decode().splitlines()
    for handle in (start, starts, output, given):
        os.close(handle)
print(json.dumps(ends))
"""


def test_processes_that_start_together(tmp_path: Path) -> None:
    done = programs.run(["-c", STARTS, tmp_path, "40", "3"])
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout)
    assert len(ends) == 120
    busy = [end for end in ends if end.startswith("another process is at work on")]
    assert len(busy) + ends.count("gone on with by nobody") == len(ends), set(ends)
    assert not list(tmp_path.iterdir())


def started(out: Path) -> Job | OutputError:
    try:
        return Job(out, IDENTITY, 1)
    except OutputError as error:
        return error


def interrupted(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, meanwhile: Callable[[], object]) -> list[Any]:
    """Do `meanwhile` once, just before the function of this name is called; its result comes in the list."""
    found: list[Any] = []
    function = getattr(place, name)

    def called(*arguments: Any) -> Any:
        if not found:
            found.append(None)  # once
            found[0] = meanwhile()
        return function(*arguments)

    monkeypatch.setattr(place, name, called)
    return found


def test_another_starts_while_the_job_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both used to hold a lock: each on its own squawq_job.json, of which the second had replaced the first."""
    out = tmp_path / "out"
    found = interrupted(monkeypatch, jobs, "write_json", lambda: started(out))
    ends = [started(out), *found]
    assert [type(end) for end in ends].count(Job) == 1
    (error,) = [str(end) for end in ends if isinstance(end, OutputError)]
    assert error.startswith(f"another process is at work on {out}.partial")


def test_the_folder_goes_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run ends with an error and removes it: what was opened is no longer OUT.partial."""
    out = tmp_path / "out"

    def failing() -> None:
        with pytest.raises(ConfigError), Job(out, IDENTITY, 1):
            raise ConfigError("no such setting")

    interrupted(monkeypatch, fcntl, "flock", failing)
    with Job(out, IDENTITY, 1) as job:
        assert read_json(job.partial / jobs.JOB) == IDENTITY
        assert isinstance(started(out), OutputError)


def test_the_job_is_done_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(Job, "_is_finished", lambda self: self.out.exists())

    def working() -> None:
        with Job(out, IDENTITY, 1) as job:
            job.finish()

    interrupted(monkeypatch, fcntl, "flock", working)
    job = started(out)
    assert isinstance(job, Job)
    assert job.finished
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list(out.iterdir())


def test_an_error_gives_the_folder_free(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(ConfigError), Job(out, IDENTITY, 1):
            raise ConfigError("no such setting")
        assert not list(tmp_path.iterdir())


def test_a_forked_child_does_not_hold_the_lock(tmp_path: Path) -> None:
    """As the processes that render templates: they may outlive the work."""
    end, ends = os.pipe()
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            os.read(end, 1)
            os._exit(0)
    with locked(tmp_path):
        os.write(ends, b"x")
    os.waitpid(child, 0)
    os.close(end)
    os.close(ends)


def test_what_lies_in_the_partial_folder_of_nobody_stays(tmp_path: Path) -> None:
    """A folder .tmp there used to be taken for a run's own."""
    theirs = tmp_path / "out.partial" / ".tmp"
    theirs.mkdir(parents=True)
    (theirs / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="squawq did not make it"):
        Job(tmp_path / "out", IDENTITY, 1)
    assert (theirs / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("name", [".tmp", "notes", "squawq_part_of_mine", ".squawq-tmp-of-mine"])
def test_what_is_put_into_a_run_s_folder_stays(name: str, tmp_path: Path) -> None:
    """Whether the run fails or ends well."""
    out = tmp_path / "out"
    job = Job(out, IDENTITY, 1)
    (job.partial / name).mkdir()
    (job.partial / name / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError), job:
        raise ConfigError("no such setting")
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.txt")] == [Path("out.partial", name, "thesis.txt")]
    shutil.rmtree(job.partial)
    with Job(out, IDENTITY, 1) as job:
        (job.partial / name).mkdir()
        (job.partial / name / "thesis.txt").write_text("mine")
        job.finish()
    assert (out / name / "thesis.txt").read_text() == "mine"
    assert len(list(out.iterdir())) == 1


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A quantized folder as far as reports go, with a folder of somebody's own in it."""
    out = tmp_path / "out"
    (out / ".tmp").mkdir(parents=True)
    (out / ".tmp" / "thesis.txt").write_text("mine")
    write_json(out / REPORT, {"layers": [], "job": IDENTITY})
    return out


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("squawq.report.files.render", lambda *_: "")


@pytest.mark.usefixtures("no_page")
def test_a_report_leaves_what_is_not_ours(finished: Path) -> None:
    left = finished / ".squawq-tmp-abcdefgh"  # by a killed process
    left.mkdir()
    (left / "report.html").write_text("half")
    add_evaluation(finished, "model", {"perplexity": 2.0})
    assert (finished / ".tmp" / "thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in finished.iterdir()) == [".tmp", "report.html", REPORT]


@pytest.mark.usefixtures("no_page")
def test_two_reports_at_once(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits, so that the page shows what the JSON has."""
    children: list[int] = []

    def other() -> None:
        children.append(os.fork())
        if children[0] == 0:
            try:
                with locked(finished):
                    os._exit(1)
            except OutputError:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0, "the folder was not locked"

    interrupted(monkeypatch, sys.modules["squawq.report.files"], "write_text", other)
    add_evaluation(finished, "model", {"perplexity": 2.0})
    assert children


def test_saving_leaves_what_is_not_ours_and_one_saves_at_a_time(finished: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").write_text("weights")
    (source / "config.json").write_text('{"model_type": "llama"}')
    with locked(finished), pytest.raises(OutputError, match=BUSY):
        save(source, finished, "5GB", move=False)
    assert not (finished / "config.json").exists()
    save(source, finished, "5GB", move=False)
    assert (finished / ".tmp" / "thesis.txt").read_text() == "mine"
    assert (finished / "model.safetensors").read_text() == "weights"


def test_only_our_own_names_are_cleared(tmp_path: Path) -> None:
    names = [".tmp", ".squawq-tmp-", ".squawq-tmp-abcdefghi", "x.squawq-tmp-abcdefgh"]
    for name in (*names, ".squawq-tmp-ab_de1gh"):
        (tmp_path / name).mkdir()
    (tmp_path / ".squawq-tmp-linked_0").symlink_to(tmp_path / ".tmp")
    clear_temporary(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*names, ".squawq-tmp-linked_0"}
