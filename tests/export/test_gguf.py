"""GGUF files read back by gguf's own reader: the same integers, scales and metadata. Knows no llama.cpp."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from family_models import family_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from squawq.demo import demo_model
from squawq.errors import CheckpointError, ConfigError, DependencyError, OutputError
from squawq.export.gguf import export_gguf
from squawq.export.gguf_architectures import architecture_of
from squawq.export.gguf_blocks import q4_1
from squawq.export.gguf_tensors import Entry, plan, read_entry
from squawq.format.groupwise import GroupwiseTensor
from squawq.format.reader import Checkpoint
from squawq.nn.loader import linear_shapes
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize

if TYPE_CHECKING:
    from conftest import MakeModel

gguf = pytest.importorskip("gguf", reason="needs the package gguf")


def split_blocks(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d and m float32 [out, blocks], q uint8 [out, in] of Q4_1 rows, by the format's description."""
    blocks = data.view(data.shape[0], -1, 20)
    ends = blocks[..., :4].contiguous().view(torch.float16).float()
    low, high = blocks[..., 4:] & 15, blocks[..., 4:] >> 4
    return ends[..., 0], ends[..., 1], torch.cat([low, high], -1).view(data.shape[0], -1)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields and tensors of a file by name."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def matrix(tensor: Any) -> Tensor:
    return torch.from_numpy(np.array(tensor.data))


@pytest.fixture(scope="module")
def demo(awq_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    export_gguf(awq_demo, path)
    return path


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def with_tokenizer(folder: Path, size: int = 160, **changes: Any) -> Path:
    """A byte-level tokenizer with no merges, cut as Llama 3's is."""
    state = json.loads((demo_model() / "tokenizer.json").read_text())
    vocab = {token: number for number, token in enumerate(list(state["model"]["vocab"])[:size])}
    state["model"] |= {"vocab": vocab, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({**state, **changes}))
    (folder / "tokenizer_config.json").write_text((demo_model() / "tokenizer_config.json").read_text())
    return folder


# -- Q4_1 --


@st.composite
def quantized(draw: st.DrawFn) -> GroupwiseTensor:
    out, groups, group = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.sampled_from([32, 64, 128]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    exponent = draw(st.integers(-24, 12))  # from float16's smallest to where 15 scales still fit
    scales = (torch.rand(out, groups, generator=generator) + 1) * 2.0**exponent / 2
    return GroupwiseTensor(
        torch.randint(0, 16, (out, groups * group), generator=generator, dtype=torch.uint8),
        scales.half().clamp(min=2**-24),
        torch.randint(0, 16, (out, groups), generator=generator, dtype=torch.uint8),
    )


@given(quantized())
def test_integers_scales_and_zeros_survive(tensor: GroupwiseTensor) -> None:
    scale, minimum, q = split_blocks(q4_1(tensor))
    repeat = scale.shape[1] // tensor.scales.shape[1]
    assert torch.equal(q, tensor.q)
    assert torch.equal(scale, tensor.scales.float().repeat_interleave(repeat, 1))
    assert torch.equal((-minimum / scale).round(), tensor.zeros.float().repeat_interleave(repeat, 1))


@given(quantized())
def test_weights_move_by_no_more_than_the_rounded_minimum(tensor: GroupwiseTensor) -> None:
    found = torch.from_numpy(gguf.quants.dequantize(q4_1(tensor).numpy(), gguf.GGMLQuantizationType.Q4_1))
    group = tensor.q.shape[1] // tensor.scales.shape[1]
    scale, zero = (t.double().repeat_interleave(group, 1) for t in (tensor.scales, tensor.zeros))
    moved = (found.double() - (tensor.q.double() - zero) * scale).abs()
    assert (moved <= zero * scale * 2.0**-11 * (1 + 1e-3)).all()  # and float32's own rounding in the reader
    assert not moved[torch.isin(zero, torch.tensor([0.0, 1, 2, 4, 8], dtype=torch.float64))].any()


def test_what_float16_cannot_hold_is_refused() -> None:
    tensor = GroupwiseTensor(
        torch.zeros(1, 32, dtype=torch.uint8), torch.full((1, 1), 6e4).half(), torch.full((1, 1), 15, dtype=torch.uint8)
    )
    with pytest.raises(CheckpointError, match="beyond float16"):
        q4_1(tensor)


# -- a file read back --


def test_every_linear_read_back(awq_demo: Path, demo: Path) -> None:
    _, tensors = read(demo)
    checkpoint = Checkpoint(awq_demo)
    config = checkpoint.config
    for index in range(config.num_layers):
        for ours, (out, in_features) in linear_shapes(config).items():
            found = tensors[f"blk.{index}.{NAMES[ours]}.weight"]
            assert found.tensor_type == gguf.GGMLQuantizationType.Q4_1
            assert found.shape.tolist() == [in_features, out]
            scale, minimum, q = split_blocks(matrix(found))
            order = list(range(out))
            if ours in ("self_attn.q_proj", "self_attn.k_proj"):  # row 2i of a head was i, row 2i + 1 was half + i
                size, half = config.head_dim, config.head_dim // 2
                order = [row // size * size + row % 2 * half + row % size // 2 for row in range(out)]
            stored = checkpoint.read_quantized(f"model.layers.{index}.{ours}", in_features, out)
            repeat = scale.shape[1] // stored.scales.shape[1]
            assert torch.equal(q, stored.q[order])
            assert torch.equal(scale, stored.scales[order].float().repeat_interleave(repeat, 1))
            assert torch.equal((-minimum / scale).round(), stored.zeros[order].float().repeat_interleave(repeat, 1))


def test_other_tensors(awq_demo: Path, demo: Path) -> None:
    _, tensors = read(demo)
    checkpoint = Checkpoint(awq_demo)
    assert "output.weight" not in tensors  # tied
    assert torch.equal(matrix(tensors["token_embd.weight"]), checkpoint.read("model.embed_tokens.weight").half())
    for theirs, ours in (
        ("output_norm", "model.norm"),
        ("blk.3.attn_norm", "model.layers.3.input_layernorm"),
        ("blk.3.ffn_norm", "model.layers.3.post_attention_layernorm"),
    ):
        found = tensors[f"{theirs}.weight"]
        assert found.tensor_type == gguf.GGMLQuantizationType.F32
        assert torch.equal(matrix(found), checkpoint.read(f"{ours}.weight").float())
    assert len(tensors) == 3 + 9 * checkpoint.config.num_layers


def test_llama3_rope_factors(demo: Path) -> None:
    _, tensors = read(demo)
    expected = []
    for index in range(0, 64, 2):
        wavelength = 2 * math.pi * 10000.0 ** (index / 64)
        if wavelength < 512 / 4:
            expected.append(1.0)
        elif wavelength > 512:
            expected.append(8.0)
        else:
            smooth = (512 / wavelength - 1) / 3
            expected.append(1 / ((1 - smooth) / 8 + smooth))
    torch.testing.assert_close(matrix(tensors["rope_freqs.weight"]), torch.tensor(expected), rtol=1e-5, atol=0)


def test_metadata(awq_demo: Path, demo: Path) -> None:
    fields, _ = read(demo)
    expected = {
        "general.architecture": "llama",
        "general.file_type": 3,
        "general.quantization_version": 2,
        "llama.vocab_size": 4096,
        "llama.context_length": 4096,
        "llama.embedding_length": 256,
        "llama.block_count": 8,
        "llama.feed_forward_length": 768,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 64,
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smaug-bpe",  # Llama 3's cuts with merges throughout
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 4,
        "tokenizer.ggml.eot_token_id": 4,
        "tokenizer.ggml.padding_token_id": 7,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": (demo_model() / "chat_template.jinja").read_text(),
    }
    assert {name: fields.get(name) for name in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert "llama.rope.scaling.type" not in fields  # rope_freqs.weight says it
    state = json.loads((awq_demo / "tokenizer.json").read_text())
    assert fields["tokenizer.ggml.tokens"] == sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in state["model"]["merges"]]
    assert fields["tokenizer.ggml.token_type"] == [3] * 8 + [1] * 4088


# -- other models --


def test_a_tokenizer_that_leaves_keys_out(make_model: MakeModel, tmp_path: Path) -> None:
    """The library reads it, so it is written."""
    folder = with_tokenizer(make_model())
    state = json.loads((folder / "tokenizer.json").read_text())
    for key in ("added_tokens", "normalizer", "truncation", "padding"):
        state.pop(key)
    state["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(state))
    export_gguf(folder, tmp_path / "model.gguf")
    fields, _ = read(tmp_path / "model.gguf")
    assert len(fields["tokenizer.ggml.tokens"]) == 160
    assert fields["tokenizer.ggml.token_type"] == [1] * 160


def test_sixteen_bit_and_untied(make_model: MakeModel, tmp_path: Path) -> None:
    folder = with_tokenizer(make_model(vocab_size=170))
    export_gguf(folder, tmp_path / "new" / "model.gguf")
    fields, tensors = read(tmp_path / "new" / "model.gguf")
    assert fields["general.file_type"] == 1
    assert fields["tokenizer.ggml.tokens"][158:162] == [
        *fields["tokenizer.ggml.tokens"][158:160],
        "[PAD160]",
        "[PAD161]",
    ]
    assert fields["tokenizer.ggml.token_type"][160:] == [5] * 10
    assert torch.equal(matrix(tensors["output.weight"]), Checkpoint(folder).read("lm_head.weight").half())
    assert "rope_freqs.weight" not in tensors


def test_stacked_experts_of_either_layout(tmp_path: Path) -> None:
    family_model("qwen3_vl_moe_text", tmp_path / "saved", moe_intermediate_size=96)
    shutil.copytree(tmp_path / "saved", tmp_path / "published")
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    turned = {name: tensor.mT.contiguous() if tensor.dim() == 3 else tensor for name, tensor in tensors.items()}
    save_file(turned, tmp_path / "published" / "model.safetensors", {"format": "pt"})
    files = []
    for name in ("saved", "published"):
        checkpoint = Checkpoint(tmp_path / name)
        entries = plan(checkpoint, architecture_of(checkpoint.config))
        files.append({entry.name: read_entry(checkpoint, entry) for entry in entries})
    stack = tensors["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(files[1]["blk.1.ffn_up_exps.weight"], stack[:, 96:].half())
    for name, tensor in files[0].items():
        assert torch.equal(files[1][name], tensor)


def test_a_window_bounds_the_context(make_model: MakeModel, tmp_path: Path) -> None:
    export_gguf(with_tokenizer(make_model("mistral", sliding_window=40)), tmp_path / "model.gguf")
    fields, _ = read(tmp_path / "model.gguf")
    assert (fields["general.architecture"], fields["llama.context_length"]) == ("llama", 40)


def test_linear_rope(make_model: MakeModel, tmp_path: Path) -> None:
    export_gguf(with_tokenizer(make_model(rope_scaling={"type": "linear", "factor": 2.0})), tmp_path / "model.gguf")
    fields, _ = read(tmp_path / "model.gguf")
    assert (fields["llama.rope.scaling.type"], fields["llama.rope.scaling.factor"]) == ("linear", 2.0)


# -- what is refused --


def test_a_taken_name_is_left_alone(awq_demo: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        export_gguf(awq_demo, tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "mine"


def test_groups_that_are_no_blocks(make_model: MakeModel, tmp_path: Path) -> None:
    folder = tmp_path / "awq"
    quantize(make_model(), folder, QuantConfig(method="rtn", group_size=16))
    with pytest.raises(ConfigError, match="takes groups of a multiple of 32"):
        export_gguf(with_tokenizer(folder), tmp_path / "model.gguf")


def test_a_bias_that_llama_cpp_lacks(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"o_proj has a bias, which llama.cpp's qwen3 does not support"):
        export_gguf(with_tokenizer(make_model("qwen3", attention_bias=True)), tmp_path / "model.gguf")


def test_without_the_package(awq_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DependencyError, match="pip install gguf"):
        export_gguf(awq_demo, tmp_path / "model.gguf")


# -- writing --


def test_one_tensor_at_a_time(awq_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[Tensor]] = []
    original = read_entry

    def watched(*args: Any) -> Tensor:
        assert not [ref for ref in seen if ref() is not None]
        tensor = original(*args)
        seen.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr("squawq.export.gguf.read_entry", watched)
    told: list[tuple[int, int]] = []
    export_gguf(awq_demo, tmp_path / "model.gguf", progress=lambda done, total: told.append((done, total)))
    assert told == [(done, len(seen)) for done in range(1, len(seen) + 1)]


def test_a_failure_leaves_nothing(awq_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object, entry: Entry) -> Tensor:
        raise CheckpointError(f"damaged: {entry.name}")

    monkeypatch.setattr("squawq.export.gguf.read_entry", broken)
    with pytest.raises(CheckpointError, match="damaged: token_embd"):
        export_gguf(awq_demo, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_what_lies_beside_it_is_left_alone(awq_demo: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf.partial").write_text("mine")
    export_gguf(awq_demo, tmp_path / "model.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "model.gguf.partial"]
    assert (tmp_path / "model.gguf.partial").read_text() == "mine"


def touch(path: Path) -> None:
    path.write_text("theirs")


def test_a_name_that_another_takes_meanwhile(awq_demo: Path, tmp_path: Path) -> None:
    """As a second export that started at the same time: what it made used to be replaced."""
    out = tmp_path / "model.gguf"
    with pytest.raises(OutputError, match=r"model.gguf exists; remove it, or name another file"):
        export_gguf(awq_demo, out, progress=lambda *_: touch(out))
    assert out.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [out]


def test_a_full_disk_is_a_typed_error(awq_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object, __: object) -> Tensor:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("squawq.export.gguf.read_entry", full)
    with pytest.raises(OutputError, match=r"model.gguf cannot be written: No space"):
        export_gguf(awq_demo, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []
