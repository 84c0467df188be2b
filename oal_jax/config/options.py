"""How a field of the config is declared: its default, meaning, choices and range in one place.

The validator, `--help` and the documentation are made from these declarations.
"""

import dataclasses
import difflib
import math
from typing import Any


def option(
    default: Any,
    meaning: str,
    *,
    choices: tuple[str, ...] = (),
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    chosen: Any = None,
) -> Any:
    """A dataclass field with a default, what it means, and the values that it may have.

    `chosen` is the value that leaves the choice to `oal_jax.stages.choose`, with data.source='own'.
    """
    limits = {"above": above, "at_least": at_least, "below": below, "at_most": at_most}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    metadata = {"meaning": meaning, "choices": choices, "limits": limits, "chosen": chosen}
    return dataclasses.field(default=default, metadata=metadata)


def range_text(f: dataclasses.Field) -> str:
    """The range of a field in words, such as "above 0, at most 1"; empty where any number fits."""
    limits = f.metadata.get("limits", {})
    return ", ".join(f"{name.replace('_', ' ')} {limit:g}" for name, limit in limits.items())


def value_problem(f: dataclasses.Field, path: str, value: Any, default: Any) -> str | None:
    """What is wrong with the value of a field, as the end of an error line; None if nothing is."""
    if not _has_type_of(value, default):
        return f"config key '{path}' must be of type {type(default).__name__}, got {value!r}"
    choices = f.metadata.get("choices", ())
    for entry in value if isinstance(value, tuple | list) else (value,):
        if choices and entry not in choices:
            nearest = difflib.get_close_matches(entry, choices, n=1, cutoff=0.0)[0]
            known = f"one of {', '.join(choices)}" if len(choices) < 20 else "known"
            return f"config {path}='{entry}' is not {known}; nearest: '{nearest}'"
    tests = {
        "above": lambda limit: value > limit,
        "at_least": lambda limit: value >= limit,
        "below": lambda limit: value < limit,
        "at_most": lambda limit: value <= limit,
    }
    limits = f.metadata.get("limits", {})
    if all(tests[name](limit) for name, limit in limits.items()):
        return None
    return f"config {path}={value} must be {range_text(f)}"


def is_open(f: dataclasses.Field, value: Any) -> bool:
    """Whether a field's value leaves the choice to the data."""
    chosen = f.metadata.get("chosen")
    return chosen is not None and value == chosen


def _has_type_of(value: Any, default: Any) -> bool:
    if isinstance(default, float):
        return type(value) in (int, float) and math.isfinite(value)
    if isinstance(default, tuple):
        return isinstance(value, tuple | list) and all(isinstance(v, str) for v in value)
    return type(value) is type(default)
