"""What a field of the schema may hold: types, bounds, and the one line that a wrong value gets."""

import ast
import inspect
import math
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from itertools import pairwise
from numbers import Integral, Real
from typing import Annotated, Any, Literal

from resjax.errors import UserError
from resjax.models.presets import nearest


@dataclass(frozen=True)
class Bounds:
    """The finite numbers that are at least `ge`, above `gt`, at most `le` and below `lt`."""

    ge: float = -math.inf
    gt: float = -math.inf
    le: float = math.inf
    lt: float = math.inf

    def __contains__(self, number: float) -> bool:
        return self.ge <= number <= self.le and self.gt < number < self.lt

    def __str__(self) -> str:
        limits = {"at least": self.ge, "above": self.gt, "at most": self.le, "below": self.lt}
        finite = (f"{word} {x:.12g}" for word, x in limits.items() if math.isfinite(x))
        return " and ".join(finite)


@dataclass(frozen=True)
class Field:
    """The values that one field may hold."""

    type: Any  # bool, int, float, str, tuple, dict, a section's dataclass, or object for anything
    optional: bool = False
    item: Any = float  # the type of a tuple's items
    choices: tuple[str, ...] = ()
    bounds: Bounds = Bounds()

    def __str__(self) -> str:
        words = {
            bool: "true or false",
            int: "an integer",
            float: "a number",
            str: " or ".join(self.choices) or "a name",
            tuple: {
                float: "numbers, as in 0.5,0.75",
                int: "integers, as in 5,6",
                str: "names, as in a,b",
            }[self.item],
        }
        return words.get(self.type, "a section with fields") + " or None" * self.optional

    def parse(self, text: str, path: str) -> Any:
        """Returns the value that a string on the command line stands for."""
        if self.optional and text == "None":
            return None
        try:
            if self.type is bool:
                return {"true": True, "false": False}[text.lower()]
            if self.type in (int, float, str):
                return self.type(text)
            if self.type is tuple:
                items = (item.strip() for item in text.strip("()").split(","))
                return tuple(self.item(item) for item in items if item)
        except (KeyError, ValueError):
            raise UserError(f"{path}={text}: expected {self}") from None
        return _parse_literal(text)

    def check(self, value: Any, path: str) -> Any:
        """Returns `value` as the field stores it: 2 as 2.0, a list as a tuple.

        Raises:
          UserError: `value` has another type, is out of bounds, or is not one of the choices.
        """
        if value is None and self.optional:
            return None
        if self.type is object or (self.type is dict and isinstance(value, Mapping)):
            return _freeze(value, path)
        if self.type is tuple and isinstance(value, (list, tuple)):
            item = replace(self, type=self.item, optional=False)
            return tuple(item.check(each, path) for each in value)
        if self.type is bool and isinstance(value, bool):
            return value
        if self.type is str and isinstance(value, str):
            if self.choices and value not in self.choices:
                raise UserError(f"{path}={value}: unknown{nearest(value, self.choices)}")
            return value
        number = {int: Integral, float: Real}.get(self.type)
        if number and isinstance(value, number) and not isinstance(value, bool):
            if self.type(value) not in self.bounds:
                raise UserError(f"{path}={value}: must be {self.bounds}")
            return self.type(value)
        raise UserError(f"{path}={value!r}: expected {self}")


def fields(section: Any, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """Yields the dotted path and the field of every field, those of inner sections included."""
    for name, annotation in typing.get_type_hints(section, include_extras=True).items():
        found = Field(**_describe(annotation))
        if is_dataclass(found.type):
            yield from fields(found.type, f"{prefix}{name}.")
        else:
            yield prefix + name, found


def documentation(section: type) -> dict[str, str]:
    """Returns the string below each field of a dataclass, on one line, by the field's name."""
    (tree,) = (
        node
        for node in ast.parse(inspect.getsource(sys.modules[section.__module__])).body
        if isinstance(node, ast.ClassDef) and node.name == section.__name__
    )
    found = {}
    for statement, below in pairwise(tree.body):
        match statement, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                found[name] = " ".join(text.split())
    return found


def _describe(annotation: Any) -> dict[str, Any]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return {**_describe(arguments[0]), "bounds": arguments[1]}
    if origin is Literal:
        return {"type": str, "choices": arguments}
    if origin is tuple:
        return {"type": tuple, "item": arguments[0]}
    if origin in (types.UnionType, typing.Union):
        return {**_describe(arguments[0]), "optional": True}
    return {"type": origin or annotation}


def _parse_literal(text: str) -> Any:
    """Reads a Python literal, a comma-separated tuple of literals, or else returns the string."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if "," not in text:
            return text
        return tuple(_parse_literal(item.strip()) for item in text.split(",") if item.strip())


def _freeze(value: Any, path: str) -> Any:
    """Returns a JSON value with plain numbers, and tuples in place of lists, as Flax needs them."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _freeze(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence):
        return tuple(_freeze(item, path) for item in value)
    raise UserError(f"{path}={value!r}: expected numbers, strings, or lists or dicts of them")
