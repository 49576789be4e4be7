"""Closes the objects of a JSON schema: no properties but those it names, unless it says `additionalProperties`.

That is the strict mode of OpenAI and xgrammar, and what clients mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

MAX_WORK = 100_000  # schemas visited and names passed on
_NAMES = ("properties", "patternProperties")
_MAPS = (*_NAMES, "$defs", "definitions")
_ONE = ("items", "additionalProperties", "additionalItems", "unevaluatedItems", "contains")
_SOME = ("prefixItems", "items")
_APPLIED = ("allOf", "anyOf", "oneOf")  # to the same value
_LISTED = ("enum", "const", "minProperties")  # closing could leave no value at all

Names = frozenset[tuple[str, str]]  # ("properties", name) or ("patternProperties", pattern)
NONE: Names = frozenset()


def close_objects(schema: Any) -> Any:
    """The schema with `additionalProperties: false` where objects with `properties` or `patternProperties` do not say.

    Schemas that apply to one value (allOf, anyOf, oneOf, $ref and what stands beside them) are closed together, as
    `unevaluatedProperties: false` would: each takes the names of the others as well. Where one of them is open, or
    lists its values, all stay open. An object without `properties` is a map and stays open. A schema with `properties`
    and no type describes an object.

    Raises:
        ValueError: the schemas combine too many names.
    """
    return _Closing(schema).run() if isinstance(schema, Mapping) else schema


class _Closing:
    """Closes one schema. None instead of names: some schema of the value is open."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._left = MAX_WORK
        self._derived: dict[tuple[str, Names | None], str] = {}
        self._definitions: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        made: dict[str, Any] = self._value(self._root)
        if self._definitions:
            made["$defs"] = {**_mapping(made.get("$defs")), **self._definitions}
        return made

    def _value(self, schema: Any) -> Any:
        """A schema that applies to a value alone."""
        return self._part(schema, NONE, typed=False)

    def _part(self, schema: Any, around: Names | None, *, typed: bool) -> Any:
        """A schema that applies to a value beside others, which name the properties `around`.

        typed: whether one of those says the value's type.
        """
        self._work(1 + len(around or ()))
        if not isinstance(schema, Mapping):
            return schema
        made = {key: self._inside(key, value) for key, value in schema.items()}
        own = self._own(schema)
        reached = {key: [self._reach(part) for part in _parts(schema, key)] for key in _APPLIED}
        everything = {key: _union(*names) for key, names in reached.items()}
        target = self._reach({"$ref": schema["$ref"]}) if "$ref" in schema else NONE
        for key in _APPLIED:
            if _parts(schema, key):
                beside = _union(around, own, target, *(everything[other] for other in _APPLIED if other != key))
                made[key] = [
                    self._part(part, _union(beside, *rest), typed=typed or "type" in schema or key == "allOf")
                    for part, rest in zip(schema[key], self._others(reached[key], key == "allOf"), strict=True)
                ]
        if "$ref" in schema:
            made["$ref"] = self._refer(schema["$ref"], _union(around, own, *everything.values()))
        if made.get("unevaluatedProperties") is False:  # what closing means
            del made["unevaluatedProperties"]
        names = _union(around, own, target, *everything.values())
        if any(key in schema for key in _NAMES):
            if not typed and not any(key in schema for key in ("type", "$ref", *_LISTED, *_APPLIED)):
                made["type"] = "object"
            sound = all(isinstance(schema.get(kind, {}), Mapping) for kind in _NAMES)
            if "additionalProperties" not in schema and names is not None and sound:
                self._close(made, names)
        return made

    def _close(self, made: dict[str, Any], names: Names) -> None:
        self._work(len(names))
        for kind in _NAMES:
            more = {name: True for of, name in sorted(names) if of == kind}
            if more:
                made[kind] = {**made.get(kind, {}), **{name: True for name in more if name not in made.get(kind, {})}}
        made["additionalProperties"] = False

    def _inside(self, key: str, value: Any) -> Any:
        """A keyword's value, with the schemas of other values in it closed."""
        if key in _MAPS and isinstance(value, Mapping):
            return {name: self._value(schema) for name, schema in value.items()}
        if key in _SOME and isinstance(value, list):
            return [self._value(schema) for schema in value]
        return self._value(value) if key in _ONE else value

    def _own(self, schema: Mapping[str, Any]) -> Names | None:
        """The names that a schema itself gives to a value's properties."""
        if schema.get("additionalProperties", False) is not False or any(key in schema for key in _LISTED):
            return None
        if schema.get("unevaluatedProperties", False) is not False:
            return None
        given = {(kind, str(name)) for kind in _NAMES for name in _mapping(schema.get(kind))}
        required = schema.get("required")
        if isinstance(required, list):
            given |= {("properties", name) for name in required if isinstance(name, str)}
        return frozenset(given)

    def _reach(self, schema: Any, seen: frozenset[str] = frozenset()) -> Names | None:
        """The names of a schema and of all that it applies to the same value."""
        self._work(1)
        if not isinstance(schema, Mapping):
            return NONE
        found = [self._own(schema)]
        found += [self._reach(part, seen) for key in _APPLIED for part in _parts(schema, key)]
        reference = schema.get("$ref")
        if reference is not None and reference not in seen:
            target = self._resolve(reference)
            found.append(None if target is None else self._reach(target, seen | {reference}))
        names = _union(*found)
        self._work(len(names or ()))
        return names

    def _others(self, reached: Sequence[Names | None], together: bool) -> list[list[Names | None]]:
        """For each part what those beside it name: all others of allOf, none of alternatives."""
        if not together:
            return [[] for _ in reached]
        self._work(sum(len(names or ()) for names in reached) * len(reached))
        return [[*reached[:i], *reached[i + 1 :]] for i in range(len(reached))]

    def _refer(self, reference: Any, around: Names | None) -> Any:
        """A reference to the target as it is beside `around`."""
        target = self._resolve(reference)
        if target is None or around == NONE:
            return reference
        key = (reference, around)
        if key not in self._derived:
            name = self._derived[key] = f"closed-{len(self._derived)}"
            while name in _mapping(self._root.get("$defs")):
                name = self._derived[key] = name + "-"
            self._definitions[name] = self._part(target, around, typed=True)
        return f"#/$defs/{self._derived[key]}"

    def _resolve(self, reference: Any) -> Any:
        """What a reference into the same schema names; None for any other."""
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            return None
        found: Any = self._root
        for step in reference.split("/")[1:]:
            step = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and step.isdecimal() and int(step) < len(found):
                found = found[int(step)]
            elif isinstance(found, Mapping) and step in found:
                found = found[step]
            else:
                return None
        return found

    def _work(self, amount: int) -> None:
        self._left -= amount
        if self._left < 0:
            raise ValueError("the schema combines too many properties by allOf, anyOf and $ref")


def _parts(schema: Mapping[str, Any], key: str) -> list[Any]:
    parts = schema.get(key)
    return parts if isinstance(parts, list) else []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _union(*names: Names | None) -> Names | None:
    """All the names; None where one of them is open."""
    known = [one for one in names if one is not None]
    return frozenset().union(*known) if len(known) == len(names) else None
