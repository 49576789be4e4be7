"""Mixture-of-experts layers whose experts are separate linears, under the names that AWQ checkpoints give them.

transformers 5 stacks all experts of a layer in two three-dimensional parameters; `Experts` replaces that module and has
the same call signature. The router stays transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from squawq.errors import CheckpointError
from squawq.format.reader import Checkpoint

Gating = Callable[[Tensor, Tensor], Tensor]
# gate, up and down projection, as Qwen's and Mixtral's checkpoints name them
STACKED = ("gate_up_proj", "down_proj")  # parameters that stack all experts of a layer; gate before up
EITHER_WAY = ("qwen3_vl_moe_text",)  # families whose checkpoints stack weights as [in, out] or as [out, in]
SPELLINGS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


def is_stacked(module: nn.Module) -> bool:
    """Whether all experts of the layer are stacked in two parameters, as in transformers."""
    parts = [module._parameters.get(name) for name in STACKED]
    return all(part is not None and part.dim() == 3 for part in parts)


def is_transposed(module: Any) -> bool:
    """Whether stacked weights are [experts, in, out], as Llama 4 has them, instead of [experts, out, in]."""
    return bool(module.gate_up_proj.shape[1] == module.down_proj.shape[2])


def is_turned(checkpoint: Checkpoint, name: str, shape: tuple[int, int]) -> bool:
    """Whether the checkpoint stacks weights of `shape` [out, in] as [experts, in, out].

    Qwen3-VL-MoE's published checkpoints do, those that transformers 5 saves do not; it tells them by the shape.
    """
    stored = checkpoint.info(name).shape[1:]
    return checkpoint.config.model_type in EITHER_WAY and stored == shape[::-1] != shape


def stacked_sizes(module: Any) -> tuple[int, int, int]:
    """(experts, hidden, inner) of stacked weights."""
    experts, hidden, inner = module.down_proj.shape
    return (experts, inner, hidden) if is_transposed(module) else (experts, hidden, inner)


def is_interleaved(module: nn.Module) -> bool:
    """Whether gate and up rows alternate in stacked weights that have biases, as in gpt-oss."""
    return "gate_up_proj_bias" in module._parameters


def gating(module: Any) -> Gating:
    """What stacked experts compute of gate and up: act(gate) * up, or as the architecture's own function has it."""
    if is_interleaved(module):
        return lambda gate, up: module._apply_gate(torch.stack((gate, up), -1).flatten(-2))
    return lambda gate, up: module.act_fn(gate) * up


class Expert(nn.Module):
    """One expert: down(gated(gate(x), up(x))). linears: gate, up and down by their names."""

    def __init__(self, linears: Mapping[str, nn.Module], gated: Gating) -> None:
        super().__init__()
        self.names = tuple(linears)
        for name, linear in linears.items():
            self.add_module(name, linear)
        self._gated = gated

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in self.names)
        y: Tensor = down(self._gated(gate(x), up(x)))
        return y


class Experts(nn.ModuleList):
    """The experts of one layer, called as transformers calls its own."""

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__(experts)
        self.num_experts, self.names = len(experts), experts[0].names

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """Weighted sum of each token's experts, in float32, in the order of the experts.

        Args:
            hidden_states: [tokens, hidden]; without an index, as Llama 4 calls: [experts * tokens, hidden], one part
                per expert, zero where the token is not routed to it.
            top_k_index: int64 [tokens, k]. An index past the last expert belongs to another process and is skipped.
            top_k_weights: [tokens, k].

        Returns:
            As hidden_states, in shape and dtype.
        """
        if top_k_index is None or top_k_weights is None:
            return self._each_its_own(hidden_states)
        total = torch.zeros_like(hidden_states, dtype=torch.float32)
        for index in sorted(set(top_k_index.flatten().tolist())):
            if index < self.num_experts:
                token, place = torch.where(top_k_index == index)
                y = self[index](hidden_states[token]) * top_k_weights[token, place, None]
                total.index_add_(0, token, y.float())
        return total.to(hidden_states.dtype)

    def _each_its_own(self, hidden_states: Tensor) -> Tensor:
        found = []
        for expert, inputs in zip(self, hidden_states.chunk(self.num_experts), strict=True):
            token = torch.where((inputs != 0).any(-1))[0]
            y = torch.zeros_like(inputs)
            found.append(y.index_put((token,), expert(inputs[token])) if len(token) else y)
        return torch.cat(found)


def expert_names(
    path: str, experts: int, stored: Collection[str], integers: str = "qweight"
) -> tuple[str, str, str] | None:
    """Names of the gate, up and down projections of the quantized experts under `path`; None if they are unquantized.

    integers: The tensor that tells a quantized linear.

    Raises CheckpointError, naming the first missing tensor, if some or all experts are missing.
    """
    for names in SPELLINGS:
        needed = [f"{path}.{e}.{name}.{integers}" for e in range(experts) for name in names]
        missing = [name for name in needed if name not in stored]
        if len(missing) < len(needed):
            if missing:
                raise CheckpointError(f"tensor {missing[0]!r} is missing, one of {len(missing)} expert tensors")
            return names
    if not any(name.startswith(path + ".") for name in stored):
        raise CheckpointError(f"the experts {path!r} are missing")
    return None
