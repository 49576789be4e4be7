"""Which devices can be used here."""

from __future__ import annotations

import torch

from squawq.errors import ConfigError


def check_device(device: str, *, mps: bool = False) -> None:
    """Raises ConfigError, with the choices, for a device that is not there: cpu, cuda, cuda:1 ...

    mps: Apple's GPU will do as well.
    """
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    choices = ["cpu", *(["cuda"] if cuda else []), *cuda]
    if mps and torch.backends.mps.is_available():
        choices.append("mps")
    if device not in choices:
        raise ConfigError(f"device {device!r} is not there; choose one of {', '.join(choices)}")
