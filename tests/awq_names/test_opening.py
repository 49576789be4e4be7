"""Opening under AutoAWQ's names: no code of a folder runs, and what `quantize` would not heed is refused."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DECODED, MakeModel

from awq import AutoAWQForCausalLM
from awq.models.loading import check_as_stored
from squawq.config import CODE
from squawq.errors import ConfigError
from squawq.format.reader import Checkpoint
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


@pytest.mark.parametrize("trust", [None, False, True])
@pytest.mark.parametrize(
    ("config", "kind", "says"),
    [
        ({"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}, ConfigError, "no model_type 'mine'"),
        (  # known to transformers, but not as a causal model
            {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "code.Model"}, "quantization_config": AWQ},
            ConfigError,
            "no causal language model",
        ),
    ],
    ids=["config", "model"],
)
def test_no_code_of_a_folder_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    kind: type[Exception],
    says: str,
    trust: bool | None,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\n"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(kind, match=says):
        AutoAWQForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)
    assert not (tmp_path / "ran").exists()
    assert sys.stdin.read() == "y\ny\n"  # nobody asked


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("max_position_embeddings", 64, "max_positions is 64"), ("rms_norm_eps", 1e-3, "norm_eps is 0.001")],
)
def test_settings_that_quantize_does_not_heed_are_refused(
    make_model: MakeModel, rows: list[list[int]], name: str, value: Any, says: str
) -> None:
    folder = make_model()
    opened = AutoAWQForCausalLM.from_pretrained(folder, **{name: value})
    edited = AutoAWQForCausalLM.from_pretrained(folder)
    setattr(edited.config, name, value)
    for model in (opened, edited):
        with pytest.raises(ConfigError, match=rf"{says} in the model and .* reads the folder"):
            model.quantize(calib_data=rows, max_calib_seq_len=32)
        assert not model.is_quantized


def test_weights_that_were_changed_are_refused(make_model: MakeModel, rows: list[list[int]]) -> None:
    model = AutoAWQForCausalLM.from_pretrained(make_model())
    with torch.no_grad():
        model.model.model.layers[1].mlp.up_proj.weight[3, 5] += 1
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.up_proj\.weight in the model is not what"):
        model.quantize(calib_data=rows, max_calib_seq_len=32)


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
@pytest.mark.parametrize("family", DECODED)
def test_an_unchanged_model_is_as_stored(make_model: MakeModel, family: str, dtype: Any) -> None:
    folder = make_model(family, tie_word_embeddings=True)
    raw = json.loads((folder / "config.json").read_text())
    for name in ("rms_norm_eps", "max_position_embeddings", "rope_theta"):  # transformers' defaults are not ours
        raw.pop(name)
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": None}))
    model = AutoAWQForCausalLM.from_pretrained(folder, dtype=dtype, use_cache=False)
    check_as_stored(model.config, None, Checkpoint(folder))
    check_as_stored(model.config, model.model, Checkpoint(folder))


@pytest.mark.parametrize("key", CODE)
def test_what_a_config_names_is_not_fetched(make_model: MakeModel, key: str, tmp_path: Path) -> None:
    """transformers would ask the Hub for a kernel of this name, or run the code."""
    folder = make_model()
    config = json.loads((folder / "config.json").read_text())
    named: Any = {"AutoConfig": "code.Config"} if key == "auto_map" else "evil/kernel"
    (folder / "config.json").write_text(json.dumps({**config, key: named, "num_labels": 10**8}))
    model = AutoAWQForCausalLM.from_pretrained(folder)
    assert "evil" not in str(model.config.to_dict())
    assert "evil" not in str(model.config._attn_implementation)
    quantize(folder, tmp_path / "out", QuantConfig(method="rtn", group_size=32))
    assert key not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_an_adapter_is_refused(make_model: MakeModel) -> None:
    folder = make_model()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/model"}))
    with pytest.raises(ConfigError, match="is an adapter"):
        AutoAWQForCausalLM.from_pretrained(folder)
