"""transformers' tensor parallelism over two gloo processes gives what one process gives."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from awq_folders import quantized, stored
from test_transformers import TOLERANCES, difference, load, logits

import squawq.transformers  # noqa: F401 (registers)
from squawq.errors import ConfigError
from squawq.integrations.quantizer import check_cuts

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch's gloo")


MODELS = ["llama", "qwen2", "qwen3_moe", "mixtral"]


@pytest.fixture(scope="module")
def cut_in_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By model_type, a folder with the model in awq/ and what each of two processes computed; they run once for all."""
    found = {}
    for model_type in MODELS:
        inner: dict[str, Any] = (
            {"moe_intermediate_size": 64} if model_type == "qwen3_moe" else {"intermediate_size": 128}
        )
        found[model_type] = tmp_path_factory.mktemp(model_type)
        assert quantized(found[model_type], model_type, **inner)[0].name == "awq"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SQUAWQ_THREADS": "1"}
    for done in programs.run_ranks(2, [WORKER, *found.values()], env=environment, timeout=280):
        assert done.returncode == 0, done.stderr[-3000:]
    return found


@pytest.mark.parametrize("model_type", MODELS)
def test_two_processes_are_one_model(cut_in_two: dict[str, Path], model_type: str) -> None:
    folder = cut_in_two[model_type]
    awq = folder / "awq"
    model = load(awq, exact=True)
    ids = torch.arange(2, 26).view(2, 12)
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    for rank in (0, 1):
        found = torch.load(folder / f"{rank}.pt")
        assert found["rank_words"].tolist() == [64, 4]
        assert difference(found["logits"], logits(model, ids)) < TOLERANCES[torch.float32]
        assert torch.equal(found["tokens"], tokens)
        assert torch.equal(found["batch"], tokens[:, 12:])
    before, after = stored(awq), stored(folder / "saved")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_cuts_inside_a_group_are_refused(tmp_path: Path) -> None:
    model = load(quantized(tmp_path)[0])
    check_cuts(model, {"model.layers.*.mlp.down_proj": "rowwise"}, 3)
    with pytest.raises(ConfigError, match=r"down_proj \[64, 96\] in groups of 32 .* 2 processes"):
        check_cuts(model, {"model.layers.*.mlp.down_proj": "rowwise"}, 2)
    with pytest.raises(ConfigError, match=r"k_proj \[32, 64\]"):
        check_cuts(model, {"model.layers.*.self_attn.k_proj": "colwise"}, 8)
