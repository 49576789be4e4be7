"""Other layouts: the same integers and logits as their GEMM twin; what does not fit is refused by its header."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import logits
from other_layouts import CONFIG, folder_of, integers, packed, stated, woven
from safetensors.torch import load_file, save_file
from torch import Tensor

from squawq.errors import CheckpointError
from squawq.export.run import export
from squawq.format import reader
from squawq.format.groupwise import quantize, to_gemm
from squawq.format.layouts import LAYOUTS
from squawq.format.reader import Checkpoint
from squawq.inspection import inspect, missing

OTHER = [name for name in LAYOUTS if name != "gemm"]
PARTS = ("qweight", "scales", "qzeros")
DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_integers_and_logits_of_the_twin(layout: str, group: int, tmp_path: Path) -> None:
    linears = integers(group)
    checkpoint = Checkpoint(folder_of(tmp_path / "theirs", layout, linears, stated(layout, group)))
    for name, tensor in linears.items():
        for part, found in zip(PARTS, checkpoint.read_gemm(name, *tensor.q.shape[::-1]), strict=True):
            assert found is not None
            assert torch.equal(found, to_gemm(tensor)[part]), (name, part)
            assert found.is_contiguous()
    twin = folder_of(tmp_path / "twin", "gemm", linears, stated("gemm", group))
    ids = torch.arange(2, 22).view(1, -1)
    assert torch.equal(logits(checkpoint.folder, ids), logits(twin, ids))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_part_of_a_linear(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part is that part of the whole linear; of GEMM's layout no more is read than its rows."""
    linears = integers(64)
    checkpoint = Checkpoint(folder_of(tmp_path / "m", layout, linears, stated(layout, 64)))
    read, own = list[int](), checkpoint._read_data

    def counted(file: Any, info: Any) -> Tensor:
        read.append(info.nbytes)
        return own(file, info)

    monkeypatch.setattr(checkpoint, "_read_data", counted)
    part = checkpoint.read_quantized(DOWN, 128, 64, (slice(16, 48), slice(32, 96)))
    assert torch.equal(part.dequantize(), linears[DOWN].dequantize()[16:48, 32:96])
    assert part.scales.shape == (32, 2)
    kind = LAYOUTS[layout]
    stored = sum(checkpoint.info(f"{DOWN}.{name}").nbytes for name in (kind.integers, kind.scales, kind.zeros))
    assert (sum(read) < stored) == (layout == "gemm")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_symmetric_without_zeros(layout: str, tmp_path: Path) -> None:
    linears = integers(32, zero_point=False)
    settings = stated(layout, 32, zero_point=False)
    folder = folder_of(tmp_path / "m", layout, linears, settings, drop=("qzeros", "scaled_zeros", "weight_zero_point"))
    found = Checkpoint(folder).read_quantized(DOWN, 128, 64)
    assert torch.equal(found.q, linears[DOWN].q)
    assert torch.equal(found.zeros, torch.full_like(found.zeros, 8))


@pytest.mark.parametrize(("inputs", "out", "group"), [(64, 8, 16), (512, 24, 32), (2304, 8, 128), (1088, 16, 64)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes(layout: str, inputs: int, out: int, group: int) -> None:
    """More groups than a word has zeros, and numbers of them that fill no word."""
    weight = torch.randn(out, inputs, generator=torch.Generator().manual_seed(inputs))
    made, kind = quantize(weight, group, zero_point=True), LAYOUTS[layout]
    tensor = replace(made, zeros=made.zeros.clamp(min=1))
    theirs = packed(tensor, layout)
    if group >= 32:  # a smaller one has no padding that is described anywhere
        shapes = [tuple(theirs[name].shape) for name in (kind.integers, kind.scales, kind.zeros)]
        assert list(kind.shapes(inputs, out, group)) == shapes
    found = kind.to_gemm(theirs[kind.integers], theirs[kind.scales], theirs[kind.zeros], inputs // group)
    for name, part in zip(PARTS, found, strict=True):
        assert part is not None
        assert torch.equal(part, to_gemm(tensor)[name]), name


def test_zeros_in_bfloat16(tmp_path: Path) -> None:
    """llm-awq may write -zero * scale in bfloat16, where that of 15 is off by up to 0.06 of a scale."""
    linears = integers(32)
    folder = folder_of(tmp_path / "m", "llm-awq", linears, stated("llm-awq", 32), dtype=torch.bfloat16)
    checkpoint = Checkpoint(folder)
    for name, tensor in linears.items():
        found = checkpoint.read_quantized(name, *tensor.q.shape[::-1])
        assert torch.equal(found.zeros, tensor.zeros)
        assert torch.equal(found.q, tensor.q)


def test_the_weave_is_autoawqs() -> None:
    """Words that AutoAWQ 0.2.9's pack_intweight made of these integers; the packer here must agree before it judges."""
    q = torch.tensor([[(7 * n + 3 * k + k // 16) % 16 for k in range(64)] for n in range(4)]).numpy()
    first = "9180c4b3f7e62a195d4c807fb3a2e6d5b3a2e6d519084c3b7f6ea291d5c408f7"
    second = "08f73b2a6e5d9180c4b3f7e62a195d4c2a195d4c807fb3a2e6d519084c3b7f6e"
    assert "".join(f"{word & 0xFFFF:04x}" for word in woven(q)[0, :32].tolist()) == first + second


def in_wider_words(tensors: dict[str, Tensor], kind: str) -> None:
    name, wide = f"{DOWN}.{LAYOUTS[kind].integers}", LAYOUTS[kind].words == torch.int32
    tensors[name] = tensors[name].to(torch.int64 if wide else torch.int32)


def whole_scales(tensors: dict[str, Tensor], kind: str) -> None:
    tensors[f"{DOWN}.{LAYOUTS[kind].scales}"] = tensors[f"{DOWN}.{LAYOUTS[kind].scales}"].to(torch.int32)


def cut(tensors: dict[str, Tensor], kind: str) -> None:
    tensors[f"{DOWN}.{LAYOUTS[kind].integers}"] = tensors[f"{DOWN}.{LAYOUTS[kind].integers}"][:-4].contiguous()


def without_zeros(tensors: dict[str, Tensor], kind: str) -> None:
    del tensors[f"{DOWN}.{LAYOUTS[kind].zeros}"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (in_wider_words, "(qweight|weight_packed)' is torch.int(64|32); torch.int(32|16) is needed"),
        (whole_scales, "scales?' is torch.int32; floating point is needed"),
        (cut, r"(qweight|weight_packed)' has shape .* is needed"),
        (without_zeros, "(zeros|zero_point)' is missing"),
    ],
)
@pytest.mark.parametrize("layout", OTHER)
def test_headers_are_refused_before_anything_is_read(
    layout: str, damage: Callable[[dict[str, Tensor], str], None], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    file = folder_of(tmp_path / "m", layout, integers(32), stated(layout, 32)) / "model.safetensors"
    tensors = load_file(file)
    damage(tensors, layout)
    save_file(tensors, file)
    monkeypatch.delattr(reader, "safe_open")
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(file.parent).read_gemm(DOWN, 128, 64)
    assert str(file.parent) in str(caught.value)


@pytest.mark.parametrize("layout", OTHER)
def test_a_layout_under_another_name(layout: str, tmp_path: Path) -> None:
    """GEMM's tensors where config.json says otherwise: the square ones too, whose qweight has the same shape."""
    folder = folder_of(tmp_path / "m", "gemm", integers(32), stated(layout, 32))
    for linear, inputs in ((DOWN, 128), ("model.layers.0.self_attn.q_proj", 64)):
        with pytest.raises(CheckpointError, match=f"{linear}.* is needed|' is missing"):
            Checkpoint(folder).read_gemm(linear, inputs, 64)


@pytest.mark.parametrize("value", [0.3, 16.0, -1.0, float("nan"), float("inf")])
def test_zeros_that_are_no_integers(value: float, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", "llm-awq", integers(32), stated("llm-awq", 32))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{DOWN}.scaled_zeros"][1, 5] = -value * tensors[f"{DOWN}.scales"][1, 5].float()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{DOWN}.scaled_zeros.*squawq reads whole numbers from 0 to 15"):
        Checkpoint(folder).read_gemm(DOWN, 128, 64)


def test_a_zero_of_16(tmp_path: Path) -> None:
    """GPTQ's first version could say so; its second, and compressed-tensors, have 15 at most."""
    folder = folder_of(tmp_path / "m", "gptq", integers(32), stated("gptq", 32))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{DOWN}.qzeros"][1, 2] |= 15 << 8
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{DOWN}.qzeros': a zero is 16.*from 0 to 15"):
        Checkpoint(folder).read_gemm(DOWN, 128, 64)


@pytest.mark.parametrize("sizes", [[128, 64], [64, 120], [0, -1], [2**40, 8]])
def test_a_shape_that_lies(sizes: list[int], tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", "pack-quantized", integers(32), stated("pack-quantized", 32))
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, f"{DOWN}.weight_shape": torch.tensor(sizes)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{DOWN}.weight_shape' is not \[64, 128\]"):
        Checkpoint(folder).read_gemm(DOWN, 128, 64)


def test_groups_of_zeros_and_padding(tmp_path: Path) -> None:
    """A scale of 0 has a zero of 0; what fills the rows up is not looked at."""
    folder = folder_of(tmp_path / "m", "gemv_fast", integers(32), stated("gemv_fast", 32))
    tensors = load_file(folder / "model.safetensors")
    for part in ("scales", "qzeros"):
        tensors[f"{DOWN}.{part}"][0, 3] = 0.0
        tensors[f"{DOWN}.{part}"][4:] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    found = Checkpoint(folder).read_quantized(DOWN, 128, 64)
    assert found.zeros[3, 0] == 0
    assert found.dequantize().isfinite().all()


@pytest.mark.parametrize(
    ("layout", "inputs", "out", "message"),
    [
        ("gemv_fast", 96, 64, "layout 'gemv_fast'"),
        ("llm-awq", 96, 64, "layout 'llm-awq'"),
        ("gemv", 128, 60, "layout 'gemv'"),
        ("gemv", 80, 64, "groups of 32"),
    ],
)
def test_sizes_that_a_layout_cannot_have(layout: str, inputs: int, out: int, message: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", layout, integers(32), stated(layout, 32))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder).read_gemm(DOWN, inputs, out)


def test_llm_awqs_own_files_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", "llm-awq", integers(32), stated("llm-awq", 32))
    (folder / "model.safetensors").rename(folder / "model-w4-g32-awq-v2.pt")
    with pytest.raises(CheckpointError, match=r"model-w4-g32-awq-v2\.pt, which squawq does not read; convert it"):
        _ = Checkpoint(folder).tensors


def test_a_quantized_head(tmp_path: Path) -> None:
    """GPTQModel's lm_head: true."""
    linears = {**integers(64), "lm_head": quantize(torch.randn(160, 64) * 0.2, 64, zero_point=True)}
    ids = torch.arange(2, 22).view(1, -1)
    for layout in ("gemm", "gemv"):
        settings = {**stated(layout, 64), "lm_head": True}
        folder_of(tmp_path / layout, layout, linears, settings)
    file = tmp_path / "gemv" / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "lm_head.weight"}, file)
    assert CONFIG["tie_word_embeddings"] is False
    assert torch.equal(logits(tmp_path / "gemm", ids), logits(tmp_path / "gemv", ids))


@pytest.mark.parametrize("layout", OTHER)
def test_exported_and_counted_as_the_twin(layout: str, tmp_path: Path) -> None:
    theirs = folder_of(tmp_path / "theirs", layout, integers(32), stated(layout, 32))
    twin = folder_of(tmp_path / "twin", "gemm", integers(32), stated("gemm", 32))
    for form in ("awq", "gptq", "compressed-tensors", "dense"):
        made = []
        for folder in (theirs, twin):
            export(folder, tmp_path / form / folder.name, form)
            shards = sorted((tmp_path / form / folder.name).glob("*.safetensors"))
            made.append({name: tensor for shard in shards for name, tensor in load_file(shard).items()})
        assert made[0].keys() == made[1].keys()
        assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())
    assert inspect(theirs)["parameters"] == inspect(twin)["parameters"]
    parts = ("qweight", "zeros", "scales", "_packed", "_scale", "_point", "_shape")
    stored = sum(info.nbytes for name, info in Checkpoint(theirs).tensors.items() if name.endswith(parts))
    assert inspect(theirs)["bytes"]["quantized_linears"] == stored
    assert missing(Checkpoint(theirs)) == []
