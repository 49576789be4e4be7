"""The fields of a dataclass as rows of a table: name, type, default, and what its docstring or a comment says of it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any, get_type_hints


def rows(kind: type[Any]) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each field that can be set; the meaning includes the allowed values."""
    stated, hints = {**comments(kind), **attributes(kind)}, get_type_hints(kind, include_extras=True)
    plain = get_type_hints(kind)
    for field in (field for field in fields(kind) if field.init):
        allowed = allowed_values(hints[field.name])
        meaning = ". ".join(filter(None, (stated.get(field.name, "").rstrip("."), allowed[:1].upper() + allowed[1:])))
        yield field.name, type_name(plain[field.name]), default(field), meaning


def attributes(kind: type[Any]) -> dict[str, str]:
    """The Attributes section of a docstring; `n, best_of: text` is of both."""
    section = re.search(r"^Attributes:\n((?:    .*\n|\n)*)", inspect.cleandoc(kind.__doc__ or "") + "\n", re.MULTILINE)
    found: dict[str, str] = {}
    for names, text in re.findall(r"^    (\w[\w, ]*): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.MULTILINE):
        found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def comments(kind: type[Any]) -> dict[str, str]:
    """What the comment behind or above a field says."""
    found, above = {}, ""
    for line in inspect.getsource(kind).splitlines():
        code, _, comment = re.sub(r"  # type: ignore\S*", "", line).partition("  # ")
        if line.strip().startswith("# "):
            above = f"{above} {line.strip()[2:]}".strip()
            continue
        if match := re.match(r"    (\w+): ", code):
            found[match[1]] = comment.strip() or above
        above = ""
    return found


def allowed_values(hint: Any) -> str:
    """The description of pydantic's Field in an annotation, unless it repeats the type."""
    described = [getattr(item, "description", None) for item in getattr(hint, "__metadata__", ())]
    text = next(filter(None, described), "")
    return "" if text.startswith("true") else text


def type_name(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) and not hasattr(hint, "__origin__") else str(hint)
    text = re.sub(r"\b(?:[a-z_]+\.)+(?=\w)", "", text)
    return re.sub(r"Literal\[([^\]]*)\]", lambda match: match[1].replace(", ", " | "), text)


def default(field: Field[Any]) -> str:
    if field.default is not MISSING:
        return repr(field.default)
    return "required" if field.default_factory is MISSING else repr(field.default_factory())
