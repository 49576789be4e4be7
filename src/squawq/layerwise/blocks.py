"""Loads decoder layers of a checkpoint (transformers' own modules) one at a time, and runs them with hooks.

A layer, 16-bit or quantized, is computed in float32. Peak memory: one layer. In shapes, blocks are calibration blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from squawq.families import Family
from squawq.format.groupwise import PACKED, from_gemm
from squawq.format.reader import Checkpoint
from squawq.layerwise.extra_inputs import ExtraInputs, PerLayerInputs
from squawq.layerwise.meta_model import SHARED, Arguments, MetaModel, refusing
from squawq.layerwise.plan import EXACT, Folding
from squawq.layerwise.tensor_names import TensorNames, check_floating
from squawq.memory import give_memory_back

InputHook = Callable[[Tensor], object]
BATCH_TOKENS = 4096
BATCH_VALUES = 1 << 25  # most values that a batch may have in the layer's widest activation


class _AllCaptured(BaseException):
    """Every hook has captured its part of the batch."""


@dataclass(frozen=True)
class OutputModule:
    """A module that returns the output of its last linear: alone, or in a tuple before `nones`."""

    module: str
    nones: tuple[None, ...] | None = None

    def output(self, tensor: Tensor) -> Any:
        """The module's return value if its last linear returns `tensor`."""
        return tensor if self.nones is None else (tensor, *self.nones)


class Blocks:
    """The decoder layers of a checkpoint, opened one at a time, and its embedding and head."""

    def __init__(self, checkpoint: Checkpoint, family: Family, device: str) -> None:
        self.checkpoint, self.family, self.device = checkpoint, family, device
        self.meta_model = MetaModel(checkpoint.config.raw, str(checkpoint.folder / "config.json"), family, device)
        self.layers = self.meta_model.layers
        self.names = TensorNames(checkpoint, self.meta_model)
        self._per_layer = PerLayerInputs(self.names, self.meta_model) if self.meta_model.per_layer else None

    def fast_dtype(self) -> torch.dtype:
        """What the whole model computes in: as stored on a GPU; float32 elsewhere, which a CPU multiplies fastest."""
        stored = self.checkpoint.info(self.names.stored_name(f"{self.family.embedding}.weight")).dtype
        return stored if self.device.startswith("cuda") else torch.float32

    def check(self) -> None:
        """Check names and dtypes of all tensors, and shapes of those outside the layers, from headers alone.

        Raises:
            CheckpointError: A tensor is missing, unexpected, of another shape, or not floating point.
        """
        self.names.check(self.meta_model.outer)
        for name, shape in self.meta_model.outer.items():
            if name in self.names.on_disk:
                self.checkpoint.check_shape(self.names.on_disk[name], shape)
        for name in self.names.stored_names:
            check_floating(self.checkpoint, name)
        for index, layer in enumerate(self.layers):
            self.names.check({f"{self.family.layer(index)}.{name}" for name in layer.state_dict()}, index)

    def embed(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        """Input of the first layer, float32 [blocks, tokens, hidden], for ids int64 [blocks, tokens]."""
        table = self.checkpoint.read(self.names.stored_name(f"{self.family.embedding}.weight"))
        states = torch.empty(*ids.shape, self.meta_model.config.hidden_size, device=self.device) if out is None else out
        step = max(1, BATCH_TOKENS // ids.shape[1])
        for start in range(0, len(ids), step):
            states[start : start + step] = self.meta_model.embed(ids[start : start + step], table)
        return states

    def extra_inputs(self, ids: Tensor) -> ExtraInputs:
        """What layers read beside hidden states, before the first one, for ids int64 [blocks, tokens]."""
        if self._per_layer is None:
            return ExtraInputs(None)
        self._per_layer.add(ids)
        return ExtraInputs(ids)

    def last_states(self, ids: Tensor, step: Callable[[int], object] = lambda _: None) -> Tensor:
        """Run ids int64 [blocks, tokens] through the model with one layer in memory at a time.

        Args:
            ids: Token ids.
            step: Called with the number of layers done, after each.

        Returns:
            Output of the last layer, float32 [blocks, tokens, hidden].
        """
        states, extra = self.embed(ids), self.extra_inputs(ids)
        for index in range(len(self.layers)):
            with self.open(index) as block:
                block.run(states, in_place=True, extra=extra)
            step(index + 1)
        return states

    def logits(self) -> Callable[[Tensor], Tensor]:
        """A function from the last layer's output [blocks, tokens, hidden] to logits; it holds the head in float32."""
        self.meta_model.put(self._outer(lambda tensor: tensor.to(self.device, torch.float32)))
        return self.meta_model.logits

    def logits_by_slices(self, states: Tensor, size: int) -> Iterator[Tensor]:
        """Logits of `size` tokens of the vocabulary after another, float32 [blocks, tokens, size].

        Peak memory: the head in its dtype on disk, and one slice of it and of the logits in float32.
        """
        outer = self._outer(lambda tensor: tensor)
        for start in range(0, len(outer[f"{self.family.head}.weight"]), size):
            self.meta_model.put(outer, vocabulary=slice(start, start + size))
            yield self.meta_model.logits(states)

    def _outer(self, convert: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The tensors that `MetaModel.put` takes, each converted when it has been read."""
        embedding, head = f"{self.family.embedding}.weight", f"{self.family.head}.weight"
        shapes = self.meta_model.outer
        wanted = shapes.keys() - {embedding, *self.meta_model.per_layer}
        outer = {name: convert(self.names.read(name, shapes[name])) for name in sorted(wanted)}
        if head not in outer:
            outer[head] = convert(self.names.read(embedding, shapes[embedding]))
        return outer

    def call(
        self,
        index: int,
        module: nn.Module,
        states: Tensor,
        tensors: Mapping[str, Tensor] | None = None,
        extra: ExtraInputs | None = None,
    ) -> Tensor:
        """Output of a layer, or of a module in it, for hidden states [blocks, tokens, hidden] of its dtype.

        Args:
            index: Which decoder layer.
            module: The layer or the module.
            states: Hidden states, on any device.
            tensors: Instead of the module's parameters, by name in the module; None: its own.
            extra: What the layer reads beside the hidden states of these blocks; receives what it has for later ones.
                None for a model whose layers read nothing else.
        """
        part = states.to(self.device)
        accepted = signature(module.forward).parameters
        blocks, tokens = part.shape[:2]
        given = self.meta_model.arguments(blocks, tokens, part.dtype)[index]
        given = given | self._extra(index, ExtraInputs(None) if extra is None else extra, part.dtype)
        arguments = {name: value for name, value in given.items() if name in accepted}
        known = dict(arguments.get(SHARED, {}))
        if tensors is None:
            with refusing(self.meta_model.where):
                result = module(part, **arguments)
        else:  # autograd may call this again, and end it by an exception of its own
            result = functional_call(module, dict(tensors), (part,), arguments)
        if extra is not None and self.meta_model.shares:
            extra.found = {name: t for name, t in arguments.get(SHARED, {}).items() if t is not known.get(name)}
            extra.shared |= extra.found
        result = result[0] if isinstance(result, tuple) else result
        return result.view(part.shape)  # type: ignore[no-any-return]

    def _extra(self, index: int, extra: ExtraInputs, dtype: torch.dtype) -> Arguments:
        """A layer's further keyword arguments."""
        shared = {name: tuple(t.to(self.device) for t in tensors) for name, tensors in extra.shared.items()}
        if self._per_layer is None:
            return {SHARED: shared}
        assert extra.ids is not None
        return {SHARED: shared, "per_layer_input": self._per_layer.of(index, extra.ids).to(dtype)}

    @contextmanager
    def open(self, index: int, stored: Mapping[str, Tensor] | None = None) -> Iterator[Block]:
        """Load a layer while the context is open; meanwhile the checkpoint's next one is read ahead.

        Args:
            index: Which decoder layer.
            stored: Tensors of the quantized layer by name in the checkpoint; None loads the checkpoint's own.
        """
        block = Block(self, index, stored)
        try:
            with self.checkpoint.reading_ahead(self.names.of_layer(index + 1) if stored is None else ()):
                yield block
        finally:
            block.module.to("meta")
            give_memory_back()


class Block:
    """One decoder layer in float32."""

    def __init__(self, blocks: Blocks, index: int, stored: Mapping[str, Tensor] | None = None) -> None:
        self._blocks, self.index = blocks, index
        self.module: nn.Module = blocks.layers[index]
        self.groups = blocks.meta_model.groups(index)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self.module.state_dict().items()}
        self.device, self._prefix = blocks.device, blocks.family.layer(index) + "."
        self._widest = max(size for shape in blocks.meta_model.shapes(index).values() for size in shape)
        if stored is not None:
            self.module.float().to_empty(device=blocks.device).requires_grad_(False)
        blocks.meta_model.fill_constants(self.module.modules())
        if stored is None:
            self.reload()
        else:
            self.load_stored(stored)

    def reload(self) -> None:
        """Load the checkpoint's weights. Raises CheckpointError for a bad tensor, see `TensorNames.read`."""
        self._blocks.names.check({self._prefix + name for name in self._shapes}, self.index)
        for name in self._shapes:  # each in place of the old one: never a second copy of the layer
            self.restore(name)

    def restore(self, name: str) -> None:
        """Load one tensor of the layer from the checkpoint."""
        self._set(name, self._blocks.names.read(self._prefix + name, self._shapes[name]))

    def stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors, renamed from names in the layer to names in the checkpoint."""
        return {self._blocks.names.stored_name(self._prefix + name): tensor for name, tensor in tensors.items()}

    def load_stored(self, stored: Mapping[str, Tensor]) -> None:
        """Load and dequantize a quantized layer. `stored`: its tensors by name in the checkpoint."""
        for name in self._shapes:
            owner, _, kind = name.rpartition(".")
            packed = self.stored(dict.fromkeys((f"{owner}.{k}" for k in PACKED), torch.empty(0)))
            if kind == "weight" and packed.keys() <= stored.keys():
                self.load_packed(owner, *(stored[key] for key in packed))
            else:
                (key,) = self.stored({name: torch.empty(0)})
                self._set(name, stored[key])

    def cast(self, dtype: torch.dtype) -> None:
        """Convert the layer, except router biases (EXACT), to another computation dtype."""
        for name, parameter in self.module.named_parameters():
            if not name.endswith(EXACT):
                parameter.data = parameter.data.to(dtype)

    def load_packed(self, linear: str, qweight: Tensor, scales: Tensor, qzeros: Tensor) -> None:
        """Replace a linear's weight with dequantized AWQ integers, of the shapes that `to_gemm` returns."""
        integers = from_gemm(*(tensor.to(self.device) for tensor in (qweight, scales, qzeros)))
        weight = self.weight(linear)
        for start in range(0, len(weight), step := max(1, BATCH_VALUES // weight.shape[1])):
            part = slice(start, start + step)
            weight[part] = integers.rows(part).dequantize()

    def fold(self, folding: Folding) -> None:
        """Fold scales into the layer's weights; its function stays the same."""
        for name, parameter in self.module.named_parameters():
            parameter.data = folding.apply(name, parameter.data)

    def _set(self, name: str, tensor: Tensor) -> None:
        owner, _, kind = name.rpartition(".")
        owner_module = self.module.get_submodule(owner)
        old = getattr(owner_module, kind)
        kept = old.device.type == torch.device(self.device).type and old.dtype == torch.float32
        tensor = tensor.to(self.device)  # in 16 bits, and converted there
        if kept and old.shape == tensor.shape:
            old.data.copy_(tensor)  # in place: a second copy would be large
            return
        tensor = tensor.to(self.device, torch.float32, copy=True)
        is_parameter = kind in owner_module._parameters
        setattr(owner_module, kind, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)

    def weight(self, name: str) -> Tensor:
        """The weight, float32, of a linear [out, in] or a norm [hidden] in this layer; not a copy."""
        parameter = self.module.get_submodule(name).weight
        assert isinstance(parameter, nn.Parameter)
        return parameter.data

    @torch.no_grad()
    def run(self, states: Tensor, in_place: bool = False, extra: ExtraInputs | None = None) -> Tensor:
        """Output of the layer for hidden states [blocks, tokens, hidden], both in its dtype; a few blocks at a time.

        in_place: The states are replaced, and what later layers read is added to `extra`.
        """
        return self._run(self.module, states, states if in_place else torch.empty_like(states), extra)

    @torch.no_grad()
    def inspect(self, name: str, inputs: Tensor, extra: ExtraInputs | None = None) -> Tensor:
        """Output of a module (attention, MLP; "": the layer) for inputs float32 [blocks, tokens, hidden]."""
        return self._run(self.module.get_submodule(name), inputs, torch.empty_like(inputs), extra)

    @torch.no_grad()
    def run_until_captured(
        self, states: Tensor, hooks: Mapping[str, InputHook], extra: ExtraInputs | None = None
    ) -> None:
        """Run hidden states only for the hooks: each batch stops once every hook has been called."""
        waiting: set[str] = set()

        def last(name: str, hook: InputHook) -> Callable[[Tensor], None]:
            def look(x: Tensor) -> None:
                hook(x)
                waiting.discard(name)
                if not waiting:
                    raise _AllCaptured

            return look

        with self.input_hooks({name: last(name, hook) for name, hook in hooks.items()}):
            for part in self._batches(states):
                waiting.update(hooks)
                with suppress(_AllCaptured):
                    self._call(self.module, states[part], None if extra is None else extra.part(part))

    def _run(self, module: nn.Module, states: Tensor, out: Tensor, extra: ExtraInputs | None) -> Tensor:
        for part in self._batches(states):
            some = None if extra is None else extra.part(part)
            out[part] = self._call(module, states[part], some)
            if out is states and extra is not None and some is not None:
                extra.keep(part, len(states), some.found)
        return out

    def _batches(self, states: Tensor) -> Iterator[slice]:
        blocks, tokens = states.shape[:2]
        step = max(1, min(BATCH_TOKENS, BATCH_VALUES // self._widest) // tokens)
        yield from (slice(start, start + step) for start in range(0, blocks, step))

    def _call(self, module: nn.Module, states: Tensor, extra: ExtraInputs | None) -> Tensor:
        return self._blocks.call(self.index, module, states, extra=extra)

    @contextmanager
    def input_hooks(self, hooks: Mapping[str, InputHook]) -> Iterator[None]:
        """While open, call each hook with the input of the module of that name whenever it runs."""

        def pre_hook(hook: InputHook) -> Callable[..., None]:
            def look(_: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
                hook(args[0] if args else kwargs["hidden_states"])

            return look

        handles = [
            self.module.get_submodule(name).register_forward_pre_hook(pre_hook(hook), with_kwargs=True)
            for name, hook in hooks.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def output_modules(self, linears: Iterable[str], extra: ExtraInputs | None = None) -> dict[str, OutputModule]:
        """By linear, the module that returns its output and does nothing else, if one does.

        Found by running a single token; `extra`: what the layer reads besides hidden states, of some blocks.
        """
        seen: dict[str, list[Any]] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda _module, _args, output: seen.setdefault(name, []).append(output)

        around = {name: name.rpartition(".")[0] for name in linears if "." in name}
        handles = [
            self.module.get_submodule(name).register_forward_hook(keep(name)) for name in {*around, *around.values()}
        ]
        try:
            one = ExtraInputs(None) if extra is None else extra.first_token()
            self._call(self.module, torch.zeros(1, 1, self._blocks.meta_model.config.hidden_size), one)
        finally:
            for handle in handles:
                handle.remove()
        found = {}
        for name, module in around.items():
            if one.found and SHARED in signature(self.module.get_submodule(module).forward).parameters:
                continue  # it also computes keys and values for later layers
            outputs, results = seen.get(name, []), seen.get(module, [])
            if len(outputs) == len(results) == 1:
                result, nones = results[0], None
                if isinstance(result, tuple) and all(other is None for other in result[1:]):
                    result, nones = result[0], result[1:]
                if result is outputs[0]:
                    found[name] = OutputModule(module, nones)
        return found

    @contextmanager
    def replaying(self, outputs: Mapping[OutputModule, Iterator[Tensor]]) -> Iterator[None]:
        """While open, these modules do not run: each returns the next of its recorded outputs."""

        def forward(ending: OutputModule, pieces: Iterator[Tensor]) -> Callable[..., Any]:
            return lambda *_, **__: ending.output(next(pieces))

        modules = {self.module.get_submodule(ending.module): forward(ending, p) for ending, p in outputs.items()}
        for module, instead in modules.items():
            module.forward = instead
        try:
            yield
        finally:
            for module in modules:
                del module.forward
