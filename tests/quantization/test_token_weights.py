"""Weights of calibration tokens: squared gradients by an independent way, their use, and runs that are killed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import MakeModel
from family_models import CASES, family_model
from results import settled
from transformers import AutoModelForCausalLM

import squawq
from squawq import QuantConfig, cli
from squawq.demo import demo_model
from squawq.errors import CheckpointError, ConfigError
from squawq.families import family_of
from squawq.format.reader import Checkpoint
from squawq.format.shards import write_shard
from squawq.layerwise.blocks import Blocks
from squawq.layerwise.plan import LayerPlan
from squawq.layerwise.whole_model import draw
from squawq.quantization import token_weights
from squawq.quantization.error_propagation import ErrorStatistics
from squawq.quantization.job import Job
from squawq.quantization.token_weights import weights_key
from squawq.report.schema import Report
from squawq.report.words import command

SMALL: dict[str, Any] = {"group_size": 32, "seqlen": 16, "samples": 12, "n_grid": 2, "refine": 0}
CONFIG = QuantConfig(**SMALL, token_weights=True, seed=3)
PLAIN = QuantConfig(**SMALL)


def rows(count: int = 12) -> torch.Tensor:
    return torch.randint(3, 150, (count, 16), generator=torch.Generator().manual_seed(5))


def plans_of(checkpoint: Checkpoint) -> list[LayerPlan]:
    blocks = Blocks(checkpoint, family_of(checkpoint.config.model_type), "cpu")
    shapes, layer = blocks.meta_model.shapes, blocks.family.layer
    return [LayerPlan(shapes(i), blocks.family, PLAIN, layer(i)) for i in range(len(blocks.layers))]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_squared_gradients(family: str, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the definition: zeros that are added to the linears' outputs, and the loss's gradient by them."""
    monkeypatch.setattr(token_weights, "BATCH", 5 * 16)  # batches of 5, 5 and 2 rows
    monkeypatch.setattr(token_weights, "DRAWN", 7)
    folder = make_model(family)
    tokens, checkpoint = rows(), Checkpoint(folder)
    found = token_weights.token_weights(checkpoint, "cpu", plans_of(checkpoint), tokens, seed=3)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(tokens).logits.flatten(0, 1)
    uniform = torch.rand(
        tokens.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3 ^ token_weights.SALT)
    )
    drawn = draw(logits, uniform.flatten())
    inputs = {"self_attn.q_proj": ("q", "k", "v"), "self_attn.o_proj": ("o",), "mlp.down_proj": ("down",)}
    inputs["mlp.gate_proj"] = ("gate", "up")
    for index, layer in enumerate(model.model.layers):
        zeros: dict[str, torch.Tensor] = {}
        for module in inputs:
            for name in inputs[module]:
                linear = layer.get_submodule(f"{module.partition('.')[0]}.{name}_proj")
                zeros[name] = torch.zeros(*tokens.shape, linear.weight.shape[0], requires_grad=True)
                linear.register_forward_hook(lambda _, __, output, zero=zeros[name]: output + zero)
        loss = F.cross_entropy(model(tokens).logits.flatten(0, 1), drawn, reduction="sum")
        gradients = dict(zip(zeros, torch.autograd.grad(loss, list(zeros.values())), strict=True))
        for module, names in inputs.items():
            squares = torch.stack([gradients[name].square().sum(-1) for name in names]).sum(0)
            expected = (squares / squares.mean()).clamp(min=token_weights.LEAST) ** token_weights.POWER
            expected /= expected.mean()
            torch.testing.assert_close(found[weights_key(index, module)].float(), expected, rtol=0.02, atol=0.002)


def test_without_gradients_all_tokens_count_alike() -> None:
    assert torch.equal(token_weights._weights(torch.zeros(2, 3)), torch.ones(2, 3))
    assert torch.equal(
        token_weights._weights(torch.tensor([[1.0, torch.inf, 4.0]])),
        token_weights._weights(torch.tensor([[1.0, 0, 4]])),
    )
    some = token_weights._weights(torch.tensor([[0.0, 1.0, 2e6]]))
    assert some.mean() == pytest.approx(1)
    assert some[0, 2] / some[0, 0] == pytest.approx((3 / token_weights.LEAST) ** token_weights.POWER, rel=1e-4)


def test_they_reach_the_right_linears(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor | None] = []
    init = ErrorStatistics.__init__

    def watch(self: ErrorStatistics, block: Any, stage: Any, scales: Any, weights: torch.Tensor | None) -> None:
        seen.append(weights)
        init(self, block, stage, scales, weights)

    monkeypatch.setattr(ErrorStatistics, "__init__", watch)
    source, given = make_model("llama"), rows().tolist()
    squawq.quantize(source, tmp_path / "plain", PLAIN, calibration=given, progress=False)
    assert seen == [None] * 8
    seen.clear()
    report = squawq.quantize(source, tmp_path / "out", CONFIG, calibration=given, progress=False)
    checkpoint = Checkpoint(source)
    wanted = token_weights.token_weights(checkpoint, "cpu", plans_of(checkpoint), rows(), seed=3)
    order = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    for (index, module), found in zip(((i, m) for i in range(2) for m in order), seen, strict=True):
        assert found is not None
        assert torch.equal(found, wanted[weights_key(index, module)])
    assert report["job"]["config"]["token_weights"] is True
    assert "--seed 3" in command(Report.read(report), "out")
    assert "--token-weights" in command(Report.read(report), "out")


def test_a_killed_run_goes_on(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out, given = make_model("llama"), tmp_path / "out", rows().tolist()
    squawq.quantize(source, tmp_path / "whole", CONFIG, calibration=given, progress=False)
    commit = Job.commit

    def killed(self: Job, part: int, *rest: Any, **how: Any) -> None:
        commit(self, part, *rest, **how)
        if part == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Job, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            squawq.quantize(source, out, CONFIG, calibration=given, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("squawq.quantization.pipeline.token_weights", None)  # those on disk are used
        squawq.quantize(source, out, CONFIG, calibration=given, progress=False)
    assert settled(out) == settled(tmp_path / "whole")


def test_damaged_weights_are_not_used(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, given = make_model("llama"), rows().tolist()
    with monkeypatch.context() as patch:
        patch.setattr(
            "squawq.quantization.pipeline._quantize_layers", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            squawq.quantize(source, tmp_path / "out", CONFIG, calibration=given, progress=False)
    write_shard(tmp_path / "out.partial" / "squawq_token_weights", {"0.self_attn.q_proj": torch.ones(2, 16)})
    with pytest.raises(CheckpointError, match="squawq_token_weights: damaged; remove"):
        squawq.quantize(source, tmp_path / "out", CONFIG, calibration=given, progress=False)


@pytest.mark.parametrize("family", CASES)
def test_every_family_has_gradients(family: str, tmp_path: Path) -> None:
    family_model(family, tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")
    found = token_weights.token_weights(checkpoint, "cpu", plans_of(checkpoint), rows(2), seed=0)
    assert found
    assert all(bool((weights != weights[0, 0]).any()) for weights in found.values())


def test_memory_of_experts_is_that_of_the_chosen(tmp_path: Path) -> None:
    family_model("qwen3_moe", tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")
    plan, config = plans_of(checkpoint)[0], checkpoint.config
    chosen = token_weights._activations(plan, config)
    whole = sum(out + in_ for out, in_ in plan.shapes.values())
    assert chosen < whole
    assert token_weights._activations(plan, replace(config, raw={})) == whole


def test_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--token-weights", "--seqlen", "16", "--samples", "4"]
    assert cli.main(["quantize", str(demo_model()), str(tmp_path / "out"), *options]) == 0
    assert "weighting 64 calibration tokens by gradients of the 16-bit model" in capsys.readouterr().err


def test_what_is_refused(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_model("llama")
    for settings in ({"method": "awq"}, {"sequential": False}):
        config = QuantConfig(group_size=32, token_weights=True, **settings)
        with pytest.raises(ConfigError, match="token_weights needs method 'squawq' with sequential calibration"):
            squawq.quantize(source, tmp_path / "out", config, calibration=rows().tolist())
    with pytest.raises(ConfigError, match="token_weights runs the whole model, whose files stream keeps only in part"):
        squawq.quantize(source, tmp_path / "out", CONFIG, calibration=rows().tolist(), stream=True)
    monkeypatch.setattr("squawq.engine.capacity.free_memory", lambda: 10**4)
    with pytest.raises(ConfigError, match=r"token_weights needs about .* of memory on cpu.*--no-token-weights"):
        squawq.quantize(source, tmp_path / "out", CONFIG, calibration=rows().tolist())
    assert not list(tmp_path.glob("out*"))
