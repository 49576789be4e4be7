"""The one door to transformers' modelling code: one decoder layer materialized, run and dropped.

The model is built on the meta device, which costs nothing; `Block` fills one layer from the checkpoint in
float32. Peak memory: one layer.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from squawq.errors import CheckpointError
from squawq.families import Family
from squawq.format.reader import Checkpoint
from squawq.quantization.statistics import all_finite

BATCH_TOKENS = 4096


class Blocks:
    """The decoder layers of a checkpoint, opened one at a time."""

    def __init__(self, checkpoint: Checkpoint, family: Family, device: str) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.checkpoint, self.family, self.device = checkpoint, family, device
        try:
            config = AutoConfig.from_pretrained(checkpoint.folder)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        except Exception as error:  # transformers raises many kinds for a config.json that it cannot use
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise CheckpointError(f"{checkpoint.folder / 'config.json'}: transformers refuses it: {reason}") from error
        self.config = model.config
        base = model.get_submodule(family.layers.rpartition(".")[0])
        self.layers = base.get_submodule(family.layers.rpartition(".")[2])
        self.rotary = type(base.rotary_emb)(config=config).to(device)

    def shapes(self, index: int) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of a layer's linears, as the architecture has them."""
        layer = self.layers.get_submodule(str(index))
        found = {}
        for name in self.family.linears:
            weight = layer.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            found[name] = (weight.shape[0], weight.shape[1])
        return found

    def embed(self, ids: Tensor) -> Tensor:
        """float32 [blocks, tokens, hidden] of ids int64 [blocks, tokens]."""
        table = self.checkpoint.read(f"{self.family.embedding}.weight")
        return nn.functional.embedding(ids, table).to(self.device, torch.float32)

    @contextmanager
    def open(self, index: int) -> Iterator[Block]:
        """Layer `index` with its weights; gone when the context ends."""
        block = Block(self, index)
        try:
            yield block
        finally:
            block.module.to("meta")
            self.checkpoint.close()
            _give_memory_back()


class Block:
    """One decoder layer in float32."""

    def __init__(self, blocks: Blocks, index: int) -> None:
        self._blocks, self.index = blocks, index
        self.module: nn.Module = blocks.layers.get_submodule(str(index))
        self.reload()

    def reload(self) -> None:
        """Fill the layer with the checkpoint's weights. Raises CheckpointError naming a missing, surplus, misshapen or
        non-finite tensor."""
        checkpoint = self._blocks.checkpoint
        prefix = self._blocks.family.layer(self.index) + "."
        expected = {name: tuple(t.shape) for name, t in self.module.state_dict().items()}
        stored = {n[len(prefix) :] for n in checkpoint.tensors if n.startswith(prefix) and "rotary_emb" not in n}
        if surplus := sorted(stored - set(expected)):
            file = checkpoint.info(prefix + surplus[0]).file
            raise CheckpointError(f"{file}: tensor {prefix + surplus[0]!r} does not belong to this architecture")
        state = {}
        for name, shape in expected.items():
            state[name] = read_finite(checkpoint, prefix + name, shape).to(
                self._blocks.device, torch.float32, copy=True
            )
        self.module.load_state_dict(state, strict=True, assign=True)
        checkpoint.close()

    def weight(self, name: str) -> Tensor:
        """The weight (linear [out, in] or norm) of a module in this layer."""
        return self.parameter(name).data

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter behind `weight`; setting its `data` changes the layer."""
        parameter = self.module.get_submodule(name).weight
        assert isinstance(parameter, nn.Parameter)
        return parameter

    def state(self) -> dict[str, Tensor]:
        """All tensors of the layer by their names in it."""
        return dict(self.module.state_dict())

    def _arguments(self, tokens: int) -> dict[str, Any]:
        positions = torch.arange(tokens, device=self._blocks.device)[None]
        sample = torch.empty(1, tokens, 1, device=self._blocks.device)
        window = self._blocks.checkpoint.config.window(self.index)
        mask = None
        if window is not None and window < tokens:
            from transformers.masking_utils import create_sliding_window_causal_mask

            cache = None  # by its place: transformers 5.24 gave it another name
            mask = create_sliding_window_causal_mask(self._blocks.config, sample, None, cache, positions)
        return {"position_embeddings": self._blocks.rotary(sample, positions), "attention_mask": mask}

    @torch.no_grad()
    def run(self, states: Tensor, in_place: bool = False) -> Tensor:
        """Hidden states [blocks, tokens, hidden] through the layer, a few blocks at a time."""
        return self._run(self.module, states, states if in_place else torch.empty_like(states))

    @torch.no_grad()
    def inspect(self, name: str, inputs: Tensor) -> Tensor:
        """Output of one module of the layer (attention or MLP) for its own inputs [blocks, tokens, hidden]."""
        return self._run(self.module.get_submodule(name), inputs, torch.empty_like(inputs))

    def _run(self, module: nn.Module, states: Tensor, out: Tensor) -> Tensor:
        accepted = signature(module.forward).parameters
        arguments = {k: v for k, v in self._arguments(states.shape[1]).items() if k in accepted}
        step = max(1, BATCH_TOKENS // states.shape[1])
        for start in range(0, len(states), step):
            result = module(states[start : start + step], **arguments)
            out[start : start + step] = result[0] if isinstance(result, tuple) else result
        return out

    @contextmanager
    def watching(self, watchers: dict[str, Callable[[Tensor], None]]) -> Iterator[None]:
        """While open, each named module's watcher sees that module's input whenever it runs."""

        def hook(watch: Callable[[Tensor], None]) -> Callable[..., None]:
            return lambda _, args, kwargs: watch(args[0] if args else kwargs["hidden_states"])

        handles = [
            self.module.get_submodule(name).register_forward_pre_hook(hook(watch), with_kwargs=True)
            for name, watch in watchers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def read_finite(checkpoint: Checkpoint, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """A tensor that holds no NaN or infinity. Raises CheckpointError naming file and tensor."""
    tensor = checkpoint.read(name, shape)
    if not tensor.dtype.is_floating_point:
        raise CheckpointError(
            f"{checkpoint.info(name).file}: tensor {name!r} is {tensor.dtype}; floating point is needed"
        )
    if not all_finite(tensor):
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        raise CheckpointError(f"{checkpoint.info(name).file}: tensor {name!r} holds {bad} values that are not finite")
    return tensor


def _give_memory_back() -> None:
    """glibc keeps freed arenas; without this the process grows with every layer."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):  # musl has neither
            return
