"""What `inspect` says of real folders, of a config.json alone, and of Llama 3.1's 8B and 70B shapes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from conftest import MakeModel, tiny_config

from squawq.commands.inspect import inspect as inspect_command
from squawq.demo import demo_model
from squawq.errors import CheckpointError, ConfigError
from squawq.format.reader import Checkpoint
from squawq.inspection import expected, inspect, missing
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LLAMA_8B = {**LLAMA_70B, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32} | {
    "num_attention_heads": 32
}


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


def test_llama_70b_by_hand(tmp_path: Path) -> None:
    found = inspect(write(tmp_path, LLAMA_70B), context=8192, batch=2)
    linears = 80 * (8192 * (8192 + 1024 + 1024 + 8192) + 3 * 8192 * 28672)
    table = 128256 * 8192
    norms = (2 * 80 + 1) * 8192
    assert found["parameters"] == linears + 2 * table + norms == 70_553_706_496
    assert found["memory"]["fp16"]["weights"] == 2 * found["parameters"]
    # 4 bits a weight, and for each 128 of them a 16-bit scale and a 4-bit zero
    int4 = linears // 2 + linears // 128 * 5 // 2 + 2 * (2 * table + norms)
    assert found["memory"]["int4"]["weights"] == int4
    assert round(int4 / 1e9, 1) == 39.8
    assert round(int4 / 2**30) == 37  # model cards say "around 35 GiB"
    assert found["memory"]["int4"]["kv_cache"] == 2 * 8192 * 80 * 2 * 8 * 128 * 2
    assert found["tensors"] == "shapes"


def test_how_many_processes_can_share(tmp_path: Path) -> None:
    """Of Qwen2.5-72B's 231 groups of 128, vLLM cannot give two GPUs equally many."""
    qwen = tiny_config(
        "qwen2", hidden_size=8192, num_attention_heads=64, num_key_value_heads=8, head_dim=128, intermediate_size=29568
    )
    for group, whole in ((128, [1]), (64, [1, 2]), (32, [1, 2, 4])):
        stated = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
        file = write(tmp_path, {**qwen, "vocab_size": 152064, "quantization_config": stated})
        found = inspect(file)["tensor_parallel"]
        assert found == {"squawq": [1, 2, 4, 8, 16, 32, 64], "whole_groups": whole}
    assert inspect(write(tmp_path, tiny_config("gemma3_text")))["tensor_parallel"] == {}


def test_llama_8b(tmp_path: Path) -> None:
    found = inspect(write(tmp_path, LLAMA_8B))
    assert found["parameters"] == 8_030_261_248
    assert round(found["memory"]["int4"]["weights"] / 1e9, 2) == 5.73


def test_a_real_folder_to_the_byte(awq_demo: Path) -> None:
    found = inspect(awq_demo)
    tensors = Checkpoint(awq_demo).tensors
    assert found["tensors"] == "headers"
    assert found["bytes"]["total"] == sum(info.nbytes for info in tensors.values())
    files = sum(path.stat().st_size for path in awq_demo.glob("*.safetensors"))
    assert 0 < files - found["bytes"]["total"] < 64 * 1024  # the headers
    integers = sum(i.nbytes for n, i in tensors.items() if n.endswith(("qweight", "qzeros", "scales")))
    assert found["bytes"]["quantized_linears"] == integers
    assert found["bytes"]["embedding"] == 4096 * 256 * 2
    assert found["bytes"]["head"] == found["bytes"]["dense_linears"] == 0
    assert found["quantization"] == {
        "method": "awq",
        "format": "gemm",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
    }
    assert found["linears"][0] == {
        "name": "self_attn.q_proj",
        "out_features": 256,
        "in_features": 256,
        "layers": {"int4": 8},
    }
    assert found["kept_in_16_bits"] == []


def test_the_config_alone_says_the_same_as_the_files(awq_demo: Path, tmp_path: Path) -> None:
    for folder in (awq_demo, demo_model()):
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        whole = inspect(folder)
        for alone in (inspect(tmp_path), inspect(tmp_path / "config.json")):
            assert alone["tensors"] == "shapes"
            differ = {key for key in whole if whole[key] != alone[key]}
            assert differ == {"model", "tensors"}
    assert inspect(demo_model())["memory"]["int4"] == inspect(awq_demo)["memory"]["int4"]
    assert inspect(demo_model())["parameters"] == inspect(awq_demo)["parameters"]


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
def test_shapes_give_every_tensor_of_each_family(
    make_model: MakeModel, tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    folder = make_model(model_type, hidden_size=128, intermediate_size=128, head_dim=32, **changes)
    quantize(folder, tmp_path / "awq", QuantConfig(method="rtn", group_size=32, modules_to_not_convert=("0.mlp.down",)))
    for path, quant in ((folder, None), (tmp_path / "awq", Checkpoint(tmp_path / "awq").config.quant)):
        checkpoint = Checkpoint(path)
        shapes = expected(checkpoint.config, quant)
        assert set(shapes) == set(checkpoint.tensors)
        assert missing(checkpoint) == []
        if quant is not None:
            assert {n: s.nbytes for n, s in shapes.items()} == {n: i.nbytes for n, i in checkpoint.tensors.items()}
    found = inspect(tmp_path / "awq")
    assert found["kept_in_16_bits"] == ["model.layers.0.mlp.down_proj"]
    assert found["linears"][-1]["layers"] == {"float16": 1, "int4": 1}
    assert found["bytes"]["dense_linears"] == 128 * 128 * 2


def test_what_does_not_fit_a_group_stays(tmp_path: Path) -> None:
    found = inspect(write(tmp_path, tiny_config(hidden_size=128, intermediate_size=96)))
    memory = found["memory"]
    assert memory["int4"]["weights"] < memory["fp16"]["weights"]
    down = 2 * 96 * 128 * 2  # two layers of 96 inputs, no multiple of 128
    assert memory["int4"]["weights"] > down


@pytest.mark.parametrize("context", [0, -1, 131073, True, 1.5])
def test_a_context_that_cannot_be(tmp_path: Path, context: Any) -> None:
    with pytest.raises(ConfigError, match="context is"):
        inspect(write(tmp_path, LLAMA_70B), context=context)


def test_a_batch_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch is 0"):
        inspect(write(tmp_path, LLAMA_70B), batch=0)


@pytest.mark.parametrize("model", ["nothing", "a/b/c", "./nothing"])
def test_no_model(model: str) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a file nor a Hub id"):
        inspect(model)


def test_weights_are_not_read(awq_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("squawq.format.reader.safe_open", refuse)
    assert inspect(awq_demo)["layers"] == 8


@pytest.mark.parametrize(
    ("stated", "shown"),
    [
        (["LlamaForCausalLM", "[/red]"], "LlamaForCausalLM"),
        (["[/red]"], "llama"),
        (["X |\n\n# other"], "llama"),
        (["\x1b[31mX"], "llama"),
        ({"a": 1}, "llama"),
        ("LlamaForCausalLM", "llama"),
        (5, "llama"),
        ([], "llama"),
        ([None], "llama"),
        (None, "llama"),
    ],
)
def test_an_architectures_name_is_a_name(tmp_path: Path, stated: Any, shown: str) -> None:
    assert inspect(write(tmp_path, {**LLAMA_8B, "architectures": stated}))["architecture"] == shown


@pytest.mark.parametrize(
    ("stated", "layout"),
    [
        ({"version": "GEMV"}, "gemv"),
        ({"format": "gemv"}, "gemv"),
        ({"backend": "llm-awq", "version": "gemm"}, "llm-awq"),
        ({"version": None}, "gemm"),
    ],
)
def test_the_layout(tmp_path: Path, stated: dict[str, Any], layout: str) -> None:
    quant = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, **stated}
    assert inspect(write(tmp_path, {**LLAMA_8B, "quantization_config": quant}))["quantization"]["format"] == layout


def test_a_folders_name_is_shown_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "we[red]ird :cat: \x1b[31m"
    folder.mkdir()
    write(folder, LLAMA_8B)
    inspect_command(str(folder))
    shown = capsys.readouterr().out.replace("\n", "")
    assert r"we[red]ird :cat: \x1b[31m" in shown
    assert "\x1b" not in shown


def test_the_gpus_of_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (70 * 2**30, 80 * 2**30))
    config = write(tmp_path, LLAMA_8B)
    assert inspect(config)["gpus"] == [{"name": "NVIDIA A100", "total": 80 * 2**30, "free": 70 * 2**30}]
    inspect_command(str(config))
    assert "NVIDIA A100: 75.2 GB (70.0 GiB) of 85.9 GB (80.0 GiB) are free" in capsys.readouterr().out


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return programs.run(["-W", "error", "-m", "squawq", "inspect", *arguments])


def test_the_command(tmp_path: Path) -> None:
    config = write(tmp_path, LLAMA_70B)
    table = run(config, "--context", "4096")
    assert table.returncode == 0, table.stderr
    assert "39.8 GB (37.0 GiB)" in table.stdout
    assert "memory to run 1 x 4,096 tokens" in table.stdout
    asked = run(config, "--context", "4096", "--batch", "4", "--json")
    assert json.loads(asked.stdout) | {"gpus": []} == inspect(config, 4096, 4) | {"gpus": []}
    refused = run(config, "--context", "1000000")
    assert refused.returncode == 2
    assert refused.stderr.strip() == "squawq: error: context is 1000000; the model has 131072 positions"
