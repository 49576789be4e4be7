"""A config.json that asks for gigabytes, for a kernel of the Hub or for what no number can be: one line, at once."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeModel, tiny_config
from family_models import ALONE

from squawq.config import ModelConfig
from squawq.errors import CheckpointError, SquawqError
from squawq.export.run import export
from squawq.inspection import inspect
from squawq.layerwise.meta_model import transformers_config

MEMORY = 3 * 2**30  # bytes of addresses: torch and transformers alone take about half of it
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 1e300}, "rope_theta is 1e"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None"),
        (
            {"rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 1e300}},
            "original_max_position_embeddings is 1e",
        ),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": "4"}, "sliding_window is '4'"),
        ({"model_type": "mistral", "sliding_window": True}, "sliding_window is True"),
        ({"model_type": "mistral", "sliding_window": 2**40}, "sliding_window is 1099511627776"),
        ({"vocab_size": 2147483647}, "vocab_size is 2147483647"),
        ({"hidden_size": 2**30}, "hidden_size is 1073741824"),
        ({"head_dim": 2**30}, "head_dim is 1073741824"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ({"hidden_size": [[0] * 10**5]}, "hidden_size is"),
    ],
)
def test_numbers_that_no_model_has(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        ModelConfig.from_dict({**tiny_config(), **changes})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", ["abc", None, -1, 1.5, [1], 10**400])
def test_max_window_layers(value: Any) -> None:
    window = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": value}
    with pytest.raises(CheckpointError, match="max_window_layers is"):
        ModelConfig.from_dict(tiny_config("qwen2", **window))


HEAVY: dict[str, dict[str, Any]] = {
    "labels": {"num_labels": 10**8},
    "experts": {"model_type": "qwen3_moe", **MOE, "num_experts": 10**7},
    "experts by another name": {"model_type": "mixtral", "num_local_experts": 10**7},
    "rotary": {"model_type": "stablelm", "partial_rotary_factor": 1e9},
    "another name of the layers": {"model_type": "exaone", "num_layers": 10**8},
}


def test_no_number_takes_gigabytes(tmp_path: Path) -> None:
    """All in a process that has little memory. What is harmless there is inspected, the rest refused."""
    for name, changes in HEAVY.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({**tiny_config(), **changes}))
    program = (
        "import sys; from squawq.inspection import inspect; from squawq.errors import SquawqError\n"
        "for path in sys.argv[1:]:\n"
        "    try: inspect(path); print('inspected')\n"
        "    except SquawqError as error: print(str(error).replace(path, ''))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *(str(tmp_path / f"{name}.json") for name in HEAVY)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
    )
    assert done.returncode == 0, done.stderr
    said = dict(zip(HEAVY, done.stdout.splitlines(), strict=True))
    assert said["labels"] == said["another name of the layers"] == "inspected"
    assert "num_experts is 10000000" in said["experts"]
    assert "num_local_experts is 10000000" in said["experts by another name"]
    assert "rotary frequencies" in said["rotary"]


def test_too_many_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts times layers, each number of which is that of some model."""
    monkeypatch.setattr("squawq.layerwise.meta_model.MAX_MODULES", 300)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("qwen3_moe", **{**MOE, "num_experts": 64})))
    with pytest.raises(CheckpointError, match="more than 300 modules"):
        inspect(tmp_path)


@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation_internal"]
)
def test_no_kernel_is_asked_for(key: str, tmp_path: Path) -> None:
    raw = {**tiny_config("qwen3_moe", **MOE), key: "evil/kernel"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert inspect(tmp_path)["layers"] == 2
    config = transformers_config(raw, "here")
    assert "evil" not in str([config._attn_implementation, config._experts_implementation])


@pytest.mark.parametrize(
    "key",
    [
        *("auto_map", "quantization_config", "compression_config", "distributed_config", "transformers_weights"),
        *("base_model_tp_plan", "get_text_config", "__class__", "__dict__", "dtype", "torch_dtype", "per_layer_config"),
        *("id2label", "problem_type", "fusion_config", "_name_or_path", "sub_configs", "attribute_map"),
    ],
)
@pytest.mark.parametrize("value", ["evil", {"AutoModelForCausalLM": "evil/code--m.Model"}])
def test_keys_that_are_not_the_architectures_do_nothing(key: str, value: Any) -> None:
    config = transformers_config({**tiny_config(), key: value}, "here")
    assert config.to_dict() == transformers_config(tiny_config(), "here").to_dict()


def test_keys_of_a_part_do_nothing_either() -> None:
    text = {**tiny_config("gemma3_text"), "attn_implementation": "evil/kernel", "num_labels": 10**8}
    raw = {"model_type": "gemma3", "text_config": text, "vision_config": {"num_hidden_layers": 10**8}}
    config = transformers_config(raw, "here")
    assert config.hidden_size == 64
    assert "evil" not in str(config._attn_implementation)


@pytest.mark.parametrize("model_type", ALONE)
def test_what_the_architecture_reads_is_passed_on(model_type: str) -> None:
    """transformers' own config of the family, written and read again."""
    from transformers import CONFIG_MAPPING

    whole = CONFIG_MAPPING[model_type]()
    ours = transformers_config(whole.to_dict(), "here")
    dropped = {"id2label", "label2id", "architectures", "transformers_version", "dtype", "use_return_dict"}
    wanted, found = ({k: v for k, v in c.to_dict().items() if k not in dropped} for c in (whole, ours))
    assert found == wanted


def test_gguf_looks_at_the_headers_first(make_model: MakeModel, awq_demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in awq_demo.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "vocab_size": 2**24}))
    with pytest.raises(SquawqError, match=r"has shape \[4096, 256\]; \[16777216, 256\] is needed"):
        export(folder, tmp_path / "x.gguf", "gguf")
