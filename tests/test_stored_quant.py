"""`quantization_config` of other writers: what is read, and what is refused with its value."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from conftest import tiny_config

from squawq.config import ModelConfig
from squawq.errors import CheckpointError
from squawq.format.layouts import LAYOUTS

AUTOROUND: dict[str, Any] = {  # AutoRound 0.16.1
    "amp": False,
    "autoround_version": "0.16.1",
    "bits": 4,
    "block_name_to_quantize": "model.layers",
    "data_type": "int",
    "enable_quanted_input": False,
    "group_size": 32,
    "packing_format": "auto_round:auto_gptq",
    "quant_method": "auto-round",
    "sym": True,
}
AUTOROUND_GPTQ: dict[str, Any] = {  # the same, format auto_gptq
    "bits": 4,
    "damp_percent": 0.01,
    "data_type": "int",
    "desc_act": False,
    "group_size": 32,
    "lm_head": False,
    "provider": "auto-round",
    "quant_method": "gptq",
    "sym": True,
    "true_sequential": False,
}
GPTQ: dict[str, Any] = {  # GPTQModel's keys
    "bits": 4,
    "checkpoint_format": "gptq",
    "desc_act": True,
    "dynamic": {"-:.*o_proj.*": {}, "+:.*down_proj.*": {"desc_act": False}},
    "group_size": 128,
    "lm_head": False,
    "pack_dtype": "int32",
    "quant_method": "gptq",
    "sym": False,
}
LLMCOMPRESSOR: dict[str, Any] = {  # llm-compressor 0.14 with compressed-tensors 0.19
    "config_groups": {
        "group_0": {
            "format": "pack-quantized",
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": "static",
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "memoryless_minmax",
                "observer_kwargs": {},
                "scale_dtype": None,
                "strategy": "group",
                "symmetric": False,
                "type": "int",
                "zp_dtype": "torch.int8",
            },
        }
    },
    "format": "pack-quantized",
    "global_compression_ratio": None,
    "ignore": ["re:.*o_proj", "lm_head"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.19.0",
}
WEIGHTS = ("config_groups", "group_0", "weights")
GROUP = ("config_groups", "group_0")


def changed(base: dict[str, Any], *path: str, **values: Any) -> dict[str, Any]:
    made = copy.deepcopy(base)
    place = made
    for key in path:
        place = place[key]
    place.update(values)
    return made


def read(values: dict[str, Any]) -> ModelConfig:
    return ModelConfig.from_dict(tiny_config(quantization_config=values))


@pytest.mark.parametrize(
    ("written", "layout", "group", "zero_point"),
    [
        (AUTOROUND, "gptq", 32, False),
        ({**AUTOROUND, "sym": False, "packing_format": "auto_round:auto_awq"}, "gemm", 32, True),
        ({**AUTOROUND, "packing_format": "auto_round:auto_gptq:exllamav2"}, "gptq", 32, False),
        ({**AUTOROUND, "packing_format": "auto_round"}, "gptq_v2", 32, False),
        (
            {**AUTOROUND, "quant_method": "intel/auto-round", "packing_format": "auto_round:gptqmodel"},
            "gptq_v2",
            32,
            False,
        ),
        ({**AUTOROUND, "extra_config": {"lm_head": {"bits": 16}, "a": {"bits": 4}}}, "gptq", 32, False),
        (AUTOROUND_GPTQ, "gptq", 32, False),
        (GPTQ, "gptq", 128, True),
        ({**GPTQ, "checkpoint_format": "gptq_v2", "group_size": -1}, "gptq_v2", -1, True),
        (LLMCOMPRESSOR, "pack-quantized", 32, True),
        (
            changed(LLMCOMPRESSOR, *WEIGHTS, strategy="channel", group_size=None, symmetric=True),
            "pack-quantized",
            -1,
            False,
        ),
        (
            changed(LLMCOMPRESSOR, "config_groups", group_1=LLMCOMPRESSOR["config_groups"]["group_0"]),
            "pack-quantized",
            32,
            True,
        ),
    ],
)
def test_read(written: dict[str, Any], layout: str, group: int, zero_point: bool) -> None:
    config = read(written)
    assert config.quant is not None
    assert (config.layout, config.quant.group_size, config.quant.zero_point) == (layout, group, zero_point)
    assert layout in LAYOUTS


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "quant_method is 'bitsandbytes'; squawq reads awq, gptq, compressed-tensors",
        ),
        ({"quant_method": ["gptq"]}, "quant_method is"),
        ({**GPTQ, "bits": 8}, "bits is 8"),
        ({**GPTQ, "bits": "4"}, "bits is '4'"),
        ({**GPTQ, "group_size": 1024}, "group_size is 1024"),
        ({**GPTQ, "sym": "yes"}, "symmetric is 'yes'"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({**GPTQ, "dynamic": {"+:.*down.*": {"bits": 8}}}, r"dynamic has 8 bits in groups of 128 for '\+:\.\*down"),
        ({**GPTQ, "dynamic": {".*": {"group_size": 32}}}, "dynamic has 4 bits in groups of 32"),
        ({**GPTQ, "dynamic": ["a"]}, "dynamic must map names to settings"),
        ({**AUTOROUND, "bits": 2}, "bits is 2"),
        ({**AUTOROUND, "data_type": "mx_fp"}, "data_type 'mx_fp' is not read"),
        ({**AUTOROUND, "packing_format": "auto_round:fp8"}, "packing_format 'auto_round:fp8'"),
        ({**AUTOROUND, "extra_config": {"a": {"bits": 8}}}, "extra_config has 8 bits"),
        (changed(LLMCOMPRESSOR, *GROUP, format="nvfp4-pack-quantized"), "in the format 'nvfp4-pack-quantized'"),
        (changed(LLMCOMPRESSOR, *GROUP, format="marlin-24"), "in the format 'marlin-24'"),
        (changed(LLMCOMPRESSOR, *GROUP, input_activations={"num_bits": 8}), "with input_activations"),
        (changed(LLMCOMPRESSOR, *GROUP, weights=None), "without weights"),
        (changed(LLMCOMPRESSOR, *WEIGHTS, num_bits=8), "'num_bits': 8"),
        (changed(LLMCOMPRESSOR, *WEIGHTS, type="float"), "'type': 'float'"),
        (changed(LLMCOMPRESSOR, *WEIGHTS, strategy="tensor"), "strategy 'tensor'"),
        (changed(LLMCOMPRESSOR, *WEIGHTS, group_size=48), "group_size is 48"),
        (changed(LLMCOMPRESSOR, *WEIGHTS, symmetric=[1]), r"symmetric \[1\]"),
        (changed(LLMCOMPRESSOR, kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (changed(LLMCOMPRESSOR, transform_config={"config_groups": {}}), "transform_config"),
        (changed(LLMCOMPRESSOR, sparsity_config={"format": "sparse-24"}), "sparsity_config"),
        (changed(LLMCOMPRESSOR, config_groups={"W4A16": ["Linear"]}), "no config_groups of objects"),
        (
            changed(
                LLMCOMPRESSOR,
                "config_groups",
                b=changed(LLMCOMPRESSOR, *WEIGHTS, group_size=64)["config_groups"]["group_0"],
            ),
            "config_groups has 2 schemes",
        ),
    ],
)
def test_refused(written: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(written)
    assert len(str(caught.value)) < 400
