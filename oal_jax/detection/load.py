"""The detector of a finished run."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.tree_util import Partial
from jaxtyping import Float

from oal_jax import scores as post_hoc
from oal_jax.data.image_files import Decoding
from oal_jax.detection import saved
from oal_jax.detection.detector import Detector
from oal_jax.detection.parts import (
    check_runs,
    check_share,
    run_detector,
    sorted_scores,
    warn_of_few,
)
from oal_jax.errors import UserError
from oal_jax.evaluation import headline
from oal_jax.evaluation.tables import read_csv
from oal_jax.runtime import artifacts, distributed
from oal_jax.scores import Head, Outputs, Score, State
from oal_jax.scores.forward import make_forward
from oal_jax.stages import evaluate, student, train
from oal_jax.stages import run as pipeline
from oal_jax.stages.context import Context

_REMEDY = "run the stages of the run again with --force"


def load(
    directory: str | os.PathLike,
    score: str | None = None,
    keep_id: float | None = None,
    batch_size: int | None = None,
) -> Detector:
    """The detector of a finished run, or a saved one. Verifies every file that it reads.

    Args:
      directory: the run's working directory, or one that `detector.save` wrote.
      score: a key of `scores.SCORES`; None for the headline of the report, or, of older runs, the
        first of the config. A score that is not in the report is fitted now, on the run's saved
        outputs, or on its images where those do not suffice.
      keep_id: share of ID validation images that the threshold keeps; None for the config's.
      batch_size: images of a call of the model; None: as saved, or 256 of a run.

    Raises:
      UserError: no run, not finished, damaged; an unknown score.
    """
    if not isinstance(directory, str | os.PathLike):
        raise UserError(f"load takes a directory, got a {type(directory).__name__}")
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise UserError(f"batch_size must be a whole number, 1 or more, got {batch_size!r}")
    directory = Path(directory).expanduser()
    if keep_id is not None:
        check_share(keep_id)
    if saved.is_saved(directory):
        parts = saved.read(directory, keep_id, batch_size)
        if score not in (None, parts.score.name):
            post_hoc.make(score)
            raise UserError(
                f"{directory} is a saved detector by {parts.score.name}; {score} would have to be"
                " fitted: load the run that it came from, or calibrate again"
            )
        return Detector(**vars(parts))
    if not (directory / "config.json").exists():
        raise UserError(
            f"{directory} has neither the config.json of a run nor the detector.json of a saved"
            " detector"
        )
    context = pipeline.resolve(directory)
    config = context.config.evaluation
    name = score or _headline(context)
    post_hoc.make(name)  # an unknown name fails before any file is read
    keep_id = config.keep_id if keep_id is None else keep_id
    _check_finished(context, "train")
    card, forward, head = _classifier(context, name)
    if _is_current(context, "report") and _fitted_file(name) in artifacts.output_hashes(
        context.directory("report")
    ):
        params, state, values = _fitted(context, name)
    else:
        print(f"oal_jax: {directory} lists no score {name}; fitting it now", file=sys.stderr)
        params, (state, values) = {}, _fit(context, post_hoc.make(name), head, forward)
    detector = Detector(
        forward=distributed.place_parameters(forward, context.mesh),
        score=post_hoc.make(name, **params),
        state=distributed.replicate(state, context.mesh),
        id_val_scores=sorted_scores(values, name),
        image_shape=tuple(card["image_shape"]),
        keep_id=keep_id,
        class_names=tuple(card["class_names"]),
        batch_size=256 if batch_size is None else batch_size,
        params=params,
        mesh=context.mesh,
        decoding=Decoding.from_json(card["decoding"]) if "decoding" in card else None,
        about=_about(context, card, name),
    )
    check_runs(detector, directory, _REMEDY)
    warn_of_few(len(detector.id_val_scores))
    return detector


def _headline(context: Context) -> str:
    """The score that the run chose; the first of the config if it chose none."""
    chosen = None
    if _is_current(context, "report"):
        chosen = headline.read(context.directory("report"))
    return chosen.score if chosen else context.config.evaluation.scores[0]


def _about(context: Context, card: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Where the classifier comes from, and the rows of the run's report on this score."""
    config, report = context.config, context.directory("report")
    rows = []
    if (report / artifacts.MANIFEST).exists():
        rows = read_csv(artifacts.verified(report, "ood.csv"))
    return {
        "architecture": card["architecture"],
        "trained_on": {
            "id_set": config.data.id_set,
            "source": config.data.source,
            "method": config.method.name,
            "epochs": config.train.epochs,
            "seed": config.seed,
        },
        "measured": [list(row) for row in rows if row.score == name],
    }


def _check_finished(context: Context, stage: str) -> None:
    if not _is_current(context, stage):
        raise UserError(
            f"stage {stage} of {context.workdir} is not finished; run python -m oal_jax.main"
            f" --config FILE --workdir {context.workdir}"
        )


def _is_current(context: Context, stage: str) -> bool:
    """Whether a stage is finished, with the student that the run has now."""
    directory, trained = context.directory(stage), context.directory("train")
    if not all((place / artifacts.MANIFEST).exists() for place in (directory, trained)):
        return False
    if stage == "train":
        return True
    return artifacts.made_from(directory, "train") == artifacts.output_hashes(trained)


def _classifier(context: Context, name: str) -> tuple[dict[str, Any], Partial, Head]:
    """Contents of `classifier.json`, the student's forward function, and its last layer."""
    directory = context.directory("train")
    for file in (train.CLASSIFIER, train.STUDENT):
        artifacts.verified(directory, file)
    card = _card(directory / train.CLASSIFIER)
    try:
        net = student.network(context.config, len(card["class_names"]), card)
    except (KeyError, TypeError, ValueError):
        raise _other_form(directory / train.CLASSIFIER) from None
    variables = train.student_variables(*train.load(context))
    fc = variables["params"]["fc"]
    forward = make_forward(net, variables, post_hoc.make(name).needs)
    return card, forward, Head(np.asarray(fc["kernel"]), np.asarray(fc["bias"]))


def _card(path: Path) -> dict[str, Any]:
    """Contents of a `classifier.json` of this form."""
    card = artifacts.read_json(path)
    is_list = lambda x, kind: isinstance(x, list) and all(type(y) is kind for y in x)
    sound = (
        isinstance(card, dict)
        and is_list(card.get("class_names"), str)
        and is_list(card.get("image_shape"), int)
        and len(card["image_shape"]) == 3
        and min(card["image_shape"]) > 0
        and isinstance(card.get("architecture"), dict)
    )
    if not sound:
        raise _other_form(path)
    return card


def _other_form(path: Path) -> UserError:
    return UserError(f"{path} has another form than a run writes; {_REMEDY}")


def _fitted_file(name: str) -> str:
    return f"detectors/{name}.safetensors"


def _fitted(context: Context, name: str) -> tuple[dict[str, Any], State, np.ndarray]:
    """Parameters, state and ID validation ood_scores that the report saved."""
    directory = context.directory("report")
    tensors = artifacts.read_tensors(artifacts.verified(directory, _fitted_file(name)))
    path = artifacts.verified(directory, "parameters.json")
    params = artifacts.read_json(path)
    params = params.get(name, {}) if isinstance(params, dict) else None
    if not isinstance(params, dict):
        raise _other_form(path)
    params = {k: tuple(v) if isinstance(v, list) else v for k, v in params.items()}
    if "id_val_scores" not in tensors:
        raise _other_form(directory / _fitted_file(name))
    values = tensors.pop("id_val_scores")
    return params, {k.removeprefix("state."): v for k, v in tensors.items()}, values


def _fit(
    context: Context, score: Score, head: Head, forward: Partial
) -> tuple[State, Float[np.ndarray, " m"]]:
    """State and ID validation ood_scores of a score that is not in the run's config."""
    _check_finished(context, "evaluate")
    for file in artifacts.output_hashes(context.directory("evaluate")):
        artifacts.verified(context.directory("evaluate"), file)
    sets, size = evaluate.inputs(context), context.config.evaluation.batch_size
    mesh = context.mesh

    def outputs(inputs) -> Outputs:
        if all(getattr(inputs.outputs, field) is not None for field in score.needs):
            return inputs.outputs
        images = inputs.images()
        return post_hoc.compute(forward, images, size, score.needs, mesh)

    fitted_on = sets.id_train if score.fit_on == "train" else sets.id_val
    set_name = f"ID {score.fit_on}"
    state = post_hoc.fit(score, outputs(fitted_on), fitted_on.labels, head, set_name, mesh)
    if score.perturb:
        return state, run_detector(score, forward, state, sets.id_val.images(), size, mesh)[-1]
    return state, post_hoc.apply(score, state, outputs(sets.id_val), size, "ID val", mesh)
