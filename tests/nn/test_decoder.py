"""Our decoder against transformers, family by family, and against itself with and without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, shared_data

from squawq.config import QuantConfig, RopeConfig
from squawq.nn.loader import load
from squawq.nn.rope import inverse_frequencies
from squawq.quantization.pipeline import quantize

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
}


def transformers_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits
    return logits


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, make_model: MakeModel) -> None:
    """float32 on both sides; 1e-4 is some 100 roundings of the logits, which are of order 10."""
    model_type, changes = CASES[case]
    folder = make_model(model_type, **changes)
    ids = torch.randint(0, 160, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = transformers_logits(folder, ids)
    found = load(folder)(ids)
    assert expected.abs().max() > 1
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("case", ["llama 3.1", "mistral, window", "qwen3"])
def test_cache_changes_nothing(case: str, make_model: MakeModel) -> None:
    model_type, changes = CASES[case]
    decoder = load(make_model(model_type, **changes))
    ids = torch.randint(0, 160, (1, 24), generator=torch.Generator().manual_seed(2))
    whole = decoder(ids)
    cache = decoder.new_cache()
    pieces = [decoder(ids[:, :9], cache), decoder(ids[:, 9:16], cache)]
    pieces += [decoder(ids[:, i : i + 1], cache) for i in range(16, 24)]
    assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-4
    assert (decoder(ids, last_only=True) - whole[:, -1:]).abs().max() < 1e-5


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
    assert (load(folder)(ids) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("group_size", [16, 32, -1])
@pytest.mark.parametrize("zero_point", [True, False])
def test_quantized_folder_runs_as_its_dequantized_self(
    make_model: MakeModel, tmp_path: Path, group_size: int, zero_point: bool
) -> None:
    folder = make_model("qwen2")
    quantize(folder, tmp_path / "out", QuantConfig(group_size=group_size, zero_point=zero_point, method="rtn"))
    decoder = load(tmp_path / "out")
    dense = load(tmp_path / "out")
    dense.layers = [layer.dequantized() for layer in dense.layers]
    ids = torch.randint(0, 160, (1, 16), generator=torch.Generator().manual_seed(1))
    assert (decoder(ids) - dense(ids)).abs().max() < 1e-5
    original = load(folder)(ids)
    assert 1e-3 < (decoder(ids) - original).abs().mean() < original.abs().mean()
