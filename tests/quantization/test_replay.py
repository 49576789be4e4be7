"""Modules that end in a linear, and what a layer need not compute twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import MakeModel
from family_models import family_model
from torch import nn

from squawq.families import FAMILIES
from squawq.format.reader import Checkpoint
from squawq.layerwise.blocks import Blocks, OutputModule
from squawq.quantization.states import Replay

ATTENTION, MLP = "self_attn.o_proj", "mlp.down_proj"


def blocks_of(folder: Path, model_type: str = "llama") -> Blocks:
    return Blocks(Checkpoint(folder), FAMILIES[model_type], "cpu")


def test_endings_of_a_llama(make_model: MakeModel) -> None:
    with blocks_of(make_model()).open(0) as block:
        found = block.output_modules([ATTENTION, "self_attn.q_proj", MLP, "mlp.up_proj"])
        assert found == {ATTENTION: OutputModule("self_attn", (None,)), MLP: OutputModule("mlp")}


def test_a_module_that_goes_on_has_no_ending(make_model: MakeModel) -> None:
    with blocks_of(make_model()).open(0) as block:
        mlp = block.module.get_submodule("mlp")
        forward = mlp.forward
        mlp.forward = lambda x: 2 * forward(x)
        assert list(block.output_modules([ATTENTION, MLP])) == [ATTENTION]


def test_shared_experts_end_in_a_linear_and_the_mixture_does_not(tmp_path: Path) -> None:
    family_model("deepseek_v3", tmp_path / "model")
    with blocks_of(tmp_path / "model", "deepseek_v3").open(1) as block:
        names = [name for name, module in block.module.named_modules() if isinstance(module, nn.Linear)]
        modules = {ending.module for ending in block.output_modules(names).values()}
        assert "mlp.shared_experts" in modules
        assert "mlp" not in modules


@pytest.mark.parametrize("in_memory", [1.0, 0.0])
def test_settled_modules_are_not_run_again(
    in_memory: float, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("squawq.layerwise.blocks.BATCH_TOKENS", 64)
    states = torch.randn(5, 32, 64, generator=torch.Generator().manual_seed(0))
    with blocks_of(make_model()).open(0) as block:
        ran: list[str] = []
        for name in (ATTENTION, "self_attn.q_proj", MLP, "mlp.up_proj"):
            block.module.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
        replay = Replay(block, [ATTENTION, MLP], tmp_path, in_memory)
        for linear in (ATTENTION, MLP):
            with block.input_hooks(replay.hooks([linear])):
                block.run(states)
            block.weight(linear).mul_(0.5)  # it is rounded now
            replay.settle()
        expected = block.run(states)
        ran.clear()
        with replay.playing():
            assert torch.equal(block.run(states), expected)
        assert ran == []
        block.run(states)
        assert len(ran) == 3 * 4  # batches of 64 tokens, and all is as before
    assert list(tmp_path.glob("tmp*")) == []


def test_a_linear_seen_is_settled_once(make_model: MakeModel, tmp_path: Path) -> None:
    """What was settled stays when the next stage has no ending."""
    states = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(0))
    with blocks_of(make_model()).open(0) as block:
        replay = Replay(block, [ATTENTION], tmp_path, 1.0)
        with block.input_hooks(replay.hooks([ATTENTION])):
            expected = block.run(states)
        replay.settle()
        block.weight(ATTENTION).zero_()
        assert replay.hooks(["mlp.gate_proj"]) == {}
        replay.settle()
        for _ in range(2):
            with replay.playing():
                assert torch.equal(block.run(states), expected)
