"""The exceptions that users meet. Each message says the value, the choices and what to do.

SquawqError
├── ConfigError         a setting that cannot work (also a ValueError)
│   └── FusionError     a model of transformers that our decoder cannot run, so that its own layers must
├── CheckpointError     a model folder that is missing, damaged, lying or of an unknown kind
├── CalibrationError    calibration or evaluation text that is missing or too short
├── OutputError         a target folder that is not ours, belongs to another job, or has no room
├── RankError           another process of a shared run has failed or gone
├── DependencyError     an optional package that is not installed
├── KernelError         no kernel takes this operation; lists what was tried
├── QueueFull           the engine has as many requests waiting as it may have; try again later
├── EngineClosed        the engine was closed, or has failed, and takes no more requests
└── GenerationError     a request failed while it ran; says why
"""

from __future__ import annotations

import re

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u061c\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """Text of a folder or a client as it may reach a terminal: control characters, bidirectional overrides and half
    surrogate pairs are escaped, but for those in `keep`."""

    def escaped(found: re.Match[str]) -> str:
        return found[0] if found[0] in keep else ascii(found[0])[1:-1]

    return _UNPRINTABLE.sub(escaped, text)


class SquawqError(Exception):
    """Base of every error that squawq raises for its user."""


class ConfigError(SquawqError, ValueError):
    """A setting that cannot work."""


class FusionError(ConfigError):
    """A model of transformers that our decoder cannot run, so that its own layers must."""


class CheckpointError(SquawqError):
    """A model folder that is missing, damaged, lying or of an unknown kind."""


class CalibrationError(SquawqError):
    """Calibration or evaluation text that is missing, unreadable or too short."""


class OutputError(SquawqError):
    """A target folder that is not ours, that belongs to another job, or that has no room."""


class RankError(SquawqError):
    """Another process of a shared run has failed or gone."""


class DependencyError(SquawqError, ImportError):
    """An optional package that is not installed."""


class KernelError(SquawqError):
    """No kernel takes this operation."""


class QueueFull(SquawqError):  # noqa: N818 (as queue.Full)
    """The engine has as many requests waiting as it may have."""


class EngineClosed(SquawqError):  # noqa: N818
    """The engine takes no more requests."""


class GenerationError(SquawqError):
    """A request failed while it ran."""
