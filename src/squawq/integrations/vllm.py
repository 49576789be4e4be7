"""vLLM's plugin: AWQ on CPUs with our kernels, behind vLLM's interface of mixed-precision linear kernels.

vLLM calls `register` in each of its processes (entry-point group `vllm.general_plugins`); on other devices than CPUs it
does nothing. SQUAWQ_VLLM_KERNEL chooses the kernel:

- auto (default): ours where vLLM has none (x86 without AVX-512, Arm, shapes that its own does not take), and where ours
  is faster (AVX-512 without AMX).
- always: ours for every layer that it can run.
- never: vLLM's own.
"""

from __future__ import annotations

import logging
import os
from typing import Any

VARIABLE = "SQUAWQ_VLLM_KERNEL"
CHOICES = ("auto", "always", "never")

logger = logging.getLogger("vllm.plugins.squawq")  # vLLM prints the loggers below its own name


def choice() -> str:
    """SQUAWQ_VLLM_KERNEL; "auto" where it is empty or, with a warning, invalid."""
    given = os.environ.get(VARIABLE) or "auto"
    if given in CHOICES:
        return given
    logger.warning("%s is %r; choose one of %s. auto is used.", VARIABLE, given, ", ".join(CHOICES))
    return "auto"


def register() -> None:
    """Add our kernel to vLLM's list for CPUs. Errors are logged, since one that is raised would end vLLM."""
    try:
        _register()
    except Exception as error:  # vLLM of another version, or a broken installation of ours
        logger.warning("squawq's kernel for AWQ on CPUs is not used: %s: %s", type(error).__name__, error)


def _register() -> None:
    from vllm.platforms import current_platform

    wanted = choice()
    if wanted == "never" or not current_platform.is_cpu():
        return
    from vllm.model_executor.kernels import linear

    from squawq.integrations.vllm_kernel import SquawqInt4LinearKernel

    kernels: list[Any] = linear._POSSIBLE_KERNELS[current_platform._enum]
    if SquawqInt4LinearKernel not in kernels:
        SquawqInt4LinearKernel.others = tuple(kernels) if wanted == "auto" else ()
        kernels.insert(0, SquawqInt4LinearKernel)
