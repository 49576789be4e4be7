"""AutoAWQ's public names are here, with its arguments; and the user is told where AutoAWQ itself is installed too."""

from __future__ import annotations

import importlib.metadata
import inspect
import warnings
from typing import Any

import pytest

import awq
from awq import AutoAWQForCausalLM
from awq.models._config import AwqConfig
from awq.models.base import BaseAWQForCausalLM
from squawq.errors import CheckpointError, ConfigError
from squawq.families import FAMILIES
from squawq.quant_config import QuantConfig

QUANTIZE = (
    "tokenizer quant_config calib_data split text_column duo_scaling export_compatible apply_clip "
    "n_parallel_calib_samples max_calib_samples max_calib_seq_len max_chunk_memory quantizer_cls"
)
PRETRAINED = (
    "model_path torch_dtype trust_remote_code safetensors device_map download_kwargs low_cpu_mem_usage use_cache"
)
QUANTIZED = (
    "quant_path quant_filename max_seq_len trust_remote_code fuse_layers use_exllama use_exllama_v2 use_ipex "
    "batch_size safetensors device_map max_memory offload_folder download_kwargs"
)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (BaseAWQForCausalLM.quantize, f"self {QUANTIZE}"),
        (AutoAWQForCausalLM.from_pretrained, PRETRAINED),
        (AutoAWQForCausalLM.from_quantized, QUANTIZED),
        (BaseAWQForCausalLM.save_quantized, "self save_dir safetensors shard_size"),
        (BaseAWQForCausalLM.pack, "self"),
        (BaseAWQForCausalLM.fuse_layers, "model"),
    ],
)
def test_arguments_stand_in_autoawqs_order(function: Any, names: str) -> None:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = [name for name, p in inspect.signature(function).parameters.items() if p.kind in kinds]
    assert found == names.split()


def test_is_not_made_by_itself() -> None:
    with pytest.raises(OSError, match="from_pretrained"):
        AutoAWQForCausalLM()


def test_tells_of_autoawq_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awq, "version", lambda name: {"autoawq": "0.2.9"}[name])
    with pytest.warns(UserWarning, match=r"autoawq 0\.2\.9 is installed beside squawq"):
        awq._warn_of_autoawq()


def test_is_silent_without_autoawq(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(awq, "version", missing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        awq._warn_of_autoawq()


def test_the_cards_settings_are_squawqs_defaults() -> None:
    card = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
    assert AwqConfig.from_dict(card).to_quant_config() == QuantConfig() == AwqConfig.from_dict({}).to_quant_config()
    assert AwqConfig.from_dict(card).to_dict() == {**card, "version": "gemm", "modules_to_not_convert": None}


def test_settings_go_to_disk_and_back() -> None:
    config = AwqConfig.from_dict({"zero_point": False, "q_group_size": 64, "modules_to_not_convert": ["down_proj"]})
    written = config.to_transformers_dict()
    assert written["group_size"] == 64
    assert written["version"] == "gemm"
    assert AwqConfig.from_transformers_dict(written) == config


def test_unknown_settings_are_type_errors_as_in_autoawq() -> None:
    with pytest.raises(TypeError, match=r"'w_bits'.*zero_point, q_group_size, w_bit, version, modules_to_not_convert"):
        AwqConfig.from_dict({"w_bits": 4})


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"version": "GEMV"}, "'GEMV'.*'GEMM'"),
        ({"version": "marlin"}, "'marlin'.*'GEMM'"),
        ({"w_bit": 3}, "bits is 3; choose one of 4"),
        ({"q_group_size": 100}, "group_size is 100; choose one of 16"),
        ({"zero_point": "yes"}, "zero_point is 'yes'"),
    ],
)
def test_what_cannot_be_had_names_the_choices(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        AwqConfig.from_dict(wrong)


def test_another_method_is_refused_on_disk() -> None:
    with pytest.raises(CheckpointError, match="gptq"):
        AwqConfig.from_transformers_dict({"quant_method": "gptq", "bits": 4})


def test_modules_that_are_never_converted_may_be_listed() -> None:
    config = AwqConfig.from_dict({"modules_to_not_convert": ["lm_head", "down_proj", "typo", "model"]})
    assert config.to_quant_config(FAMILIES["llama"]).modules_to_not_convert == ("down_proj", "typo", "model")
