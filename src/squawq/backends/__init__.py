"""Device backends, found by name and imported when they are asked for. `base.py` says what one is."""

from __future__ import annotations

from importlib import import_module

import torch

from squawq.backends.base import Backend
from squawq.errors import KernelError

REFERENCE = "reference"
BACKENDS = {  # name -> module:class, the preferred first
    "cpu": "squawq.backends.cpu.backend:CpuBackend",
    REFERENCE: "squawq.backends.reference:Reference",
}


def backend_for(device: str | torch.device, name: str | None = None, *, exact: bool = False) -> Backend:
    """The first backend that runs on a device, or the one named.

    Args:
        device: such as "cpu" or "cuda:1".
        name: one of BACKENDS; None chooses.
        exact: compute 4-bit products in float32.

    Raises:
        KernelError: no backend runs there; it lists why each declined.
    """
    if name is not None and name not in BACKENDS:
        raise KernelError(f"backend is {name!r}; choose one of {', '.join(BACKENDS)}")
    device, refusals = torch.device(device), []
    for candidate in BACKENDS if name is None else (name,):
        module, _, kind = BACKENDS[candidate].partition(":")
        found: type[Backend] = getattr(import_module(module), kind)
        reason = found.declines(device)
        if reason is None:
            return found(device, exact=exact)
        refusals.append(f"{candidate}: {reason}")
    raise KernelError(f"no backend runs on {device}; tried {'; '.join(refusals)}")
