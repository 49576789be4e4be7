"""Mixture-of-experts layers whose experts are 4-bit linears, one by one, as AutoAWQ writes them.

transformers 5 keeps all experts of a layer in two three-dimensional parameters, for which an AWQ checkpoint has no
tensors; a layer of this kind is replaced by `AwqExperts`, whose names are the checkpoint's. The router stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from squawq.errors import CheckpointError

# gate, up and down projection, as Qwen's and Mixtral's checkpoints name them
SPELLINGS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


def is_stacked(module: nn.Module) -> bool:
    """Whether this is transformers' form: every expert of a layer in two parameters."""
    parts = [module._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
    return all(part is not None and part.dim() == 3 for part in parts)


def expert_names(path: str, experts: int, stored: Collection[str]) -> tuple[str, str, str] | None:
    """How the quantized experts under `path` are spelled; None where the checkpoint has them unquantized.

    Raises CheckpointError naming what is missing where it has only some of them, or none.
    """
    for names in SPELLINGS:
        needed = [f"{path}.{e}.{name}.qweight" for e in range(experts) for name in names]
        missing = [name for name in needed if name not in stored]
        if len(missing) < len(needed):
            if missing:
                raise CheckpointError(f"tensor {missing[0]!r} is missing, one of {len(missing)} expert tensors")
            return names
    if not any(name.startswith(path + ".") for name in stored):
        raise CheckpointError(f"the experts {path!r} are missing")
    return None


class Expert(nn.Module):
    """One expert: down(act(gate(x)) * up(x))."""

    def __init__(self, linears: Mapping[str, nn.Module], act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.names = tuple(linears)
        for name, linear in linears.items():
            self.add_module(name, linear)
        self._act = [act]  # a list: an activation shared by all experts is no module of each

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in self.names)
        y: Tensor = down(self._act[0](gate(x)) * up(x))
        return y


class AwqExperts(nn.ModuleList):
    """The experts of one layer, called as transformers calls its own."""

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__(experts)
        self.num_experts, self.names = len(experts), experts[0].names

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden]; top_k_index and top_k_weights [tokens, k]. An index past the last expert
        is one of another process: no part of the sum here. Sums in float32, in the order of the experts."""
        total = torch.zeros_like(hidden_states, dtype=torch.float32)
        for index in sorted(set(top_k_index.flatten().tolist())):
            if index < self.num_experts:
                token, place = torch.where(top_k_index == index)
                y = self[index](hidden_states[token]) * top_k_weights[token, place, None]
                total.index_add_(0, token, y.float())
        return total.to(hidden_states.dtype)
