"""The dtype in which a result is stored: the source's by default, and one in which the model still computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel
from results import settled
from safetensors.torch import load_file, save_file

import squawq
from squawq.errors import CheckpointError
from squawq.format.reader import Checkpoint
from squawq.quant_config import QuantConfig

Rows = list[list[int]]
SMALL = {"group_size": 32, "seqlen": 32, "samples": 8, "n_grid": 2}
DOWN = "model.layers.1.mlp.down_proj.weight"


def quantize(folder: Path, out: Path, rows: Rows | None, **changes: Any) -> dict[str, Any]:
    return squawq.quantize(folder, out, QuantConfig(**{**SMALL, **changes}), calibration=rows)


def rewrite(folder: Path, dtype: torch.dtype, scale: float = 1.0) -> Path:
    """The model in another dtype, the outputs of its second layer's MLP multiplied."""
    state = load_file(folder / "model.safetensors")
    state = {k: (t * scale if k == DOWN else t).to(dtype) for k, t in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def dense_types(folder: Path) -> set[torch.dtype]:
    tensors = Checkpoint(folder).tensors.items()
    return {info.dtype for name, info in tensors if not name.endswith(("qweight", "qzeros", "scales"))}


@pytest.mark.parametrize(
    ("source", "asked", "stored"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float16),
        (torch.float32, "auto", torch.float16),
        (torch.bfloat16, "float16", torch.float16),
        (torch.float16, "bfloat16", torch.bfloat16),
    ],
)
def test_the_sources_dtype_is_kept(
    source: torch.dtype, asked: str, stored: torch.dtype, make_model: MakeModel, tmp_path: Path
) -> None:
    report = quantize(rewrite(make_model(), source), tmp_path / "out", None, method="rtn", dtype=asked)
    assert dense_types(tmp_path / "out") == {stored}
    name = str(stored).removeprefix("torch.")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == name
    assert report["job"]["config"]["dtype"] == report["stored_dtype"]["dtype"] == name  # the same job as if asked for
    default = torch.bfloat16 if source == torch.bfloat16 else torch.float16
    assert report["stored_dtype"]["by_default"] == str(default).removeprefix("torch.")
    assert 0 < report["stored_dtype"]["logits_error"] < 0.05


@pytest.mark.parametrize("method", ["squawq", "rtn"])
def test_activations_beyond_float16_are_an_error_that_names_the_layer(
    method: str, make_model: MakeModel, rows: Rows, tmp_path: Path
) -> None:
    folder, given = rewrite(make_model(num_hidden_layers=3), torch.bfloat16, 3e4), None if method == "rtn" else rows
    with pytest.raises(
        CheckpointError, match=r"^model\.layers\.1: .*float16.*not finite.*dtype='bfloat16' \(--dtype bfloat16\)$"
    ):
        quantize(folder, tmp_path / "out", given, method=method, dtype="float16")
    assert not (tmp_path / "out").exists()
    quantize(folder, tmp_path / "kept", given, method=method)
    from transformers import AutoModelForCausalLM

    import squawq.transformers  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "kept")
    assert model.dtype == torch.bfloat16
    assert model(torch.tensor(rows[:1])).logits.isfinite().all()


@pytest.mark.parametrize("method", ["squawq", "rtn"])
def test_the_first_token_of_a_text_is_tried(method: str, make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    """As in Gemma, where the activations of BOS overflow and no others."""
    seen = {i for row in rows for i in row} | set(torch.linspace(0, 159, 128).round().int().tolist())
    bos = min(set(range(160)) - seen)
    folder = rewrite(make_model(bos_token_id=bos), torch.float32, 300)
    state = load_file(folder / "model.safetensors")
    state["model.embed_tokens.weight"][bos] = 65_000
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"^model\.layers\.1: .*not finite"):
        quantize(folder, tmp_path / "out", None if method == "rtn" else rows, method=method)


def test_a_model_that_is_broken_in_float32_is_said_to_be(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    folder = make_model()
    rewrite(folder, torch.float32, 1e38)
    with pytest.raises(CheckpointError, match=r"^model\.layers\.1: .*not finite in float32 either"):
        quantize(folder, tmp_path / "out", rows, modules_to_not_convert=("layers.1",), dtype="bfloat16")


def test_logits_far_from_those_in_float32(
    make_model: MakeModel, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("squawq.quantization.check.FAR_OFF", 1e-6)
    with pytest.raises(CheckpointError, match=r"^model\.layers\.0: .*float16.*0% away.*--dtype bfloat16"):
        quantize(make_model(), tmp_path / "out", rows)
    with pytest.raises(CheckpointError, match=r"bfloat16.*% away from that in float32$"):  # float16 would hold less
        quantize(make_model(name="other"), tmp_path / "other-out", rows, dtype="bfloat16")


def test_a_run_that_goes_on_is_checked_from_the_first_layer(
    make_model: MakeModel, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = rewrite(make_model(), torch.bfloat16)
    whole = quantize(folder, tmp_path / "whole", rows)

    class StopError(Exception):
        pass

    def stop(*_: Any) -> float:
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr("squawq.quantization.check.DtypeCheck.head", stop)
        with pytest.raises(StopError):
            quantize(folder, tmp_path / "out", rows)
    assert quantize(folder, tmp_path / "out", rows)["stored_dtype"] == whole["stored_dtype"]
    assert settled(tmp_path / "out") == settled(tmp_path / "whole")
