"""What decoder layers read besides hidden states: per-layer inputs, and keys and values of earlier layers.

Gemma 4 E2B and E4B have both. A per-layer input depends on the token alone, so it is computed once for each token id of
the text. Keys and values are kept from the layer that computes them for the later ones that share them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from squawq.errors import CheckpointError
from squawq.layerwise.meta_model import MetaModel
from squawq.layerwise.tensor_names import TensorNames

AT_ONCE = 1024  # tokens whose per-layer inputs are computed at once
Make = Callable[[Tensor, tuple[int, ...]], Tensor]


@dataclass
class ExtraInputs:
    """What layers read besides hidden states [blocks, tokens, hidden], for the same blocks.

    Attributes:
        ids: Token ids, int64 [blocks, tokens]; None for a model without per-layer inputs.
        shared: Keys and values [blocks, heads, tokens, dim] that later layers read, by transformers' name for them.
        found: Those that the last call of a layer has computed.
        make: Allocates a tensor of a shape for `shared`, like another one.
    """

    ids: Tensor | None
    shared: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    found: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    make: Make = Tensor.new_empty

    @property
    def tensors(self) -> list[Tensor]:
        """Ids, and shared keys and values, in a fixed order."""
        found = [tensor for name in sorted(self.shared) for tensor in self.shared[name]]
        return found if self.ids is None else [self.ids, *found]

    def each(self, change: Callable[[Tensor], Tensor]) -> ExtraInputs:
        """Apply `change` to every tensor, whose first dimension is the blocks."""
        shared = {name: tuple(map(change, tensors)) for name, tensors in self.shared.items()}
        return ExtraInputs(None if self.ids is None else change(self.ids), shared)

    def part(self, blocks: slice) -> ExtraInputs:
        """A slice of the blocks."""
        return self.each(lambda tensor: tensor[blocks])

    def first_token(self) -> ExtraInputs:
        """The first token of the first block."""
        ids = None if self.ids is None else self.ids[:1, :1]
        return ExtraInputs(ids, {name: tuple(t[:1, :, :1] for t in tensors) for name, tensors in self.shared.items()})

    def keep(self, part: slice, blocks: int, found: dict[str, tuple[Tensor, ...]]) -> None:
        """Keep keys and values that a layer has computed for some of so many blocks."""
        for name, tensors in found.items():
            if part.start == 0:
                self.shared[name] = tuple(self.make(tensor, (blocks, *tensor.shape[1:])) for tensor in tensors)
            for whole, tensor in zip(self.shared[name], tensors, strict=True):
                whole[part] = tensor


class PerLayerInputs:
    """Per-layer inputs of the token ids that were added, or asked for, in float32.

    Peak memory: layers x size x 4 bytes for each id. Of the embeddings only the rows of these ids are read.
    """

    def __init__(self, names: TensorNames, meta_model: MetaModel) -> None:
        self._names, self._meta_model = names, meta_model
        self._embedding = f"{meta_model.family.embedding}.weight"
        self._place = torch.full(meta_model.outer[self._embedding][:1], -1)
        self._rows: Tensor | None = None

    def add(self, ids: Tensor) -> None:
        """Compute the inputs of token ids int64 [...]. Raises CheckpointError for a bad tensor."""
        names, outer, (own, *others) = self._names, self._meta_model.outer, self._meta_model.per_layer
        new = torch.unique(ids.cpu())
        new = new[self._place[new] < 0]
        if not len(new):
            return
        self._meta_model.put({name: names.read(name, outer[name]) for name in others})
        known = 0 if self._rows is None else len(self._rows)
        self._place[new] = torch.arange(known, known + len(new))
        first = known
        for some in torch.split(new, AT_ONCE):
            found = self._meta_model.per_layer_inputs(
                *(self._read(name, some.tolist()) for name in (self._embedding, own))
            )
            if first == known:
                grown = found.new_empty(known + len(new), *found.shape[1:])
                if self._rows is not None:
                    grown[:known] = self._rows
                self._rows = grown
            grown[first : first + len(some)] = found
            first += len(some)

    def _read(self, name: str, ids: Sequence[int]) -> Tensor:
        checkpoint, stored = self._names.checkpoint, self._names.stored_name(name)
        checkpoint.check_shape(stored, self._meta_model.outer[name])
        found = torch.stack([checkpoint.read(stored, index=token).float() for token in ids])
        if not bool(found.isfinite().all()):
            raise CheckpointError(f"{checkpoint.info(stored).file}: tensor {stored!r} has values that are not finite")
        return found.to(self._meta_model.device)

    def of(self, index: int, ids: Tensor) -> Tensor:
        """A layer's inputs, float32 [blocks, tokens, size], for ids int64 [blocks, tokens]."""
        self.add(ids)
        assert self._rows is not None
        return self._rows[self._place[ids.cpu()].to(self._rows.device), index]


def keep_as_stored(embedding: nn.Embedding, table: Tensor, dtype: torch.dtype) -> None:
    """Keep an embedding's table [vocab, hidden] in its stored dtype: only rows that are looked up become `dtype`.

    The module's own forward runs on them, which may scale them.
    """
    own: Callable[[Tensor], Tensor] = embedding.forward
    embedding.padding_idx = None

    def forward(ids: Tensor) -> Tensor:
        flat = ids.flatten()
        embedding._parameters["weight"] = table[flat].to(dtype)  # type: ignore[assignment]
        return own(torch.arange(len(flat), device=flat.device).view(ids.shape))

    vars(embedding)["forward"] = forward
