"""Results that cannot be written where they should be: each is told in one line, and what was found is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from reports import report

from squawq.cli import main
from squawq.demo import demo_model
from squawq.report.files import REPORT

FULL = Path("/dev/full")
SCORES: dict[str, Any] = {
    "tokens": 100,
    "perplexity": 12.3456,
    "reference_perplexity": 11.0,
    "kl_mean": 0.125,
    "kl_p99": 1.5,
    "top1_agreement": 0.75,
    "window": 10,
    "stride": 5,
    "kl_by_position": [0.1] * 9,
    "text": "a text",
}
SPEED = {
    **dict.fromkeys(("streams", "prompt_tokens", "new_tokens", "threads"), 1),
    **dict.fromkeys(("prefill_tok_s", "decode_tok_s", "ttft_ms", "itl_ms_p50", "itl_ms_p99", "overhead"), 12.25),
    "device": "cpu",
    "isa": "scalar",
    "peak_rss_bytes": 2**30,
    "load_s": 1.0,
}

pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("squawq.evaluation.run.evaluate", lambda *_, **__: dict(SCORES))
    monkeypatch.setattr("squawq.bench.bench", lambda *_, **__: dict(SPEED))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / REPORT).write_text(json.dumps(report(layers=0)))
    return folder


@pytest.fixture
def full_stdout(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """stdout on a full disk, from the call on: capsys puts its own in place before a test begins."""
    with FULL.open("w", encoding="utf-8") as full:
        yield lambda: monkeypatch.setattr(sys, "stdout", full)


def error_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("squawq: error:")]


def test_a_plot_that_cannot_be_written(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scores used to be printed after it, and were lost."""
    added: list[Any] = []
    monkeypatch.setattr("squawq.report.files.add_evaluation", lambda *given: added.append(given))
    arguments = ["eval", str(out), "--reference", "model", "--plot", str(FULL)]
    assert main([*arguments, "--json"]) != 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["kl_mean"] == SCORES["kl_mean"]
    assert error_lines(printed.err) == ["squawq: error: the plot /dev/full cannot be written: No space left on device"]
    assert len(added) == 1
    assert main(arguments) != 0
    assert "12.3456" in capsys.readouterr().out


@pytest.mark.parametrize("form", [[], ["--json"]])
@pytest.mark.parametrize("command", ["eval", "bench", "inspect"])
def test_stdout_that_cannot_be_written(
    command: str,
    form: list[str],
    out: Path,
    tmp_path: Path,
    full_stdout: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = demo_model() if command == "inspect" else out
    plot = ["--plot", str(tmp_path / "plot.png")] if command == "eval" else []
    full_stdout()
    assert main([command, str(folder), *form, *plot]) != 0
    shown = capsys.readouterr().err
    (error,) = error_lines(shown)
    assert "stdout cannot be written: No space left on device; the result is shown here instead" in error
    figure = {"eval": "12.3456", "bench": "12.2", "inspect": "LlamaForCausalLM"}[command]
    assert figure in shown
    assert not plot or Path(plot[1]).read_bytes().startswith(b"\x89PNG")


def test_a_report_that_cannot_be_written(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model in the Hub's cache, say: the figures are what was asked for."""
    monkeypatch.setattr("squawq.report.files.render", lambda *_: "")
    monkeypatch.setattr("squawq.format.files.TemporaryDirectory", lambda **_: FULL.joinpath("x").open())
    assert main(["eval", str(out), "--reference", "model", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["perplexity"] == SCORES["perplexity"]
    assert "the report stays as it was" in printed.err


def test_a_plot_in_a_place_that_cannot_be(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before hours of work."""
    assert main(["eval", str(out), "--plot", str(out)]) == 2
    assert "is a folder; name a file in it" in capsys.readouterr().err


def test_a_process_whose_stdout_is_full() -> None:
    """Python itself would say so at its end, with `Exception ignored` and exit code 120."""
    with FULL.open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "squawq", "--version"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["squawq: error: [Errno 28] No space left on device"]


def test_an_encoding_that_lacks_a_character() -> None:
    """A pipe under PYTHONIOENCODING=ascii: the result is printed, with question marks for what it lacks."""
    code = "from squawq.commands.output import results\nwith results(): print('12.5 \u00e9')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stdout.decode()) == (0, "12.5 ?\n"), done.stderr
