"""Lays out an export: which tensors go into which shard, and which linears are quantized, by its headers.

So any family is exported, with experts and with parts beside its text model, which stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from squawq.errors import CheckpointError
from squawq.families import family_of
from squawq.format.reader import Checkpoint
from squawq.inspection import missing
from squawq.layerwise.meta_model import MetaModel
from squawq.layerwise.tensor_names import TensorNames


@dataclass(frozen=True)
class Plan:
    """Layout of the result; names are the checkpoint's.

    Attributes:
        parts: Tensors of each shard: what stands before the layers, every layer, the final norm and head.
        shapes: (out_features, in_features) of every quantized linear.
        kept: Linears of the text model in 16 bits, the output head last.
        beside: Names of parts beside the text model, such as vision_tower.
        targets: What is quantized, by class or full name.
        embedding: The tensor of the embedding.
    """

    parts: list[list[str]]
    shapes: dict[str, tuple[int, int]]
    kept: list[str]
    beside: list[str]
    targets: list[str]
    embedding: str


def make_plan(checkpoint: Checkpoint) -> Plan:
    """Only rotary frequencies and a head beside a tied embedding are left out.

    Raises:
        CheckpointError: A tensor is missing, misshapen or unexpected.
    """
    config, family = checkpoint.config, family_of(checkpoint.config.model_type)
    meta_model = MetaModel(config.raw, str(checkpoint.folder / "config.json"), family)
    names = TensorNames(checkpoint, meta_model)
    for lost in missing(checkpoint)[:1]:
        checkpoint.info(lost)  # raises
    shapes = checkpoint.quantized_linears()
    _check_shapes(checkpoint, meta_model, names, shapes)
    layers = [names.of_layer(index) for index in range(config.num_layers)]
    ends = {stored for name, stored in names.on_disk.items() if name.rpartition(".")[0] in (family.norm, family.head)}
    head, placed = names.stored_module(family.head), ends | set(chain(*layers))
    dropped = {name for name in ends if config.tied_embeddings and name.rpartition(".")[0] == head}
    first = [name for name in names.stored_names if name not in placed]
    matrices = [name for name in chain(*layers) if _is_matrix(checkpoint, name)]
    kept = [name.removesuffix(".weight") for name in matrices]
    kept += [names.stored_module(name) for name in meta_model.outer_linears]
    if config.tied_embeddings:
        shapes.pop(head, None)  # a head beside a tied embedding
    targets = ["Linear", *([head] if head in shapes else [])]
    last = [name for name in names.on_disk.values() if name in ends - dropped]
    kept += [] if head in shapes else [head]
    embedding = names.stored_name(f"{family.embedding}.weight")
    return Plan([first, *layers, last], shapes, kept, names.other_parts, targets, embedding)


def _is_matrix(checkpoint: Checkpoint, name: str) -> bool:
    return name.endswith(".weight") and len(checkpoint.info(name).shape) == 2


def _check_shapes(
    checkpoint: Checkpoint, meta_model: MetaModel, names: TensorNames, shapes: dict[str, tuple[int, int]]
) -> None:
    """Compare the shapes of linears, the embedding and the final norm with the architecture's."""
    family = meta_model.family
    expected: dict[str, tuple[int, ...]] = dict(meta_model.outer)
    for index in range(len(meta_model.layers)):
        prefix = family.layer(index)
        expected |= {f"{prefix}.{name}.weight": shape for name, shape in meta_model.shapes(index).items()}
    for name, shape in expected.items():
        stored = names.stored_module(name.removesuffix(".weight"))
        if stored in shapes:
            if shapes[stored] != shape:
                found = list(shapes[stored])
                raise CheckpointError(f"{checkpoint.folder}: {stored} has shape {found}; {list(shape)} is needed")
        elif names.has(name) and name in names.on_disk:
            checkpoint.check_shape(names.on_disk[name], shape)
