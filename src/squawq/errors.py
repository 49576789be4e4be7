"""The exceptions that users meet. Each message says the value, the choices and what to do.

SquawqError
├── ConfigError         a setting that cannot work (also a ValueError)
│   ├── FusionError     a model of transformers that our decoder cannot run, so that its own layers must
│   └── TemplateError   a chat template that takes too much time or memory, or crashes
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

# C0 and C1 controls, line separators, marks and overrides of the writing direction, halves of surrogate pairs
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u061c\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """Text that a terminal shows as it is: what would steer the terminal is escaped, as \\x1b or \\u202e.

    Args:
        text: Text that comes from a model folder, a client or a model.
        keep: Characters that stay as they are, such as "\\n\\t".
    """

    def escape(match: re.Match[str]) -> str:
        character = match[0]
        if character in keep:
            return character
        return f"\\x{ord(character):02x}" if character < "\u0100" else f"\\u{ord(character):04x}"

    return _UNSAFE.sub(escape, text)


class SquawqError(Exception):
    """Base of every error that squawq raises for its user. Its text is safe to show on a terminal."""

    def __str__(self) -> str:
        return printable(super().__str__(), keep="\n\t")


class ConfigError(SquawqError, ValueError):
    """A setting that cannot work."""


class FusionError(ConfigError):
    """A model of transformers that our decoder cannot run, so that its own layers must."""


class TemplateError(ConfigError):
    """A chat template that takes too much time or memory, or crashes, whatever the chat."""


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
