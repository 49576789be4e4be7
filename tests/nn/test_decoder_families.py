"""Our decoder against transformers for families that are unlike Llama: norms, RoPE, factors, names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeModel, logits, tiny_config
from decoder_cases import CASES
from family_models import dense_folder
from safetensors.torch import load_file, save_file
from test_moe import QWEN

from squawq.backends.cpu import library
from squawq.backends.sampling import Chunk
from squawq.engine.runner import DecoderRunner
from squawq.families import FAMILIES
from squawq.format.reader import Checkpoint
from squawq.nn.cache import Cache
from squawq.nn.loader import Options, load
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize

LIMIT = 3e-2  # keys and values are float16: see test_decoder.py
WAYS = {"torch": Options(backend="reference"), "native": Options(exact=True)}


def transformers_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


def some_ids(rows: int = 2, length: int = 40) -> torch.Tensor:
    """Longer than the windows and the original contexts above."""
    return torch.randint(0, 160, (rows, length), generator=torch.Generator().manual_seed(1))


def test_every_family_has_a_case() -> None:
    from test_decoder import CASES as LIKE_LLAMA
    from test_hybrid import FAMILIES as HYBRIDS
    from test_moe import CASES as EXPERTS

    tested = {model_type for cases in (CASES, LIKE_LLAMA, EXPERTS) for model_type, _ in cases.values()}
    text_alone = {name for name, row in FAMILIES.items() if row.decoder and "_vl_" not in name}
    assert text_alone == tested | set(HYBRIDS)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, make_model: MakeModel) -> None:
    model_type, changes = CASES[case]
    folder = make_model(model_type, **changes)
    expected = transformers_logits(folder, some_ids())
    assert expected.abs().max() > 1
    for options in WAYS.values():
        found = logits(folder, some_ids(), options)
        assert (found - expected).abs().max() < LIMIT
        assert (found - expected).abs().mean() < 2e-3


@pytest.mark.parametrize("case", ["gemma3", "phi3, long", "olmo2", "glm4", "granite"])
def test_a_quantized_folder_runs_as_its_dequantized_self(case: str, make_model: MakeModel, tmp_path: Path) -> None:
    model_type, changes = CASES[case]
    folder = make_model(model_type, **changes)
    quantize(folder, tmp_path / "awq", QuantConfig(group_size=32, method="rtn"))
    dense = dense_folder(tmp_path / "awq", folder, tmp_path / "dense")
    expected = transformers_logits(dense, some_ids(1))
    for options in WAYS.values():
        assert (logits(tmp_path / "awq", some_ids(1), options) - expected).abs().max() < LIMIT
    rounded = logits(tmp_path / "awq", some_ids(1), Options())  # int8 activations and head
    assert (rounded - expected).abs().max() < 0.2 * expected.abs().max()


@pytest.mark.parametrize("case", ["gemma2", "gemma3", "ministral3", "phi3, long", "olmo2", "glm4", "hunyuan_v1_dense"])
def test_all_layers_run_in_one_native_call(case: str, make_model: MakeModel) -> None:
    """And a sequence's bits are the same in one chunk, in several, alone and beside others."""
    if library.load() is None:
        pytest.skip("the native kernels are not built on this machine")
    model_type, changes = CASES[case]
    decoder = load(make_model(model_type, **changes))
    runner = DecoderRunner(decoder, kv_tokens=1024)
    assert decoder.native(Cache(decoder.config, 1, decoder.backend))
    ids = some_ids(1)[0].tolist()
    (whole,) = runner.run([Chunk(ids, 0, [5, 2, 9], 40)])
    pieces = [runner.run([Chunk(ids[:9], 0, [1, 7, 4], 9)])[0], runner.run([Chunk(ids[9:24], 9, [1, 7, 4], 15)])[0]]
    for at in range(24, 40):
        other = Chunk(ids[at - 20 : at], 0, [20, 21], 1)
        pieces.append(runner.run([other, Chunk([ids[at]], at, [1, 7, 4], 1), other])[1])
    assert (np.concatenate(pieces) == whole).all()


WRAPPED: dict[str, Callable[[str], str]] = {  # as transformers 4 and 5 name the text model of a multimodal one
    "language_model first": (lambda name: f"language_model.{name}"),
    "model first": (lambda name: name.replace("model.", "model.language_model.", 1)),
}


@pytest.mark.parametrize("names", WRAPPED)
@pytest.mark.parametrize("case", ["gemma3", "ministral3"])
def test_the_text_model_of_a_multimodal_one(case: str, names: str, make_model: MakeModel) -> None:
    model_type, changes = CASES[case]
    folder = make_model(model_type, **changes)
    options = Options(exact=True)
    expected = logits(folder, some_ids(), options)
    tensors = {WRAPPED[names](name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["vision_tower.patch.weight"] = torch.ones(3, 3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "outer", "text_config": text}))
    assert torch.equal(logits(folder, some_ids(), options), expected)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_qwens_text_towers(kind: str, tmp_path: Path) -> None:
    """Text has equal positions on all three axes of multimodal RoPE; whether the head is tied is the outer config's."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    half = {"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 1e4}
    text = {**tiny_config(), **QWEN, "model_type": f"{kind}_text", "rope_parameters": half}
    del text["tie_word_embeddings"]
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
    config = CONFIG_MAPPING[kind](text_config=text, vision_config={**vision, "fullatt_block_indexes": [0]})
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1 if parameter.dim() == 1 else 0.2)
        expected = model(some_ids()).logits
    model.save_pretrained(tmp_path)
    for options in WAYS.values():
        assert (logits(tmp_path, some_ids(), options) - expected).abs().max() < LIMIT
    quantize(tmp_path, tmp_path / "awq", QuantConfig(group_size=32, method="rtn"))
    assert "lm_head.weight" in Checkpoint(tmp_path / "awq").tensors
