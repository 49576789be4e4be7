"""Where a model's tensors lie in its checkpoint: transformers' names against those on disk, which are often older.

A tensor is read by its name in the model, whether it is stored as it is, as AWQ integers, or as a slice of a parameter
that holds all experts. Knows names and shapes; runs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import torch
from torch import Tensor

from squawq.errors import CheckpointError
from squawq.families import expert_of
from squawq.format.reader import Checkpoint
from squawq.layerwise.meta_model import Skeleton

LANGUAGE_MODEL = re.compile(r"^(model\.language_model|language_model\.model)\.")
LANGUAGE_HEAD = re.compile(r"^(model\.)?language_model\.(?=lm_head\.)")
INTEGERS = ("qweight", "scales", "qzeros", "scaled_zeros")
FUSED = ("gate_up_proj", "down_proj")  # what holds all experts of a layer; gate before up


class Places:
    """names: from the model's names to those on disk. beside: tensors on disk of parts that are no text model.
    ignored: those that transformers leaves aside, as layers that predict further tokens.

    Raises CheckpointError for a tensor on disk that has no place in the model.
    """

    def __init__(self, checkpoint: Checkpoint, skeleton: Skeleton) -> None:
        self.checkpoint, self.family, self.transposed = checkpoint, skeleton.family, skeleton.transposed
        self.names: dict[str, str] = {}
        self.beside: list[str] = []
        self.ignored: list[str] = []
        self._of_layer: dict[int, list[str]] = {}
        family, outer, rename = skeleton.family, skeleton.outer, skeleton.renaming()
        nested = "text_config" in checkpoint.config.raw
        layer = re.compile(re.escape(family.layers) + r"\.(\d+)\.")
        for stored, info in checkpoint.tensors.items():
            text = LANGUAGE_HEAD.sub("", LANGUAGE_MODEL.sub("model.", stored)) if nested else stored
            name = rename(text)
            owner = name.rpartition(".")[0]
            if "rotary_emb" in name:
                continue
            found = layer.match(name)
            if found and int(found.group(1)) < checkpoint.config.num_layers:
                self._of_layer.setdefault(int(found.group(1)), []).append(name)
                self.names[name] = stored
            elif name in outer or owner == family.head or f"{owner}.weight" in outer:
                self.names[name] = stored
            elif nested and text == stored:
                self.beside.append(stored)
            elif any(re.search(pattern, name) for pattern in skeleton.ignored):
                self.ignored.append(stored)
            else:
                raise CheckpointError(f"{info.file}: tensor {stored!r} does not belong to a {family.model_type} model")

    def stored(self, name: str) -> str:
        """What a tensor of the model is called on disk; its kind may be one that only quantized linears have."""
        if name in self.names:
            return self.names[name]
        owner, _, kind = name.rpartition(".")
        for own in ("weight", "qweight"):
            if f"{owner}.{own}" in self.names:
                return self.names[f"{owner}.{own}"].removesuffix(own) + kind
        experts = _experts_of(name)
        on_disk = self.names.get(f"{experts}.{FUSED[0]}", "")
        return on_disk.removesuffix(FUSED[0]) + name.removeprefix(f"{experts}.") if on_disk.endswith(FUSED[0]) else name

    def holder(self, name: str) -> str:
        """The tensor on disk that holds one of the model: itself, or that of all experts of its layer."""
        if name not in self.names and (experts := _experts_of(name)) and f"{experts}.{FUSED[0]}" in self.names:
            part = self.family.experts.index(name.removesuffix(".weight").rpartition(".")[2])
            return self.names[f"{experts}.{FUSED[part // 2]}"]
        return self.stored(name)

    @property
    def written(self) -> list[str]:
        """All tensors on disk that a result is made of."""
        return [*self.names.values(), *self.beside]

    @property
    def parts(self) -> list[str]:
        """What the parts beside the text model are called, as vision_tower."""
        return sorted({name.removeprefix("model.").partition(".")[0] for name in self.beside})

    def module(self, name: str) -> str:
        """What a module of the model is called on disk."""
        return self.stored(f"{name}.weight").removesuffix(".weight")

    def has(self, name: str) -> bool:
        """Whether a tensor of the model is on disk, in whatever form."""
        owner = name.rpartition(".")[0]
        return bool({name, f"{owner}.qweight", f"{_experts_of(name)}.{FUSED[0]}"} & self.names.keys())

    def check(self, expected: Collection[str], index: int | None = None) -> None:
        """Raises CheckpointError for a tensor that is missing or, in the layer of that index, surplus."""
        for name in expected:
            if not self.has(name):
                self.checkpoint.info(self.stored(name))  # raises
        for name in self._of_layer.get(index, ()) if index is not None else ():
            owner, _, kind = name.rpartition(".")
            whole = f"{owner}.weight" if kind in INTEGERS else name
            if whole not in expected and not (kind in FUSED and owner.endswith(".experts")):
                stored = self.names[name]
                file = self.checkpoint.info(stored).file
                raise CheckpointError(f"{file}: tensor {stored!r} does not belong to this architecture")

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of this shape that holds no NaN or infinity. Raises CheckpointError naming file and tensor."""
        owner, _, kind = name.rpartition(".")
        if kind == "weight" and f"{owner}.qweight" in self.names:
            out, inputs = shape
            stored = self.names[f"{owner}.qweight"].removesuffix(".qweight")
            return self.checkpoint.read_quantized(stored, inputs, out).dequantize()
        fused = f"{_experts_of(name)}.{FUSED[0]}"
        if name not in self.names and fused in self.names:
            return self._slice(name, shape)
        return read_finite(self.checkpoint, self.stored(name), shape)

    def _slice(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One expert's linear out of the parameter that holds all."""
        expert, _, linear = name.removesuffix(".weight").rpartition(".")
        number, part, stored = int(expert.rpartition(".")[2]), self.family.experts.index(linear), self.holder(name)
        out, inputs = shape
        rows = out * (1 if part == 2 else 2)
        info = self.checkpoint.info(stored)
        needed = [inputs, rows] if self.transposed else [rows, inputs]
        if len(info.shape) != 3 or list(info.shape[1:]) != needed or number >= info.shape[0]:
            raise CheckpointError(
                f"{info.file}: tensor {stored!r} has shape {list(info.shape)}; [experts, {needed[0]}, "
                f"{needed[1]}] is needed"
            )
        weight = self.checkpoint.read(stored, index=number)
        weight = weight.T if self.transposed else weight
        first = out if part == 1 else 0
        return _finite(weight[first : first + out].contiguous(), self.checkpoint, stored)


def _experts_of(name: str) -> str:
    return (expert_of(name) or "").rpartition(".")[0]


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; one pass and no copy, unlike torch.isfinite."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def read_finite(checkpoint: Checkpoint, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """A tensor that holds no NaN or infinity. Raises CheckpointError naming file and tensor."""
    return _finite(checkpoint.read(name, shape), checkpoint, name)


def check_floating(checkpoint: Checkpoint, name: str) -> None:
    """Raises CheckpointError for a tensor of integers or truth values."""
    info = checkpoint.info(name)
    if not info.dtype.is_floating_point:
        raise CheckpointError(f"{info.file}: tensor {name!r} is {info.dtype}; floating point is needed")


def _finite(tensor: Tensor, checkpoint: Checkpoint, name: str) -> Tensor:
    check_floating(checkpoint, name)
    if not all_finite(tensor):
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        raise CheckpointError(f"{checkpoint.info(name).file}: tensor {name!r} holds {bad} values that are not finite")
    return tensor
