"""Device names: what "auto" means here, and a check against the devices of this machine."""

from __future__ import annotations

from typing import Any

import torch

from squawq.backends import backend_class
from squawq.errors import ConfigError


def pick_device(device: str, *, exact: bool = False) -> str:
    """The device that "auto" stands for: "cuda" where the CUDA backend runs, else "cpu". Other names stay as they are.

    exact: float32 activations, which the CUDA backend does not have: then "cpu".
    """
    if device != "auto":
        return device
    usable = not exact and torch.cuda.is_available() and backend_class("cuda").declines(torch.device("cuda")) is None
    return "cuda" if usable else "cpu"


def gpus() -> list[dict[str, Any]]:
    """This machine's GPUs: name, and bytes of memory in all and free."""
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append({"name": torch.cuda.get_device_name(index), "total": total, "free": free})
    return found


def check_device(device: str, *, mps: bool = False) -> None:
    """Raise ConfigError, listing the choices, for a device that this machine does not have.

    Args:
        device: "cpu", "cuda", "cuda:1" ... (on ROCm, too).
        mps: Accept Apple's GPU, "mps".
    """
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    choices = ["cpu", *(["cuda"] if cuda else []), *cuda]
    if mps and torch.backends.mps.is_available():
        choices.append("mps")
    if device.partition(":")[0] == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        raise ConfigError(
            f"device is {device!r}, but this torch ({torch.__version__}) is built for the CPU alone; "
            "install a CUDA build of torch (pytorch.org says how), or use cpu"
        )
    if device.partition(":")[0] == "cuda" and not cuda:
        raise ConfigError(f"device is {device!r}, but torch ({torch.__version__}) finds no GPU here; use cpu")
    if device not in choices:
        raise ConfigError(f"device {device!r} is not there; choose one of {', '.join(choices)}")
