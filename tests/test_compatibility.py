"""What runs a result: one answer for command line, model card and `inspect`, which names nothing that refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeModel, tiny_config

import squawq
from squawq.compatibility import ENGINES, TGI, VLLM, compatible_engines, engines_line, how_to_run
from squawq.config import ModelConfig
from squawq.errors import ConfigError
from squawq.families import FAMILIES
from squawq.inspection import inspect
from squawq.nn.loader import load
from squawq.publish.card import model_card
from squawq.publish.usage import usage
from squawq.quant_config import QuantConfig

OURS_ALONE = ("\nsquawq ", "from squawq import LLM", "LLM(", "do_fuse")
ALL = list(ENGINES)


def config(model_type: str = "llama", **changes: Any) -> ModelConfig:
    return ModelConfig.from_dict(tiny_config(model_type, **changes))


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (config(), ALL),
        (config("qwen3"), ["squawq", "transformers", "vllm"]),
        (config("gemma3_text"), ALL),
        (config("gemma3_text", torch_dtype="bfloat16"), ["squawq", "transformers", "vllm"]),  # TGI runs AWQ in float16
        (config(dtype="bfloat16"), ["squawq", "transformers", "vllm"]),
        (config(dtype="bfloat16", quantization_config=AWQ), ["squawq", "transformers", "vllm"]),
        (config(dtype="float16", quantization_config=AWQ), ALL),
        (config("vaultgemma"), ["transformers"]),
        (config(hidden_act="relu2"), ["transformers", "vllm", "tgi"]),
        (config(quantization_config={**AWQ, "version": "gemv"}), ["squawq"]),
        (config(quantization_config={**AWQ, "group_size": 16}), ["squawq", "transformers"]),
        (config(quantization_config={**AWQ, "zero_point": False}), ["squawq", "transformers", "vllm"]),
    ],
)
def test_by_the_config_alone(found: ModelConfig, expected: list[str]) -> None:
    assert compatible_engines(found) == expected


def test_families() -> None:
    assert {*VLLM, *TGI} <= set(FAMILIES)
    for name, family in FAMILIES.items():
        assert ("squawq" in compatible_engines(config(name))) == (family.decoder is not None), name


def test_settings_that_are_still_to_come_count() -> None:
    assert "vLLM" in engines_line(config(), QuantConfig())
    assert "vLLM" not in engines_line(config(), QuantConfig(group_size=16))
    assert "Text Generation" in engines_line(config(torch_dtype="bfloat16"), QuantConfig(dtype="float16"))
    assert "Text Generation" not in engines_line(config(), QuantConfig(dtype="bfloat16"))


def test_linears_that_engines_fuse_stay_together(make_model: MakeModel, tmp_path: Path) -> None:
    """vLLM refuses a folder where some of q, k and v are quantized and others are not."""
    settings = QuantConfig(method="rtn", group_size=32, modules_to_not_convert=("q_proj", "1.mlp.up_proj"))
    squawq.quantize(make_model(), tmp_path / "out", settings, progress=False)
    kept = {
        name.removeprefix("model.layers.")
        for name in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"][
            "modules_to_not_convert"
        ]
    }
    attention = {f"{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qkv"}
    assert kept == attention | {"1.mlp.gate_proj", "1.mlp.up_proj"}


def test_lines_to_paste_quote_the_folder() -> None:
    lines = how_to_run(config(), Path("my model"), chats=True)
    assert len(lines) == 4
    assert "squawq chat 'my model'" in lines[0]
    assert "docker run" in lines[3]  # text-generation-launcher is squawq's own here
    assert f"-v '{Path('my model').resolve()}':/model" in lines[3]


@pytest.mark.parametrize("chat", [True, False])
def test_usage_has_what_was_asked_for(chat: bool) -> None:
    alone = usage("me/x", chat, ["transformers"])
    assert not [words for words in (*OURS_ALONE, "vllm", "OpenAI", "text-generation-inference") if words in alone]
    assert "import squawq.transformers" in alone
    whole = usage("me/x", chat)
    assert all(words in whole for words in (*OURS_ALONE, "vllm", "OpenAI", "text-generation-inference"))
    assert "float16" not in whole  # a folder in bfloat16 would overflow


def test_a_family_without_a_decoder_of_ours(make_model: MakeModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    squawq.quantize(make_model("cohere"), out, QuantConfig(method="rtn", group_size=32), progress=False)
    with pytest.raises(ConfigError, match="does not run this model"):
        load(out)
    assert inspect(out)["runs_in"] == ["transformers", "vllm", "tgi"]
    card = model_card(out, "me/x")
    assert not [words for words in OURS_ALONE if words in card.partition("## Use it")[2]]


def test_python_shows_progress_unless_told_not_to(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, settings = make_model(), QuantConfig(group_size=32, seqlen=32)
    rows = [list(range(2, 34))] * 8
    squawq.quantize(folder, tmp_path / "out", settings, calibration=rows)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("the result runs in: squawq generate")
    assert "2 layers, 256 calibration tokens" in shown.err
    assert "model.layers.1  output off by" in shown.err
    squawq.quantize(folder, tmp_path / "out", settings, calibration=rows)
    assert f"already done: {tmp_path / 'out'}" in capsys.readouterr().err
    squawq.quantize(folder, tmp_path / "silent", settings, calibration=rows, progress=False)
    squawq.quantize(folder, tmp_path / "silent", settings, calibration=rows, progress=False)
    assert capsys.readouterr().err == ""
