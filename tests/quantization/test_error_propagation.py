"""Error propagation: statistics of the 16-bit and the quantized run of one layer, and the weight correction (QEP)."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from conftest import MakeModel
from torch import Tensor

import squawq
from squawq.families import FAMILIES
from squawq.format.reader import Checkpoint
from squawq.layerwise.blocks import Blocks
from squawq.layerwise.extra_inputs import ExtraInputs
from squawq.quant_config import QuantConfig
from squawq.quantization import rounding, statistics
from squawq.quantization.error_propagation import ActivationRecord, ErrorStatistics, Stage, sequential_stages
from squawq.quantization.layer import LayerQuantization, LayerResult, verify
from squawq.quantization.rounding import LinearQuantizer
from squawq.quantization.states import Sample
from squawq.quantization.statistics import LayerInputs

CONFIG = QuantConfig(group_size=32, samples=8, seqlen=32)
LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
QKV = tuple(LINEARS[:3])


def blocks_of(folder: Path) -> Blocks:
    return Blocks(Checkpoint(folder), FAMILIES["llama"], "cpu")


def test_stages_of_a_llama(make_model: MakeModel) -> None:
    with blocks_of(make_model()).open(0) as block:
        found = sequential_stages(block, LINEARS)
    assert found == [
        Stage("self_attn.q_proj", QKV, ""),
        Stage("self_attn.o_proj", ("self_attn.o_proj",), "input_layernorm"),
        Stage("mlp.gate_proj", ("mlp.gate_proj", "mlp.up_proj"), ""),
        Stage("mlp.down_proj", ("mlp.down_proj",), "post_attention_layernorm"),
    ]


@pytest.mark.parametrize("place", [1, 2, 3])
@pytest.mark.parametrize(("states_memory", "weighted"), [(1.0, False), (0.0, False), (1.0, True)])
def test_sums_are_those_of_both_runs(
    place: int,
    states_memory: float,
    weighted: bool,
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """H and E by their definitions, over inputs that were kept whole."""
    monkeypatch.setattr("squawq.layerwise.blocks.BATCH_TOKENS", 64)
    states = torch.randn(5, 32, 64, generator=torch.Generator().manual_seed(0))
    other = states + 0.1 * torch.randn(5, 32, 64, generator=torch.Generator().manual_seed(1))
    scales = torch.rand(96 if place == 3 else 64, generator=torch.Generator().manual_seed(2)) + 0.5
    with blocks_of(make_model()).open(0) as block:
        inputs = LayerInputs(block)
        stage = sequential_stages(block, LINEARS)[place]
        names = [stage.capture_module, *([stage.residual] if stage.residual else [])]
        whole: dict[str, dict[str, Tensor]] = {}
        for run, given in (("wanted", states), ("found", other)):
            seen: dict[str, list[Tensor]] = {name: [] for name in names}
            with block.input_hooks({name: pieces.append for name, pieces in seen.items()}):
                block.run(given)
            whole[run] = {name: torch.cat(pieces).flatten(0, 1) for name, pieces in seen.items()}
        features = {name: whole["found"][name].shape[1] for name in names}
        record = ActivationRecord(features, tmp_path, states_memory)
        inputs.collect(states.clone(), ExtraInputs(None), Sample.spread(5, 32, slice(0, 5)), record.hooks)
        weights = torch.rand(5, 32, generator=torch.Generator().manual_seed(3)) + 0.1 if weighted else None
        error = ErrorStatistics(block, stage, scales, weights)
        error.collect(other, ExtraInputs(None), record)
        x = whole["found"][stage.capture_module]
        each = torch.ones(160, 1) if weights is None else weights.view(160, 1)
        lack = whole["wanted"][stage.capture_module] / scales - x
        weight = block.weight(stage.linears[0])
        missing = lack @ weight.T
        if stage.residual:
            missing += whole["wanted"][stage.residual] - whole["found"][stage.residual]
        expected = (each * missing).T @ x
        assert torch.allclose(error.inputs.gram, (each * x).T @ x, rtol=1e-4, atol=1e-3)
        (lack,) = error.cross
        found = lack if error.single else weight @ lack
        assert error.single == bool(stage.residual)
        assert (found - expected).abs().max() < 0.02 * expected.abs().max()  # the record is in bfloat16


def test_what_is_lacking_is_made_up_for(make_model: MakeModel, tmp_path: Path) -> None:
    """A layer whose attention output is halved before o_proj: o_proj's new weights are about twice the old ones."""
    states = torch.randn(8, 32, 64, generator=torch.Generator().manual_seed(0))
    with blocks_of(make_model()).open(0) as block:
        inputs = LayerInputs(block)
        stage = Stage("self_attn.o_proj", ("self_attn.o_proj",), "")
        record = ActivationRecord({"self_attn.o_proj": 64}, tmp_path, 1.0)
        inputs.collect(states.clone(), ExtraInputs(None), Sample.spread(8, 32, slice(0, 8)), record.hooks)
        block.weight("self_attn.v_proj").mul_(0.5)
        error = ErrorStatistics(block, stage, None)
        error.collect(states, ExtraInputs(None), record)
        weight = block.weight("self_attn.o_proj").clone()
        quantizer = LinearQuantizer(error.inputs, QuantConfig(group_size=32, damping=1e-3), error)
        quantizer.quantize(block.weight("self_attn.o_proj"), clip=False)
        made = block.weight("self_attn.o_proj")
        assert (made - 2 * weight).abs().max() < 0.1 * weight.abs().max()


@pytest.mark.parametrize("linears", [("mlp.gate_proj", "mlp.up_proj"), ("mlp.gate_proj",)])
def test_wide_inputs_make_up_part_by_part(
    linears: tuple[str, ...], make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halved inputs, whose parts know nothing of each other: every part of the weights becomes about twice itself."""
    monkeypatch.setattr(statistics, "MAX_GRAM", 32)
    monkeypatch.setattr(statistics, "BOUNDARY", 16)
    monkeypatch.setattr(rounding, "CHUNK", 32 * 7)  # several chunks of rows
    states = torch.randn(64, 32, 64, generator=torch.Generator().manual_seed(0))
    with blocks_of(make_model()).open(0) as block:
        block.weight("self_attn.o_proj").zero_()
        block.weight("post_attention_layernorm").fill_(1)
        inputs, stage = LayerInputs(block), Stage("mlp.gate_proj", linears, "")
        record = ActivationRecord({"mlp.gate_proj": 64}, tmp_path, 1.0)
        inputs.collect(states.clone(), ExtraInputs(None), Sample.spread(64, 32, slice(0, 64)), record.hooks)
        block.weight("post_attention_layernorm").fill_(0.5)
        error = ErrorStatistics(block, stage, None)
        error.collect(states, ExtraInputs(None), record)
        assert len(error.cross) == 2
        quantizer = LinearQuantizer(error.inputs, QuantConfig(group_size=32, damping=1e-3), error)
        for name in linears:
            weight = block.weight(name).clone()
            quantizer.quantize(block.weight(name), clip=False)
            assert (block.weight(name) - 2 * weight).abs().max() < 0.2 * weight.abs().max()


def test_a_record_is_forgotten(tmp_path: Path) -> None:
    record = ActivationRecord({"a": 8, "b": 8, "norm": 8}, tmp_path, 1.0)
    kept = {name: weakref.ref(record._spools[name]) for name in ("a", "b", "norm")}
    record.keep([Stage("b", ("b",), "norm")])
    assert [kept[name]() is None for name in ("a", "b", "norm")] == [True, False, False]
    record.keep([])
    assert all(reference() is None for reference in kept.values())


def test_inputs_that_are_not_finite_are_left_out(make_model: MakeModel, tmp_path: Path) -> None:
    states = torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(0))
    broken = states.clone()
    broken[1, 5, 3] = torch.inf
    with blocks_of(make_model()).open(0) as block:
        inputs, stage = LayerInputs(block), Stage("self_attn.q_proj", QKV, "")
        record = ActivationRecord({"self_attn.q_proj": 64}, tmp_path, 1.0)
        inputs.collect(states.clone(), ExtraInputs(None), Sample.spread(4, 32, slice(0, 4)), record.hooks)
        error = ErrorStatistics(block, stage, None)
        error.collect(broken, ExtraInputs(None), record)
        assert (error.inputs.rows, error.inputs.dropped) == (127, 1)
        assert error.cross[0].isfinite().all()


def test_the_next_layer_sees_the_quantized_one(
    make_model: MakeModel, rows: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states that the second layer is judged on are those that the folder on disk hands over, to the last bit."""
    seen: list[Tensor] = []

    def watch(chosen: LayerQuantization, before: Tensor, extra: ExtraInputs, wanted: Tensor) -> LayerResult:
        seen.append(before.clone())
        return verify(chosen, before, extra, wanted)

    monkeypatch.setattr("squawq.quantization.layer.verify", watch)
    folder = make_model()
    squawq.quantize(folder, tmp_path / "out", CONFIG, calibration=rows)
    states = blocks_of(folder).embed(torch.tensor(rows)[:8, :32])
    assert torch.equal(seen[0], states)
    with blocks_of(tmp_path / "out").open(0) as block:
        assert torch.equal(seen[1], block.run(states))


def test_each_part_is_for_something(make_model: MakeModel, rows: list[list[int]], tmp_path: Path) -> None:
    """Every switch changes what is written, and the published method knows none of them."""
    folder, found = make_model(), {}
    settings: dict[str, dict[str, object]] = {
        "all": {},
        "published": {"method": "awq"},
        "published, too": {"method": "awq", "compensate": False, "sequential": False, "refine": 0},
        **{f"no {name}": {name: False} for name in ("clip", "compensate", "act_order", "sequential")},
        "no refine": {"refine": 0},
        "damped": {"damping": 1.0},
    }
    for name, changes in settings.items():
        config = QuantConfig(group_size=32, samples=8, seqlen=32, **changes)  # type: ignore[arg-type]
        squawq.quantize(folder, tmp_path / name, config, calibration=rows)
        found[name] = (tmp_path / name / "model-00003-of-00004.safetensors").read_bytes()
    assert found.pop("published, too") == found["published"]
    assert len(set(found.values())) == len(found)
