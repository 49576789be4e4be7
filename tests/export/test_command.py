"""`squawq export` as a user meets it, and how OUT comes to be: whole, ours, after a stop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import MakeModel

from squawq.cli import main
from squawq.errors import CheckpointError, ConfigError, OutputError
from squawq.export.run import FORMATS, export
from squawq.quant_config import QuantConfig
from squawq.quantization.job import Job
from squawq.quantization.pipeline import quantize


@pytest.fixture
def source(make_model: MakeModel, tmp_path: Path) -> Path:
    out = tmp_path / "awq"
    quantize(make_model(), out, QuantConfig(group_size=32, method="rtn"))
    (out / "tokenizer_config.json").write_text("{}")
    (out / "chat_template.jinja").write_text("{{ messages }}")
    (out / "training.log").write_text("stays at home")
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("format_", ["compressed-tensors", "dense"])
def test_prints_where_it_is(format_: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "here"
    assert main(["export", str(source), str(out), "--format", format_]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n"
    assert " MB in " in printed.err
    names = set(contents(out))
    assert {"config.json", "squawq_report.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert "training.log" not in names
    assert len([name for name in names if name.endswith(".safetensors")]) == 4
    left = [*tmp_path.rglob(".*"), *tmp_path.rglob("*.partial"), *tmp_path.rglob("squawq_job.json")]
    assert not left


def test_misuse_is_one_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(source), str(tmp_path / "out"), "--format", "onnx"]) == 2
    printed = capsys.readouterr()
    assert "'onnx'" in printed.err
    assert all(name in printed.err for name in FORMATS)
    assert printed.err.strip().count("\n") == 0
    assert main(["export", str(source), str(tmp_path / "out")]) == 2
    assert "--format" in capsys.readouterr().err


@pytest.mark.parametrize(("format_", "other"), [("dense", "compressed-tensors"), ("compressed-tensors", "dense")])
def test_the_same_again_and_another(format_: str, other: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = export(source, out, format_)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert export(source, out, format_) == report
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    with pytest.raises(OutputError, match="another format"):
        export(source, out, other)
    next(out.glob("*-00002-*")).unlink()
    with pytest.raises(CheckpointError, match="it is missing"):
        export(source, out, format_)


def test_what_is_not_ours_stays(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "diary.txt").write_text("dear diary")
    for format_ in FORMATS:
        with pytest.raises(OutputError, match="exists"):
            export(source, out, format_)
    assert contents(out) == {"diary.txt": b"dear diary"}
    with pytest.raises(ConfigError, match="the model itself"):
        export(source, source, "dense")


def test_goes_on_after_a_stop(source: Path, tmp_path: Path) -> None:
    """Stopped after any part: no OUT, and the next run ends with the bytes of one that was not stopped."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    export(source, whole, "compressed-tensors")
    for stop in range(1, 5):

        def interrupt(done: int, total: int, stop: int = stop) -> None:
            assert total == 4
            if done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            export(source, out, "compressed-tensors", progress=interrupt)
        assert not out.exists()
    export(source, out, "compressed-tensors")
    assert contents(out) == contents(whole)


def test_one_layer_at_a_time(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No part holds more than a layer."""
    log: list[object] = []
    commit = Job.commit

    def spy(self: Job, part: int, tensors: dict[str, torch.Tensor], record: dict[str, object]) -> None:
        log.append({name.split(".")[2] for name in tensors if ".layers." in name})
        commit(self, part, tensors, record)

    monkeypatch.setattr(Job, "commit", spy)
    export(source, tmp_path / "out", "dense")
    assert log == [set(), {"0"}, {"1"}, set()]


def test_gguf_is_one_file(awq_demo: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the package gguf")
    out = tmp_path / "deep" / "model.gguf"
    assert export(awq_demo, out, "gguf")["bytes"] == out.stat().st_size > 5_000_000
    assert [path.name for path in out.parent.iterdir()] == ["model.gguf"]
    with pytest.raises(OutputError, match=r"model.gguf exists; remove it, or name another file"):
        export(awq_demo, out, "gguf")
    with pytest.raises(OutputError, match=r"deep exists and is a folder; a GGUF file needs a name of its own"):
        export(awq_demo, out.parent, "gguf")
