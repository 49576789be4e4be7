"""Dataclasses whose values pydantic validates strictly, with squawq's one-line errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, fields
from functools import wraps
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from squawq.errors import ConfigError

Class = TypeVar("Class", bound=type)
CONFIG = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
MAX_SHOWN = 100  # characters of a value in an error


@dataclass_transform(frozen_default=True, field_specifiers=(Field, field))
def strict(*, kw_only: bool = False) -> Callable[[Class], Class]:
    """A decorator for frozen dataclasses: fields are validated by their annotations, without conversions.

    A bad value raises ConfigError, as in "top_k is -1; it must be 0 (off) or more"; the rule is the description in
    the annotation's `Field`. An unknown field raises ConfigError, too.
    """

    def decorate(cls: Class) -> Class:
        made: Any = dataclass(cls, frozen=True, kw_only=kw_only, config=CONFIG)
        init = made.__init__

        @wraps(init)
        def __init__(self: Any, *args: Any, **values: Any) -> None:  # noqa: N807
            try:
                init(self, *args, **values)
            except ValidationError as error:
                raise _config_error(made, error) from None

        made.__init__ = __init__
        return made  # type: ignore[no-any-return]

    return decorate


def refuse(name: str, value: object, rule: str, verb: str = "is") -> ConfigError:
    """The error for a value that breaks a rule: "at least 1", or "choose one of a, b"."""
    shown = repr(value)
    shown = shown if len(shown) <= MAX_SHOWN else shown[: MAX_SHOWN - 3] + "..."
    return ConfigError(f"{name} {verb} {shown}; {rule if rule.startswith('choose ') else f'it must be {rule}'}")


def _config_error(cls: Any, error: ValidationError) -> ConfigError:
    first = error.errors(include_url=False)[0]
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, ConfigError):  # from __post_init__
        return raised
    names = [entry.name for entry in fields(cls) if entry.init]
    place = first["loc"][0]
    name = names[place] if isinstance(place, int) else place
    if first["type"].startswith(("unexpected", "multiple")):
        return ConfigError(f"there is no setting {name!r}; choose from {', '.join(names)}")
    if first["type"].startswith("missing"):
        return ConfigError(f"{name} is not given; give one")
    rule = cls.__pydantic_fields__[name].description
    rule = rule or first["msg"].removeprefix("Input should be ")
    return refuse(name, first["input"], rule, "is" if len(first["loc"]) == 1 else "has")
