"""Whether a model has room on this machine, in 16 bits and in INT4, before it is downloaded or loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from squawq.backends.devices import check_device, pick_device
from squawq.engine.capacity import free_memory
from squawq.errors import ConfigError
from squawq.inspection import inspect


@dataclass(frozen=True)
class Form:
    """A model in 16 bits or in INT4.

    Attributes:
        weights: Bytes of the weights.
        needed: Bytes of weights, KV cache and workspace together.
        fits: There is room for it.
    """

    weights: int
    needed: int
    fits: bool


@dataclass(frozen=True)
class Fitting:
    """What a model needs and what is free.

    Attributes:
        context: Tokens of the KV cache that is counted.
        free: Bytes of the device, or of each GPU.
        dense: In 16 bits.
        int4: As stored, if it is quantized, or as squawq would store it.
    """

    device: str
    context: int
    free: int
    dense: Form
    int4: Form


def fitting(model: Path, device: str = "auto", *, exact: bool = False, gpus: int = 1) -> Fitting:
    """Compare what a model needs, by `inspection` and `capacity`, with the free memory.

    Args:
        model: A folder with weights, or a config.json.
        device: Where it would run.
        exact: As in EngineConfig; "auto" is then the CPU.
        gpus: That share the model.

    Raises:
        SquawqError: The model is damaged, or there is no such device.
    """
    device = pick_device(device, exact=exact)
    check_device(device)
    on_gpu = device.startswith("cuda")
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else free_memory()
    found = inspect(model, device_memory=max(1, free) if on_gpu else None)
    memory, forms = found["memory"], {}
    for name in ("fp16", "int4"):
        weights, needed = memory[name]["weights"], memory[name]["total"]
        fits = needed <= free
        if on_gpu and name in found["devices"]:
            row = next((row for row in found["devices"][name] if row["size"] == gpus), None)
            if row is None:
                sizes = ", ".join(str(row["size"]) for row in found["devices"][name])
                raise ConfigError(f"tensor_parallel_size is {gpus}; this model can take {sizes}")
            needed, fits = row["weights"] + row["steps"] + memory[name]["kv_cache"] // gpus, row["fits"]
        forms[name] = Form(weights, needed, fits)
    return Fitting(device, memory["context"], free, forms["fp16"], forms["int4"])
