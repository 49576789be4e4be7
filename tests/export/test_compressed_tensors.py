"""compressed-tensors: the same integers word by word, and read back by the package itself where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from squawq.errors import CheckpointError
from squawq.export.compressed_tensors import CompressedTensors, pack_rows
from squawq.export.plan import Plan
from squawq.export.run import export
from squawq.format.files import read_json, write_json
from squawq.format.groupwise import GroupwiseTensor, pack
from squawq.format.reader import Checkpoint
from squawq.format.shards import write_shard
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize

Case = tuple[str, dict[str, Any], dict[str, Any]]  # model_type, its changes, settings
CASES: dict[str, Case] = {
    "llama": ("llama", {}, {}),
    "tied": ("llama", {"tie_word_embeddings": True}, {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "skipped": ("llama", {}, {"modules_to_not_convert": ("layers.0.self_attn.o_proj", "mlp.down_proj")}),
    "symmetric": ("llama", {}, {"zero_point": False}),
    "whole rows": ("llama", {}, {"group_size": -1}),
    "bfloat16": ("qwen3", {}, {"dtype": "bfloat16"}),
}


def awq(make_model: MakeModel, tmp_path: Path, case: str) -> Path:
    """A tiny AWQ folder."""
    model_type, changes, settings_ = CASES[case]
    out = tmp_path / "awq"
    quantize(make_model(model_type, **changes), out, QuantConfig(**{"group_size": 32, "method": "rtn", **settings_}))
    return out


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def nibbles(words: Tensor, count: int) -> list[list[int]]:
    """Read back by plain shifts of Python's integers."""
    return [[(w & 0xFFFFFFFF) >> 4 * i & 15 for w in row for i in range(8)][:count] for row in words.tolist()]


def test_golden_words() -> None:
    assert pack_rows(torch.arange(8).view(1, 8)).tolist() == [[0x76543210]]
    assert pack_rows(torch.full((1, 10), 15)).tolist() == [[-1, 0xFF]]


@settings(max_examples=50, deadline=None)
@given(
    words=st.integers(1, 5), groups=st.integers(1, 4), group=st.sampled_from([16, 32, 36]), seed=st.integers(0, 2**16)
)
def test_integers_zeros_and_scales_survive(words: int, groups: int, group: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    out, in_ = 8 * words, groups * group
    q = torch.randint(0, 16, (out, in_), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (out, groups), generator=generator, dtype=torch.uint8)
    scales = torch.randn(out, groups, generator=generator).half()
    made = CompressedTensors(QuantConfig()).linear("x", GroupwiseTensor(q, scales, zeros))
    assert made["weight_packed"].shape == (out, -(-in_ // 8))
    assert made["weight_zero_point"].shape == (words, groups)
    assert nibbles(made["weight_packed"], in_) == q.tolist()
    assert nibbles(made["weight_zero_point"].T, out) == zeros.T.tolist()
    assert torch.equal(made["weight_scale"], scales)
    assert made["weight_shape"].dtype == torch.int64
    assert made["weight_shape"].tolist() == [out, in_]


@pytest.mark.parametrize("case", CASES)
def test_folder(case: str, make_model: MakeModel, tmp_path: Path) -> None:
    source = awq(make_model, tmp_path, case)
    before = Checkpoint(source)
    quant = before.config.quant
    assert quant is not None
    out = tmp_path / "ct"
    report = export(source, out, "compressed-tensors")
    found = tensors(out)
    linears = {name.removesuffix(".qweight") for name in before.tensors if name.endswith(".qweight")}
    assert linears
    for name in linears:
        groups, width = before.info(f"{name}.scales").shape
        in_ = before.info(f"{name}.qweight").shape[0]
        expected = before.read_quantized(name, in_, width)
        assert nibbles(found.pop(f"{name}.weight_packed"), in_) == expected.q.tolist()
        assert torch.equal(found.pop(f"{name}.weight_scale"), expected.scales)
        assert found.pop(f"{name}.weight_shape").tolist() == [width, in_]
        if quant.zero_point:
            assert nibbles(found.pop(f"{name}.weight_zero_point").T, width) == expected.zeros.T.tolist()
        assert expected.scales.shape == (width, groups)
    kept = {n for n in before.tensors if n.rpartition(".")[0] not in linears or n.endswith(".bias")}
    assert set(found) == kept
    assert all(torch.equal(found[name], before.read(name)) for name in kept)

    config = read_json(out / "config.json")
    written = config.pop("quantization_config")
    raw = read_json(source / "config.json")
    raw.pop("quantization_config")
    assert config == raw
    dense = {n.removesuffix(".weight") for n in kept if n.endswith("_proj.weight")}
    assert written["ignore"] == [*sorted(dense, key=written["ignore"].index), "lm_head"]
    assert len(dense) == (3 if case == "skipped" else 0)
    index = read_json(out / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == report["bytes"]
    assert set(index["weight_map"]) == set(tensors(out))
    assert read_json(out / "squawq_report.json")["layers"] == read_json(source / "squawq_report.json")["layers"]


def test_quantized_head_is_a_target(make_model: MakeModel, tmp_path: Path) -> None:
    """As some other writers make it."""
    source = awq(make_model, tmp_path, "llama")
    shard = source / "model-00004-of-00004.safetensors"
    held = load_file(shard)
    del held["lm_head.weight"]
    held |= {"lm_head.qweight": pack(torch.arange(64 * 160).view(64, 160) % 16)}
    held |= {"lm_head.qzeros": pack(torch.full((2, 160), 7)), "lm_head.scales": torch.ones(2, 160).half()}
    write_shard(shard, held)
    (source / "model.safetensors.index.json").unlink()
    export(source, tmp_path / "ct", "compressed-tensors")
    written = read_json(tmp_path / "ct" / "config.json")["quantization_config"]
    assert written["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
    assert written["ignore"] == []
    packed = tensors(tmp_path / "ct")["lm_head.weight_packed"]
    assert nibbles(packed, 64) == (torch.arange(64 * 160).view(64, 160) % 16).T.tolist()


def test_zeros_that_the_configuration_denies(make_model: MakeModel, tmp_path: Path) -> None:
    source = awq(make_model, tmp_path, "llama")
    config = read_json(source / "config.json")
    config["quantization_config"]["zero_point"] = False
    write_json(source / "config.json", config)
    with pytest.raises(CheckpointError, match=r"zeros other than 8.*symmetric.*change that in config.json"):
        export(source, tmp_path / "ct", "compressed-tensors")
    assert not (tmp_path / "ct").exists()


def test_sixteen_bits_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="quantize it first"):
        export(make_model(), tmp_path / "ct", "compressed-tensors")
    assert not (tmp_path / "ct.partial").exists()


def test_config_is_theirs(make_model: MakeModel, tmp_path: Path) -> None:
    """Read by their own class and written again, nothing changes."""
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="needs compressed-tensors")
    for case in ("skipped", "symmetric", "whole rows"):
        _, _, changes = CASES[case]
        quant = QuantConfig(**changes)
        written = CompressedTensors(quant).config({}, Plan([], {}, ["a", "lm_head"], [], ["Linear"], ""))[
            "quantization_config"
        ]
        parsed = quantization.QuantizationConfig.model_validate(json.loads(json.dumps(written)))
        assert parsed.model_dump(mode="json") == written


@pytest.mark.parametrize("case", CASES)
def test_their_decompression(case: str, make_model: MakeModel, tmp_path: Path) -> None:
    """Their own reader gives (q - zero) * scale, rounded once to the scale's dtype."""
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="needs compressed-tensors")
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="needs compressed-tensors")
    source, out = awq(make_model, tmp_path, case), tmp_path / "ct"
    export(source, out, "compressed-tensors")
    scheme = quantization.QuantizationConfig.model_validate(read_json(out / "config.json")["quantization_config"])
    before, found, compressor = (
        Checkpoint(source),
        tensors(out),
        compressors.BaseCompressor.get_value_from_registry("pack-quantized"),
    )
    names = [n.removesuffix(".weight_packed") for n in found if n.endswith(".weight_packed")]
    assert names
    for name in names:
        own = {n.rpartition(".")[2]: t for n, t in found.items() if n.startswith(f"{name}.weight_")}
        out_, in_ = own["weight_shape"].tolist()
        weight = compressor.decompress(own, scheme.config_groups["group_0"])["weight"]
        assert weight.dtype == own["weight_scale"].dtype
        assert torch.equal(weight, before.read_quantized(name, in_, out_).dequantize().to(weight.dtype))


def test_the_same_as_their_converter(awq_demo: Path, tmp_path: Path) -> None:
    """Bit for bit what their AutoAWQ converter makes of the demo model."""
    convert = pytest.importorskip("compressed_tensors.entrypoints.convert", reason="needs compressed-tensors")
    converter = convert.AutoAWQConverter.from_pretrained(str(awq_demo))
    theirs: dict[str, Tensor] = {}
    for shard in awq_demo.glob("*.safetensors"):
        theirs |= converter.process(load_file(shard))
    export(awq_demo, tmp_path / "ct", "compressed-tensors")
    ours = tensors(tmp_path / "ct")
    assert ours.keys() == theirs.keys()
    assert all(ours[n].dtype == theirs[n].dtype and torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_transformers_reads_it(awq_demo: Path, tmp_path: Path) -> None:
    """Dequantized on loading: transformers 5 with compressed-tensors 0.20 has no room for packed zeros otherwise."""
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    export(awq_demo, tmp_path / "ct", "compressed-tensors")
    export(awq_demo, tmp_path / "dense", "dense")
    ids = torch.randint(8, 4000, (2, 24), generator=torch.Generator().manual_seed(0))
    dequantize = CompressedTensorsConfig(dequantize=True)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "ct", quantization_config=dequantize)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        assert torch.equal(packed(ids).logits, dense(ids).logits)
