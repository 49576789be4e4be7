"""transformers' whole model of a checkpoint: token by token with its KV cache, or as a module (`WholeModel.model`).

Either all layers stay in memory, or each is read from the checkpoint whenever it runs.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from squawq.errors import CheckpointError
from squawq.layerwise.blocks import Block, Blocks
from squawq.layerwise.extra_inputs import keep_as_stored
from squawq.layerwise.meta_model import refusing


class WholeModel:
    """A checkpoint as transformers' causal LM (`model`), with a KV cache of its own for `next_logits`.

    Peak memory: `memory`, and what the KV cache takes.

    Args:
        blocks: The checkpoint. The model is built in its modules, so they can serve nothing else afterwards.
        dtype: Of weights and computation.
        resident: Keep all layers in memory. Otherwise each is loaded in float32 when it runs, so `dtype` must be that,
            and every step reads all layers from disk.

    Raises:
        CheckpointError: A tensor is missing, of another shape, or not finite.
    """

    def __init__(self, blocks: Blocks, dtype: torch.dtype, *, resident: bool) -> None:
        assert resident or dtype == torch.float32
        self._blocks, self._cache = blocks, None
        self.model = blocks.meta_model.model
        names, family, meta_model = blocks.names, blocks.family, blocks.meta_model
        renamed = "cache" in signature(meta_model.model.base_model.forward).parameters  # in transformers 5.24
        self._cache_name = "cache" if renamed else "past_key_values"
        shapes, own = meta_model.outer, meta_model.per_layer[:1]  # far larger than the other embedding
        outer = {n: names.read(n, s).to(blocks.device, dtype) for n, s in shapes.items() if n not in own}
        for name in own:
            embedding = self.model.get_submodule(name.removesuffix(".weight"))
            keep_as_stored(embedding, names.read(name, shapes[name]).to(blocks.device), dtype)
        outer.setdefault(f"{family.head}.weight", outer[f"{family.embedding}.weight"])
        meta_model.put(outer, dtype)
        for index, layer in enumerate(blocks.layers):
            if resident:
                Block(blocks, index).cast(dtype)
            else:
                layer.forward = self._loading(index, layer)

    def _loading(self, index: int, layer: nn.Module) -> Callable[..., Any]:
        """The layer's forward, between loading its weights and dropping them."""
        own = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self._blocks.open(index):
                return own(*args, **kwargs)

        return forward

    def reset(self) -> None:
        """Empty the KV cache: the next tokens are the first of their rows."""
        self._cache = None

    @torch.no_grad()
    def next_logits(self, tokens: Tensor) -> Tensor:
        """Append a token to each row; logits of the next ones.

        Args:
            tokens: int64 [rows]; the same number of rows until `reset`.

        Returns:
            float32 [rows, vocab].
        """
        ids = tokens.to(self._blocks.device)[:, None]
        with refusing(self._blocks.meta_model.where):
            found = self.model(ids, use_cache=True, **{self._cache_name: self._cache})
        self._cache = found[self._cache_name]
        logits: Tensor = found.logits[:, -1].float()
        return logits

    @staticmethod
    def memory(blocks: Blocks, dtype: torch.dtype, *, resident: bool) -> int:
        """Bytes of the weights that are in memory at the same time, from the headers."""
        meta_model = blocks.meta_model
        own: int = sum(math.prod(meta_model.outer[name]) for name in meta_model.per_layer[:1])  # in 16 bits
        outer: int = sum(math.prod(shape) for shape in meta_model.outer.values()) - own
        layers: list[int] = [sum(t.numel() for t in layer.state_dict().values()) for layer in blocks.layers]
        return 2 * own + dtype.itemsize * (outer + (sum(layers) if resident else max(layers)))


def collect_garbage(device: str) -> None:
    """Free the memory of models that nothing holds any more: their modules refer to each other."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Sample from softmax(logits) by inversion, in float64.

    Args:
        logits: float32 [rows, vocab].
        uniform: float64 [rows], in [0, 1).

    Returns:
        int64 [rows], on the CPU.

    Raises:
        CheckpointError: A logit is NaN or infinite.
    """
    logits = logits.cpu() if logits.device.type == "mps" else logits  # which has no float64
    mass = torch.softmax(logits.double(), -1).cumsum(-1)
    if mass[:, -1].isnan().any():
        raise CheckpointError("the 16-bit model has logits that are not finite")
    below = uniform.to(mass.device)[:, None] * mass[:, -1:]
    return torch.searchsorted(mass, below, right=True)[:, 0].clamp_(max=mass.shape[1] - 1).cpu()
