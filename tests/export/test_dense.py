"""Dense 16-bit weights: exactly what the integers say, and plain transformers runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, logits
from safetensors.torch import load_file
from torch import Tensor

from squawq.errors import CheckpointError
from squawq.export.dense import Dense
from squawq.export.run import export
from squawq.format.files import read_json
from squawq.format.groupwise import GroupwiseTensor
from squawq.format.reader import Checkpoint
from squawq.format.shards import write_index, write_shard
from squawq.nn.loader import Options
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "tied": ("llama", {"tie_word_embeddings": True}, {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "skipped": ("llama", {}, {"modules_to_not_convert": ("o_proj",)}),
    "symmetric": ("mistral", {}, {"zero_point": False}),
    "whole rows": ("qwen2", {}, {"group_size": -1}),
    "bfloat16": ("qwen3", {}, {"dtype": "bfloat16"}),
}


def awq(make_model: MakeModel, tmp_path: Path, case: str) -> Path:
    model_type, changes, settings = CASES[case]
    out = tmp_path / "awq"
    quantize(make_model(model_type, **changes), out, QuantConfig(**{"group_size": 32, "method": "rtn", **settings}))
    return out


def reference(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights by the formula of docs/explanation/format.md, in float64, rounded once."""
    checkpoint, weights = Checkpoint(folder), {}
    for name, info in checkpoint.tensors.items():
        linear, _, kind = name.rpartition(".")
        if kind == "qweight":
            tensor = checkpoint.read_quantized(linear, info.shape[0], info.shape[1] * 8)
            repeat = info.shape[0] // tensor.scales.shape[1]
            scale, zero = (t.double().repeat_interleave(repeat, 1) for t in (tensor.scales, tensor.zeros))
            weights[f"{linear}.weight"] = ((tensor.q.double() - zero) * scale).to(dtype)
        elif kind not in ("qzeros", "scales"):
            weights[name] = checkpoint.read(name)
    return weights


@pytest.mark.parametrize("case", CASES)
def test_folder(case: str, make_model: MakeModel, tmp_path: Path) -> None:
    """The weights to the bit; transformers loads all of them and nothing else, with the logits of the reference."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source, out = awq(make_model, tmp_path, case), tmp_path / "dense"
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float16
    report = export(source, out, "dense")
    expected = reference(source, dtype)
    found = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert found.keys() == expected.keys()
    assert all(t.dtype == dtype and torch.equal(t, expected[name]) for name, t in found.items())
    assert report["bytes"] == sum(t.nbytes for t in found.values())
    config = read_json(out / "config.json")
    assert "quantization_config" not in config
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")

    loaded, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out), dtype=torch.float32)
    built.load_state_dict(expected, strict=False)
    ids = torch.randint(0, 160, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = loaded.eval()(ids).logits
        assert torch.equal(theirs, built.eval()(ids).logits)
    # ours has the integers themselves and keys and values in 16 bits; against it the rounding of the weights shows too
    close = 0.2 if dtype == torch.bfloat16 else 0.03
    assert theirs.abs().max() > 1
    assert (logits(source, ids, Options(backend="reference")) - theirs).abs().max() < close
    assert (logits(out, ids, Options(backend="reference")) - theirs).abs().max() < 0.03


def test_head_beside_a_tied_embedding_is_left_out(make_model: MakeModel, tmp_path: Path) -> None:
    source = awq(make_model, tmp_path, "tied")
    last = source / "model-00004-of-00004.safetensors"
    write_shard(last, {**load_file(last), "lm_head.weight": torch.zeros(160, 64).half()})
    write_index(source)
    export(source, tmp_path / "dense", "dense")
    assert "lm_head.weight" not in Checkpoint(tmp_path / "dense").tensors


def test_a_tensor_without_a_place(make_model: MakeModel, tmp_path: Path) -> None:
    source = awq(make_model, tmp_path, "llama")
    last = source / "model-00004-of-00004.safetensors"
    write_shard(last, {**load_file(last), "model.layers.2.mlp.up_proj.bias": torch.zeros(96)})
    write_index(source)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.bias.*does not belong"):
        export(source, tmp_path / "dense", "dense")
    assert not (tmp_path / "dense.partial").exists()


def test_a_missing_linear(make_model: MakeModel, tmp_path: Path) -> None:
    source = awq(make_model, tmp_path, "llama")
    shard = source / "model-00002-of-00004.safetensors"
    write_shard(shard, {n: t for n, t in load_file(shard).items() if "up_proj" not in n})
    write_index(source)
    with pytest.raises(CheckpointError, match=r"mlp\.up_proj\.weight' is missing"):
        export(source, tmp_path / "dense", "dense")


def test_sixteen_bits_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="16-bit checkpoint already; use it as it is"):
        export(make_model(), tmp_path / "dense", "dense")


def test_weights_beyond_float16() -> None:
    tensor = GroupwiseTensor(
        torch.full((8, 16), 15, dtype=torch.uint8),
        torch.full((8, 1), 60000.0).half(),
        torch.zeros(8, 1, dtype=torch.uint8),
    )
    with pytest.raises(CheckpointError, match=r"a\.b.*beyond float16"):
        Dense(torch.float16).linear("a.b", tensor)
    assert Dense(torch.bfloat16).linear("a.b", tensor)["weight"].isfinite().all()


def test_dtype_of_a_checkpoint() -> None:
    kinds = (torch.float16, torch.bfloat16, torch.float32)
    assert [Dense.like(kind).dtype for kind in kinds] == [torch.float16, torch.bfloat16, torch.float16]
