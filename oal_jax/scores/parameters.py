"""Types and ranges of the scores' parameters, declared where a factory declares the parameter.

`k: Count = 50` says that k is a whole number, 1 or more. `checked` reads that from the factory's
annotations, so that no factory checks its own arguments.
"""

import difflib
import functools
import inspect
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, NamedTuple

import numpy as np

from oal_jax.errors import UserError


class Range(NamedTuple):
    """Limits of a number; None for none."""

    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        words = {"above": "above {:g}", "at_least": "{:g} or more"}
        words |= {"at_most": "at most {:g}", "below": "below {:g}"}
        limits = [(words[name], limit) for name, limit in self._asdict().items()]
        return " and ".join(word.format(limit) for word, limit in limits if limit is not None)


Count = Annotated[int, Range(at_least=1)]
AtLeast0 = Annotated[float, Range(at_least=0)]
Percentile = Annotated[float, Range(at_least=0, below=100)]
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(above=0, at_most=1)]

_NAMES = {int: "a whole number", float: "a number", bool: "True or False"}


def checked(name: str, factory: Callable, params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a score in the types that its factory declares: 5 for 5.0, a tuple for a list.

    Args:
      name: of the score, for messages.
      factory: has annotations of this module's types.
      params: by name; those left out keep their defaults.

    Raises:
      UserError: no such parameter (names the nearest), another type, or out of range.
    """
    declared = _annotations(factory)
    values = {}
    for key, value in params.items():
        if key not in declared:
            raise UserError(f"score {name!r} has no parameter {key!r}; {nearest(key, declared)}")
        try:
            values[key] = _converted(value, declared[key])
        except _Misfit as misfit:
            raise UserError(f"{name}: {key} must be {misfit}, got {value!r}") from None
    return values


def nearest(name: str, known: Iterable[str]) -> str:
    """What a user who wrote `name` may have meant."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"


class _Misfit(Exception):
    """What a value must be."""


@functools.cache
def _annotations(factory: Callable) -> dict[str, Any]:
    hints = typing.get_type_hints(factory, include_extras=True)
    return {key: hints.get(key, Any) for key in inspect.signature(factory).parameters}


def _converted(value: Any, hint: Any) -> Any:
    """The value in the declared type."""
    if hint is Any:  # a factory outside of the package, which checks its own arguments
        return value
    kind, *none = _options(hint)
    if value is None and none:
        return None
    kind, limits = _parts(kind)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple | np.ndarray):
            raise _Misfit("a list of numbers")
        return tuple(_converted(entry, typing.get_args(kind)[0]) for entry in value)
    if not isinstance(value, bool | int | float) and np.ndim(value) == 0 and hasattr(value, "item"):
        value = value.item()  # a scalar of NumPy or JAX
    if not _has_type(value, kind):
        raise _Misfit(", ".join(filter(None, (_NAMES[kind], str(limits or "")))))
    value = kind(value)
    if limits is not None and value not in limits:
        raise _Misfit(str(limits))
    return value


def _has_type(value: Any, kind: type) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is type(value)
    if not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return kind is float or value == int(value)


def _options(hint: Any) -> tuple[Any, ...]:
    """The types of `X | None`, X first."""
    if typing.get_origin(hint) is Annotated or not typing.get_args(hint):
        return (hint,)
    return (hint,) if typing.get_origin(hint) is tuple else typing.get_args(hint)


def _parts(hint: Any) -> tuple[Any, Range | None]:
    return (
        (hint.__origin__, hint.__metadata__[0]) if hasattr(hint, "__metadata__") else (hint, None)
    )
