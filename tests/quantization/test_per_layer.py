"""Gemma 4 with per-layer inputs (E2B, E4B), whose later layers share keys and values of earlier ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import PER_LAYER, SIZES, VOCABULARY, dense_folder, family_model, randomize
from safetensors.torch import load_file, save_file

import squawq
from squawq.errors import CheckpointError
from squawq.export.run import export
from squawq.families import FAMILIES
from squawq.format.reader import Checkpoint
from squawq.inspection import inspect
from squawq.layerwise.blocks import Blocks
from squawq.quant_config import QuantConfig
from squawq.quantization.tuning import Tuning

CASE = "gemma4_text per layer"
SMALL = QuantConfig(group_size=32, seqlen=32, samples=8, n_grid=3)
ROWS = torch.randint(2, 150, (8, 32), generator=torch.Generator().manual_seed(5))


def blocks_of(folder: Path) -> Blocks:
    return Blocks(Checkpoint(folder), FAMILIES["gemma4_text"], "cpu")


def test_layers_one_by_one_as_the_whole_model(tmp_path: Path) -> None:
    """In batches of blocks, of which each layer keeps keys and values; inputs computed a few tokens at a time."""
    model = family_model(CASE, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("squawq.layerwise.blocks.BATCH_TOKENS", 64)
        patch.setattr("squawq.layerwise.extra_inputs.AT_ONCE", 7)
        blocks = blocks_of(tmp_path)
        states = blocks.last_states(ROWS)
        with torch.no_grad():
            expected = model(ROWS).logits
        assert (blocks.logits()(states) - expected).abs().max() < 1e-3
        sliced = torch.cat(list(blocks.logits_by_slices(states, 50)), -1)
        assert (sliced - expected).abs().max() < 1e-3


def test_only_rows_that_are_looked_up_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family_model(CASE, tmp_path)
    read: list[tuple[str, object]] = []
    own = Checkpoint.read

    def watch(self: Checkpoint, name: str, shape: Any = None, index: int | None = None) -> torch.Tensor:
        read.append((name, index))
        return own(self, name, shape, index)

    monkeypatch.setattr(Checkpoint, "read", watch)
    blocks = blocks_of(tmp_path)
    blocks.last_states(torch.tensor([[3, 5, 3]]))
    blocks.logits()
    assert [index for name, index in read if "embed_tokens_per_layer" in name] == [3, 5]


@pytest.mark.parametrize("method", ["squawq", "awq", "rtn"])
def test_the_text_model_of_a_larger_one(method: Any, tmp_path: Path) -> None:
    """With keys and values in the checkpoint that no layer reads, as early ones have them: these are left out."""
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    import squawq.transformers

    known = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    text = {name: SIZES[name] for name in (*known, "max_position_embeddings", "sliding_window")}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = ("image_token_id", "boi_token_id", "eoi_token_id", "audio_token_id", "video_token_id")
    config = Gemma4Config(
        text_config={**text, **PER_LAYER, "pad_token_id": 0},
        vision_config={**vision, "num_key_value_heads": 2, "head_dim": 16},
        audio_config=None,
        **{name: 150 + place for place, name in enumerate(special)},
    )
    torch.manual_seed(0)
    model = Gemma4ForConditionalGeneration(config).eval()
    randomize(model, 0.0)
    folder, awq = tmp_path / "model", tmp_path / "awq"
    model.save_pretrained(folder)
    state, text_model = load_file(folder / "model.safetensors"), "model.language_model"
    surplus = {f"{text_model}.layers.{index}.self_attn.k_proj.weight": torch.randn(32, 64) for index in (2, 3)}
    save_file({**state, **surplus}, folder / "model.safetensors", {"format": "pt"})
    settings = QuantConfig(method=method, group_size=32, seqlen=32, samples=8, n_grid=3)
    report = squawq.quantize(folder, awq, settings, calibration=None if method == "rtn" else ROWS.tolist())
    kept = {row["name"]: row["reason"] for row in report["kept_in_16_bits"]}
    assert kept[f"{text_model}.per_layer_model_projection"] == "outside the layers"
    assert kept[f"{text_model}.layers.3.per_layer_projection"] == "part of per-layer inputs"
    assert kept["vision_tower"] == "beside the text model"
    tensors = Checkpoint(awq).tensors
    assert not [name for name in tensors if "layers.2.self_attn.k_proj" in name]
    assert tensors[f"{text_model}.embed_tokens_per_layer.weight"].dtype.itemsize == 2
    with torch.no_grad():
        wanted = model(ROWS[:1]).logits
        found = Gemma4ForConditionalGeneration.from_pretrained(awq)(ROWS[:1]).logits
    assert (found - wanted).abs().mean() < 0.5 * wanted.abs().mean()
    assert 0 < squawq.evaluate(awq, folder, ids=ROWS[0].tolist(), window=32)["kl_mean"] < 1
    for kind in ("gptq", "compressed-tensors"):
        export(awq, tmp_path / kind, kind)
    listed = json.loads((tmp_path / "compressed-tensors" / "config.json").read_text())["quantization_config"]["ignore"]
    assert f"{text_model}.per_layer_model_projection" in listed


def test_exported_in_16_bits_it_is_what_its_integers_stand_for(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    family_model(CASE, tmp_path / "model")
    squawq.quantize(tmp_path / "model", tmp_path / "awq", SMALL, calibration=ROWS.tolist())
    export(tmp_path / "awq", tmp_path / "dense", "dense")
    expected = dense_folder(tmp_path / "awq", tmp_path / "model", tmp_path / "expected")
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ROWS[:2]).logits
            for folder in (tmp_path / "dense", expected)
        ]
    assert (logits[0] - logits[1]).abs().max() < 0.05 * logits[1].std()  # weights rounded to float16


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    """Layers before have kept keys and values for those after."""

    class Stopping:
        def __init__(self, layers: int) -> None:
            self.left = layers

        def layer(self, record: Any) -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

        def __getattr__(self, _: str) -> Any:
            return lambda *_: None

    folder = tmp_path / "model"
    family_model(CASE, folder)
    squawq.quantize(folder, tmp_path / "whole", SMALL, calibration=ROWS.tolist())
    with pytest.raises(KeyboardInterrupt):
        squawq.quantize(folder, tmp_path / "cut", SMALL, calibration=ROWS.tolist(), observer=Stopping(3))
    squawq.quantize(folder, tmp_path / "cut", SMALL, calibration=ROWS.tolist())
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "cut" / file.name).read_bytes()


def test_tuning_lowers_the_loss(tmp_path: Path) -> None:
    family_model(CASE, tmp_path / "model")
    squawq.quantize(tmp_path / "model", tmp_path / "awq", QuantConfig(method="rtn", group_size=32), progress=False)
    quantized, blocks = Checkpoint(tmp_path / "awq"), blocks_of(tmp_path / "model")
    written = blocks_of(tmp_path / "awq")

    def stored(index: int) -> dict[str, torch.Tensor]:
        return {name: quantized.read(name) for name in written.names.of_layer(index)}

    tuning = Tuning(blocks, ROWS, blocks.last_states(ROWS), 2, stored)
    row = tuning.run(8)
    assert row.loss < row.loss_before
    shared = tuning._layers[0].linears["self_attn.k_proj.weight"].change  # read by the third layer, too
    assert shared.detach().any()


def test_its_bytes_by_kind(tmp_path: Path) -> None:
    family_model(CASE, tmp_path)
    found = inspect(tmp_path)
    assert found["bytes"]["embedding"] == 4 * VOCABULARY * (SIZES["hidden_size"] + 4 * 16)
    assert found["memory"]["fp16"]["kv_cache"] == 128 * 2 * 2 * 2 * 16 * 2  # two of the four layers have any


def test_a_token_without_inputs_is_refused(tmp_path: Path) -> None:
    family_model(CASE, tmp_path, vocab_size_per_layer_input=VOCABULARY - 1)
    with pytest.raises(CheckpointError, match="per-layer embedding has 159 rows, the token embedding 160"):
        blocks_of(tmp_path)
