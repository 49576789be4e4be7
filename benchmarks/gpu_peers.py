"""Other INT4 kernels for gpu.py to compare with, where one is installed: Marlin of vLLM or GPTQModel, and Humming.

A peer turns a weight in AWQ's layout into a function of activations, float16 [rows, in] -> [rows, out].
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from squawq.backends.base import Gemm

Multiply = Callable[[Tensor], Tensor]
Prepare = Callable[[Gemm], Multiply]


def marlin(utils: Any, repack: Callable[..., Tensor], uint4: Any) -> Prepare:
    """Marlin for AWQ weights; vLLM and GPTQModel have the same functions."""

    def prepare(gemm: Gemm) -> Multiply:
        qweight, scales, qzeros = gemm
        in_, out = qweight.shape[0], scales.shape[1]
        groups, none = scales.shape[0], utils.marlin_make_empty_g_idx(qweight.device)
        weight = {
            "weight": repack(qweight, in_, out, 4),
            "weight_scale": utils.marlin_permute_scales(scales, size_k=in_, size_n=out, group_size=in_ // groups),
            "weight_zp": utils.awq_to_marlin_zero_points(qzeros, size_k=groups, size_n=out, num_bits=4),
            "g_idx": none,
            "g_idx_sort_indices": none,
            "workspace": utils.marlin_make_workspace_new(qweight.device),
            "quant_type": uint4,
            "output_size_per_partition": out,
            "input_size_per_partition": in_,
        }
        return lambda x: utils.apply_awq_marlin_linear(input=x, **weight)

    return prepare


def vllm_marlin() -> Prepare:
    utils = import_module("vllm.model_executor.layers.quantization.utils.marlin_utils")
    repack = import_module("vllm._custom_ops").awq_marlin_repack
    return marlin(utils, repack, import_module("vllm.scalar_type").scalar_types.uint4)


def gptqmodel_marlin() -> Prepare:
    utils = import_module("gptqmodel.utils.marlin")
    return marlin(
        utils, utils.awq_marlin_repack, import_module("gptqmodel.utils.marlin_scalar_type").scalar_types.uint4
    )


def humming() -> Prepare:
    layer_class = import_module("humming.layer").HummingLayer

    def prepare(gemm: Gemm) -> Multiply:
        qweight, scales, qzeros = gemm
        in_, out = qweight.shape[0], scales.shape[1]
        config = {"quant_method": "awq", "bits": 4, "group_size": in_ // scales.shape[0], "zero_point": True}
        layer = layer_class(shape_n=out, shape_k=in_, weight_config=config, torch_dtype=torch.float16).cuda()
        layer.load_from_tensors({"qweight": qweight, "scales": scales, "qzeros": qzeros})
        layer.transform()
        multiply: Multiply = layer
        return multiply

    return prepare


PEERS = {"Marlin (vLLM)": vllm_marlin, "Marlin (GPTQModel)": gptqmodel_marlin, "Humming": humming}


def find_peers() -> tuple[dict[str, Prepare], dict[str, str]]:
    """The peers that are installed, and why each other one cannot be used."""
    found: dict[str, Prepare] = {}
    missing: dict[str, str] = {}
    for name, load in PEERS.items():
        try:
            found[name] = load()
        except Exception as error:  # whatever goes wrong in a peer, the others are measured
            missing[name] = f"{type(error).__name__}: {error}"[:200]
    return found, missing
