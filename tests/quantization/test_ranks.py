"""torchrun's processes share one calibration: the result of one process, and an error on one is everybody's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import programs
import pytest
import torch
from conftest import MakeModel
from family_models import family_model
from results import settled

import squawq
from squawq.config import ModelConfig
from squawq.demo import demo_model
from squawq.distributed import Ranks, TorchRanks, torchrun_ranks
from squawq.errors import CalibrationError, ConfigError
from squawq.format.files import read_json
from squawq.format.reader import Checkpoint
from squawq.quant_config import QuantConfig

WORKER = Path(__file__).with_name("ranks_worker.py")
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
needs_gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch's gloo")


def torchrun(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*LAUNCH, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=120)


def integers(folder: Path) -> torch.Tensor:
    checkpoint = Checkpoint(folder)
    words = [checkpoint.read(name).flatten() for name in sorted(checkpoint.tensors) if name.endswith("qweight")]
    return torch.stack([torch.cat(words) >> shift & 15 for shift in range(0, 32, 4)])


def assert_equal_within_rounding(folder: Path, other: Path) -> None:
    """Sums in another order may turn a value that lies between two integers; the losses hardly move."""
    assert (integers(folder) != integers(other)).float().mean() < 1e-3
    reports = [read_json(path / "squawq_report.json") for path in (folder, other)]
    assert reports[0]["job"] == reports[1]["job"]
    for mine, theirs in zip(reports[0]["layers"], reports[1]["layers"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
        assert [row["name"] for row in mine["linears"]] == [row["name"] for row in theirs["linears"]]


@needs_gloo
def test_the_command_under_torchrun(make_model: MakeModel, tmp_path: Path) -> None:
    vocabulary = ModelConfig.from_dict(read_json(demo_model() / "config.json")).vocab_size
    model = make_model(vocab_size=vocabulary)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model() / name, model)
    options = ["--group-size", "32", "--samples", "5", "--seqlen", "32", "--states-memory", "0"]
    done = torchrun("-m", "squawq", "quantize", model, tmp_path / "two", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [str(tmp_path / "two")]  # one process speaks
    assert done.stderr.count("2 layers, 160 calibration tokens") == 1
    squawq.quantize(model, tmp_path / "one", QuantConfig(group_size=32, samples=5, seqlen=32))
    assert_equal_within_rounding(tmp_path / "one", tmp_path / "two")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command: list[str | Path] = ["-m", "squawq", "quantize", model, tmp_path / "devices", *options, "--devices", "2"]
    done = programs.run(command, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [str(tmp_path / "devices")]
    assert done.stderr.count("2 layers, 160 calibration tokens") == 1
    assert settled(tmp_path / "devices") == settled(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["devices", "model", "one", "two"]


@needs_gloo
def test_layers_that_share_keys_and_values(tmp_path: Path) -> None:
    """Each process keeps those of its own tokens, in files, and the first one judges layers by some of all."""
    vocabulary = ModelConfig.from_dict(read_json(demo_model() / "config.json")).vocab_size
    model = tmp_path / "model"
    family_model("gemma4_text per layer", model, vocab_size=vocabulary, vocab_size_per_layer_input=vocabulary)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model() / name, model)
    options = ["--group-size", "32", "--samples", "5", "--seqlen", "32", "--states-memory", "0"]
    done = torchrun("-m", "squawq", "quantize", model, tmp_path / "two", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    squawq.quantize(model, tmp_path / "one", QuantConfig(group_size=32, samples=5, seqlen=32))
    reports = [read_json(tmp_path / name / "squawq_report.json")["layers"] for name in ("one", "two")]
    for mine, theirs in zip(*reports, strict=True):  # an integer that rounding turns moves much in so small a model
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.1)
        assert theirs["loss"] < 0.8 * theirs["loss_rounded"]


@needs_gloo
def test_one_process_generates_for_both(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model() / name, model)
    options = ["--group-size", "32", "--samples", "5", "--seqlen", "32", "--calibration", "self"]
    done = torchrun("-m", "squawq", "quantize", model, tmp_path / "two", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("generating 5 rows of 32 calibration tokens") == 1
    config = QuantConfig(group_size=32, samples=5, seqlen=32)
    squawq.quantize(model, tmp_path / "one", config, calibration="self")
    assert_equal_within_rounding(tmp_path / "one", tmp_path / "two")


@needs_gloo
def test_two_processes_end_alike(make_model: MakeModel, rows: list[list[int]], tmp_path: Path) -> None:
    model = make_model()
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    done = programs.run_ranks(2, [WORKER, model, tmp_path], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240)
    assert (tmp_path / "1.json").exists(), done[1].stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    gone = first.pop("gone")
    assert first == second
    assert {first[name] for name in ("straight", "again", "weighted", "resumed", "signalled, resumed", "rounded")} == {
        "report of 2 layers"
    }
    assert first["stopped"] == first["stopped again"] == "KeyboardInterrupt: "
    assert first["signalled"] == "Stopped: stopped after layer 1 of 2; run the same command again to resume"
    assert first["few"].startswith("CalibrationError: 2 processes cannot share 1 calibration blocks")
    assert first["other text"].startswith("ConfigError: process 1 has another calibration than process 0")
    assert first["bad device"].startswith("ConfigError: device 'cuda:0' cannot be shared by 2 processes")
    assert first["streamed"].startswith("ConfigError: 2 processes cannot stream")
    assert first["full disk"].startswith("OutputError: ")  # of the second process
    assert gone.startswith("RankError: another process of this run has ended")
    for name in ("few", "other", "full", "gone"):
        assert not (tmp_path / name).exists()
        assert not (tmp_path / f"{name}.partial").exists()
    config = QuantConfig(group_size=32, seqlen=32, samples=8)
    squawq.quantize(model, tmp_path / "one", config, calibration=rows)
    assert_equal_within_rounding(tmp_path / "one", tmp_path / "straight")
    weighted = replace(config, token_weights=True)
    squawq.quantize(model, tmp_path / "one weighted", weighted, calibration=rows)
    assert_equal_within_rounding(tmp_path / "one weighted", tmp_path / "weighted")
    for name in ("stopped", "signalled"):
        assert settled(tmp_path / name) == settled(tmp_path / "straight")
    squawq.quantize(model, tmp_path / "left", config, calibration=rows)  # one process goes on with what two began
    assert_equal_within_rounding(tmp_path / "one", tmp_path / "left")
    squawq.quantize(model, tmp_path / "plain", QuantConfig(group_size=32, method="rtn"))
    assert settled(tmp_path / "rounded") == settled(tmp_path / "plain")


def test_blocks_are_shared_evenly_and_each_once() -> None:
    def shares(size: int, blocks: int) -> list[slice]:
        ranks = Ranks()
        ranks.size = size
        found = []
        for ranks.rank in range(size):
            found.append(ranks.share(blocks))
        return found

    assert shares(1, 5) == [slice(0, 5)]
    assert shares(3, 7) == [slice(0, 2), slice(2, 4), slice(4, 7)]
    assert shares(3, 3) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    with pytest.raises(CalibrationError, match="3 processes cannot share 2 calibration blocks"):
        shares(3, 2)


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")  # as some schedulers set it
    monkeypatch.setenv("WORLD_SIZE", "4")
    with torchrun_ranks("cuda") as ranks:
        assert (ranks.rank, ranks.size, ranks.first) == (0, 1, True)
        assert ranks.device("cuda:1") == "cuda:1"
        with pytest.raises(ConfigError, match="as it is"), ranks.session():
            raise ConfigError("as it is")


@pytest.mark.parametrize("raised", [KeyboardInterrupt, TypeError])  # the second for what cannot be pickled
def test_what_breaks_an_exchange_is_not_told_by_another(
    raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are still in that exchange: they would take the message for a part of it, or wait for ever."""
    exchanges = []

    def all_gather_object(found: list[object], value: object) -> None:
        exchanges.append(value)
        raise raised

    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    ranks = TorchRanks(1)
    with pytest.raises(raised), ranks.session():
        ranks.broadcast(lambda: None)
    assert exchanges == [None]
