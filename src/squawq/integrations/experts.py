"""Which experts of a model of transformers an AWQ checkpoint has as 4-bit linears, and how it spells them.

transformers 5 keeps all experts of a layer in two three-dimensional parameters, for which an AWQ checkpoint has no
tensors; `nn/experts.py` has what takes their place. The router stays as it is.
"""

from __future__ import annotations

from collections.abc import Collection

from squawq.errors import CheckpointError

# gate, up and down projection, as Qwen's and Mixtral's checkpoints name them
SPELLINGS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


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
