"""Stage `evaluate`: the student's outputs on every set; the tables of the near/far protocol."""

from pathlib import Path

import numpy as np

from oal_jax import artifacts
from oal_jax.evaluation import protocol
from oal_jax.scores import Head, Outputs
from oal_jax.stages import train
from oal_jax.stages.context import Context, apply_in_batches, classifier

_FILE = "outputs.safetensors"
_ID_SETS = ("id_train", "id_val", "id_test")


def groups(context: Context) -> dict[str, str]:
    """OOD set to its group: near, far or validation."""
    benchmark = context.benchmark
    return (
        dict.fromkeys(benchmark.near, "near")
        | dict.fromkeys(benchmark.far, "far")
        | dict.fromkeys(benchmark.validation, "validation")
    )


def run(context: Context) -> list[Path]:
    """Write `outputs.safetensors`: `SET.logits` and `SET.features`, and `SET.labels` of ID sets."""
    params, model_state = train.load(context)
    sets = {
        "id_train": context.train_images(),
        "id_val": context.images("validation"),
        "id_test": context.images("test"),
    }
    for name, group in groups(context).items():
        split = "validation" if group == "validation" else "test"
        sets[name] = context.images(split, name)
    net = train.student(context.config, len(sets["id_train"].class_names))
    forward = classifier(net, context.mesh)(train.student_variables(params, model_state))
    tensors = {}
    for name, data in sets.items():
        outputs = apply_in_batches(
            forward, data.images, context.config.evaluation.batch_size, context.mesh
        )
        tensors[f"{name}.logits"], tensors[f"{name}.features"] = outputs
        if name in _ID_SETS:
            tensors[f"{name}.labels"] = data.labels
    path = context.directory("evaluate") / _FILE
    artifacts.write_tensors(path, tensors)
    return [path]


def outputs(context: Context) -> tuple[dict[str, protocol.Labelled], dict[str, Outputs]]:
    """ID sets (with labels) and OOD sets, as `run` wrote them."""
    tensors = artifacts.read_tensors(context.directory("evaluate") / _FILE)

    def of(name):
        return Outputs(tensors[f"{name}.logits"], tensors[f"{name}.features"])

    id_sets = {name: protocol.Labelled(of(name), tensors[f"{name}.labels"]) for name in _ID_SETS}
    return id_sets, {name: of(name) for name in groups(context)}


def head(context: Context) -> Head:
    """The student's last linear layer."""
    params, _ = train.load(context)
    return Head(np.asarray(params["student"]["fc"]["kernel"]), params["student"]["fc"]["bias"])


def protocol_result(context: Context) -> protocol.Evaluation:
    """All scores of the config on all sets."""
    id_sets, ood = outputs(context)
    return protocol.evaluate(
        context.config.evaluation.scores,
        *(id_sets[name] for name in _ID_SETS),
        ood,
        groups(context),
        head(context),
        keep=context.config.evaluation.keep_id,
        batch_size=context.config.evaluation.batch_size,
    )
