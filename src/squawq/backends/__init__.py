"""The registry of device backends, imported when they are needed. `base.py` says what a backend is."""

from __future__ import annotations

from importlib import import_module

import torch

from squawq.backends.base import Backend
from squawq.errors import KernelError

REFERENCE = "reference"
BACKENDS = {  # name -> module:class, in order of preference
    "cpu": "squawq.backends.cpu.backend:CpuBackend",
    "cuda": "squawq.backends.cuda.backend:CudaBackend",
    REFERENCE: "squawq.backends.reference:Reference",
}


def backend_class(name: str) -> type[Backend]:
    """The class of one of BACKENDS."""
    module, _, kind = BACKENDS[name].partition(":")
    found: type[Backend] = getattr(import_module(module), kind)
    return found


def backend_for(device: str | torch.device, name: str | None = None, *, exact: bool = False, **dtypes: str) -> Backend:
    """The first backend that runs on a device, or the one named.

    Args:
        device: "cpu", "cuda:1" ...
        name: One of BACKENDS, or None.
        exact: Compute 4-bit products in float32.
        **dtypes: `dtype` and `kv_cache_dtype`, see Backend.

    Raises:
        ConfigError: The backend does not have that dtype.
        KernelError: No backend runs there; it lists why each one declined.
    """
    if name is not None and name not in BACKENDS:
        raise KernelError(f"backend is {name!r}; choose one of {', '.join(BACKENDS)}")
    device, refusals = torch.device(device), []
    for candidate in BACKENDS if name is None else (name,):
        found = backend_class(candidate)
        reason = found.declines(device)
        if reason is None and exact and not found.computes_exactly:
            reason = "it has no float32 activations"
        if reason is None:
            return found(device, exact=exact, **dtypes)
        refusals.append(f"{candidate}: {reason}")
    raise KernelError(f"no backend runs on {device}; tried {'; '.join(refusals)}")
