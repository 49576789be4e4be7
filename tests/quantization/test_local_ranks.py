"""squawq quantize --devices: how many processes, and that none is left, however one of them ends."""

from __future__ import annotations

import shutil
import signal
import time
from functools import partial
from pathlib import Path

import programs
import pytest
import torch
from conftest import MakeModel

from squawq.demo import demo_model
from squawq.distributed import Ranks
from squawq.errors import ConfigError
from squawq.local_ranks import local_ranks, rank_count

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch's gloo")

# Runs the command line; rank 0 does something in the second layer, while the other process waits for it. Prints the
# other's id.
COMMAND_LINE = """
import multiprocessing, os, signal, sys, tempfile, time
from squawq import cli, local_ranks
from squawq.quantization import layer

local_ranks.GRACE_S = 2
tempfile.tempdir = os.path.dirname(sys.argv[4])  # a killed process leaves its folder there
what, choose_scales = sys.argv[1], layer.choose_scales

def begin(*given):
    print(multiprocessing.active_children()[0].pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

def acting(block, *given):
    if block.index == 1:
        other = multiprocessing.active_children()[0]
        print(other.pid, flush=True)
        if "terminal" in what:  # which sends its signals to both
            os.kill(other.pid, signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        if "twice" in what:
            os.kill(os.getpid(), signal.SIGTERM)
        if "other killed" in what:
            other.kill()
        if "stuck" in what:
            time.sleep(600)
        if "first killed" in what:
            os.kill(os.getpid(), signal.SIGKILL)
        if "failed" in what:
            raise TypeError("told")
    return choose_scales(block, *given)

layer.choose_scales = acting
if "at once" in what:  # the other process waits for the first
    local_ranks.host_ranks = begin
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.fixture
def command(make_model: MakeModel, tmp_path: Path) -> list[str]:
    folder = make_model(num_hidden_layers=3, vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model() / name, folder / name)
    options = ["--group-size", "32", "--samples", "8", "--seqlen", "32", "--devices", "2"]
    return ["quantize", str(folder), str(tmp_path / "out"), *options]


def ends(what: str, command: list[str]) -> tuple[int, str]:
    """Exit code and stderr of a run of which no process is left."""
    done = programs.run(["-c", COMMAND_LINE, what, *command], timeout=120)
    other, limit = int(done.stdout.split()[0]), time.monotonic() + 30
    while runs(other):
        assert time.monotonic() < limit, "a process is left"
        time.sleep(0.05)
    return done.returncode, done.stderr


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("devices", "device", "stream", "blocks", "ranks"),
    [
        (None, "cuda", False, 128, 4),
        (None, "cuda", False, 3, 3),
        (None, "cuda", False, None, 1),  # plain rounding
        (None, "cuda", True, 128, 1),
        (None, "cuda:1", False, 128, 1),
        (None, "cpu", False, 128, 1),
        (1, "cuda", False, 128, 1),
        (1, "cuda:1", True, 128, 1),
        (3, "cuda", False, 2, 3),  # the ranks say what is wrong
        (8, "cpu", False, 128, 8),
    ],
)
def test_how_many(devices: int | None, device: str, stream: bool, blocks: int | None, ranks: int) -> None:
    assert rank_count(devices, device, stream, lambda: blocks) == ranks


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("devices", "device", "stream", "message"),
    [
        (0, "cpu", False, "devices is 0; choose 1 or more"),
        (0, "cuda", False, "devices is 0, but 4 GPUs are visible; choose 1 to 4"),
        (5, "cuda", False, "devices is 5, but 4 GPUs are visible; choose 1 to 4"),
        (2, "cuda:1", False, "devices is 2, but device 'cuda:1' is a single one; choose cuda, cpu, or 1 device"),
        (2, "cuda", True, "devices is 2, but stream works with one; choose 1, or leave stream out"),
        (2, "gpu", False, "device 'gpu' is not there"),
    ],
)
def test_what_cannot_be(devices: int, device: str, stream: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rank_count(devices, device, stream, lambda: 128)


@pytest.mark.usefixtures("gpus")
def test_torchrun_has_started_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rank_count(None, "cuda", False, lambda: 128) == 4  # some schedulers set it
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert rank_count(None, "cuda", False, lambda: 128) == rank_count(2, "cuda", False, lambda: 128) == 1
    for devices in (1, 3):
        with pytest.raises(ConfigError, match=f"devices is {devices}, but torchrun started 2 processes"):
            rank_count(devices, "cuda", False, lambda: 128)


def write_threads(folder: Path, ranks: Ranks) -> None:
    (folder / str(ranks.rank)).write_text(str(torch.get_num_threads()))
    ranks.broadcast(lambda: None)


def test_processes_share_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        with local_ranks(2, "cpu", partial(write_threads, tmp_path)) as ranks:
            write_threads(tmp_path, ranks)
    finally:
        torch.set_num_threads(before)
    assert (ranks.rank, ranks.size) == (0, 2)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["3", "3"]


def test_an_error_is_one_line(command: list[str], tmp_path: Path) -> None:
    command[command.index("8")] = "1"
    done = programs.run(["-m", "squawq", *command], timeout=120)
    message = "2 processes cannot share 1 calibration blocks; give more samples, or start fewer"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"squawq: error: {message}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_no_process_is_left(command: list[str]) -> None:
    assert ends("killed at once", command)[0] == -signal.SIGKILL
    assert ends("first killed", command)[0] == -signal.SIGKILL
    killed = "\nsquawq: error: process 1 of 2 was killed by SIGKILL; if memory ran out, choose fewer devices\n"
    for what in ("other killed", "other killed, stuck"):
        code, text = ends(what, command)
        assert code == 2
        assert text.endswith(killed)
        assert "Traceback" not in text
    code, text = ends("failed", command)  # a defect
    assert code == 1
    assert text.endswith("\nTypeError: told\n")
    assert text.count("Traceback") == 1


def test_signals_of_a_terminal(command: list[str]) -> None:
    again = "run the same command again to resume"
    code, text = ends("terminal, twice", command)
    assert code == 130
    assert text.endswith(f"\nsquawq: stopped in layer 2 of 3; {again}\n")
    code, text = ends("terminal", command)
    assert code == 130
    assert text.endswith(f"\nsquawq: stopped after layer 2 of 3; {again}\n")
    assert text.count("stopped after") == 1
    done = programs.run(["-m", "squawq", *command], timeout=120)
    assert done.returncode == 0
    assert "going on with a run that was stopped: 2 of 3 layers are on disk" in done.stderr
