"""transformers' whole model of a checkpoint on a backend: its linears multiply weights that the backend has packed.

Everything else is transformers' own module, in the backend's activation dtype. Peak memory of `load`: the packed
weights, the embedding as stored, and one linear as stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from squawq.backends.base import Backend
from squawq.backends.layer_ops import Packed
from squawq.layerwise.beside import keep_as_stored
from squawq.layerwise.blocks import Blocks
from squawq.layerwise.plan import EXACT
from squawq.memory import give_memory_back
from squawq.nn.linears import Linear, load_linear
from squawq.nn.loader import HEAD_GROUP, choose_head


class PackedLinear(nn.Module):
    """x [..., in] -> [..., out], with the bias that `weight` has, by the backend."""

    def __init__(self, backend: Backend, weight: Packed) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._backend, self._weight = backend, weight

    def forward(self, x: Tensor) -> Tensor:
        return self._backend.matmul(self._weight.ordered(x), self._weight)


class PackedHead(nn.Module):
    """The output head, of some rows alone: x [1, tokens, hidden] -> float32 [1, len(rows), vocab].

    Attributes:
        rows: int64; which tokens' logits are computed.
    """

    rows: Tensor

    def __init__(self, backend: Backend, weight: Packed, bias: Tensor | None) -> None:
        super().__init__()
        self._backend, self._weight, self._bias = backend, weight, bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])[self.rows]
        if not len(rows):
            return rows.new_empty(1, 0, self._weight.shape[0], dtype=torch.float32)
        logits = self._backend.logits(rows.contiguous(), self._weight)
        return (logits if self._bias is None else logits + self._bias)[None]


class PackedModel:
    """transformers' causal LM with packed linears.

    Args:
        blocks: The checkpoint. The model is built in its modules, so they can serve nothing else afterwards.
        head: Format of the output head: "int8", "int4" or "16-bit"; None: the backend's default.

    Raises:
        CheckpointError: A tensor is missing, of another shape, or not finite.
        ConfigError: The head cannot have that format.
    """

    def __init__(self, blocks: Blocks, backend: Backend, head: str | None = None) -> None:
        self._blocks, self._backend = blocks, backend
        self.model: Any = blocks.meta_model.model
        self.config, self.layers, self.device = self.model.config, blocks.layers, backend.device
        self._load_outer(head)
        for index in range(len(blocks.layers)):
            self._load_layer(index)
            give_memory_back()

    @torch.inference_mode()
    def __call__(self, ids: Tensor, outputs: Tensor, **arguments: Any) -> Any:
        """Run int64 [1, tokens]; transformers' result, with logits [1, outputs, vocab] of the tokens `outputs`."""
        self._head.rows = outputs
        return self.model(ids, **arguments)

    def _load_outer(self, head: str | None) -> None:
        """The embedding, the head, and what else stands outside of the layers."""
        names, family, outer = self._blocks.names, self._blocks.family, self._blocks.meta_model.outer
        names.check(outer)
        weight_of_head = f"{family.head}.weight"
        for name, shape in outer.items():
            owner = self.model.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, nn.Embedding) and name.endswith(".weight"):
                keep_as_stored(owner, names.read(name, shape).to(self._backend.device), self._backend.activation_dtype)
            elif name.rpartition(".")[0] in self._blocks.meta_model.outer_linears and name.endswith(".weight"):
                self._pack(self.model, name.removesuffix(".weight"), name.removesuffix(".weight"))
            elif name != weight_of_head:
                self._set(self.model, name, names.read(name, shape))
        bias = self.model.get_submodule(family.head)._parameters.get("bias")
        packed = self._packed_head(head, weight_of_head if weight_of_head in outer else f"{family.embedding}.weight")
        self._head = PackedHead(self._backend, packed, None if bias is None else bias.data.float())
        self.model.set_submodule(family.head, self._head)

    def _packed_head(self, asked: str | None, name: str) -> Packed:
        backend, weight = self._backend, self._blocks.names.read(name, self._blocks.meta_model.outer[name])
        out, in_ = weight.shape

        def declines(kind: str) -> str | None:
            if kind == "int4":
                return backend.int4_declines(out, in_, HEAD_GROUP)
            return backend.int8_declines(out, in_, weight.dtype)

        kind = choose_head(asked, backend.head, declines, self._blocks.meta_model.where)
        if kind == "16-bit":
            return backend.pack_dense([weight])
        return backend.pack_int8(weight) if kind == "int8" else backend.round_int4(weight, HEAD_GROUP)

    def _load_layer(self, index: int) -> None:
        blocks, prefix = self._blocks, self._blocks.family.layer(index)
        layer: nn.Module = blocks.layers[index]
        blocks.names.check({f"{prefix}.{name}" for name in layer.state_dict()}, index)
        groups = blocks.meta_model.groups(index)
        kept = {name for group in groups for name in group.unquantized_consumers}  # small, and looked into by some
        for name, module in list(layer.named_modules()):
            if type(module) is nn.Linear and name not in kept:  # not of a class that computes something else
                self._pack(layer, name, f"{prefix}.{name}")
        for name, tensor in layer.state_dict().items():
            self._set(layer, name, blocks.names.read(f"{prefix}.{name}", tuple(tensor.shape)))
        blocks.meta_model.fill_constants(layer.modules())

    def _pack(self, module: nn.Module, linear: str, name: str) -> None:
        """Replace a linear of the module, whose name in the model is `name`."""
        packed = self._packed(name, module.get_submodule(linear))
        module.set_submodule(linear, PackedLinear(self._backend, packed))

    def _packed(self, name: str, linear: Any) -> Packed:
        names, checkpoint = self._blocks.names, self._blocks.checkpoint
        stored, shape = names.stored_module(name), (linear.out_features, linear.in_features)
        if checkpoint.is_quantized(stored):
            return load_linear(checkpoint, [Linear(stored, *shape)], self._backend, ordered=True)
        bias = None if linear.bias is None else names.read(f"{name}.bias", shape[:1]).float()
        return self._backend.pack_dense([names.read(f"{name}.weight", shape)], bias)

    def _set(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        owner, _, kind = name.rpartition(".")
        part = module.get_submodule(owner)
        dtype = torch.float32 if name.endswith(EXACT) else self._backend.activation_dtype
        tensor = tensor.to(self._backend.device, dtype)
        is_parameter = kind in part._parameters
        setattr(part, kind, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
