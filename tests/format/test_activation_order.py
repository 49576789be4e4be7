"""Groups in activation order (g_idx): weights and logits of the dequantized model; what cannot be is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import logits
from other_layouts import dequantized, folder_of, integers, stated
from safetensors.torch import load_file, save_file
from torch import Tensor

from squawq.engine.config import EngineConfig
from squawq.engine.loaded_model import LoadedModel
from squawq.engine.request import Request, SamplingParams
from squawq.errors import CheckpointError
from squawq.export.run import export
from squawq.format.reader import Checkpoint
from squawq.nn.loader import Options, load

LAYOUTS = ("gptq", "gptq_v2", "pack-quantized")
DOWN = "model.layers.0.mlp.down_proj"
IDS = torch.arange(2, 42).view(2, -1)


def ordered(folder: Path, layout: str, group: int = 32) -> Path:
    return folder_of(folder, layout, integers(group), stated(layout, group), order=group)


def test_weights_by_the_formula(tmp_path: Path) -> None:
    linears = integers(32)
    checkpoint = Checkpoint(ordered(tmp_path / "m", "gptq_v2"))
    for name, tensor in linears.items():
        out, in_ = tensor.q.shape
        own = {part: checkpoint.read(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
        assert torch.equal(checkpoint.read_weight(name, in_, out), dequantized(own))
        assert not torch.equal(checkpoint.read_weight(name, in_, out), tensor.dequantize())


ON_A_CARD = Options("cuda", dtype="float16", head="16-bit")


@pytest.mark.parametrize(
    "options",
    [
        Options(exact=True),
        Options(),
        Options(backend="reference"),
        pytest.param(ON_A_CARD, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_of_the_dense_twin(layout: str, options: Options, tmp_path: Path) -> None:
    theirs = ordered(tmp_path / "m", layout)
    export(theirs, tmp_path / "dense", "dense")
    expected = logits(tmp_path / "dense", IDS, Options(backend="reference"))
    found = logits(theirs, IDS, options)
    close = 0.05 if options == Options() else 0.01  # int8 activations
    assert (found - expected).norm() < close * expected.norm()


def test_rows_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    folder = ordered(tmp_path / "m", "gptq")
    assert torch.equal(logits(folder, IDS, Options())[:1], logits(folder, IDS[:1], Options()))


def test_different_orders_of_one_input(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = ordered(tmp_path / "m", "gptq")
    name = "model.layers.0.self_attn.k_proj.g_idx"
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors")
    export(folder, tmp_path / "dense", "dense")
    expected = logits(tmp_path / "dense", IDS, Options(backend="reference"))
    assert (logits(folder, IDS) - expected).norm() < 0.01 * expected.norm()
    assert "model.layers.0.self_attn.q_proj" in caplog.text
    assert "dequantized" in caplog.text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exported(layout: str, tmp_path: Path) -> None:
    """GPTQ keeps the order; other formats have none."""
    theirs = ordered(tmp_path / "m", layout)
    export(theirs, tmp_path / "dense", "dense")
    weights = load_dense(tmp_path / "dense")
    export(theirs, tmp_path / "gptq", "gptq")
    again = Checkpoint(tmp_path / "gptq")
    for name, (out, in_) in again.quantized_linears().items():
        assert again.input_order(name, in_) is not None
        assert torch.equal(again.read_weight(name, in_, out).half(), weights[f"{name}.weight"])
    for form in ("awq", "compressed-tensors"):
        with pytest.raises(CheckpointError, match=f"down_proj has its groups in activation order.*{form} does not"):
            export(theirs, tmp_path / "refused", form)
    assert not (tmp_path / "refused.partial").exists()


def load_dense(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_what_does_not_know_it_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(ordered(tmp_path / "m", "gptq"))
    with pytest.raises(CheckpointError, match=f"{DOWN} has groups in activation order.*not supported here"):
        checkpoint.read_quantized(DOWN, 128, 64)
    with pytest.raises(CheckpointError, match="cannot be cut among processes"):
        checkpoint.read_gemm(DOWN, 128, 64, (slice(None), slice(0, 64)), ordered=True)


def beyond(groups: Tensor) -> None:
    groups[3] = 4


def negative(groups: Tensor) -> None:
    groups[3] = -1


def crowded(groups: Tensor) -> None:
    groups[groups == 1] = 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [(beyond, "is in group 4; there are 4"), (negative, "is in group -1"), (crowded, "group 1 has 0 inputs; 32")],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_that_cannot_be(layout: str, damage: Callable[[Tensor], None], message: str, tmp_path: Path) -> None:
    folder = ordered(tmp_path / "m", layout)
    tensors = load_file(folder / "model.safetensors")
    name = f"{DOWN}.{'weight_g_idx' if layout == 'pack-quantized' else 'g_idx'}"
    damage(tensors[name])
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"model.safetensors: tensor '{name}'.*{message}"):
        load(folder)
    tensors[name] = tensors[name].long()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name}' is torch.int64; torch.int32 is needed"):
        load(folder)


@pytest.mark.parametrize("value", [0, -1])
def test_an_order_that_is_none(value: int, tmp_path: Path) -> None:
    """Trivial groups, and compressed-tensors' -1 throughout."""
    linears = integers(32)
    folder = folder_of(tmp_path / "m", "pack-quantized", linears, stated("pack-quantized", 32))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{DOWN}.weight_g_idx"] = (torch.arange(128) // 32 if value == 0 else torch.full((128,), -1)).int()
    save_file(tensors, folder / "model.safetensors")
    assert Checkpoint(folder).input_order(DOWN, 128) is None
    assert torch.equal(Checkpoint(folder).read_quantized(DOWN, 128, 64).q, linears[DOWN].q)


def test_in_transformers_model_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The same tokens as by our decoder; nothing is dequantized."""
    folder, found = ordered(tmp_path / "m", "gptq"), []
    for impl in ("squawq", "transformers"):
        loaded = LoadedModel(folder, EngineConfig(exact=True, kv_tokens=256, model_impl=impl), text=False)
        request = Request("0", IDS[0].tolist(), SamplingParams(max_tokens=8, ignore_eos=True))
        found.append([token for output in loaded.engine.generate([request]) for token in output.ids])
        loaded.close()
    assert found[0] == found[1]
    assert len(found[0]) == 8
    assert "dequantized" not in caplog.text
