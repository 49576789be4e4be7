"""Whole-model tuning of scales: the loss and its gradients, what is written, and runs that are killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import MakeModel
from results import settled
from transformers import AutoModelForCausalLM

import squawq
from squawq import QuantConfig
from squawq.errors import ConfigError
from squawq.families import family_of
from squawq.format.reader import Checkpoint
from squawq.layerwise.blocks import Blocks
from squawq.quantization import tuning
from squawq.quantization.job import Job
from squawq.quantization.tuning import Tuning, steps_for

SMALL: dict[str, Any] = {"group_size": 32, "seqlen": 16, "samples": 32, "n_grid": 2}
CONFIG = QuantConfig(**SMALL, refine=0, tune=True)
PLAIN = QuantConfig(**SMALL, refine=0, tune=False)


def blocks_of(folder: Path) -> Blocks:
    checkpoint = Checkpoint(folder)
    return Blocks(checkpoint, family_of(checkpoint.config.model_type), "cpu")


def rows(count: int = 32) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, 150, (count, 16), generator=generator).tolist()


def opened(source: Path, quantized: Path) -> Tuning:
    blocks, tokens, checkpoint = blocks_of(source), torch.tensor(rows()), Checkpoint(quantized)

    def stored(index: int) -> dict[str, torch.Tensor]:
        return {name: checkpoint.read(name) for name in checkpoint.tensors if f"layers.{index}." in name}

    return Tuning(blocks, tokens, blocks.last_states(tokens), 4, stored)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_loss_is_that_of_the_stored_model(family: str, make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model(family)
    squawq.quantize(source, tmp_path / "out", PLAIN, calibration=rows(), progress=False)
    found = squawq.evaluate(
        tmp_path / "out", source, ids=[token for row in rows()[:4] for token in row], window=16, stride=16
    )
    loss = opened(source, tmp_path / "out").loss([0, 1, 2, 3])
    assert loss == pytest.approx(found["kl_mean"], rel=0.15)  # without the last token of each row


def test_gradients(make_model: MakeModel, tmp_path: Path) -> None:
    """Of some scales, against transformers' whole model in float64, dequantized by hand."""
    source = make_model("llama")
    squawq.quantize(source, tmp_path / "out", PLAIN, calibration=rows(), progress=False)
    found = opened(source, tmp_path / "out")
    found._backward([0, 5])
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    tokens = torch.tensor(rows())[[0, 5]]
    with torch.no_grad():
        wanted = model(tokens).logits.log_softmax(-1)
    checkpoint, linears = Checkpoint(tmp_path / "out"), {linear.scales_name: linear for linear in found.linears}
    own = dict(model.named_parameters())
    changes = {}
    for name, parameter in own.items():
        scales = name.replace(".weight", ".scales")
        if (linear := linears.get(scales)) is not None:
            changes[scales] = torch.zeros_like(linear.scales, dtype=torch.float64, requires_grad=True)
            exact = linear.scales.double() * (1 + changes[scales])
            own[name] = (linear.steps.double() * exact[..., None]).flatten(1)
        else:
            own[name] = checkpoint.read(name).double() if ".layers." in name else parameter.detach()
    logits = torch.func.functional_call(model, own, (tokens,)).logits.log_softmax(-1)
    F.kl_div(logits, wanted, reduction="sum", log_target=True).div(tokens.numel()).backward()  # type: ignore[no-untyped-call]
    assert len(changes) == len(linears) > 10
    for name, change in changes.items():
        assert change.grad is not None
        assert torch.allclose(linears[name].change.grad.double(), change.grad, rtol=1e-3, atol=1e-7)  # type: ignore[union-attr]


def test_only_scales_change_and_the_loss_falls(make_model: MakeModel, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tuning, "BATCH", 256)
    source = make_model("llama")
    plain_config, tuned_config = (QuantConfig(method="awq", **SMALL, tune=tune) for tune in (False, True))
    squawq.quantize(source, tmp_path / "plain", plain_config, calibration=rows(), progress=False)
    report = squawq.quantize(source, tmp_path / "tuned", tuned_config, calibration=rows(), progress=False)
    row = report["tuning"]
    assert 0 < row["loss"] < row["loss_before"]
    assert (row["held_back"], row["rows"], row["steps"]) == (24, 104, steps_for(104 * 16))
    plain, tuned = Checkpoint(tmp_path / "plain"), Checkpoint(tmp_path / "tuned")
    changed = {n for n in plain.tensors if not torch.equal(plain.read(n), tuned.read(n))}
    assert changed
    assert all(name.endswith(".scales") for name in changed)
    assert not [path for path in (tmp_path / "tuned").iterdir() if "tun" in path.name]


def test_scales_stay_if_the_loss_does_not_fall(make_model: MakeModel, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tuning, "RATE", 30.0)
    source = make_model("llama")
    squawq.quantize(source, tmp_path / "plain", PLAIN, calibration=rows(), progress=False)
    report = squawq.quantize(source, tmp_path / "tuned", CONFIG, calibration=rows(), progress=False)
    assert report["tuning"]["loss"] == report["tuning"]["loss_before"]
    assert {k: v for k, v in settled(tmp_path / "tuned").items() if "safetensors" in k} == {
        k: v for k, v in settled(tmp_path / "plain").items() if "safetensors" in k
    }


@pytest.mark.parametrize("after", ["tuning", "scales of the first layer", "a layer is damaged"])
def test_a_killed_run_goes_on(after: str, make_model: MakeModel, tmp_path: Path, monkeypatch: Any) -> None:
    source, out = make_model("llama"), tmp_path / "out"
    squawq.quantize(source, tmp_path / "whole", CONFIG, calibration=rows(), progress=False)
    commit, parts = Job.commit, list[int]()

    def killed(self: Job, part: int, *given: Any, **how: Any) -> None:
        commit(self, part, *given, **how)
        parts.append(part)
        if parts.count(1) == 2:  # quantized, then tuned
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if after == "tuning":
            patch.setattr(Job, "commit_tuning", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        else:
            patch.setattr(Job, "commit", killed)
        with pytest.raises(KeyboardInterrupt):
            squawq.quantize(source, out, CONFIG, calibration=rows(), progress=False)
    if after == "a layer is damaged":
        (out.with_name("out.partial") / "model-00003-of-00004.safetensors").write_bytes(b"no")
    report = squawq.quantize(source, out, CONFIG, calibration=rows(), progress=False)
    assert report["tuning"]["loss"] <= report["tuning"]["loss_before"]
    if after != "a layer is damaged":
        assert settled(out) == settled(tmp_path / "whole")


def test_what_is_refused(make_model: MakeModel, tmp_path: Path, monkeypatch: Any) -> None:
    source = make_model("llama")
    with pytest.raises(ConfigError, match="method 'rtn' runs no text"):
        squawq.quantize(source, tmp_path / "out", QuantConfig(group_size=32, method="rtn", tune=True))
    monkeypatch.setattr("squawq.engine.capacity.free_memory", lambda: 10**4)
    with pytest.raises(ConfigError, match=r"tuning needs about .* of memory on cpu.*--no-tune"):
        squawq.quantize(source, tmp_path / "out", CONFIG, calibration=rows(), progress=False)
    assert not list(tmp_path.glob("out*"))
    assert steps_for(10) == 1
    assert steps_for(20_000) == 8 * 20_000 // 4096
    assert steps_for(10**6) == tuning.STEPS
