"""Stage `evaluate`: the student's outputs on every set, once, for all scores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oal_jax import scores as post_hoc
from oal_jax.evaluation.protocol import Inputs
from oal_jax.runtime import artifacts, distributed
from oal_jax.scores import Head, Outputs
from oal_jax.scores.forward import make_forward
from oal_jax.stages import student, train
from oal_jax.stages.context import Context, outputs_of_set

_FILE = "outputs.safetensors"
_ID_SPLITS = {"id_train": "train", "id_val": "validation", "id_test": "test"}


class Sets(NamedTuple):
    """The sets of a run, as `protocol.evaluate` takes them. Images are read on demand."""

    id_train: Inputs
    id_val: Inputs
    id_test: Inputs
    ood: dict[str, Inputs]
    groups: dict[str, str]
    head: Head
    forward: post_hoc.Forward


def groups(context: Context) -> dict[str, str]:
    """Group of each OOD set: near, far, validation or csid."""
    benchmark = context.benchmark
    return (
        dict.fromkeys(benchmark.near, "near")
        | dict.fromkeys(benchmark.far, "far")
        | dict.fromkeys(benchmark.validation, "validation")
        | dict.fromkeys(benchmark.csid, "csid")
    )


def run(context: Context) -> list[Path]:
    """Write `outputs.safetensors`: `SET.FIELD` of every set, `SET.labels` of labelled sets."""
    # The report shows the features even if no score reads them.
    fields = post_hoc.needed(context.config.evaluation.scores) | {"features"}
    forward = make_forward(*_student(context), fields)
    forward = distributed.place_parameters(forward, context.mesh)
    size = context.config.evaluation.batch_size
    tensors: dict[str, np.ndarray] = {}
    for name in (*_ID_SPLITS, *groups(context)):
        data = context.opened(*_place(context, name))
        outputs, labels = outputs_of_set(forward, data, size, context.mesh, fields)
        tensors |= _flat(name, outputs)
        if _labelled(context, name):
            tensors[f"{name}.labels"] = labels
    path = context.directory("evaluate") / _FILE
    artifacts.write_tensors(path, tensors)
    return [path]


def inputs(context: Context) -> Sets:
    """Every set as `run` wrote it, with the student's head and forward function."""
    tensors = artifacts.read_tensors(context.directory("evaluate") / _FILE)

    def of(name: str) -> Inputs:
        return Inputs(
            _unflat(name, tensors),
            images=lambda: context.images(*_place(context, name)).images,
            labels=tensors.get(f"{name}.labels"),
        )

    net, variables = _student(context)
    return Sets(
        **{name: of(name) for name in _ID_SPLITS},
        ood={name: of(name) for name in groups(context)},
        groups=groups(context),
        head=Head(*(np.asarray(variables["params"]["fc"][k]) for k in ("kernel", "bias"))),
        forward=make_forward(net, variables, post_hoc.FIELDS),
    )


def _student(context: Context) -> tuple[Any, dict[str, Any]]:
    params, model_state = train.load(context)
    card = artifacts.read_json(context.directory("train") / train.CLASSIFIER)
    net = student.network(context.config, len(card["class_names"]), card)
    return net, train.student_variables(params, model_state)


def _place(context: Context, name: str) -> tuple[str, str, int]:
    """Split, set and limit."""
    if name in _ID_SPLITS:
        limit = context.config.data.train_images if name == "id_train" else 0
        return _ID_SPLITS[name], "", limit
    split = "validation" if groups(context)[name] == "validation" else "test"
    return split, name, 0


def _labelled(context: Context, name: str) -> bool:
    return name in _ID_SPLITS or groups(context)[name] == "csid"


def _flat(name: str, outputs: Outputs) -> dict[str, np.ndarray]:
    """{"SET.FIELD": array}; the arrays of a tuple are numbered."""
    flat = {}
    for field, value in outputs._asdict().items():
        if isinstance(value, tuple):
            flat |= {f"{name}.{field}.{i}": x for i, x in enumerate(value)}
        elif value is not None:
            flat[f"{name}.{field}"] = value
    return flat


def _unflat(name: str, tensors: Mapping[str, np.ndarray]) -> Outputs:
    fields: dict[str, Any] = {}
    for field in Outputs._fields:
        numbered = [key for key in tensors if key.startswith(f"{name}.{field}.")]
        if numbered:
            ordered = sorted(numbered, key=lambda key: int(key.rpartition(".")[2]))
            fields[field] = tuple(tensors[key] for key in ordered)
        else:
            fields[field] = tensors.get(f"{name}.{field}")
    return Outputs(**fields)
