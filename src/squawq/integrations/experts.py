"""Finds the quantized experts of an AWQ checkpoint and how it names them.

transformers 5 stacks all experts of a layer in two parameters, and an AWQ checkpoint stores one linear per expert;
`nn/experts.py` has the module that replaces them.
"""

from __future__ import annotations

from collections.abc import Collection

from squawq.errors import CheckpointError

# gate, up and down projection, as Qwen's and Mixtral's checkpoints name them
SPELLINGS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


def expert_names(path: str, experts: int, stored: Collection[str]) -> tuple[str, str, str] | None:
    """Names of the gate, up and down projections of the quantized experts under `path`; None if they are unquantized.

    Raises:
        CheckpointError: some or all experts are missing; it names the first missing tensor.
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
