"""What a run settles that was left open: calibration text, its amount, token weights, and tuning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, tiny_config

from squawq import QuantConfig
from squawq.config import ModelConfig
from squawq.demo import demo_model
from squawq.errors import ConfigError
from squawq.format.reader import Checkpoint
from squawq.quantization import prepare
from squawq.quantization.self_calibration import SelfCalibration, default_rows

PLAIN = QuantConfig(seqlen=512)


def settled(config: QuantConfig = PLAIN, calibration: Any = None, stream: bool = False) -> tuple[Any, Any]:
    found, text = prepare._settled(config, calibration, Checkpoint(demo_model()), "cuda", stream)
    return text, found.tune


def weighted(config: QuantConfig = PLAIN, stream: bool = False) -> bool | None:
    found, _ = prepare._settled(config, None, Checkpoint(demo_model()), "cuda", stream)
    return found.token_weights


def test_on_a_gpu_that_holds_the_model(monkeypatch: pytest.MonkeyPatch, make_model: MakeModel) -> None:
    monkeypatch.setattr(prepare, "_gpu_memory", lambda _: 80 << 30)
    assert settled() == ("self+builtin", True)
    assert settled(calibration="chats.jsonl") == ("chats.jsonl", True)
    assert settled(replace(PLAIN, tune=False)) == ("self+builtin", False)
    assert settled(replace(PLAIN, method="awq")) == (None, False)
    assert settled(replace(PLAIN, method="awq", tune=True)) == (None, True)
    assert settled(stream=True) == (None, False)
    assert settled(replace(PLAIN, seed=3))[0] == "self+builtin"
    bare = Checkpoint(make_model())  # without a tokenizer
    assert prepare._settled(PLAIN, None, bare, "cuda", False)[1] is None
    assert [weighted(), weighted(replace(PLAIN, method="awq")), weighted(stream=True)] == [True, False, False]
    assert weighted(replace(PLAIN, token_weights=False)) is False
    monkeypatch.setattr(prepare, "MAX_TUNED", 1e6)
    assert settled() == ("self+builtin", False)
    assert weighted()


def test_a_gpu_too_small_to_tune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tuning that nobody asked for is left out; what was asked for is refused."""
    monkeypatch.setattr(prepare, "check_device", lambda *_, **__: None)
    monkeypatch.setattr(prepare, "_settled", lambda config, *_: (replace(config, tune=True), "self"))
    monkeypatch.setattr(prepare, "_gpu_memory", lambda _: 1 << 40)
    config = QuantConfig(seqlen=64, samples=8)
    work = prepare.prepare(demo_model(), tmp_path / "out", config, None, "cpu", False)
    assert (work.config.tune, work.generated and work.generated.tuning_rows) == (True, 24)
    monkeypatch.setattr(prepare, "_gpu_memory", lambda _: 1 << 20)
    work = prepare.prepare(demo_model(), tmp_path / "out", config, None, "cpu", False)
    assert (work.config.tune, work.generated and work.generated.tuning_rows) == (False, 0)
    monkeypatch.setattr("squawq.engine.capacity.free_memory", lambda: 1 << 20)
    with pytest.raises(ConfigError, match="tuning needs about"):
        prepare.prepare(demo_model(), tmp_path / "out", replace(config, tune=True), None, "cpu", False)


def test_a_gpu_too_small_to_weight_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The demo model fits, with 64 tokens at once; a GPU with less memory does without, unless it was asked for."""
    monkeypatch.setattr(prepare, "check_device", lambda *_, **__: None)
    monkeypatch.setattr(prepare, "_settled", lambda config, *_: (replace(config, token_weights=True, tune=False), None))
    config = QuantConfig(seqlen=64, samples=8)
    for memory, expected in ((1 << 30, True), (20 << 20, False)):
        monkeypatch.setattr(prepare, "_gpu_memory", lambda _, memory=memory: memory)
        work = prepare.prepare(demo_model(), tmp_path / "out", config, None, "cpu", False)
        assert work.config.token_weights is expected
    monkeypatch.setattr(prepare, "_gpu_memory", lambda _: 1 << 30)
    monkeypatch.setattr("squawq.engine.capacity.free_memory", lambda: 20 << 20)
    for asked in (True, None):  # None: before text is generated, not after
        with pytest.raises(ConfigError, match="token_weights needs about"):
            prepare.prepare(demo_model(), tmp_path / "out", replace(config, token_weights=asked), None, "cpu", False)


@pytest.mark.parametrize(
    ("inner", "size", "asked", "found"),
    [
        (29568, 2, 128, 64),  # Qwen2.5-72B: 231 groups of 128
        (29568, 4, 128, 32),
        (29568, 8, 128, 16),
        (28672, 8, 128, 128),
        (28672, 1, -1, -1),
        (28672, 2, -1, 256),
        (29568, None, 128, 128),
    ],
)
def test_groups_for_tensor_parallel(inner: int, size: int | None, asked: int, found: int) -> None:
    """The largest size up to the one asked for with which every GPU has whole groups."""
    raw = tiny_config("qwen2", num_attention_heads=64, num_key_value_heads=8, head_dim=128, intermediate_size=inner)
    config = QuantConfig(group_size=asked, for_tensor_parallel=size)
    assert prepare._group_size(config, ModelConfig.from_dict(raw | {"vocab_size": 4096})) == found


def test_what_cannot_be_shared(make_model: MakeModel, tmp_path: Path) -> None:
    for model, size, message in (
        (make_model(name="a"), 3, "4 attention heads do not divide by that; this model can be shared by 1, 2, 4"),
        (make_model(name="b", head_dim=16, intermediate_size=88), 2, "would be on two GPUs"),
        (make_model("cohere", name="c"), 2, "how cohere is split is not known"),
    ):
        with pytest.raises(ConfigError, match=rf"for_tensor_parallel is {size}, .*{message}"):
            prepare.prepare(model, tmp_path / "out", QuantConfig(for_tensor_parallel=size), None, "cpu", False)


def test_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, text = prepare._settled(PLAIN, None, Checkpoint(demo_model()), "cpu", False)
    assert (text, found.tune) == (None, False)
    monkeypatch.setattr(prepare, "_gpu_memory", lambda _: 10 << 20)  # the model has 14.7 MB
    assert settled() == (None, False)
    assert weighted() is False
    with pytest.raises(ConfigError, match="only calibration 'self', token_weights and tune sample tokens"):
        prepare.prepare(demo_model(), tmp_path / "out", replace(PLAIN, seed=3), None, "cpu", False)


def test_the_built_in_set_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a GPU it is not the default, so it must have a name; the tokens are those of the default elsewhere."""
    monkeypatch.setattr(prepare, "_gpu_memory", lambda _: 80 << 30)
    assert settled(calibration="builtin", config=replace(PLAIN, tune=False)) == ("builtin", False)
    monkeypatch.setattr(prepare, "_gpu_memory", lambda _: 0)
    plain, named = (
        prepare.prepare(demo_model(), tmp_path / "out", QuantConfig(seqlen=64, samples=4), calibration, "cpu", False)
        for calibration in (None, "builtin")
    )
    assert (plain.calibration, named.calibration) == (None, "builtin")
    assert plain.tokens is not None
    assert named.tokens is not None
    assert torch.equal(plain.tokens, named.tokens)
    assert plain.identity == named.identity


def test_how_much_text_on_a_gpu() -> None:
    assert [default_rows(512 * hidden) for hidden in (640, 2048, 4096, 8192)] == [819, 256, 128, 128]
    text, plan = prepare._text(replace(PLAIN, tune=True), "self", Checkpoint(demo_model()), "cuda")
    assert text is None
    assert plan is not None
    assert (plan.rows, plan.tuning_rows, plan.shape) == (1536, 384, (1920, 512))
    assert prepare._text(PLAIN, "self", Checkpoint(demo_model()), "cpu")[1].shape == (128, 512)  # type: ignore[union-attr]


@pytest.mark.parametrize(("rows", "fresh"), [(1, 3), (32, 96), (128, 384), (400, 112), (1536, 384)])
def test_rows_for_tuning_beside_given_ones(rows: int, fresh: int) -> None:
    given = torch.full((rows, 16), 7)
    plan = SelfCalibration.beside(given, Checkpoint(demo_model()), 0)
    assert (plan.rows, plan.calibration_rows, plan.tuning_rows, plan.starts) == (0, rows, fresh, (0,))
    assert plan.shape == (rows + fresh, 16)


def test_calibration_and_tuning_rows_are_others() -> None:
    """The tokens: generated calibration rows, given ones, and rows for tuning, which calibration does not have."""
    plan = SelfCalibration.of("self+builtin", Checkpoint(demo_model()), rows=4, seqlen=64, seed=1, tune=True)
    found = plan.tokens(Checkpoint(demo_model()), "cpu", lambda *_: None)
    assert found.shape == (16, 64)
    assert torch.equal(found[2:4], plan.given)
    assert len({tuple(row) for row in found.tolist()}) == 16
    untuned = replace(plan, tuning_rows=0).tokens(Checkpoint(demo_model()), "cpu", lambda *_: None)
    assert torch.equal(untuned, found[:4])
