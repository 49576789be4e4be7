"""Settings: every bad value is refused with the choices; what is written is what the readers expect."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import tiny_config

from squawq.config import ModelConfig
from squawq.errors import CheckpointError, ConfigError
from squawq.format import layouts
from squawq.quant_config import AWQ_LAYOUTS, QuantConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "bits is 3; choose one of 4"),
        ({"group_size": 100}, "16, 32, 64, 128, 256, -1"),
        ({"group_size": True}, "group_size is True"),
        ({"method": "gptq"}, "awq, rtn"),
        ({"dtype": "float32"}, "float16, bfloat16"),
        ({"samples": 0}, "samples is 0"),
        ({"n_grid": 0}, "n_grid is 0"),
        ({"method": "awq", "damping": 1.0}, "damping is 1.0, but method 'awq' has none"),
        ({"method": "rtn", "refine": 2}, "refine is 2, but method 'rtn' has none"),
        ({"seqlen": 4}, "at least 8"),
        ({"zero_point": 1}, "zero_point is 1"),
        ({"modules_to_not_convert": "lm_head"}, "list of module names"),
    ],
)
def test_bad_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantConfig(**changes)


def test_autoawq_spelling() -> None:
    config = QuantConfig.from_dict({"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"})
    assert config.group_size == 64
    with pytest.raises(ConfigError, match="unknown quantization setting 'q_grop_size'"):
        QuantConfig.from_dict({"q_grop_size": 64})
    with pytest.raises(ConfigError, match="GEMV"):
        QuantConfig.from_dict({"version": "GEMV"})


def test_keys_on_disk_are_exactly_autoawqs() -> None:
    assert QuantConfig().to_quantization_config([]) == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }


AUTOROUND = {
    "autoround_version": "0.16.1",
    "bits": 4,
    "data_type": "int",
    "group_size": 64,
    "iters": 200,
    "modules_to_not_convert": ["lm_head"],
    "provider": "auto-round",
    "quant_method": "awq",
    "sym": True,
    "to_quant_block_names": "model.layers",
    "version": "gemm",
    "zero_point": False,
}
GPTQMODEL = {
    "bits": 4,
    "checkpoint_format": "gemm",
    "desc_act": False,
    "format": "gemm",
    "group_size": 64,
    "lm_head": False,
    "meta": {"quantizer": ["gptqmodel:7.7.0"], "damp_percent": None, "true_sequential": True},
    "method": "awq",
    "pack_dtype": "int32",
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}
TRANSFORMERS = {
    "act_group_aware": True,
    "backend": "auto",
    "batch_size": 1,
    "bits": 4,
    "cache_block_outputs": True,
    "damp_percent": 0.1,
    "desc_act": False,
    "format": "gemm",
    "group_size": 64,
    "quant_method": "awq",
    "sym": True,
    "true_sequential": True,
    "version": "gemm",
    "zero_point": True,
    **dict.fromkeys(("block_name_to_quantize", "dataset", "max_input_length", "meta", "model_seqlen", "tokenizer")),
    **dict.fromkeys(("module_name_preceding_first_block", "modules_in_block_to_quantize", "modules_to_not_convert")),
    "pad_token_id": None,
}


@pytest.mark.parametrize(
    ("written", "zero_point", "skipped"),
    [(AUTOROUND, False, ("lm_head",)), (GPTQMODEL, True, ()), (TRANSFORMERS, True, ())],
)
def test_other_writers_add_keys(written: dict[str, Any], zero_point: bool, skipped: tuple[str, ...]) -> None:
    """As AutoRound 0.16.1, GPTQModel 7.7.0 and transformers 5.24 write them; the last says `sym` in any case."""
    config = QuantConfig.from_quantization_config(written, "here")
    assert (config.group_size, config.zero_point, config.modules_to_not_convert) == (64, zero_point, skipped)


@pytest.mark.parametrize(
    ("keys", "layout"),
    [
        ({}, "gemm"),
        ({"version": "GEMV"}, "gemv"),
        ({"version": None, "format": "gemv_fast"}, "gemv_fast"),
        ({"checkpoint_format": "llm-awq"}, "llm-awq"),
        ({"backend": "llm-awq", "version": "gemv"}, "llm-awq"),
    ],
)
def test_layouts_in_every_spelling(keys: dict[str, Any], layout: str) -> None:
    assert ModelConfig.from_dict(tiny_config(quantization_config={"bits": 4, **keys})).layout == layout


@pytest.mark.parametrize("version", ["marlin", "exllama", "ipex", 3, ["gemm"]])
def test_layouts_that_are_not_read(version: object) -> None:
    with pytest.raises(CheckpointError, match=r"choose one of 'gemm', 'gemv', 'gemv_fast', 'llm-awq'$"):
        ModelConfig.from_dict(tiny_config(quantization_config={"bits": 4, "version": version}))


def test_a_layout_that_is_read_elsewhere() -> None:
    with pytest.raises(CheckpointError, match=r"'gemv'; choose one of 'gemm' \(squawq.LLM"):
        QuantConfig.from_quantization_config({"bits": 4, "version": "gemv"}, "here")


def test_layouts_are_the_readers() -> None:
    assert tuple(layouts.LAYOUTS)[: len(AWQ_LAYOUTS)] == AWQ_LAYOUTS


def test_rope_in_both_spellings() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = ModelConfig.from_dict(tiny_config(rope_theta=500000.0, rope_scaling=scaling))
    raw = tiny_config(rope_parameters={**scaling, "rope_theta": 500000.0})
    del raw["rope_theta"]
    assert ModelConfig.from_dict(raw).rope == old.rope
    assert old.rope.theta == 500000.0


def test_sliding_windows() -> None:
    assert ModelConfig.from_dict(tiny_config("mistral", sliding_window=8)).window(1) == 8
    assert ModelConfig.from_dict(tiny_config("mistral", sliding_window=None)).window(0) is None
    assert ModelConfig.from_dict(tiny_config("qwen2", sliding_window=8, use_sliding_window=False)).window(0) is None
    qwen = ModelConfig.from_dict(tiny_config("qwen2", sliding_window=8, use_sliding_window=True, max_window_layers=1))
    assert [qwen.window(0), qwen.window(1)] == [None, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 7, "num_key_value_heads": 2}, "7 attention heads cannot share 2 key-value heads"),
        ({"num_attention_heads": 2, "num_key_value_heads": 4}, "2 attention heads cannot share 4 key-value heads"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
    ],
)
def test_shapes_that_no_attention_has(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_dict({**tiny_config(), **changes})
