"""GGUF files of every family in llama.cpp itself: the same logits for the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import MakeModel, logits
from family_models import family_model
from gguf_cases import CASES, NESTED

from squawq import QuantConfig
from squawq.export.gguf import export_gguf
from squawq.export.gguf_architectures import ARCHITECTURES
from squawq.export.gguf_pre_tokenizers import GPT2
from squawq.quantization.pipeline import quantize

llama = pytest.importorskip("test_gguf_llamacpp", reason="needs the packages gguf and llama-cpp-python")


def test_every_architecture_has_a_case() -> None:
    twins = {"internlm3": "llama", "iquestcoder": "llama"}  # of the same shapes as Llama
    assert {model_type for model_type, _ in CASES.values()} == ARCHITECTURES.keys() - twins.keys()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bits", [16, 4])
def test_logits(make_model: MakeModel, tmp_path: Path, case: str, bits: int) -> None:
    """llama.cpp rounds activations, to float16 beside 16-bit matrices and to int8 beside 4-bit ones."""
    model_type, changes = CASES[case]
    tokenizer = llama.byte_level((GPT2,), skip_merges=False, size=300)
    size = tokenizer.get_vocab_size()
    if case in NESTED:
        folder = tmp_path / "model"
        family_model(model_type, folder, vocab_size=size, eos_token_id=2, **changes)
    else:
        folder = make_model(model_type, vocab_size=size, eos_token_id=2, **changes)
    if bits == 4:
        quantize(folder, tmp_path / "awq", QuantConfig(method="rtn", group_size=32))
        folder = tmp_path / "awq"
    export_gguf(llama.in_folder(tokenizer, folder), tmp_path / "model.gguf")
    ids = torch.randint(3, size, (1, 60), generator=torch.Generator().manual_seed(1))
    ours = logits(folder, ids)[0]
    with llama.opened(tmp_path / "model.gguf", logits_all=True) as model:
        model.eval(ids[0].tolist())
        theirs = torch.from_numpy(model.scores[: ids.shape[1]].copy())
    error = (theirs - ours).norm(dim=-1) / ours.norm(dim=-1)
    assert error.median() < (0.01 if bits == 16 else 0.05)  # of each token: another expert of one moves one
