"""What `inspect` says of real folders, of a config.json alone, and of Llama 3.1's 8B and 70B shapes."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from conftest import MakeModel, tiny_config
from safetensors.torch import save_file

from squawq.backends.cuda.backend import CudaBackend
from squawq.commands.inspect import inspect as inspect_command
from squawq.demo import demo_model
from squawq.engine.capacity import shared_kv_tokens
from squawq.errors import CheckpointError, ConfigError
from squawq.format.reader import Checkpoint
from squawq.inspection import expected, inspect, missing
from squawq.nn.cache import Cache
from squawq.nn.loader import OpenModel
from squawq.nn.shard import Shard
from squawq.quant_config import QuantConfig
from squawq.quantization.pipeline import quantize

CPU = torch.device("cpu")
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
QWEN_72B = {**LLAMA_70B, "model_type": "qwen2", "intermediate_size": 29568, "vocab_size": 152064} | {
    "architectures": ["Qwen2ForCausalLM"],
    "max_position_embeddings": 32768,
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
LLAMA_8B = {**LLAMA_70B, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32} | {
    "num_attention_heads": 32
}
QWEN_32B = {**QWEN_72B, "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64} | {
    "num_attention_heads": 40
}
MODELS = {"Llama 3.1 8B": LLAMA_8B, "Qwen2.5 32B": QWEN_32B, "Llama 3.1 70B": LLAMA_70B, "Qwen2.5 72B": QWEN_72B}


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
    assert inspect(write(tmp_path, tiny_config("olmo")))["tensor_parallel"] == {}


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


def fewest(found: dict[str, Any], form: str = "int4") -> int | None:
    return next((row["size"] for row in found["devices"][form] if row["fits"]), None)


def test_llama_70b_on_gpus_by_hand(tmp_path: Path) -> None:
    found = inspect(write(tmp_path, LLAMA_70B), context=8192, batch=4, device_memory=24 * 2**30)
    devices = found["devices"]
    assert set(devices) == {"memory", "share", "fp16", "int4"}
    linears = 80 * (8192 * (8192 + 1024 + 1024 + 8192) + 3 * 8192 * 28672)
    table = 2 * 128256 * 8192
    for row in devices["int4"]:
        if row["size"] <= 8:  # more GPUs than key-value heads have some heads twice
            whole = linears // 2 + linears // 128 * 4 + 2 * table
            assert row["weights"] * row["size"] == whole
        each = 80 * 2 * max(1, 8 // row["size"]) * 128 * 2
        left = int(0.9 * devices["memory"]) - row["weights"] - row["steps"]
        assert row["room"] == max(0, left)
        assert row["tokens"] == row["room"] // each // 16 * 16
        assert row["fits"] == (row["tokens"] >= 4 * 8192)
        assert 2**30 < row["steps"] < 4 * 2**30
    assert fewest(found) == 4
    assert fewest(found, "fp16") == 8
    assert [row["weights"] for row in devices["fp16"]][:2] == [2 * linears + 2 * table, linears + table]


def test_qwen_72b_on_gpus(tmp_path: Path) -> None:
    """Its 231 groups of 128 inner features are not the same number on each of two GPUs: the larger part counts."""
    config = write(tmp_path, {**QWEN_72B, "quantization_config": AWQ})
    rows = inspect(config, device_memory=48 * 10**9)["devices"]
    assert set(rows) == {"memory", "share", "int4"}
    one, two = rows["int4"][:2]
    assert [row["size"] for row in rows["int4"]] == [1, 2, 4, 8, 16, 32, 64]
    group = 3 * 80 * 8192 * (64 + 4)  # bytes of a group of the MLP's inner features
    assert 2 * two["weights"] - one["weights"] == group
    assert [row["fits"] for row in rows["int4"][:2]] == [False, True]
    for memory, context, batch, size in (
        (24, 8192, 1, 4),
        (80, 8192, 1, 1),
        (80, 32768, 8, 2),
        (4, 8192, 1, None),
    ):
        found = inspect(config, context, batch, memory * 10**9)
        assert fewest(found) == size, (memory, context, batch)


def test_the_docs_table(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "how-to" / "deploy.md").read_text()
    _, *cards = re.search(r"^\| model \| (.*) \|$", text, re.MULTILINE)[0].strip("| ").split(" | ")  # type: ignore[index]
    for name, config in MODELS.items():
        file, cells = write(tmp_path, config), []
        for card in cards:
            devices = inspect(file, 8192, device_memory=int(card.removesuffix(" GB")) * 10**9)["devices"]["int4"]
            row = next(row for row in devices if row["fits"])
            cells.append(f"{row['size']}: {row['tokens']:,}")
        assert f"| {name} | {' | '.join(cells)} |\n" in text


def test_a_server_would_say_the_same(awq_demo: Path) -> None:
    """Of the weights, from the headers, for each size; and a tied embedding counts once."""
    memory = 10**9
    for row in inspect(awq_demo, device_memory=memory)["devices"]["int4"]:
        shards = [Shard(rank, row["size"]) for rank in range(row["size"])]
        ranks = [OpenModel(Checkpoint(awq_demo), CudaBackend(CPU), "16-bit", shard) for shard in shards]
        assert row["weights"] == max(rank.weight_bytes() for rank in ranks)
        backend, each = ranks[0].backend, Cache.token_bytes(ranks[0].config)
        if row["size"] == 1:
            assert row["steps"] == backend.working_bytes(ranks[0].config, 256, 2048)
            free = memory - row["weights"]
            tokens = shared_kv_tokens(ranks[0].config, each, row["steps"], 0.9, free, memory, 256)
            assert row["tokens"] == tokens


def test_gpus_for_other_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(demo_model())["devices"] is None
    assert fewest(inspect(demo_model(), device_memory=2**30)) == 1
    config = write(tmp_path, tiny_config("olmo"))
    assert inspect(config, device_memory=2**30)["devices"]["int4"] == []
    inspect_command(str(config), device_memory="1G")
    assert "squawq's decoder does not run this model" in capsys.readouterr().out
    (tmp_path / "x").mkdir()
    write(tmp_path / "x", tiny_config())
    save_file({"model.norm.weight": torch.ones(64)}, tmp_path / "x" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"the model has no model\.embed_tokens\.weight"):
        inspect(tmp_path / "x", device_memory=2**30)
    with pytest.raises(ConfigError, match="device_memory is 0"):
        inspect(config, device_memory=0)


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
    gpus = run(config, "--device-memory", "24g", "--context", "4096", "--json")
    assert json.loads(gpus.stdout)["devices"] == inspect(config, 4096, 1, 24 * 10**9)["devices"]
    shown = " ".join(run(config, "--device-memory", "24G").stdout.split())
    assert "INT4 on GPUs of 25.8 GB (24.0 GiB), of which 90% are used: needs 4 for 1 x 8,192 tokens" in shown
    assert shown.count("the fewest") == 2  # in 16 bits, too
    assert "has no room for 1 x 8,192 tokens" in " ".join(run(config, "--device-memory", "1500m").stdout.split())
    refused = run(config, "--device-memory", "24GB")
    assert refused.returncode == 2
    assert "--device-memory is '24GB'; it must be a number of bytes" in refused.stderr
    refused = run(config, "--context", "1000000")
    assert refused.returncode == 2
    assert refused.stderr.strip() == "squawq: error: context is 1000000; the model has 131072 positions"
