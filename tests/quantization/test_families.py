"""Every row of the table: a tiny model is quantized, loaded by transformers and by us, and measured."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_models import CASES, SIZES, VOCABULARY, dense_folder, family_model, linear_names, randomize, row_of
from safetensors.torch import load_file, save_file
from torch import Tensor

import squawq
from squawq.errors import CheckpointError, ConfigError
from squawq.families import FAMILIES
from squawq.format.reader import Checkpoint
from squawq.layerwise.blocks import Blocks
from squawq.layerwise.extra_inputs import ExtraInputs
from squawq.layerwise.plan import GATE, PER_LAYER, Folding, LayerPlan
from squawq.layerwise.whole_model import WholeModel
from squawq.nn.loader import load
from squawq.quant_config import QuantConfig
from squawq.quantization.job import Job
from squawq.quantization.layer import LayerQuantization, LayerResult, verify
from squawq.quantization.search import fold_group, takes_scales

SMALL = QuantConfig(group_size=32, seqlen=32, samples=8, n_grid=3)
ROWS = torch.randint(2, VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(5))


def blocks_of(folder: Path, case: str) -> Blocks:
    return Blocks(Checkpoint(folder), row_of(case), "cpu")


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("case", CASES)
def test_quantized_loaded_and_measured(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AwqConfig

    import squawq.transformers

    monkeypatch.setattr("squawq.quantization.statistics.MIN_TOKENS", 130)  # some experts see more, some fewer
    seen: list[tuple[Tensor, ExtraInputs]] = []  # what each layer is given in the quantized run

    def watch(chosen: LayerQuantization, before: Tensor, extra: ExtraInputs, wanted: Tensor) -> LayerResult:
        seen.append((before.clone(), extra.each(Tensor.clone)))
        return verify(chosen, before, extra, wanted)

    monkeypatch.setattr("squawq.quantization.layer.verify", watch)
    model = family_model(case, tmp_path / "model")
    report = squawq.quantize(tmp_path / "model", tmp_path / "awq", SMALL, calibration=ROWS.tolist())
    for index, layer in enumerate(report["layers"]):
        rows = {row["name"]: row for row in layer["linears"]}
        assert linear_names(model, index) <= set(rows)
        for name, row in rows.items():
            reason = GATE if row["out_features"] < 8 else PER_LAYER if name.startswith("per_layer") else None
            assert row.get("kept_in_16_bits") == reason  # gates have as many outputs as there are experts, or one
            assert reason or math.isfinite(row["loss"])
            assert ("tokens" in row) == bool(re.search(r"(^|\.)experts\.", name))
    ids = torch.randint(2, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(6))
    dense = dense_folder(tmp_path / "awq", tmp_path / "model", tmp_path / "dense")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()(ids).logits
        awq = AutoModelForCausalLM.from_pretrained(
            tmp_path / "awq", dtype=torch.float32, quantization_config=AwqConfig(backend="torch_awq")
        )
        assert (awq(ids).logits - expected).abs().max() < 1e-3
    blocks = blocks_of(tmp_path / "awq", case)
    states, extra = blocks.embed(ids), blocks.extra_inputs(ids)
    blocks.extra_inputs(ROWS)  # also of these tokens
    for index in range(len(blocks.layers)):
        with blocks.open(index) as block:
            if index + 1 < len(blocks.layers):
                given, beside_given = seen[index]
                out = block.run(given, extra=beside_given)
                assert torch.equal(out, seen[index + 1][0])  # as the folder on disk has it, to the last bit
            block.run(states, in_place=True, extra=extra)
    assert (blocks.logits()(states) - expected).abs().max() < 1e-3
    score = squawq.evaluate(tmp_path / "awq", tmp_path / "model", ids=ids.flatten().tolist(), window=24)
    assert 0 < score["kl_mean"] < 1
    assert math.isfinite(score["perplexity"])


@pytest.mark.parametrize("case", CASES)
def test_token_by_token_as_all_at_once(case: str, tmp_path: Path) -> None:
    """With all layers in memory, and with one at a time, which gives the same bits."""
    model = family_model(case, tmp_path / "model")
    with torch.no_grad():
        expected = model(ROWS[:3, :24]).logits
    found = []
    for resident in (True, False):
        whole = WholeModel(blocks_of(tmp_path / "model", case), torch.float32, resident=resident)
        for _ in range(2):
            whole.reset()
            found.append(torch.stack([whole.next_logits(ROWS[:3, place]) for place in range(24)], 1))
    assert (found[0] - expected).abs().max() < 1e-3
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("case", CASES)
def test_scales_leave_the_function_as_it_was(case: str, tmp_path: Path) -> None:
    """Any scales, folded where the row says, change no output: whatever reads a scaled input is in the row."""
    family_model(case, tmp_path / "model")
    blocks = blocks_of(tmp_path / "model", case)
    states, extra = blocks.embed(ROWS[:2]), blocks.extra_inputs(ROWS[:2])
    generator = torch.Generator().manual_seed(7)
    for index in range(len(blocks.layers)):
        with blocks.open(index) as block:
            own = extra.each(Tensor.clone)
            expected = block.run(states.clone(), in_place=True, extra=extra)
            nothing = QuantConfig(group_size=32, modules_to_not_convert=("layers",), dtype="bfloat16")
            plan = LayerPlan(blocks.meta_model.shapes(index), row_of(case), nothing, row_of(case).layer(index))
            folding = Folding()
            for group in block.groups:
                if takes_scales(block, group):
                    scales = torch.rand(block.weight(group.linears[0]).shape[1], generator=generator) + 0.5
                    fold_group(block, plan, group, scales, folding)
            block.fold(folding)
            assert (block.run(states, extra=own) - expected).abs().max() < 1e-4 * expected.abs().max()
            states = expected


@pytest.mark.parametrize("case", CASES)
def test_residuals_are_what_outputs_are_added_to(case: str, tmp_path: Path) -> None:
    """A row's residual plus the linear's output is what comes next: a norm's input, or the layer's output."""
    family_model(case, tmp_path / "model")
    blocks = blocks_of(tmp_path / "model", case)
    states, extra = blocks.embed(ROWS[:2]), blocks.extra_inputs(ROWS[:2])
    for index in range(len(blocks.layers)):
        with blocks.open(index) as block:
            groups = [group for group in block.groups if group.residual]
            inputs: dict[str, list[torch.Tensor]] = {g.previous: [] for g in block.groups if "norm" in g.previous}
            inputs |= {name: [] for g in groups for name in (g.residual, *g.linears)}
            with block.input_hooks({name: seen.append for name, seen in inputs.items()}):
                result = block.run(states, extra=extra)
            for group in groups:
                assert len(group.linears) == 1
                linear = block.module.get_submodule(group.linears[0])
                with torch.no_grad():
                    added = torch.cat(inputs[group.residual]) + linear(torch.cat(inputs[group.linears[0]]))
                after = [result, *(torch.cat(seen) for seen in inputs.values() if seen)]
                assert any(a.shape == added.shape and torch.allclose(a, added, atol=1e-4) for a in after)
            block.run(states, in_place=True, extra=extra)


def test_experts_that_see_few_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that knows no difference sends every token to the same two; the others are calibrated all the same."""
    family_model("qwen3_moe", tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    for layer in range(2):
        state[f"model.layers.{layer}.mlp.gate.weight"].zero_()
    save_file(state, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("squawq.quantization.statistics.MIN_TOKENS", 100)
    report = squawq.quantize(tmp_path / "model", tmp_path / "awq", SMALL, calibration=ROWS.tolist())
    for layer in report["layers"]:
        rows = {row["name"]: row for row in layer["linears"] if "tokens" in row}
        tokens = [rows[f"mlp.experts.{expert}.up_proj"]["tokens"] for expert in range(4)]
        assert sorted(tokens) == [0, 0, ROWS.numel(), ROWS.numel()]
        assert layer["notes"] == ["2 of 4 experts saw fewer than 100 tokens; calibrated on all sampled tokens"]
        for expert in range(4):
            row = rows[f"mlp.experts.{expert}.down_proj"]
            assert 0 < row["loss"] < row["loss_rounded"]  # searched, on what the expert would have been given


def test_all_experts_stay_in_16_bits_together(tmp_path: Path) -> None:
    """Engines run all experts of a layer by one kernel."""
    from transformers import AutoModelForCausalLM

    import squawq.transformers

    family_model("mixtral", tmp_path / "model")
    config = replace(SMALL, modules_to_not_convert=("layers.0.mlp.experts.3.w2",))
    squawq.quantize(tmp_path / "model", tmp_path / "awq", config, calibration=ROWS.tolist())
    found = Checkpoint(tmp_path / "awq")
    experts = [f"model.layers.{{}}.block_sparse_moe.experts.{e}.{w}" for e in range(4) for w in ("w1", "w2", "w3")]
    assert not any(found.is_quantized(name.format(0)) for name in experts)
    assert all(found.is_quantized(name.format(1)) for name in experts)
    assert found.config.quant is not None
    assert {name.format(0) for name in experts} < set(found.config.quant.modules_to_not_convert)
    assert "model.layers.1.block_sparse_moe.gate" in found.config.quant.modules_to_not_convert
    with torch.no_grad():
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "awq")(ROWS[:1]).logits.isfinite().all()


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    family_model("olmoe", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    state = load_file(file)
    del state["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model.layers.1.mlp.experts.2.up_proj.weight' is missing"):
        squawq.quantize(tmp_path / "model", tmp_path / "awq", SMALL, calibration=ROWS.tolist())
    assert not (tmp_path / "awq.partial").exists()


def test_the_text_model_of_a_larger_one(tmp_path: Path) -> None:
    """Gemma 3 with its eyes: the text model is quantized, the rest is copied and listed."""
    from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

    import squawq.transformers

    known = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {name: SIZES[name] for name in (*known, "head_dim", "vocab_size", "sliding_window")}
    config = Gemma3Config(
        text_config={**text, "max_position_embeddings": 128, "pad_token_id": 0},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=150,
        boi_token_index=151,
        eoi_token_index=152,
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    randomize(model, 1.0)
    model.save_pretrained(tmp_path / "model")
    report = squawq.quantize(tmp_path / "model", tmp_path / "awq", SMALL, calibration=ROWS.tolist())
    assert [row["name"] for row in report["kept_in_16_bits"]] == ["multi_modal_projector", "vision_tower"]
    assert len(report["layers"]) == 2
    ids = ROWS[:1] % 150
    with torch.no_grad():
        wanted, found = model(ids).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "awq")(ids).logits
    assert (found - wanted).abs().mean() < 0.3 * wanted.abs().mean()
    score = squawq.evaluate(tmp_path / "awq", tmp_path / "model", ids=ids[0].tolist(), window=32)
    assert 0 < score["kl_mean"] < 1


@pytest.mark.parametrize("flat", [False, True])
def test_the_text_model_of_qwen_with_vision(flat: bool, tmp_path: Path) -> None:
    """Early config.json have the text model's keys at the top, and early names are model.layers and visual."""
    from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    import squawq.transformers

    known = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    text = {name: SIZES[name] for name in (*known, "vocab_size", "max_position_embeddings")}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config={**vision, "patch_size": 14, "window_size": 28, "fullatt_block_indexes": [0]},
        tie_word_embeddings=flat,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    randomize(model, 0.0)
    folder, awq = tmp_path / "model", tmp_path / "awq"
    model.save_pretrained(folder)
    if flat:
        raw = json.loads((folder / "config.json").read_text())
        inner = raw.pop("text_config")
        del inner["model_type"], inner["rope_parameters"]
        rope = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "rope_theta": 10000.0}
        (folder / "config.json").write_text(json.dumps({**inner, **raw, **rope}))
        tensors = load_file(folder / "model.safetensors")
        tensors = {re.sub(r"^model\.(language_model|(?=visual))", r"", n): t for n, t in tensors.items()}
        tensors = {re.sub(r"^\.(layers|embed_tokens|norm)", r"model.\1", n): t for n, t in tensors.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    report = squawq.quantize(folder, awq, SMALL, calibration=ROWS.tolist())
    assert [row["name"] for row in report["kept_in_16_bits"]] == ["visual"]
    with torch.no_grad():
        wanted = model(ROWS[:1]).logits
        found = AutoModelForImageTextToText.from_pretrained(awq)(ROWS[:1]).logits
    assert (found - wanted).abs().mean() < 0.3 * wanted.abs().mean()
    assert 0 < squawq.evaluate(awq, folder, ids=ROWS[0].tolist(), window=32)["kl_mean"] < 1


def test_a_row_that_forgets_a_linear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family_model("llama", tmp_path / "model")
    groups = tuple(group for group in FAMILIES["llama"].groups if "mlp.down_proj" not in group.linears)
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], groups=groups))
    with pytest.raises(ConfigError, match=r"mlp.down_proj: the row of llama in squawq/families.py"):
        squawq.quantize(tmp_path / "model", tmp_path / "awq", SMALL, calibration=ROWS.tolist())


@pytest.mark.parametrize("model_type", ["deepseek_v3", "llama4_text"])
def test_what_our_decoder_does_not_run_says_what_does(model_type: str, tmp_path: Path) -> None:
    family_model(model_type, tmp_path / "model")
    with pytest.raises(ConfigError, match=r"does not run this model \(.*\); .* on transformers' model class"):
        load(tmp_path / "model")


@pytest.mark.parametrize("model_type", ["llama4_text", "mixtral"])
def test_the_room_asked_for_counts_experts(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored as one parameter of all experts, or each by itself; both become integers."""
    asked: list[int] = []
    monkeypatch.setattr(Job, "require_room", lambda self, size, scratch: asked.append(size))
    family_model(model_type, tmp_path / "model")
    report = squawq.quantize(tmp_path / "model", tmp_path / "awq", SMALL, calibration=ROWS.tolist())
    assert asked == [report["bytes"]]


@pytest.mark.parametrize(
    ("model_type", "part", "tensors"),
    [
        ("deepseek_v3", "model.layers.61", ("eh_proj.weight", "mlp.gate.e_score_correction_bias")),
        ("qwen3_5_text", "mtp", ("fc.weight", "layers.0.mlp.up_proj.weight")),
    ],
)
def test_multi_token_prediction_is_copied(model_type: str, part: str, tensors: tuple[str, ...], tmp_path: Path) -> None:
    """Layers that transformers does not load, and other engines draft with."""
    from transformers import AutoModelForCausalLM

    import squawq.transformers

    family_model(model_type, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    further = {f"{part}.{name}": torch.randn(64, 32 * place + 1) for place, name in enumerate(tensors)}
    save_file({**load_file(file), **further}, file, {"format": "pt"})
    report = squawq.quantize(tmp_path / "model", tmp_path / "awq", SMALL, calibration=ROWS.tolist())
    assert {"name": part, "reason": "beside the text model"} in report["kept_in_16_bits"]
    quantized = Checkpoint(tmp_path / "awq")
    assert quantized.config.quant is not None
    assert part in quantized.config.quant.modules_to_not_convert
    for name, tensor in further.items():
        exact = name.endswith("correction_bias")  # of a router: as it was
        assert torch.equal(quantized.read(name), tensor if exact else tensor.half())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "awq")(ROWS[:1]).logits.isfinite().all()


def test_an_expert_of_another_shape_is_named(tmp_path: Path) -> None:
    """Experts out of one parameter: it has to have the shape that the config says."""
    family_model("granitemoe", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    name = "model.layers.1.block_sparse_moe.input_linear.weight"
    save_file({**load_file(file), name: torch.zeros(4, 100, 64)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name}' has shape \[4, 100, 64\]; \[experts, 192, 64\] is needed"):
        squawq.quantize(tmp_path / "model", tmp_path / "awq", SMALL, calibration=ROWS.tolist())
