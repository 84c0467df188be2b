"""What a config may hold: `validate` reports every mistake before anything runs."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from oal_jax.config import hub_names
from oal_jax.config.benchmarks import resolve, split_names
from oal_jax.config.methods import FINE_TUNINGS
from oal_jax.config.nearest import unknown_key
from oal_jax.config.options import is_open, value_problem
from oal_jax.config.schema import Config
from oal_jax.errors import UserError

STREAMED = ("tfds", "imglist", "folder", "own")  # values of data.source


def validate(config: Config) -> None:
    """Raise one `UserError` with all that is wrong with a config.

    A config file is code: it can set fields that do not exist, and values of any type. Rules
    between fields are checked once every field has a value that it may have.
    """
    lines = problems(config)
    if lines:
        raise UserError("; ".join(lines))


def problems(config: Config) -> list[str]:
    """A line for each thing that is wrong with a config."""
    # `oal_jax.stages.choose` then gives the open fields a value.
    may_be_open = getattr(getattr(config, "data", None), "source", "") == "own"
    fields = _field_problems(config, Config(), "", may_be_open)
    return list(fields) or list(_rule_problems(config))


def _field_problems(node: Any, default: Any, prefix: str, may_be_open: bool) -> Iterator[str]:
    if type(node) is not type(default):
        name = prefix.rstrip(".") or "file"
        yield f"config {name} must be a {type(default).__name__}, is a {type(node).__name__}"
        return
    fields = {f.name: f for f in dataclasses.fields(default)}
    for name in vars(node):
        if name not in fields:
            yield unknown_key(prefix + name)
    for name, f in fields.items():
        value, usual = getattr(node, name), getattr(default, name)
        if dataclasses.is_dataclass(usual):
            yield from _field_problems(value, usual, f"{prefix}{name}.", may_be_open)
        elif may_be_open and is_open(f, value):
            continue
        elif problem := value_problem(f, prefix + name, value, usual):
            yield problem


def repaired(config: Config) -> Config:
    """The config with the default in place of every value that its field can't have.

    So the rest of it can still be checked.
    """
    may_be_open = getattr(getattr(config, "data", None), "source", "") == "own"
    return _repaired(config, Config(), may_be_open)


def _repaired(node: Any, default: Any, may_be_open: bool) -> Any:
    if type(node) is not type(default):
        return default
    values = {}
    for f in dataclasses.fields(default):
        value, usual = getattr(node, f.name), getattr(default, f.name)
        if dataclasses.is_dataclass(usual):
            values[f.name] = _repaired(value, usual, may_be_open)
        elif may_be_open and is_open(f, value):
            values[f.name] = value
        else:
            values[f.name] = usual if value_problem(f, f.name, value, usual) else value
    return type(default)(**values)


def _rule_problems(config: Config) -> Iterator[str]:
    sections = (_data, _student, _teacher, _outliers, _method, _accumulated, _evaluation)
    for rules in sections:
        try:
            yield from rules(config)
        except UserError as error:  # of a function that checks for itself
            yield str(error)


def _data(config: Config) -> Iterator[str]:
    data = config.data
    splits = split_names(data.id_splits)
    if splits and (len(splits) != 3 or data.source != "tfds"):
        yield (
            f"config data.id_splits={','.join(splits)} must name three splits, for training,"
            " validation and test, of data.source='tfds'"
        )
    if data.source in ("imglist", "folder", "own") and not data.root and not config.smoke:
        yield f"config data.root is empty: data.source={data.source} needs the images' directory"
    if data.source == "own" and data.id_set != "own":
        yield f"config data.id_set='{data.id_set}': the ID set of data.source=own is 'own'"
    if data.channels and data.source in ("bundled", "generated"):
        yield f"config data.channels={data.channels}: those of data.source={data.source} are fixed"
    if data.stream and data.source not in STREAMED:
        yield (
            f"config data.stream=True: the sets of data.source='{data.source}' are held in memory;"
            f" it is for {', '.join(STREAMED)}"
        )
    if data.stream and config.method.name == "woods":
        yield (
            "config method.name='woods' divides a set in memory; with data.stream=True choose"
            " another, such as 'energy'"
        )
    resolve(
        *(data.id_set, data.near, data.far, data.validation, data.csid, data.leave_out),
        source=data.source,
    )
    hub_names.parse(config.generator.directory)


def _student(config: Config) -> Iterator[str]:
    student, name = config.student, config.method.name
    if student.weights and student.tune == "head" and name not in ("ce", "logitnorm"):
        yield (
            f"config method.name='{name}' trains the whole student: set student.tune=all, or"
            " method.name=ce"
        )
    if student.weights:
        return  # the file has its own sizes
    if student.architecture == "resnet":
        if student.depth not in (18, 34, 50):
            yield f"config student.depth={student.depth} is not one of 18, 34, 50"
        if student.dropout:
            yield (
                f"config student.dropout={student.dropout}: a resnet has none; set it to 0, or"
                " student.architecture to densenet or wide_resnet"
            )
    elif student.depth < 10 or student.depth % 6 != 4:
        yield (
            f"config student.depth={student.depth} of a {student.architecture} must be 6 n + 4,"
            " such as 10, 16, 40 or 100"
        )


def _teacher(config: Config) -> Iterator[str]:
    teacher = config.teacher
    if teacher.architecture == "resnet" and not teacher.weights and teacher.width % 8:
        yield f"config teacher.width={teacher.width} of a resnet must be a multiple of 8"
    if teacher.width % teacher.heads:
        yield (
            f"config teacher.width={teacher.width} is not divisible by"
            f" teacher.heads={teacher.heads}"
        )


def _outliers(config: Config) -> Iterator[str]:
    yield from _at_most(config.outliers.knn, "outliers.knn", ("neighbour", "features_per_class"))
    yield from _at_most(config.outliers.knn, "outliers.knn", ("anchors", "boundary_points"))
    yield from _at_most(
        config.outliers.knn, "outliers.knn", ("boundary_points", "features_per_class")
    )
    yield from _at_most(config.outliers.knn, "outliers.knn", ("per_anchor", "noise_rows"))


def _at_most(section: Any, path: str, names: tuple[str, str]) -> Iterator[str]:
    small, large = (getattr(section, name) for name in names)
    fields = {f.name: f for f in dataclasses.fields(section)}
    left_open = any(is_open(fields[name], getattr(section, name)) for name in names)
    if small > large and not left_open:
        yield f"config {path}.{names[0]}={small} must be at most {path}.{names[1]}={large}"


def _method(config: Config) -> Iterator[str]:
    method = config.method
    constraint = method.um.constraint
    if constraint < 0 and constraint != -1:
        yield f"config method.um.constraint={constraint} must be 0 or greater, or -1 (estimated)"
    fine_tuning = method.name in FINE_TUNINGS
    if not config.train.start and (fine_tuning or (method.unleash and constraint < 0)):
        what = f"method.name='{method.name}'" if fine_tuning else "method.unleash=True"
        yield (
            f"config {what} continues a trained model: give train.start, the directory of a"
            " finished run, for example one of method.name='ce'"
        )
    yield from _at_most(method.vos, "method.vos", ("per_class", "samples"))
    for names in (
        ("neighbour", "queue_size"),
        ("boundary_points", "queue_size"),
        ("anchors", "boundary_points"),
        ("per_anchor", "candidates"),
    ):
        yield from _at_most(method.npos, "method.npos", names)


def _accumulated(config: Config) -> Iterator[str]:
    """Microbatches are of equal size."""
    count, method = config.train.accumulate, config.method
    if count == 1:
        return
    sizes = {
        "train.batch_size": config.train.batch_size,
        "method.outlier_batch": method.outlier_batch,
    }
    for path, size in sizes.items():
        if size % count:
            yield (
                f"config {path}={size} is not divisible by train.accumulate={count};"
                f" use for example {max(1, size // count) * count}"
            )


def _evaluation(config: Config) -> Iterator[str]:
    if not config.evaluation.scores:
        yield "config evaluation.scores is empty; give at least one score"
