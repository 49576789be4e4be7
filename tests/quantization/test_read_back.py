"""The finished folder, read back and compared with the 16-bit model before OUT appears."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeModel, logits
from results import settled

import squawq
from squawq.demo import demo_model
from squawq.errors import CheckpointError
from squawq.evaluation.run import evaluate
from squawq.format.shards import write_shard
from squawq.quant_config import QuantConfig

Rows = list[list[int]]
COMPARED = [0, 2, 5, 7]  # of the eight rows: evenly spread
LAYER = "model-00002-of-00004.safetensors"


def quantize(folder: Path, out: Path, rows: Rows | None, observer: Any = None, **changes: Any) -> dict[str, Any]:
    config = QuantConfig(**{"group_size": 32, "seqlen": 32, "samples": 8, "n_grid": 2, **changes})
    return squawq.quantize(folder, out, config, calibration=rows, observer=observer)


class AfterLayers:
    """An observer that calls a function when all layers are written and checked."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def start(self, layers: int, tokens: int, resumed: int, runs_in: str) -> None:
        self._left = layers

    def layer(self, record: Mapping[str, Any]) -> None:
        self._left -= 1
        if not self._left:
            self._work()

    def read_back(self, layers: int) -> None: ...


def evaluated(out: Path, folder: Path, rows: Rows) -> dict[str, Any]:
    """`evaluate` at every position of the compared rows, each a window that ends in one token more."""
    ids = [token for index in COMPARED for token in (*rows[index], 2)]
    return evaluate(out, folder, ids=ids, window=33, stride=33)


def test_the_figures_are_those_of_whole_models(make_model: MakeModel, rows: Rows, tmp_path: Path) -> None:
    """The 16-bit model run by transformers, the finished folder by squawq's decoder."""
    from transformers import AutoModelForCausalLM

    folder, out = make_model(), tmp_path / "out"
    found = quantize(folder, out, rows)["read_back"]
    ids = torch.tensor(rows)[COMPARED]
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits.log_softmax(-1)
    own = logits(out, ids).log_softmax(-1)
    kl = (reference.exp() * (reference - own)).sum(-1).mean()
    assert found["kl_mean"] == pytest.approx(float(kl), rel=0.01)
    assert found["kl_mean"] > 1e-3
    assert found["top1_agreement"] == pytest.approx(
        float((reference.argmax(-1) == own.argmax(-1)).float().mean()), abs=0.01
    )
    assert (found["tokens"], found["text"]) == (128, "calibration text")


@pytest.mark.parametrize("method", ["squawq", "awq"])
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("gemma2", {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
    ],
)
def test_the_figures_are_those_of_an_evaluation(
    method: str,
    model_type: str,
    changes: dict[str, Any],
    make_model: MakeModel,
    rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("squawq.quantization.check.VOCABULARY", 48)  # of 160: the last slice is smaller
    folder, out = make_model(model_type, **changes), tmp_path / "out"
    found = quantize(folder, out, rows, method=method, dtype="bfloat16")["read_back"]
    expected = evaluated(out, folder, rows)
    assert found["tokens"] == expected["tokens"] == 128
    assert found["kl_mean"] == pytest.approx(expected["kl_mean"], rel=0.02, abs=1e-5)
    assert found["top1_agreement"] == pytest.approx(expected["top1_agreement"], abs=0.02)


@pytest.mark.parametrize(
    ("tokenizer", "text"), [(True, "built-in text"), (False, "token ids over the whole vocabulary")]
)
def test_plain_rounding_is_compared_too(tokenizer: bool, text: str, make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model(vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json") if tokenizer else ():
        shutil.copy(demo_model() / name, folder / name)
    found = quantize(folder, tmp_path / "out", None, method="rtn")["read_back"]
    assert (found["text"], found["tokens"]) == (text, 512)
    assert 1e-4 < found["kl_mean"] < 5
    assert 0 < found["top1_agreement"] <= 1


@pytest.mark.parametrize("method", ["squawq", "awq", "rtn"])
@pytest.mark.parametrize("stop", ["after a layer", "after all layers"])
def test_a_resumed_run_gives_the_same_figures(
    method: str, stop: str, make_model: MakeModel, rows: Rows, tmp_path: Path
) -> None:
    folder, out, given = make_model(num_hidden_layers=3), tmp_path / "out", None if method == "rtn" else rows
    straight = quantize(folder, tmp_path / "straight", given, method=method)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    observer = AfterLayers(interrupt)
    if stop == "after a layer":
        observer.layer = interrupt  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        quantize(folder, out, given, observer, method=method)
    assert quantize(folder, out, given, method=method)["read_back"] == straight["read_back"]
    assert settled(out) == settled(tmp_path / "straight")


def change_last_byte(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def cut_off(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-8])


@pytest.mark.parametrize("method", ["squawq", "rtn"])
@pytest.mark.parametrize(
    ("damage", "message"), [(change_last_byte, "its tensors are not what was written"), (cut_off, "damaged")]
)
def test_a_damaged_shard_is_an_error_and_is_done_again(
    damage: Any, message: str, method: str, make_model: MakeModel, rows: Rows, tmp_path: Path
) -> None:
    folder, out, given = make_model(), tmp_path / "out", None if method == "rtn" else rows
    quantize(folder, tmp_path / "straight", given, method=method)
    shard = tmp_path / "out.partial" / LAYER
    with pytest.raises(CheckpointError, match=rf"{LAYER}.*{message}.*; remove this file and run the same command"):
        quantize(folder, out, given, AfterLayers(lambda: damage(shard)), method=method)
    assert not out.exists()
    shard.unlink()
    quantize(folder, out, given, method=method)
    assert settled(out) == settled(tmp_path / "straight")


def test_a_write_that_goes_wrong_is_an_error(
    make_model: MakeModel, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        write_shard(path, {n: t ^ 1 if n.endswith("0.mlp.up_proj.qweight") else t for n, t in tensors.items()})

    monkeypatch.setattr("squawq.quantization.job.write_shard", write)
    with pytest.raises(CheckpointError, match=f"{LAYER}: read back, its tensors are not what was written"):
        quantize(make_model(), tmp_path / "out", rows)
    assert not (tmp_path / "out").exists()


def test_a_config_that_does_not_fit_the_weights_is_an_error(
    make_model: MakeModel, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stated = QuantConfig.to_quantization_config

    def wrong(self: QuantConfig, kept: Any) -> dict[str, Any]:
        return {**stated(self, kept), "group_size": 16}

    monkeypatch.setattr(QuantConfig, "to_quantization_config", wrong)
    with pytest.raises(
        CheckpointError, match=r"cannot be read back: .*shape.*; remove .*out\.partial and run the same"
    ):
        quantize(make_model(), tmp_path / "out", rows)
    assert not (tmp_path / "out").exists()
