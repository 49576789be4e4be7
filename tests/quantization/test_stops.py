"""Kills and signals while a model is quantized: each ends with a run that can be gone on with."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import programs
import pytest
from conftest import MakeModel
from results import settled

import squawq
from squawq.demo import demo_model
from squawq.quant_config import QuantConfig
from squawq.quantization import pipeline
from squawq.quantization.check import ReadBack
from squawq.quantization.states import Streams

Rows = list[list[int]]
LAYERS = 3

COMMAND_LINE = """
# Imports everything once, then forks a child for every case, which runs the command line. A case is a signal, or 0, and
# when it comes: at this part of the time that the quickest undisturbed run took, or, if below 0, in the second layer.
# After a child that got through, OUT is put aside. Prints the exit code and last line of each.
import json, os, sys, time
from pathlib import Path
from squawq import cli
from squawq.format.reader import Checkpoint
from squawq.quantization import layer, pipeline
from transformers.models.llama import modeling_llama

arguments, cases = json.loads(sys.argv[1]), json.loads(sys.argv[2])
out, whole = Path(arguments[2]), float("inf")
output, given = os.pipe()
begun, begins = os.pipe()
choose_scales = layer.choose_scales

def searching(block, *given):
    if block.index == 1:
        os.write(begins, b"x")
        time.sleep(0.2)
    return choose_scales(block, *given)

for number, (sent, moment) in enumerate(cases):
    child, start = os.fork(), time.monotonic()
    if child == 0:
        os.dup2(given, 1)
        os.dup2(given, 2)
        if moment < 0:
            layer.choose_scales = searching
        os._exit(cli.main(arguments))
    if sent:
        if moment < 0:
            os.read(begun, 1)
        else:
            time.sleep(moment * whole)
        os.kill(child, sent)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not sent:
        whole = min(whole, time.monotonic() - start)
    os.write(given, b"\\n")
    text = os.read(output, 1 << 16).decode().rstrip().splitlines()
    if out.exists():
        assert Checkpoint(out).tensors and (out / "squawq_report.json").is_file()
    if code == 0:
        out.rename(out.with_name(f"done{number}"))
    print(json.dumps([code, text[-1] if text else ""]), flush=True)
"""


@pytest.fixture
def command(make_model: MakeModel, tmp_path: Path) -> list[str]:
    """A tiny model with a tokenizer, and the command that quantizes it to tmp_path/out."""
    folder = make_model(num_hidden_layers=LAYERS, vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model() / name, folder / name)
    (tmp_path / "text.txt").write_text("Once upon a time there was a little dog. " * 60)
    options = ["--group-size", "32", "--samples", "8", "--seqlen", "32", "--calibration", str(tmp_path / "text.txt")]
    return ["quantize", str(folder), str(tmp_path / "out"), *options]


def signalled(command: list[str], cases: list[tuple[int, float]]) -> list[tuple[int, str]]:
    """Exit code and last line of one run for each (signal, moment); see above."""
    done = programs.run(["-c", COMMAND_LINE, json.dumps(command), json.dumps(cases)])
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def quantize(folder: Path, out: Path, rows: Rows) -> dict[str, Any]:
    return squawq.quantize(folder, out, QuantConfig(group_size=32, seqlen=32, samples=8, n_grid=4), calibration=rows)


def test_killed_at_twenty_random_moments(command: list[str], tmp_path: Path) -> None:
    """kill -9 anywhere in a run, again and again; a run that got through is compared, and the next begins anew."""
    moments = random.Random(6)
    kills = [(int(signal.SIGKILL), moments.uniform(0, 1)) for _ in range(20)]
    codes = [code for code, _ in signalled(command, [(0, 0), (0, 0), *kills, (0, 0)])]
    assert set(codes) == {0, -signal.SIGKILL}
    assert codes.count(-signal.SIGKILL) >= 10
    assert codes[-1] == 0
    finished = sorted(tmp_path.glob("done*"))
    assert len(finished) == codes.count(0)
    for folder in finished:
        assert settled(folder) == settled(finished[0])
    assert not (tmp_path / "out.partial").exists()


def test_signals_stop_after_the_layer(command: list[str], tmp_path: Path) -> None:
    """They come in the second layer, which is then on disk."""
    ends = signalled(command, [(signal.SIGINT, -1), (0, 0), (signal.SIGTERM, -1), (0, 0)])
    stopped = f"squawq: stopped after layer 2 of {LAYERS}; run the same command again to resume"
    assert ends[0] == (130, stopped)
    assert ends[2] == (143, stopped)
    assert ends[1][0] == ends[3][0] == 0
    assert settled(tmp_path / "done1") == settled(tmp_path / "done3")


def test_the_second_signal_stops_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    from squawq.commands.stopping import StoppableProgress, Stopped

    before = signal.getsignal(signal.SIGINT)
    with StoppableProgress() as progress:
        progress.start(5, 0, 0, "")
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stopped, match=r"stopped in layer 1 of 5; run the same command again"):
            os.kill(os.getpid(), signal.SIGINT)
    with StoppableProgress() as progress:
        progress.start(2, 0, 0, "")
        for layer in range(2):
            progress.layer({"name": f"layers.{layer}", "notes": []})
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stopped, match="stopped while the finished folder was compared with the 16-bit model; run"):
            progress.read_back(1)
    assert "once more stops at once" in capfd.readouterr().err
    with pytest.raises(Stopped, match="before the first layer") as stopped, StoppableProgress():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def keyboard_interrupt() -> Iterator[None]:
    """Python's own handler of SIGINT, which it does not take where the tests run in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("keyboard_interrupt")
def test_a_library_call_leaves_signals_alone(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    """In another thread, and in the main one with Python's own KeyboardInterrupt."""
    folder = make_model()
    worker = threading.Thread(target=quantize, args=(folder, tmp_path / "thread", rows))
    worker.start()
    worker.join()
    assert (tmp_path / "thread" / "config.json").is_file()

    class Interrupting:
        def generating(self, what: str, done: int, total: int) -> None: ...

        def start(self, layers: int, tokens: int, resumed: int, runs_in: str) -> None: ...
        def tuning(self, step: int, steps: int) -> None: ...
        def layer(self, record: object) -> None:
            os.kill(os.getpid(), signal.SIGINT)

        def read_back(self, layers: int) -> None: ...

    config = QuantConfig(group_size=32, seqlen=32, samples=8, n_grid=4)
    with pytest.raises(KeyboardInterrupt):
        squawq.quantize(folder, tmp_path / "out", config, calibration=rows, observer=Interrupting())
    assert not (tmp_path / "out").exists()
    quantize(folder, tmp_path / "out", rows)
    assert settled(tmp_path / "out") == settled(tmp_path / "thread")


def test_a_resumed_run_multiplies_as_a_whole_one(
    make_model: MakeModel, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, hidden states come from products in TF32, also through layers that are on disk; checks are exact."""
    rounded, seen = [False], list[tuple[str, bool]]()

    @contextmanager
    def products(device: object, exact: bool) -> Iterator[None]:
        rounded.append(not exact)
        yield
        rounded.pop()

    def watch(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def watched(*given: Any) -> Any:
            seen.append((name, rounded[-1]))
            return plain(*given)

        monkeypatch.setattr(owner, name, watched)

    class Stopping:
        def generating(self, what: str, done: int, total: int) -> None: ...
        def start(self, layers: int, tokens: int, resumed: int, runs_in: str) -> None: ...
        def layer(self, record: object) -> None:
            raise KeyboardInterrupt

        def tuning(self, step: int, steps: int) -> None: ...
        def read_back(self, layers: int) -> None: ...

    monkeypatch.setattr(pipeline, "float32_products", products)
    watch(pipeline, "quantize_layer")
    watch(Streams, "skip")
    watch(ReadBack, "layer")
    folder, config = make_model(), QuantConfig(group_size=32, seqlen=32, samples=8, n_grid=4)
    with pytest.raises(KeyboardInterrupt):
        squawq.quantize(folder, tmp_path / "out", config, calibration=rows, observer=Stopping())
    squawq.quantize(folder, tmp_path / "out", config, calibration=rows, progress=False)
    assert set(seen) == {("quantize_layer", True), ("skip", True), ("layer", False)}
