"""The layers of a checkpoint, one materialized, run and dropped at a time: transformers' modules with stored weights.

`Block` fills a layer in float32, from a 16-bit checkpoint or a quantized one. Peak memory: one layer.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from squawq.families import Family
from squawq.format.packing import PACKED, from_gemm
from squawq.format.reader import Checkpoint
from squawq.layerwise.fold import Folding
from squawq.layerwise.meta_model import Skeleton, refusing
from squawq.layerwise.tensor_names import Places, check_floating

BATCH_TOKENS = 4096
BATCH_VALUES = 1 << 25  # of the widest tensor within a layer, while a batch runs through it
EXACT = ("correction_bias", "expert_bias")  # of routers: rounding them would change who is chosen


class _SeenEnough(BaseException):
    """Whatever was to be watched in this batch has been."""


@dataclass(frozen=True)
class Ending:
    """A module of a layer that gives out what its last linear does: alone, or first in a tuple of Nones."""

    module: str
    nones: tuple[None, ...] | None = None

    def output(self, tensor: Tensor) -> Any:
        """What the module gives out where its last linear does `tensor`."""
        return tensor if self.nones is None else (tensor, *self.nones)


class Blocks:
    """The decoder layers of a checkpoint, opened one at a time, and what is outside them."""

    def __init__(self, checkpoint: Checkpoint, family: Family, device: str) -> None:
        self.checkpoint, self.family, self.device = checkpoint, family, device
        self.skeleton = Skeleton(checkpoint.config.raw, str(checkpoint.folder / "config.json"), family, device)
        self.layers = self.skeleton.layers
        self.places = Places(checkpoint, self.skeleton)

    def check(self) -> None:
        """Raises CheckpointError for a tensor that is missing, misshapen outside the layers, not of floating point, or
        without a place."""
        self.places.check(self.skeleton.outer)
        for name, shape in self.skeleton.outer.items():
            if name in self.places.names:
                self.checkpoint.check_shape(self.places.names[name], shape)
        for name in self.places.written:
            check_floating(self.checkpoint, name)
        for index, layer in enumerate(self.layers):
            self.places.check({f"{self.family.layer(index)}.{name}" for name in layer.state_dict()}, index)

    def embed(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        """What the first layer is given, float32 [blocks, tokens, hidden], for ids int64 [blocks, tokens]."""
        table = self.checkpoint.read(self.places.stored(f"{self.family.embedding}.weight"))
        states = torch.empty(*ids.shape, self.skeleton.config.hidden_size, device=self.device) if out is None else out
        step = max(1, BATCH_TOKENS // ids.shape[1])
        for start in range(0, len(ids), step):
            states[start : start + step] = self.skeleton.embed(ids[start : start + step], table)
        return states

    def logits(self) -> Callable[[Tensor], Tensor]:
        """A function from the last layer's output [blocks, tokens, hidden] to logits; it holds the head in float32."""
        embedding, head = f"{self.family.embedding}.weight", f"{self.family.head}.weight"
        shapes = self.skeleton.outer
        outer = {n: self.places.read(n, s).to(self.device, torch.float32) for n, s in shapes.items() if n != embedding}
        if head not in outer:
            outer[head] = self.places.read(embedding, shapes[embedding]).to(self.device, torch.float32)
        self.skeleton.put(outer)
        return self.skeleton.logits

    @contextmanager
    def open(self, index: int, stored: Mapping[str, Tensor] | None = None) -> Iterator[Block]:
        """Layer `index` with its weights; gone when the context ends. stored: those of the quantized layer, by their
        names on disk, in place of the checkpoint's."""
        block = Block(self, index, stored)
        try:
            yield block
        finally:
            block.module.to("meta")
            _give_memory_back()


class Block:
    """One decoder layer in float32."""

    def __init__(self, blocks: Blocks, index: int, stored: Mapping[str, Tensor] | None = None) -> None:
        self._blocks, self.index = blocks, index
        self.module: nn.Module = blocks.layers[index]
        self.groups = blocks.skeleton.groups(index)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self.module.state_dict().items()}
        self.device, self._prefix = blocks.device, blocks.family.layer(index) + "."
        self._widest = max(size for shape in blocks.skeleton.shapes(index).values() for size in shape)
        if stored is not None:
            self.module.float().to_empty(device=blocks.device).requires_grad_(False)
        blocks.skeleton.fill_constants(self.module)
        if stored is None:
            self.reload()
        else:
            self.fill(stored)

    def reload(self) -> None:
        """Fill the layer with the checkpoint's weights. Raises CheckpointError naming a missing, surplus, misshapen or
        non-finite tensor."""
        self._blocks.places.check({self._prefix + name for name in self._shapes}, self.index)
        for name in self._shapes:  # each in place of the old one: never a second copy of the layer
            self.restore(name)

    def restore(self, name: str) -> None:
        """Fill one tensor of the layer with the checkpoint's."""
        self._set(name, self._blocks.places.read(self._prefix + name, self._shapes[name]))

    def stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the layer, or of its quantized linears, by what they are called on disk."""
        return {self._blocks.places.stored(self._prefix + name): tensor for name, tensor in tensors.items()}

    def fill(self, stored: Mapping[str, Tensor]) -> None:
        """Fill the layer with a quantized one's tensors as they lie on disk."""
        for name in self._shapes:
            owner, _, kind = name.rpartition(".")
            packed = self.stored(dict.fromkeys((f"{owner}.{k}" for k in PACKED), torch.empty(0)))
            if kind == "weight" and packed.keys() <= stored.keys():
                self.put(owner, *(stored[key] for key in packed))
            else:
                (key,) = self.stored({name: torch.empty(0)})
                self._set(name, stored[key])

    def cast(self, dtype: torch.dtype) -> None:
        """Compute in another dtype from now on."""
        for name, parameter in self.module.named_parameters():
            if not name.endswith(EXACT):
                parameter.data = parameter.data.to(dtype)

    def put(self, linear: str, qweight: Tensor, scales: Tensor, qzeros: Tensor) -> None:
        """Replace a linear's weight with what packed integers stand for."""
        integers, weight = from_gemm(qweight, scales, qzeros), self.weight(linear)
        for start in range(0, len(weight), step := max(1, BATCH_VALUES // weight.shape[1])):
            part = slice(start, start + step)
            weight[part] = integers.rows(part).dequantize()

    def fold(self, folding: Folding) -> None:
        """Do to the layer's tensors what scales do to them; what it computes stays the same."""
        for name, parameter in self.module.named_parameters():
            parameter.data = folding.apply(name, parameter.data)

    def _set(self, name: str, tensor: Tensor) -> None:
        owner, _, kind = name.rpartition(".")
        holder = self.module.get_submodule(owner)
        old = getattr(holder, kind)
        if (
            old.device.type == torch.device(self.device).type
            and old.dtype == torch.float32
            and old.shape == tensor.shape
        ):
            old.data.copy_(tensor)  # large: never two of them
            return
        tensor = tensor.to(self.device, torch.float32, copy=True)
        setattr(holder, kind, nn.Parameter(tensor, requires_grad=False) if kind in holder._parameters else tensor)

    def weight(self, name: str) -> Tensor:
        """The weight (linear [out, in] or norm) of a module in this layer."""
        return self.parameter(name).data

    def parameter(self, name: str, kind: str = "weight") -> nn.Parameter:
        """The parameter behind `weight`; setting its `data` changes the layer."""
        parameter = getattr(self.module.get_submodule(name), kind)
        assert isinstance(parameter, nn.Parameter)
        return parameter

    def state(self) -> dict[str, Tensor]:
        """All tensors of the layer by their names in it."""
        return dict(self.module.state_dict())

    @torch.no_grad()
    def run(self, states: Tensor, in_place: bool = False) -> Tensor:
        """Hidden states [blocks, tokens, hidden] through the layer, a few blocks at a time."""
        return self._run(self.module, states, states if in_place else torch.empty_like(states))

    @torch.no_grad()
    def inspect(self, name: str, inputs: Tensor) -> Tensor:
        """Output of a module of the layer (attention, MLP; "": itself) for its inputs [blocks, tokens, hidden]."""
        return self._run(self.module.get_submodule(name), inputs, torch.empty_like(inputs))

    @torch.no_grad()
    def feed(self, states: Tensor, watchers: Mapping[str, Callable[[Tensor], object]]) -> None:
        """Hidden states through the layer for what `watchers` see; a batch ends when each has seen its part of it."""
        waiting: set[str] = set()

        def last(name: str, watch: Callable[[Tensor], object]) -> Callable[[Tensor], None]:
            def look(x: Tensor) -> None:
                watch(x)
                waiting.discard(name)
                if not waiting:
                    raise _SeenEnough

            return look

        with self.watching({name: last(name, watch) for name, watch in watchers.items()}):
            for part in self._batches(states):
                waiting.update(watchers)
                with suppress(_SeenEnough):
                    self._call(self.module, states[part])

    def _run(self, module: nn.Module, states: Tensor, out: Tensor) -> Tensor:
        for part in self._batches(states):
            out[part] = self._call(module, states[part])
        return out

    def _batches(self, states: Tensor) -> Iterator[slice]:
        blocks, tokens = states.shape[:2]
        step = max(1, min(BATCH_TOKENS, BATCH_VALUES // self._widest) // tokens)
        yield from (slice(start, start + step) for start in range(0, blocks, step))

    def _call(self, module: nn.Module, states: Tensor) -> Tensor:
        part = states.to(self.device)
        accepted = signature(module.forward).parameters
        blocks, tokens = part.shape[:2]
        given = self._blocks.skeleton.arguments(blocks, tokens, part.dtype)[self.index]
        with refusing(self._blocks.skeleton.where):
            result = module(part, **{name: value for name, value in given.items() if name in accepted})
        result = result[0] if isinstance(result, tuple) else result
        return result.view(part.shape)  # type: ignore[no-any-return]

    @contextmanager
    def watching(self, watchers: Mapping[str, Callable[[Tensor], object]]) -> Iterator[None]:
        """While open, each named module's watcher sees that module's input whenever it runs."""

        def hook(watch: Callable[[Tensor], object]) -> Callable[..., None]:
            def look(_: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
                watch(args[0] if args else kwargs["hidden_states"])

            return look

        handles = [
            self.module.get_submodule(name).register_forward_pre_hook(hook(watch), with_kwargs=True)
            for name, watch in watchers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def endings(self, linears: Iterable[str]) -> dict[str, Ending]:
        """Those of the linears that the module around them ends in, seen in a run of a single token."""
        seen: dict[str, list[Any]] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda _module, _args, output: seen.setdefault(name, []).append(output)

        around = {name: name.rpartition(".")[0] for name in linears if "." in name}
        handles = [
            self.module.get_submodule(name).register_forward_hook(keep(name)) for name in {*around, *around.values()}
        ]
        try:
            self._call(self.module, torch.zeros(1, 1, self._blocks.skeleton.config.hidden_size))
        finally:
            for handle in handles:
                handle.remove()
        found = {}
        for name, module in around.items():
            outputs, results = seen.get(name, []), seen.get(module, [])
            if len(outputs) == len(results) == 1:
                result, nones = results[0], None
                if isinstance(result, tuple) and all(other is None for other in result[1:]):
                    result, nones = result[0], result[1:]
                if result is outputs[0]:
                    found[name] = Ending(module, nones)
        return found

    @contextmanager
    def replacing(self, outputs: Mapping[Ending, Iterator[Tensor]]) -> Iterator[None]:
        """While open, these modules do not run: each gives out what is next of its outputs."""

        def forward(ending: Ending, pieces: Iterator[Tensor]) -> Callable[..., Any]:
            return lambda *_, **__: ending.output(next(pieces))

        modules = {self.module.get_submodule(ending.module): forward(ending, p) for ending, p in outputs.items()}
        for module, instead in modules.items():
            module.forward = instead
        try:
            yield
        finally:
            for module in modules:
                del module.forward


def _give_memory_back() -> None:
    """glibc keeps freed arenas; without this the process grows with every layer."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):  # musl has neither
            return
