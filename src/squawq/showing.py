"""Short reprs: dataclasses without fields at their defaults, mappings without their long lists."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import fields
from typing import Any

MAX_LENGTH = 60  # characters of a value


def brief(value: object) -> str:
    """A value's repr, or its length if the repr is long."""
    text = repr(value)
    if len(text) <= MAX_LENGTH:
        return text
    if isinstance(value, Mapping):
        return f"{{{len(value)} entries}}"
    if isinstance(value, Sized) and not isinstance(value, str | bytes):
        return f"[{len(value)} entries]"
    return text[: MAX_LENGTH - 4] + "..." + text[-1]


def beside_defaults(instance: Any) -> str:
    """A dataclass's repr with the fields that differ from their defaults."""
    given = [(entry.name, getattr(instance, entry.name)) for entry in fields(instance) if entry.repr]
    defaults = {entry.name: entry.default for entry in fields(instance)}
    shown = ", ".join(f"{name}={brief(value)}" for name, value in given if value != defaults[name])
    return f"{type(instance).__name__}({shown})"


class Record(dict[str, Any]):
    """A dict whose repr shortens long values to their length."""

    def __repr__(self) -> str:
        entries = ", ".join(f"{key!r}: {brief(value)}" for key, value in self.items())
        return f"{{{entries}}}"
