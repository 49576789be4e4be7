"""Our decoder against transformers, family by family, and against itself with and without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, logits, shared_data
from safetensors.torch import load_file, save_file

from squawq.backends.base import Backend, Layers, Pages, RunLayers
from squawq.backends.cpu import library
from squawq.backends.cpu.backend import CpuBackend
from squawq.backends.cpu.layer_stack import LayerStack
from squawq.backends.sampling import Chunk
from squawq.engine.runner import DecoderRunner
from squawq.errors import CheckpointError, ConfigError
from squawq.families import family_of
from squawq.format.groupwise import from_gemm
from squawq.format.reader import Checkpoint
from squawq.format.shards import write_index
from squawq.layerwise.blocks import Blocks
from squawq.nn.loader import Options, load
from squawq.nn.rope import inverse_frequencies
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize
from squawq.rope_config import RopeConfig

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama 3.1": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    "llama, linear rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, no grouped heads": ("llama", {"num_key_value_heads": 4}),
    "mistral, window": ("mistral", {"sliding_window": 8}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, window": ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "ministral, both windows": (
        "ministral",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "internlm3": ("internlm3", {}),
    "iquestcoder": ("iquestcoder", {}),
    "seed_oss": ("seed_oss", {"attention_bias": True}),
}


# Keys and values are float16: their relative error of 2^-11 shows in logits of order 10 as some thousandths, seldom a
# hundredth; wrong positions, heads or scales would show as units.
FLOAT16_CACHE = 3e-2
WAYS = {"torch": Options(backend="reference"), "native": Options(exact=True)}


def transformers_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits
    return logits


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, way: str, make_model: MakeModel) -> None:
    """float32 on both sides, but for keys and values."""
    model_type, changes = CASES[case]
    folder = make_model(model_type, **changes)
    ids = torch.randint(0, 160, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = transformers_logits(folder, ids)
    found = logits(folder, ids, WAYS[way])
    assert expected.abs().max() > 1
    assert (found - expected).abs().max() < FLOAT16_CACHE
    assert (found - expected).abs().mean() < 1e-3


@pytest.mark.parametrize("case", ["llama 3.1", "mistral, window", "qwen3", "llama, biases"])
@pytest.mark.parametrize("quantized", [False, True])
def test_chunks_and_batches_change_no_bit(case: str, quantized: bool, make_model: MakeModel, tmp_path: Path) -> None:
    """The native kernels: a sequence in one chunk, in several, token by token, alone and beside others."""
    if library.load() is None:
        pytest.skip("the native kernels are not built on this machine")
    model_type, changes = CASES[case]
    folder = make_model(model_type, **changes)
    if quantized:
        quantize(folder, tmp_path / "out", QuantConfig(group_size=32, method="rtn"))
        folder = tmp_path / "out"
    runner = DecoderRunner(load(folder), kv_tokens=1024)
    ids = torch.randint(0, 160, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    (whole,) = runner.run([Chunk(ids, 0, [5, 2, 9], 40)])
    pieces = [runner.run([Chunk(ids[:9], 0, [1, 7, 4], 9)])[0], runner.run([Chunk(ids[9:24], 9, [1, 7, 4], 15)])[0]]
    for at in range(24, 40):
        other = Chunk(ids[at - 20 : at], 0, [20, 21], 1)
        pieces.append(runner.run([other, Chunk([ids[at]], at, [1, 7, 4], 1), other])[1])
    assert (torch.cat([torch.from_numpy(p) for p in pieces]) == torch.from_numpy(whole)).all()


@pytest.mark.parametrize("case", ["llama 3.1", "mistral, window", "qwen2, window", "qwen3", "llama, no grouped heads"])
@pytest.mark.parametrize("quantized", [False, True])
def test_all_layers_in_one_call_are_the_layers_one_by_one(
    case: str, quantized: bool, make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: csrc/dispatch.cpp's run_layers against the operations."""
    if library.load() is None:
        pytest.skip("the native kernels are not built on this machine")
    model_type, changes = CASES[case]
    folder = make_model(model_type, **changes)
    if quantized:
        quantize(folder, tmp_path / "out", QuantConfig(group_size=32, method="rtn"))
        folder = tmp_path / "out"
    ids = torch.randint(0, 160, (2, 40), generator=torch.Generator().manual_seed(6))
    together = logits(folder, ids, Options())
    prepared: list[object] = []
    prepare = CpuBackend.prepare

    def one_by_one(self: CpuBackend, layers: Layers, cache: Sequence[Pages]) -> RunLayers:
        prepared.append(prepare(self, layers, cache))
        return Backend.prepare(self, layers, cache)

    monkeypatch.setattr(CpuBackend, "prepare", one_by_one)
    assert torch.equal(logits(folder, ids, Options()), together)
    assert isinstance(prepared[0], LayerStack)


def test_llama31_frequencies_against_the_published_formula() -> None:
    """Every frequency written out as Llama 3.1's reference code branches on the wavelength."""
    import math

    rope = RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    found = inverse_frequencies(rope, 128)
    for k in range(64):
        plain = 500000.0 ** (-2 * k / 128)
        wavelength = 2 * math.pi / plain
        if wavelength < 8192 / 4.0:
            expected = plain
        elif wavelength > 8192 / 1.0:
            expected = plain / 8
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            expected = (1 - smooth) * plain / 8 + smooth * plain
        assert math.isclose(float(found[k]), expected, rel_tol=1e-5)


def test_autoawq_checkpoint_equals_the_reference_formula() -> None:
    """The checkpoint that AutoAWQ wrote, run by us, against transformers over weights dequantized by hand."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = shared_data("autoawq-babyllama")
    stored = load_file(folder / "model.safetensors")
    state = {}
    for name, tensor in stored.items():
        if name.endswith(".qweight"):
            linear = name.removesuffix(".qweight")
            order = [0, 4, 1, 5, 2, 6, 3, 7]  # AWQ_REVERSE_ORDER of awq/utils/packing_utils.py

            def nibbles(words: torch.Tensor, order: list[int] = order) -> torch.Tensor:
                parts = torch.stack([(words >> (4 * i)) & 15 for i in range(8)], -1)
                return parts[..., order].flatten(1).float()

            q, z = nibbles(tensor), nibbles(stored[f"{linear}.qzeros"])
            scales = stored[f"{linear}.scales"].float()
            group = q.shape[0] // z.shape[0]
            state[f"{linear}.weight"] = ((q - z.repeat_interleave(group, 0)) * scales.repeat_interleave(group, 0)).T
        elif not name.endswith((".qzeros", ".scales")):
            state[name] = tensor.float()
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    ids = torch.randint(0, 361, (2, 64), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = model(ids).logits
    for options in WAYS.values():
        assert (logits(folder, ids, options) - expected).abs().max() < FLOAT16_CACHE


@pytest.mark.parametrize("group_size", [16, 32, -1])
@pytest.mark.parametrize("zero_point", [True, False])
def test_quantized_folder_runs_as_its_dequantized_self(
    make_model: MakeModel, tmp_path: Path, group_size: int, zero_point: bool
) -> None:
    """Integers multiplied by the kernels, and the dense weights that they stand for multiplied by transformers."""
    folder = make_model("qwen2")
    quantize(folder, tmp_path / "out", QuantConfig(group_size=group_size, zero_point=zero_point, method="rtn"))
    ids = torch.randint(0, 160, (1, 16), generator=torch.Generator().manual_seed(1))
    blocks = Blocks(Checkpoint(tmp_path / "out"), family_of("qwen2"), "cpu")
    expected = blocks.logits()(blocks.last_states(ids))
    original = logits(folder, ids, WAYS["torch"])
    for options in (*WAYS.values(), Options()):
        found = logits(tmp_path / "out", ids, options)
        limit = (
            FLOAT16_CACHE if options != Options() else 0.2 * float(expected.abs().max())
        )  # int8 activations and head
        assert (found - expected).abs().max() < limit
        assert 1e-3 < (found - original).abs().mean() < original.abs().mean()


def test_smaller_heads_cost_what_their_bits_say(make_model: MakeModel) -> None:
    """Mean error of the logits against the head as stored: int4 some ten times int8's, both far from unrelated."""
    if library.load() is None:
        pytest.skip("the native kernels are not built on this machine")
    folder = make_model()
    ids = torch.randint(0, 160, (1, 32), generator=torch.Generator().manual_seed(1))
    base = logits(folder, ids, Options(head="16-bit"))
    errors = {head: float((logits(folder, ids, Options(head=head)) - base).abs().mean()) for head in ("int8", "int4")}
    assert 0 < 4 * errors["int8"] < errors["int4"] < 0.2 * float(base.abs().mean())


def test_partly_quantized_groups_run(make_model: MakeModel, tmp_path: Path) -> None:
    """A writer that left only q_proj in 16 bits: the three that are fused become dense."""
    folder = make_model("llama")
    quantize(folder, tmp_path / "out", QuantConfig(group_size=32, method="rtn"))
    ids = torch.randint(0, 160, (1, 16), generator=torch.Generator().manual_seed(1))
    whole = logits(tmp_path / "out", ids, WAYS["native"])
    for shard in sorted((tmp_path / "out").glob("*.safetensors")):
        tensors = load_file(shard)
        for name in [n for n in tensors if n.endswith("q_proj.qweight")]:
            linear = name.removesuffix(".qweight")
            parts = [tensors.pop(f"{linear}.{part}") for part in ("qweight", "scales", "qzeros")]
            tensors[f"{linear}.weight"] = from_gemm(*parts).dequantize().half()
        save_file(tensors, shard)
    write_index(tmp_path / "out")
    for options in WAYS.values():
        assert (logits(tmp_path / "out", ids, options) - whole).abs().max() < FLOAT16_CACHE


def test_a_head_that_cannot_be_is_refused_before_a_tensor_is_read(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "read", None)
    with pytest.raises(ConfigError, match=r"head is 'int4', which the head of .* cannot be here"):
        load(make_model(vocab_size=163, name="odd"), Options(head="int4"))


def test_bad_options(make_model: MakeModel) -> None:
    with pytest.raises(ConfigError, match="head is 'int2'; choose one of int8, int4, 16-bit"):
        Options(head="int2")
    with pytest.raises(ConfigError, match=r"head is 'int4', which the head of .* cannot be here"):
        load(make_model(vocab_size=163, name="odd"), Options(head="int4"))
    with pytest.raises(ConfigError, match=r"head is 'int8', which the head of .* cannot be here"):
        load(make_model(name="narrow", hidden_size=24), Options(head="int8"))
    with pytest.raises(ConfigError, match=r"does not run this model \(rope type is 'dynamic'"):
        load(make_model(name="dynamic", rope_scaling={"rope_type": "dynamic", "factor": 4.0}))
    with pytest.raises(ConfigError, match="kv_tokens is 3"):
        DecoderRunner(load(make_model()), kv_tokens=3)
    with pytest.raises(CheckpointError, match="no such model folder"):
        load("nowhere")
