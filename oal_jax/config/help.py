"""What `--help` prints of the config: its sections with every field's meaning, or one of them."""

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from oal_jax.config.methods import SECTIONS
from oal_jax.config.nearest import unknown_key
from oal_jax.config.options import range_text
from oal_jax.config.schema import Config
from oal_jax.errors import UserError

_WIDTH = 100


def describe(keys: Sequence[str], config: Config) -> str:
    """The fields and sections named by `keys`; without keys, all that the config's method reads.

    Args:
      keys: such as "train", "method.vos" or "train.epochs".
      config: whose values are printed.

    Raises:
      UserError: a key that no config has; it names the nearest one.
    """
    sections = dict(_sections(config, ""))
    if not keys:
        return "\n".join(_overview(sections, config.method.name))
    lines: list[str] = []
    for key in keys:
        inside = [path for path in sections if path == key or path.startswith(f"{key}.")]
        if inside:
            lines += [line for path in inside for line in _section(path, sections[path])]
            continue
        path, _, name = key.rpartition(".")
        fields = {f.name: f for f in _plain_fields(sections[path])} if path in sections else {}
        if name not in fields:
            raise UserError(unknown_key(key))
        lines += _field(path, fields[name], getattr(sections[path], name))
    return "\n".join(lines)


def _overview(sections: dict[str, Any], method: str) -> Iterator[str]:
    of_method = [f"method.{section}" for section in SECTIONS[method]]
    for path, section in sections.items():
        if not path.startswith("method.") or path in of_method:
            yield from _section(path, section)
    others = [path for path in sections if path.startswith("method.") and path not in of_method]
    yield ""
    yield from textwrap.wrap(
        f"Options of other methods than {method}: --help {' '.join(others)}", _WIDTH
    )


def _sections(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(path, dataclass) of a config and of all that it holds."""
    yield path, node
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            yield from _sections(value, f"{path}.{f.name}" if path else f.name)


def _plain_fields(section: Any) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(section) if "meaning" in f.metadata]


def _section(path: str, section: Any) -> Iterator[str]:
    title = type(section).__doc__.strip().splitlines()[0]
    yield ""
    yield f"{path or 'config'}: {title}"
    for f in _plain_fields(section):
        yield from _field(path, f, getattr(section, f.name))


def _field(path: str, f: dataclasses.Field, value: Any) -> list[str]:
    key = f"{path}.{f.name}" if path else f.name
    shown = ",".join(value) if isinstance(value, tuple | list) else value
    notes = [f.metadata["meaning"]]
    choices = tuple(map(str, f.metadata["choices"] or ()))
    if choices and not all(choice in notes[0] for choice in choices):
        notes.append(f"one of {', '.join(choices)}")
    if limits := range_text(f):
        notes.append(limits)
    meaning = textwrap.wrap(
        "; ".join(notes), _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
    )
    return [f"  --config.{key}={shown}", *meaning]
