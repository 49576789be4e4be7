"""AutoAWQ's public names over squawq, so that scripts written for `from awq import AutoAWQForCausalLM` run on.

A thin layer: it translates arguments. The work is squawq's; what squawq cannot do as asked is refused, not ignored.
"""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version

from awq.models.auto import AutoAWQForCausalLM
from squawq import __version__

__all__ = ["AutoAWQForCausalLM", "__version__"]


def _warn_of_autoawq() -> None:
    """Two distributions with one package name overwrite each other's files, and pip does not say so."""
    try:
        found = version("autoawq")
    except PackageNotFoundError:
        return
    warnings.warn(
        f"autoawq {found} is installed beside squawq {__version__}, and both bring a package 'awq'; this is squawq's "
        f"({__file__}). Keep one: pip uninstall autoawq squawq, then install the one you want.",
        stacklevel=3,
    )


_warn_of_autoawq()
