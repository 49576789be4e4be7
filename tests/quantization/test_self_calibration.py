"""Calibration text that the model generates itself: what is sampled, kept beside the job, resumed and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from conftest import MakeModel, logits
from family_models import family_model
from results import contents, settled

import squawq
from squawq import cli
from squawq.commands.stopping import StoppableProgress, Stopped
from squawq.demo import demo_model
from squawq.errors import CheckpointError, ConfigError, OutputError
from squawq.families import family_of
from squawq.format.reader import Checkpoint
from squawq.format.shards import write_shard
from squawq.layerwise.blocks import Blocks
from squawq.layerwise.whole_model import WholeModel, draw
from squawq.nn.cache import Cache
from squawq.quant_config import QuantConfig
from squawq.quantization import self_calibration
from squawq.quantization.self_calibration import SelfCalibration
from squawq.report.schema import Report
from squawq.report.words import command, facts

VOCABULARY = 4096  # the demo model's, whose tokenizer the tiny models have
BOS = 0
CONFIG = QuantConfig(group_size=32, seqlen=32, samples=6, n_grid=3, seed=3)
ROWS, SEQLEN = 6, 32

# The library, killed when the model has generated its text and the first layer is about to begin.
KILLED = """
import os, signal, sys
import squawq
from squawq.layerwise.whole_model import WholeModel, draw
from squawq.nn.cache import Cache
from squawq.quant_config import QuantConfig

class Killing:
    def generating(self, what, done, total):
        print(what, done, total)

    def start(self, *given):
        os.kill(os.getpid(), signal.SIGKILL)

config = QuantConfig(group_size=32, seqlen=32, samples=6, n_grid=3, seed=3)
squawq.quantize(sys.argv[1], sys.argv[2], config, calibration="self", observer=Killing())
"""


@pytest.fixture
def model(make_model: MakeModel) -> Path:
    return with_tokenizer(make_model(vocab_size=VOCABULARY))


def with_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo_model() / name, folder)
    return folder


def silent(*_: object) -> None: ...


def plan_of(folder: Path, source: str = "self", **changes: Any) -> SelfCalibration:
    plan = SelfCalibration.of(source, Checkpoint(folder), rows=ROWS, seqlen=SEQLEN, seed=3)
    return replace(plan, **changes)


def tokens(folder: Path, **changes: Any) -> torch.Tensor:
    return plan_of(folder, **changes).tokens(Checkpoint(folder), "cpu", silent)


def by_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_calibration, "_open", lambda *_: None)


Way = Callable[[pytest.MonkeyPatch], object]
WAYS = pytest.mark.parametrize("way", [silent, by_transformers], ids=["decoder", "transformers"])


@WAYS
def test_rows_are_full_and_reproducible(way: Way, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    way(monkeypatch)
    threads = torch.get_num_threads()
    seen: list[tuple[str, int, int]] = []
    plan = plan_of(model)
    found = plan.tokens(Checkpoint(model), "cpu", lambda *given: seen.append(given))
    assert found.shape == plan.shape == (ROWS, SEQLEN)
    assert found.dtype == torch.int64
    assert (found >= 0).all()
    assert (found < VOCABULARY).all()
    assert (found[:, 0] == BOS).all()
    assert len({tuple(row) for row in found.tolist()}) == ROWS
    assert torch.equal(found, tokens(model))
    assert (found[:, 1:] != tokens(model, seed=4)[:, 1:]).float().mean() > 0.9
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[0][1:] == (0, ROWS * SEQLEN)
    assert seen[-1][1:] == (ROWS * SEQLEN, ROWS * SEQLEN)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("family", ["llama", "qwen3_5_text"])  # the second keeps a state of each row
def test_the_batch_does_not_matter_to_the_decoder(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family_model(family, tmp_path, vocab_size=VOCABULARY)
    model = with_tokenizer(tmp_path)
    found = tokens(model)
    assert torch.equal(tokens(model, rows=2), found[:2])
    monkeypatch.setattr(self_calibration, "_fits", lambda _, rows, __: rows <= 4)
    assert torch.equal(tokens(model), found)


@WAYS
def test_texts_follow_each_other(way: Way, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an end token comes the first token of the next text, unless it is that already."""
    way(monkeypatch)
    ends = frozenset(range(0, VOCABULARY, 4))
    found = tokens(model, ends=ends, starts=(7, 8))
    assert set(found[:, 0].tolist()) <= {7, 8}
    after = [b for row in found.tolist() for a, b in pairwise(row) if a in ends and a not in (7, 8)]
    assert len(after) > 10
    assert set(after) == {7, 8}
    alone = tokens(model, ends=ends, starts=(8,)).tolist()  # a text of that token alone is never begun again by force
    assert any(a == 8 and b != 8 for row in alone for a, b in pairwise(row))


def test_end_tokens_of_turns_end_no_text(tmp_path: Path) -> None:
    """The demo model's end tokens are <|end_of_text|>, and <|eot_id|>, which its chat template writes."""
    eos, turn = 1, 4
    shutil.copytree(demo_model(), tmp_path / "model")
    assert plan_of(tmp_path / "model").ends == {eos}
    assert set(plan_of(tmp_path / "model").starts) == {BOS}
    for path in (tmp_path / "model").glob("*.jinja"):
        path.unlink()
    assert plan_of(tmp_path / "model").ends == {eos, turn}


@WAYS
def test_sampled_by_the_models_distribution(way: Way, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-squared of the second token's counts, by the logits after the first."""
    way(monkeypatch)
    folder, count, start = make_model(), 4000, 5
    plan = SelfCalibration(count, torch.empty(0, 2, dtype=torch.int64), 0, 2, 0, (start,), frozenset())
    found = plan.tokens(Checkpoint(folder), "cpu", silent)
    expected = count * logits(folder, torch.tensor([[start]]))[0, 0].double().softmax(-1)
    observed = torch.bincount(found[:, 1], minlength=len(expected))
    common = expected >= 5
    assert common.sum() > 20
    chi = ((observed - expected) ** 2 / expected)[common].sum()
    degrees = float(common.sum())
    assert abs(chi - degrees) < 5 * (2 * degrees) ** 0.5


def test_draw_is_the_inverse_of_the_distribution() -> None:
    rows = torch.tensor([[0.0, -torch.inf, 0.0, torch.log(torch.tensor(2.0))]]).repeat(5, 1)
    uniform = torch.tensor([0, 0.2499, 0.25, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(rows, uniform).tolist() == [0, 0, 2, 3, 3]
    with pytest.raises(CheckpointError, match="not finite"):
        draw(torch.tensor([[0.0, torch.nan]]), uniform[:1])


def test_a_family_without_our_decoder(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """VaultGemma runs in transformers: all layers in memory, one at a time, or refused, by the free memory."""
    folder = with_tokenizer(make_model("vaultgemma", vocab_size=VOCABULARY, sliding_window=8))
    said: list[str] = []
    plan = plan_of(folder, rows=40)
    whole = plan.tokens(Checkpoint(folder), "cpu", lambda *given: said.append(given[0]))
    assert whole.shape == (40, SEQLEN)
    assert set(said) == {"generating 40 rows of 32 calibration tokens with transformers"}
    plan, whole = plan_of(folder), tokens(folder)
    free = 4 * (2 * VOCABULARY * 64) + (1 << 20)  # tables, and not much more
    monkeypatch.setattr(self_calibration, "free_on", lambda _: free + ROWS * 32 * VOCABULARY)
    monkeypatch.setattr(WholeModel, "memory", staticmethod(lambda *_, resident: free * (1 + resident)))
    monkeypatch.setattr(Cache, "token_bytes", lambda *_: 0)
    said.clear()
    assert torch.equal(plan.tokens(Checkpoint(folder), "cpu", lambda *given: said.append(given[0])), whole)
    assert "one layer in memory at a time: reads the model's" in said[0]
    monkeypatch.setattr(self_calibration, "free_on", lambda _: 0)
    with pytest.raises(ConfigError, match=r"needs .* even with one layer at a time, .* more than are free"):
        plan.tokens(Checkpoint(folder), "cpu", silent)


def test_mixed_with_the_built_in_set(model: Path) -> None:
    plan = plan_of(model, "self+builtin")
    found = plan.tokens(Checkpoint(model), "cpu", silent)
    assert (plan.rows, plan.shape) == (3, (ROWS, SEQLEN))
    assert torch.equal(found[3:], plan.given)
    assert torch.equal(found[:3], tokens(model)[:3])
    many = SelfCalibration.of("self+builtin", Checkpoint(model), rows=10_000, seqlen=256, seed=0)
    assert 0 < len(many.given) < 5000  # all there is; the model generates the rest
    assert many.rows + len(many.given) == 10_000


def test_killed_after_generation(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that resumes takes the tokens on disk, and ends with the same bytes."""
    squawq.quantize(model, tmp_path / "straight", CONFIG, calibration="self")
    done = programs.run(["-c", KILLED, model, tmp_path / "out"])
    assert done.returncode == -9, done.stderr
    assert (tmp_path / "out.partial" / "squawq_calibration.ids").is_file()
    with pytest.raises(OutputError, match=r"another .*seed 3, now 4"):
        squawq.quantize(model, tmp_path / "out", replace(CONFIG, seed=4), calibration="self")
    with pytest.raises(OutputError, match=r"another calibration"):
        squawq.quantize(model, tmp_path / "out", CONFIG, calibration="self+builtin")

    def again(*_: object) -> torch.Tensor:
        raise AssertionError("generated again")

    with monkeypatch.context() as patch:
        patch.setattr(SelfCalibration, "tokens", again)
        squawq.quantize(model, tmp_path / "out", CONFIG, calibration="self")
        squawq.quantize(model, tmp_path / "out", CONFIG, calibration="self")  # done already
    assert settled(tmp_path / "out") == settled(tmp_path / "straight")
    assert not [name for name in contents(tmp_path / "out") if name.startswith(("squawq_part", "squawq_cal"))]
    same = tokens(model).tolist()
    squawq.quantize(model, tmp_path / "given", replace(CONFIG, seed=0), calibration=same)
    weights = [
        {n: c for n, c in contents(tmp_path / name).items() if n.startswith("model-")} for name in ("out", "given")
    ]
    assert weights[0] == weights[1]


def test_damaged_tokens_are_not_used(model: Path, tmp_path: Path) -> None:
    programs.run(["-c", KILLED, model, tmp_path / "out"])
    write_shard(tmp_path / "out.partial" / "squawq_calibration.ids", {"ids": torch.zeros(2, 32, dtype=torch.int64)})
    with pytest.raises(CheckpointError, match="damaged; remove"):
        squawq.quantize(model, tmp_path / "out", CONFIG, calibration="self")


def test_the_report_and_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--calibration", "self", "--seed", "7", "--samples", "4", "--seqlen", "32", "--group-size", "32"]
    assert cli.main(["quantize", str(model), str(tmp_path / "out"), *options]) == 0
    assert capsys.readouterr().err.startswith("generating 4 rows of 32 calibration tokens with squawq's decoder\n")
    raw = json.loads((tmp_path / "out" / "squawq_report.json").read_text())
    assert (raw["calibration"], raw["calibration_tokens"], raw["job"]["config"]["seed"]) == ("self", 128, 7)
    report = Report.read(raw)
    assert "--calibration self --samples 4 --seqlen 32 --group-size 32 --seed 7" in command(report, "out")
    assert dict(facts(report, "out"))["calibration"].endswith("generated by the 16-bit model (seed 7)")


def test_a_signal_stops_generation() -> None:
    progress = StoppableProgress(shown=False, stops_at_once=False)
    progress.generating("generating 2 rows", 0, 9)
    progress._handle(2, None)
    with pytest.raises(Stopped, match="stopped while generating 2 rows; run the same"):
        progress.generating("generating 2 rows", 3, 9)


def test_what_cannot_work(make_model: MakeModel, tmp_path: Path) -> None:
    bare = make_model()
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json"):
        squawq.quantize(bare, tmp_path / "out", CONFIG, calibration="self")
    with pytest.raises(
        squawq.errors.CalibrationError, match=r"the tokenizer has token id \d+; the model knows 0 to 159"
    ):
        squawq.quantize(with_tokenizer(bare), tmp_path / "out", CONFIG, calibration="self")
    with pytest.raises(ConfigError, match="seed is 3, but only calibration 'self', token_weights and tune sample"):
        squawq.quantize(bare, tmp_path / "out", CONFIG, calibration=[[5] * 32] * 8)
    with pytest.raises(ConfigError, match="choose one"):
        squawq.quantize("someone/model", tmp_path / "out", CONFIG, calibration="self", stream=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_stored_dtype_as_on_a_gpu(make_model: MakeModel) -> None:
    """All weights in bfloat16; gemma3_text multiplies its embedding, and keeps its norms' sums in float32."""
    checkpoint = Checkpoint(make_model("gemma3_text"))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        blocks = Blocks(checkpoint, family_of("gemma3_text"), "cpu")
        model = WholeModel(blocks, dtype, resident=True)
        assert {parameter.dtype for parameter in blocks.meta_model.model.parameters()} == {dtype}
        found.append([model.next_logits(torch.tensor(tokens)) for tokens in ([3, 4], [5, 6])][-1])
    exact, rounded = found
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.15 * exact.norm()
