"""Maps the model's tensor names to the checkpoint's, and reads a tensor however it is stored.

Checkpoints often use older names than transformers. A weight is stored as it is, as 4-bit integers, or as a slice of
one parameter that stacks all experts, in 16 bits or MXFP4.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection

import torch
from torch import Tensor

from squawq.config import with_text_config
from squawq.errors import CheckpointError
from squawq.families import expert_of
from squawq.format.mxfp4 import BLOCKS, SCALES, dequantize
from squawq.format.reader import Checkpoint
from squawq.layerwise.meta_model import MetaModel
from squawq.nn.experts import STACKED, is_turned

LANGUAGE_MODEL = re.compile(r"^(model\.language_model|language_model\.model)\.")
LANGUAGE_HEAD = re.compile(r"^(model\.)?language_model\.(?=lm_head\.)")
PART = re.compile(r"^((model|language_model)\.)*layers\.\d+|(?<=^model\.)\w+|^(?!model\.)\w+")  # beside the text model
OF_STACK = re.compile(rf"({'|'.join(STACKED)})(_bias|{BLOCKS}|{SCALES})?")


class TensorNames:
    """Tensor names of a text model and of its checkpoint.

    Attributes:
        on_disk: Name in the checkpoint, by name in the model.
        other_tensors: Tensors of parts beside the text model, by name in the checkpoint: a vision tower, or layers for
            multi-token prediction, which transformers does not load.

    Raises:
        CheckpointError: A tensor in the checkpoint does not belong to the model.
    """

    def __init__(self, checkpoint: Checkpoint, meta_model: MetaModel) -> None:
        self.checkpoint, self.family = checkpoint, meta_model.family
        self.transposed, self.interleaved = meta_model.transposed, meta_model.interleaved
        self._integers = checkpoint.layout.integers
        self.on_disk: dict[str, str] = {}
        self.other_tensors: list[str] = []
        self._of_layer: dict[int, list[str]] = {}
        family, outer, rename = meta_model.family, meta_model.outer, meta_model.renaming()
        nested = "text_config" in with_text_config(checkpoint.config.raw)
        layer = re.compile(re.escape(family.layers) + r"\.(\d+)\.")
        for stored, info in checkpoint.tensors.items():
            text = LANGUAGE_HEAD.sub("", LANGUAGE_MODEL.sub("model.", stored)) if nested else stored
            name = rename(text)
            owner = name.rpartition(".")[0]
            if "rotary_emb" in name:
                continue
            found = layer.match(name)
            ignored = any(re.search(pattern, name) for pattern in meta_model.ignored)
            if found and int(found.group(1)) < checkpoint.config.num_layers:
                if ignored:  # keys and values of a layer that shares those of another one
                    continue
                self._of_layer.setdefault(int(found.group(1)), []).append(name)
                self.on_disk[name] = stored
            elif name in outer or owner == family.head or f"{owner}.weight" in outer:
                self.on_disk[name] = stored
            elif (nested and text == stored) or ignored:
                self.other_tensors.append(stored)
            else:
                raise CheckpointError(f"{info.file}: tensor {stored!r} does not belong to a {family.model_type} model")

    def stored_name(self, name: str) -> str:
        """Name in the checkpoint of a tensor of the model, or of one that only quantized linears have."""
        if name in self.on_disk:
            return self.on_disk[name]
        owner, _, kind = name.rpartition(".")
        for own in ("weight", self._integers):
            if f"{owner}.{own}" in self.on_disk:
                return self.on_disk[f"{owner}.{own}"].removesuffix(own) + kind
        place, found, _ = self._stack(name, STACKED[0]).rpartition(STACKED[0])
        return place + name.removeprefix(f"{_experts_of(name)}.") if found else name  # stacks may have another name

    def storage_name(self, name: str) -> str:
        """Name of the tensor in the checkpoint that stores a tensor of the model: its own, or the stacked experts."""
        if name in self.on_disk or not self._stack(name, STACKED[0]):
            return self.stored_name(name)
        linear = name.rpartition(".")[0].rpartition(".")[2]
        return self._stack(name, STACKED[self.family.experts.index(linear) // 2])

    def _stack(self, name: str, fused: str) -> str:
        """Name in the checkpoint of the parameter, or of its MXFP4 blocks, that has a tensor of all experts; or ""."""
        place = f"{_experts_of(name)}.{fused}"
        if name.endswith(".bias"):
            return self.on_disk.get(f"{place}_bias", "")
        return self.on_disk.get(place) or self.on_disk.get(place + BLOCKS, "")

    @property
    def stored_names(self) -> list[str]:
        """All tensors of the checkpoint that a quantized checkpoint is made from."""
        return [*self.on_disk.values(), *self.other_tensors]

    @property
    def other_parts(self) -> list[str]:
        """Names of the parts beside the text model, such as vision_tower, mtp, or a further layer (model.layers.61)."""
        return sorted({found.group() for name in self.other_tensors if (found := PART.search(name))})

    def stored_module(self, name: str) -> str:
        """Name in the checkpoint of a module of the model."""
        return self.stored_name(f"{name}.weight").removesuffix(".weight")

    def of_layer(self, index: int) -> list[str]:
        """Names in the checkpoint of a layer's tensors; none after the last layer."""
        return [self.on_disk[name] for name in self._of_layer.get(index, ())]

    def has(self, name: str) -> bool:
        """Whether the checkpoint stores a tensor of the model, in whatever form."""
        owner = name.rpartition(".")[0]
        return bool({name, f"{owner}.{self._integers}"} & self.on_disk.keys() or self._stack(name, STACKED[0]))

    def check(self, expected: Collection[str], index: int | None = None) -> None:
        """Raise CheckpointError for a missing tensor, and for one of layer `index` that is not expected."""
        for name in expected:
            if not self.has(name):
                self.checkpoint.info(self.stored_name(name))  # raises
        for name in self._of_layer.get(index, ()) if index is not None else ():
            owner, _, kind = name.rpartition(".")
            whole = f"{owner}.weight" if kind in self.checkpoint.layout.tensors else name
            if whole not in expected and not (OF_STACK.fullmatch(kind) and owner.endswith("experts")):
                stored = self.on_disk[name]
                file = self.checkpoint.info(stored).file
                raise CheckpointError(f"{file}: tensor {stored!r} does not belong to this architecture")

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read a tensor of the model, dequantized where the checkpoint is quantized.

        Args:
            name: Name in the model.
            shape: Expected shape.

        Returns:
            The tensor in its dtype on disk, float32 if it was dequantized.

        Raises:
            CheckpointError: It is missing, has another shape, or holds NaN or infinity; names file and tensor.
        """
        owner, _, kind = name.rpartition(".")
        if kind == "weight" and f"{owner}.{self._integers}" in self.on_disk:
            out, inputs = shape
            stored = self.on_disk[f"{owner}.{self._integers}"].removesuffix(f".{self._integers}")
            return self.checkpoint.read_weight(stored, inputs, out)
        if name not in self.on_disk and self._stack(name, STACKED[0]):
            return self._slice(name, shape)
        return read_finite(self.checkpoint, self.stored_name(name), shape)

    def _slice(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One expert's weight [out, in] or bias [out] from the parameter that stacks all experts."""
        expert, _, linear = name.rpartition(".")[0].rpartition(".")
        number, part = int(expert.rpartition(".")[2]), self.family.experts.index(linear)
        stored, rows = self.storage_name(name), shape[0] * (1 if part == 2 else 2)
        info = self.checkpoint.info(stored)
        if stored.endswith(BLOCKS):
            whole = self._read_mxfp4(stored, number, rows, shape[1])
        else:
            turned = len(shape) == 2 and (self.transposed or is_turned(self.checkpoint, stored, (rows, shape[1])))
            needed = (shape[1], rows) if turned else (rows, *shape[1:])
            if len(info.shape) != len(needed) + 1 or info.shape[1:] != needed or number >= info.shape[0]:
                sizes = ", ".join(map(str, needed))
                raise CheckpointError(
                    f"{info.file}: tensor {stored!r} has shape {list(info.shape)}; [experts, {sizes}] is needed"
                )
            whole = self.checkpoint.read(stored, index=number)
            whole = whole.T if turned else whole
        halves = (whole[0::2], whole[1::2]) if self.interleaved else (whole[: shape[0]], whole[shape[0] :])
        return _finite((*halves, whole)[part].contiguous(), self.checkpoint, stored)

    def _read_mxfp4(self, blocks: str, number: int, rows: int, inputs: int) -> Tensor:
        """One expert's weight, float32 [rows, inputs], from MXFP4 of all experts."""
        scales = blocks.removesuffix(BLOCKS) + SCALES
        for name, needed in ((blocks, (rows, inputs // 32, 16)), (scales, (rows, inputs // 32))):
            info = self.checkpoint.info(name)
            if info.dtype != torch.uint8 or info.shape[1:] != needed or number >= info.shape[0] or inputs % 32:
                sizes = ", ".join(map(str, needed))
                raise CheckpointError(
                    f"{info.file}: tensor {name!r} is {info.dtype} {list(info.shape)}; torch.uint8 [experts, {sizes}] "
                    "is needed"
                )
        return dequantize(*(self.checkpoint.read(name, index=number) for name in (blocks, scales)))


def _experts_of(name: str) -> str:
    return (expert_of(name) or "").rpartition(".")[0]


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity, in one pass without a copy (torch.isfinite makes one)."""
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def read_finite(checkpoint: Checkpoint, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """Read a tensor by its name in the checkpoint. Raises CheckpointError if it holds NaN or infinity."""
    return _finite(checkpoint.read(name, shape), checkpoint, name)


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Convert to the 16-bit dtype on disk. Raises CheckpointError if a finite value overflows."""
    result = tensor.to(dtype)
    if not all_finite(result):
        raise CheckpointError(f"tensor {name!r} holds values beyond {dtype}; use dtype bfloat16 (--dtype bfloat16)")
    return result


def weight_count(checkpoint: Checkpoint, name: str) -> int:
    """How many weights a tensor of a 16-bit or MXFP4 checkpoint holds."""
    info = checkpoint.info(name)
    if info.dtype != torch.uint8:
        return math.prod(info.shape)
    return 2 * math.prod(info.shape) if name.endswith(BLOCKS) else 0


def check_floating(checkpoint: Checkpoint, name: str) -> None:
    """Raise CheckpointError for a tensor of integers or booleans, unless it is a part of MXFP4 weights."""
    info = checkpoint.info(name)
    if not info.dtype.is_floating_point and not (info.dtype == torch.uint8 and name.endswith((BLOCKS, SCALES))):
        raise CheckpointError(f"{info.file}: tensor {name!r} is {info.dtype}; floating point is needed")


def _finite(tensor: Tensor, checkpoint: Checkpoint, name: str) -> Tensor:
    check_floating(checkpoint, name)
    if not all_finite(tensor):
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        raise CheckpointError(f"{checkpoint.info(name).file}: tensor {name!r} holds {bad} values that are not finite")
    return tensor
