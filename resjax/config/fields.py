"""Checks values of the schema's fields against types and bounds, with an error of one line."""

import ast
import inspect
import math
import types
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import cached_property
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


WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a name",
    Any: "a number, a name, or several",
    (tuple, float): "numbers, as in 0.5,0.75",
    (tuple, int): "integers, as in 5,6",
    (tuple, str): "names, as in a,b",
    (tuple, int | str): "names or numbers, as in cat,dog or 5,6",
}

LARGEST = {int: 2**31, float: 1e38}
"""The limits of numbers in JAX's int32 and float32."""


@dataclass(frozen=True)
class Field:
    """The values that one field may hold."""

    type: Any  # bool, int, float, str, tuple, dict, a section's dataclass, or Any for JSON values
    optional: bool = False
    item: Any = Any  # the type of the items of a tuple or dict
    choices: tuple[str, ...] = ()
    bounds: Bounds = Bounds()

    def __str__(self) -> str:
        kind = WORDS.get((tuple, self.item) if self.type is tuple else self.type)
        words = " or ".join(self.choices) or kind or "a section with fields"
        return words + " or None" * self.optional

    def parse(self, text: str) -> Any:
        """Returns the value that a string on the command line stands for, for `check`."""
        if self.type is str:
            return None if self.optional and text == "None" else text
        if isinstance(self.item, types.UnionType) and not set(text) & set("\"'()[]"):
            return tuple(_parse_name(each.strip()) for each in text.split(",") if each.strip())
        value = _parse_literal(text)
        if self.type is tuple and not isinstance(value, (list, tuple)):
            return (value,) if text else ()
        return value

    def check(self, value: Any, path: str) -> Any:
        """Returns `value` as the field stores it: 2 as 2.0, a list as a tuple.

        Raises:
          UserError: `value` has another type, is out of bounds, or is not one of the choices.
        """
        if value is None and self.optional:
            return None
        if self.type is Any:
            return _freeze(value, path)
        if self.type is tuple and isinstance(value, (list, tuple)):
            return tuple(self.of_item.check(each, path) for each in value)
        if self.type is dict and isinstance(value, Mapping):
            return {key: self.of_item.check(each, f"{path}.{key}") for key, each in value.items()}
        if isinstance(self.type, types.UnionType):
            fits = str if isinstance(value, str) else int
            return replace(self, type=fits).check(value, path)
        if self.type is bool and isinstance(value, bool):
            return value
        if self.type is str and isinstance(value, str):
            if self.choices and value not in self.choices:
                raise UserError(f"{path}={value}: unknown{nearest(value, self.choices)}")
            if not value and self.optional:
                raise UserError(f"{path}=: has no value; None leaves it open")
            return value
        number = {int: Integral, float: Real}.get(self.type)
        if number and isinstance(value, number) and not isinstance(value, bool):
            size: Any = value
            if size not in self.bounds:
                raise UserError(f"{path}={value}: must be {self.bounds}")
            if not abs(size) < LARGEST[self.type]:
                raise UserError(f"{path}={value}: must be below {LARGEST[self.type]:.12g}")
            return self.type(value)
        raise UserError(f"{path}={value!r}: expected {self}")

    @cached_property
    def of_item(self) -> "Field":
        """The values that each item of a tuple or dict may hold."""
        return replace(self, type=self.item, item=Any, optional=False)


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
    tree: Any = ast.parse(inspect.getsource(section)).body[0]
    return {
        ast.unparse(field.target): " ".join(ast.literal_eval(below.value).split())
        for field, below in pairwise(tree.body)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


def _describe(annotation: Any) -> dict[str, Any]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return {**_describe(arguments[0]), "bounds": arguments[1]}
    if origin is Literal:
        return {"type": str, "choices": arguments}
    if origin in (tuple, dict):
        return {"type": origin, "item": arguments[origin is dict]}
    if origin in (types.UnionType, typing.Union):
        return {**_describe(arguments[0]), "optional": True}
    return {"type": origin or annotation}


def _parse_literal(text: str) -> Any:
    """Reads a Python literal, a comma-separated tuple of literals, or else returns the string."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd literals, such as 1or2
            return ast.literal_eval(text)
    # An unhashable key is a TypeError; the last two are brackets nested too deeply.
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        if "," not in text:
            return text
        return tuple(_parse_literal(item.strip()) for item in text.split(",") if item.strip())


def _parse_name(text: str) -> int | str:
    """Returns an integer as it is usually written, or else the name itself, such as true or 007."""
    return int(text) if text.isascii() and text.isdecimal() and str(int(text)) == text else text


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
