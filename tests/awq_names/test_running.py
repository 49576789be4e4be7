"""Running under AutoAWQ's names: the model card's script, and what was wrong in AutoAWQ's fused layers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, logits
from safetensors.torch import load_file
from transformers import AutoTokenizer

import squawq
from awq import AutoAWQForCausalLM
from awq.models import loading
from squawq.demo import demo_model
from squawq.errors import CheckpointError, ConfigError
from squawq.nn.loader import Options
from squawq.quant_config import QuantConfig

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture
def folder(make_model: MakeModel, tmp_path: Path) -> Path:
    """A tiny AWQ model with Llama 3.1's rope and the demo model's tokenizer."""
    source = make_model(vocab_size=4096, rope_scaling=LLAMA3, pad_token_id=7)
    AutoTokenizer.from_pretrained(demo_model()).save_pretrained(source)
    squawq.quantize(source, tmp_path / "awq", QuantConfig(group_size=32, method="rtn"))
    return tmp_path / "awq"


def ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(8, 4096, (1, length), generator=torch.Generator().manual_seed(seed))


def test_the_cards_script(folder: Path) -> None:
    model_id = str(folder)
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    model = AutoAWQForCausalLM.from_pretrained(
        model_id,
        torch_dtype=torch.float16,
        low_cpu_mem_usage=True,
        device_map="auto",
    )
    prompt = [
        {"role": "system", "content": "You are a helpful assistant, that responds as a pirate."},
        {"role": "user", "content": "What's Deep Learning?"},
    ]
    inputs = tokenizer.apply_chat_template(
        prompt, tokenize=True, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.model.device)
    outputs = model.generate(**inputs, do_sample=True, max_new_tokens=8)
    new = outputs[:, inputs["input_ids"].shape[1] :]
    assert 1 <= new.shape[1] <= 8
    assert isinstance(tokenizer.batch_decode(new, skip_special_tokens=True)[0], str)
    assert model.is_quantized
    assert model.quant_config.q_group_size == 32
    assert model.model.dtype == torch.float16
    assert model.to("cpu") is model.model
    assert model.eval() is model


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean difference, as a part of the mean size."""
    return float((found.detach() - wanted).abs().mean() / wanted.abs().mean())


@pytest.mark.parametrize(("fuse", "bound"), [(True, 1e-5), (False, 0.05)])  # the bound is for 8-bit activations
def test_llama_31s_rope_counts(folder: Path, fuse: bool, bound: float) -> None:
    tokens = ids(100)
    wanted = logits(folder, tokens, Options())
    model = AutoAWQForCausalLM.from_quantized(folder, fuse_layers=fuse, max_seq_len=128, torch_dtype=torch.float32)
    assert distance(model(tokens).logits, wanted) < bound
    raw = json.loads((folder / "config.json").read_text())
    for key in ("rope_scaling", "rope_parameters"):
        raw.pop(key, None)
    (folder / "config.json").write_text(json.dumps(raw))
    assert distance(logits(folder, tokens, Options()), wanted) > 0.5  # what AutoAWQ's fused layers computed


@pytest.mark.parametrize("fuse", [True, False])
def test_left_padding_changes_nothing(folder: Path, fuse: bool) -> None:
    model = AutoAWQForCausalLM.from_quantized(folder, fuse_layers=fuse, torch_dtype=torch.float32, device_map="cpu")
    short, long = ids(5, 1), ids(12, 2)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    alone = [model.generate(row, attention_mask=torch.ones_like(row), **settings)[0, -4:] for row in (short, long)]
    padded = torch.cat((torch.cat((torch.full((1, 7), 7), short), 1), long))
    mask = torch.ones_like(padded)
    mask[0, :7] = 0
    together = model.generate(padded, attention_mask=mask, **settings)[:, -4:]
    assert together.tolist() == [row.tolist() for row in alone]


def test_more_tokens_than_the_cache_holds(folder: Path) -> None:
    model = AutoAWQForCausalLM.from_quantized(folder, max_seq_len=16)
    with pytest.raises(ConfigError, match="16"):
        model.generate(ids(10), max_new_tokens=10)
    assert model.config.max_seq_len == 16
    assert model.generate(ids(10), max_new_tokens=6).shape[1] <= 16


def test_fusing_later_and_what_cannot_be_fused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoAWQForCausalLM.from_quantized(folder, fuse_layers=False, max_seq_len=16)
    model.fuse_layers(model.model)
    with pytest.raises(ConfigError, match="16"):
        model.generate(ids(10), max_new_tokens=10)
    monkeypatch.setattr(loading, "say_once", loading.say_once.__wrapped__)
    other = AutoAWQForCausalLM.from_quantized(folder, fuse_layers=False, max_seq_len=16)
    other.config.rms_norm_eps = 1e-3  # no longer the folder's
    with caplog.at_level(logging.WARNING):
        other.fuse_layers(other.model)
    assert "layers are not fused" in caplog.text
    assert other.generate(ids(10), max_new_tokens=10, min_new_tokens=10).shape[1] == 20


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("wrong", [0, -5, True, "512", 2.5])
def test_a_limit_that_cannot_be(folder: Path, fuse: bool, wrong: Any) -> None:
    for name in ("max_seq_len", "max_new_tokens"):
        with pytest.raises(ConfigError, match=f"max_seq_len is {wrong!r}"):
            AutoAWQForCausalLM.from_quantized(folder, fuse_layers=fuse, **{name: wrong})


def test_a_rope_that_our_decoder_has_not_runs_unfused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("rope_scaling", None)
    raw["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(raw))
    monkeypatch.setattr(loading, "say_once", loading.say_once.__wrapped__)
    with caplog.at_level(logging.WARNING):
        model = AutoAWQForCausalLM.from_quantized(folder)
    assert "layers are not fused" in caplog.text
    assert "rope type is 'dynamic'" in caplog.text
    assert model.generate(ids(4), max_new_tokens=2, min_new_tokens=2).shape == (1, 6)


def test_damage_is_no_reason_to_run_unfused(folder: Path) -> None:
    model = AutoAWQForCausalLM.from_quantized(folder, fuse_layers=False)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match="the index names this file"):
        model.fuse_layers(model.model)


def test_older_arguments_are_said_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    loading.say_once.cache_clear()
    for _ in range(2):
        model = AutoAWQForCausalLM.from_quantized(
            folder, "", max_new_tokens=20, use_exllama_v2=True, use_ipex=True, batch_size=4, max_memory=None
        )
    assert model.config.max_seq_len == 20
    assert caplog.text.count("max_new_tokens is deprecated") == caplog.text.count("squawq picks the kernel") == 1
    with pytest.raises(ConfigError, match=r"quant_filename is 'other\.safetensors'"):
        AutoAWQForCausalLM.from_quantized(folder, "other.safetensors")


OLDER = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
GPTQMODELS = {"bits": 4, "group_size": 32, "quant_method": "awq", "format": "gemm", "zero_point": True, "sym": False}


@pytest.mark.parametrize(
    ("name", "settings"), [("quant_config.json", OLDER), ("quantize_config.json", GPTQMODELS)], ids=["awq", "gptqmodel"]
)
@pytest.mark.parametrize("null", [False, True])
def test_older_config_files(folder: Path, tmp_path: Path, name: str, settings: dict[str, object], null: bool) -> None:
    raw = json.loads((folder / "config.json").read_text())
    stated = raw.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": None} if null else raw))
    (folder / name).write_text(json.dumps(settings))
    tokens = ids(20)
    wanted = logits(folder, tokens)
    model = AutoAWQForCausalLM.from_quantized(folder, fuse_layers=False, torch_dtype="float32")
    assert model.is_quantized
    assert distance(model(tokens).logits, wanted) < 0.05
    model.save_quantized(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**raw, "quantization_config": stated}
    assert distance(logits(tmp_path / "out", tokens), wanted) < 1e-6


def test_gptqs_older_config_file_is_refused(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32}))
    with pytest.raises(CheckpointError, match="quant_method is 'gptq'"):
        AutoAWQForCausalLM.from_pretrained(folder)


def test_a_loaded_model_is_saved_as_it_is(folder: Path, tmp_path: Path) -> None:
    model = AutoAWQForCausalLM.from_quantized(folder)
    model.save_quantized(tmp_path / "copy")
    for path in folder.glob("*.safetensors"):
        assert {k: v.tolist() for k, v in load_file(path).items()} == {
            k: v.tolist() for k, v in load_file(tmp_path / "copy" / path.name).items()
        }
    with pytest.raises(ConfigError, match="quantized already"):
        model.quantize()


def test_a_16_bit_model_runs_and_is_quantized_and_runs(make_model: MakeModel, rows: list[list[int]]) -> None:
    model = AutoAWQForCausalLM.from_pretrained(make_model(), dtype=torch.float32, use_cache=False)
    prompt = torch.tensor([rows[0][:8]])
    assert model.generate(prompt, max_new_tokens=2, do_sample=False).shape == (1, 10)
    dense = model(prompt).logits.detach()
    assert model.config.use_cache is False
    config = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    model.quantize(None, config, rows, max_calib_samples=8, max_calib_seq_len=32)
    assert 0 < distance(model(prompt).logits, dense) < 0.3


def test_a_damaged_folder_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        AutoAWQForCausalLM.from_quantized(folder)
