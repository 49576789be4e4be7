"""Tiny checkpoints in each layout, packed one integer at a time from the description, not by squawq."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import tiny_config
from safetensors.torch import save_file
from torch import Tensor

from squawq.config import ModelConfig
from squawq.format.groupwise import GroupwiseTensor, quantize
from squawq.nn.loader import linear_shapes

CONFIG = tiny_config(intermediate_size=128)
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NATURAL = tuple(range(8))


def words(rows: Any, order: tuple[int, ...], kind: str) -> Tensor:
    """Integers [rows, n] to words of len(order) nibbles; nibble i of a word has its integer order[i]."""
    rows, per = np.asarray(rows), len(order)
    found = np.zeros((len(rows), rows.shape[1] // per), dtype=np.uint64)
    for row in range(len(rows)):
        for place in range(rows.shape[1]):
            value = np.uint64(rows[row, place - place % per + order[place % per]])
            found[row, place // per] |= value << np.uint64(4 * (place % per))
    return torch.from_numpy(found.astype(f"u{kind}").view(f"i{kind}"))


def woven(q: Any) -> Tensor:
    """Four rows a line of int16. In 32 inputs: pairs dealt from the four quarters, then of each eight the even places
    before the odd; four rows after another for each 64 inputs; four integers a word."""
    pairs = [8 * quarter + 2 * pair + one for pair in range(4) for quarter in range(4) for one in range(2)]
    dealt = [pairs[eight + place] for eight in range(0, 32, 8) for place in ORDER]
    lines = []
    for top in range(0, len(q), 4):
        line: list[int] = []
        for first in range(0, q.shape[1], 64):
            for row in q[top : top + 4]:
                line += [row[first + half + place] for half in (0, 32) for place in dealt]
        lines.append(line)
    return words(lines, (0, 1, 2, 3), "2")


def width(inputs: int, group: int) -> int:
    """Zeros of a row, filled up to a whole word, and with groups of 64 to two, of 32 to four."""
    unit = 8 * {32: 4, 64: 2}.get(group, 1)
    return -(-inputs // group // unit) * unit


def padded(values: Any, to: int) -> Any:
    return np.pad(np.asarray(values), ((0, 0), (0, to - values.shape[1])))


def packed(tensor: GroupwiseTensor, layout: str, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """The tensors of a linear in `layout`."""
    q, zeros, scales = tensor.q.numpy(), tensor.zeros.numpy(), tensor.scales
    found: dict[str, Tensor]
    if layout in ("gptq", "gptq_v2"):
        less = zeros.astype(int) - (layout == "gptq")
        assert less.min() >= 0, "the first version has no zeros of 0"
        integers = words(q, NATURAL, "4").T
        found = {"qweight": integers, "qzeros": words(less.T, NATURAL, "4"), "scales": scales.T.to(dtype)}
    elif layout == "pack-quantized":
        found = {"weight_packed": words(q, NATURAL, "4"), "weight_shape": torch.tensor(q.shape)}
        found |= {"weight_scale": scales.to(dtype), "weight_zero_point": words(zeros.T, NATURAL, "4").T}
    elif layout == "gemm":
        found = {"qweight": words(q.T, ORDER, "4"), "qzeros": words(zeros.T, ORDER, "4"), "scales": scales.T}
    else:
        to = width(q.shape[1], q.shape[1] // scales.shape[1])
        own = torch.from_numpy(padded(scales, to)).to(dtype)
        if layout == "gemv":
            found = {"qweight": words(q, NATURAL, "4"), "qzeros": words(padded(zeros, to), NATURAL, "4"), "scales": own}
        else:
            below = -(own.float() * torch.from_numpy(padded(zeros, to))).to(dtype)
            name = "qzeros" if layout == "gemv_fast" else "scaled_zeros"
            found = {"qweight": woven(q), name: below.T, "scales": own.T}
    return {name: part.contiguous() for name, part in found.items()}


def stated(layout: str, group: int, zero_point: bool = True, **changes: Any) -> dict[str, Any]:
    """`quantization_config` of a layout."""
    if layout in ("gptq", "gptq_v2"):
        own = {"quant_method": "gptq", "checkpoint_format": layout, "desc_act": True, "sym": not zero_point}
        return {"bits": 4, "group_size": group, **own, **changes}
    if layout == "pack-quantized":
        strategy: dict[str, Any] = {"strategy": "channel" if group == -1 else "group"}
        strategy["group_size"] = None if group == -1 else group
        weights = {"num_bits": 4, "type": "int", "symmetric": not zero_point, "dynamic": False, **strategy, **changes}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
        return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "ignore": ["lm_head"]}
    own = {"quant_method": "awq", "zero_point": zero_point, "version": layout}
    return {"bits": 4, "group_size": group, **own, **changes}


def scattered(tensors: dict[str, Tensor], group: int, seed: int = 0) -> dict[str, Tensor]:
    """GPTQ's or compressed-tensors' tensors with the inputs' groups drawn at random (activation order)."""
    name = "weight_g_idx" if "weight_packed" in tensors else "g_idx"
    inputs = 8 * (tensors["weight_packed"].shape[1] if name[0] == "w" else tensors["qweight"].shape[0])
    order = torch.randperm(inputs, generator=torch.Generator().manual_seed(seed))
    return {**tensors, name: (order // group).to(torch.int32)}


def dequantized(tensors: dict[str, Tensor]) -> Tensor:
    """float32 [out, in] of a linear of GPTQ's second version: (q - zero) * scale, those of each input's group."""
    q = torch.stack([tensors["qweight"] >> 4 * i & 15 for i in range(8)], 1).flatten(0, 1)
    zeros = torch.stack([tensors["qzeros"] >> 4 * i & 15 for i in range(8)], 2).flatten(1)
    groups = tensors["g_idx"].long()
    return ((q - zeros[groups]) * tensors["scales"].float()[groups]).T


def integers(group: int, zero_point: bool = True, seed: int = 0) -> dict[str, GroupwiseTensor]:
    """Random integers for every linear of the tiny model; no zero is 0."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for index in range(CONFIG["num_hidden_layers"]):
        for name, shape in linear_shapes(ModelConfig.from_dict(CONFIG)).items():
            weight = torch.randn(shape, generator=generator) * 0.2
            size = shape[1] if group == -1 else group
            made = quantize(weight, size, zero_point)
            found[f"model.layers.{index}.{name}"] = replace(made, zeros=made.zeros.clamp(min=1))
    return found


def folder_of(
    folder: Path, layout: str, linears: dict[str, GroupwiseTensor], settings: dict[str, Any], *,
    drop: tuple[str, ...] = (), dtype: torch.dtype = torch.float16, order: int = 0,
) -> Path:  # fmt: skip
    """A checkpoint of the tiny model with these linears. drop: endings of tensors that are left out.

    order: the group size of a random activation order, the same for linears with the same input; 0: none.
    """
    generator, hidden = torch.Generator().manual_seed(1), CONFIG["hidden_size"]
    tensors = {
        n: torch.randn(160, hidden, generator=generator) for n in ("model.embed_tokens.weight", "lm_head.weight")
    }
    norms = [f"model.layers.{i}.{n}_layernorm" for i in range(2) for n in ("input", "post_attention")]
    tensors |= {f"{n}.weight": torch.rand(hidden, generator=generator) + 0.5 for n in (*norms, "model.norm")}
    for linear, tensor in linears.items():
        own = packed(tensor, layout, dtype)
        own = scattered(own, order, seed=tensor.q.shape[1]) if order else own
        tensors |= {f"{linear}.{n}": t for n, t in own.items() if n not in drop}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": settings}))
    save_file(tensors, folder / "model.safetensors")
    return folder
