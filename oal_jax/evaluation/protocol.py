"""The protocol: fit a score on ID inputs, set its threshold, score all sets, compare with ID test.

Near and far sets are reported. Validation sets choose hyper-parameters. Covariate-shifted ID sets
("csid": the ID classes under noise or in another style) answer two questions: how a score treats
them, and how well it separates near and far sets from all ID inputs, shifted or not. The second is
the full-spectrum setting of OpenOOD (Yang et al., arXiv 2204.05306, section 3).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from oal_jax import scores as post_hoc
from oal_jax.errors import UserError
from oal_jax.evaluation import tables
from oal_jax.evaluation.metrics import METRICS, id_accuracy, ood_metrics
from oal_jax.evaluation.tables import MEANS, Row, Shifted, with_means
from oal_jax.runtime.artifacts import write_json, write_tensors

CSID = "csid"  # the group of covariate-shifted ID sets
GROUPS = (*MEANS, CSID)


class Inputs(NamedTuple):
    """One set: the classifier's outputs, and its images and labels where they are needed."""

    outputs: post_hoc.Outputs
    # Called only for scores that move the images along a gradient, and for pictures.
    images: Callable[[], np.ndarray] | None = None  # (n, h, w, c), uint8 or floats in [0, 1]
    labels: Int[np.ndarray, " n"] | None = None  # class indices; of ID and csid sets


class Evaluation(NamedTuple):
    """Results for tables, the report and a detector. Dicts are keyed by score name."""

    rows: list[Row]  # near and far sets, then their means
    validation_rows: list[Row]  # validation sets, then their mean
    id_scores: dict[str, np.ndarray]  # ood_scores of ID test
    ood_scores: dict[str, dict[str, np.ndarray]]  # score -> near, far, validation set -> ood_scores
    thresholds: dict[str, float]  # an input with a higher ood_score is OOD
    states: dict[str, post_hoc.State]
    id_val_scores: dict[str, np.ndarray]  # ood_scores of ID validation, sorted
    csid_scores: dict[str, dict[str, np.ndarray]]  # score -> csid set -> ood_scores
    csid_rows: list[Shifted]  # empty without csid sets
    full_spectrum_rows: list[Row]  # as `rows`, against ID test and csid sets; empty without them
    params: dict[str, dict[str, Any]]  # parameters of each score that differ from its defaults
    refused: dict[str, str]  # score -> why it can't be computed here; in no other field


def evaluate(
    score_names: Sequence[str],
    id_train: Inputs,
    id_val: Inputs,
    id_test: Inputs,
    ood: Mapping[str, Inputs],
    groups: Mapping[str, str],
    head: post_hoc.Head | None = None,
    forward: post_hoc.Forward | None = None,
    params: Mapping[str, Mapping[str, Any]] | None = None,
    keep: float = 0.95,
    batch_size: int = 512,
    mesh: Mesh | None = None,
    leave_out_refused: bool = False,
) -> Evaluation:
    """Run the protocol.

    Args:
      score_names: keys of `scores.SCORES`; no name twice.
      id_train: labelled set to fit scores on, except those with `fit_on="validation"`.
      id_val: labelled set for the thresholds, and for scores with `fit_on="validation"`.
      id_test: labelled set that every OOD set is compared with.
      ood: the other sets by name, csid sets among them.
      groups: "near", "far", "validation" or "csid" for each of `ood`. Validation sets have rows of
        their own and enter no near or far mean.
      head: the last linear layer, for scores that read it.
      forward: float images in [0, 1] to `Outputs`, for scores with `perturb`; these read the images
        of all sets but `id_train`.
      params: parameters of scores, by score name.
      keep: share of ID validation inputs that a threshold keeps.
      batch_size: inputs a call of a score.
      mesh: the devices; None for all.
      leave_out_refused: go on without a score that can't be fitted or gives NaN, such as `knn` with
        fewer inputs than k, and say why in `refused`.

    Raises:
      UserError: an unknown score, a set without a group or with the name of a mean row, a NaN,
        missing labels, or a missing head, output, image or forward function that a score needs; or
        every score is refused (first reason).
    """
    params = params or {}
    _check_names(score_names, ood, groups, params)
    csid = [name for name in ood if groups[name] == CSID]
    for name, data in {"ID test": id_test, **{name: ood[name] for name in csid}}.items():
        if data.labels is None:
            raise UserError(f"set {name} has no labels; give its class indices")
    accuracies = {name: accuracy(ood[name]) for name in csid}
    id_only = accuracy(id_test)
    sizes = [len(data.outputs.logits) for data in (id_test, *(ood[name] for name in csid))]
    spectrum = float(np.average([id_only, *accuracies.values()], weights=sizes))
    order = [name for group in MEANS for name in ood if groups[name] == group]
    result = Evaluation([], [], {}, {}, {}, {}, {}, {}, [], [], {}, {})
    rows, full = [], []
    for score_name in score_names:
        chosen = dict(params.get(score_name, {}))
        score = post_hoc.make(score_name, **chosen)
        try:
            state = fit(score, id_train, id_val, head, mesh)

            def on(data, set_name, score=score, state=state):
                return apply(score, state, data, forward, batch_size, set_name, mesh)

            id_scores = on(id_test, "ID test")
            val_scores = np.sort(on(id_val, "ID validation"))
            ood_scores = {name: on(ood[name], name) for name in order}
            csid_scores = {name: on(ood[name], name) for name in csid}
        except UserError as error:
            if not leave_out_refused:
                raise
            result.refused[score_name] = str(error)
            continue
        limit = threshold(val_scores, keep)
        everything = np.concatenate([id_scores, *csid_scores.values()])
        for name, values in ood_scores.items():
            rows.append(_row(score_name, name, groups[name], id_scores, values, id_only))
            if csid and groups[name] != "validation":
                full.append(_row(score_name, name, groups[name], everything, values, spectrum))
        for name, values in csid_scores.items():
            rejected = 100 * float(np.mean(values > limit))
            result.csid_rows.append(Shifted(score_name, name, accuracies[name], rejected))
        result.id_scores[score_name] = id_scores
        result.ood_scores[score_name] = ood_scores
        result.thresholds[score_name] = limit
        result.states[score_name] = state
        result.id_val_scores[score_name] = val_scores
        result.csid_scores[score_name] = csid_scores
        result.params[score_name] = chosen
    if len(result.refused) == len(score_names):
        raise UserError(f"no score can be computed: {next(iter(result.refused.values()))}")
    test = [row for row in rows if row.group != "validation"]
    validation = [row for row in rows if row.group == "validation"]
    return result._replace(
        rows=with_means(test, ("near", "far")),
        validation_rows=with_means(validation, ("validation",)),
        full_spectrum_rows=with_means(full, ("near", "far")),
    )


def fit(
    score: post_hoc.Score,
    id_train: Inputs,
    id_val: Inputs,
    head: post_hoc.Head | None,
    mesh: Mesh | None = None,
) -> post_hoc.State:
    """`scores.fit` on the ID set that `score.fit_on` names.

    Raises:
      UserError: the set has no labels; and as `scores.fit`.
    """
    on_validation = score.fit_on == "validation"
    data, name = (id_val, "ID validation") if on_validation else (id_train, "ID train")
    if data.labels is None:
        raise UserError(f"{score.name}: {name} has no labels; give its class indices")
    return post_hoc.fit(score, data.outputs, data.labels, head, name, mesh)


def apply(
    score: post_hoc.Score,
    state: post_hoc.State,
    data: Inputs,
    forward: post_hoc.Forward | None,
    batch_size: int,
    set_name: str,
    mesh: Mesh | None = None,
) -> Float[np.ndarray, " n"]:
    """The ood_score of every input of a set: from its outputs, or from its images for `perturb`.

    Raises:
      UserError: the score needs a field, the images or `forward`, which are missing; or a NaN.
    """
    if score.perturb is None:
        values = post_hoc.apply(score, state, data.outputs, batch_size, set_name, mesh)
    elif forward is None or data.images is None:
        raise UserError(
            f"{score.name} moves the images along a gradient: give the images of {set_name} and the"
            " model's forward function, or take another score"
        )
    else:
        images = data.images()
        values = post_hoc.apply_to_images(score, state, forward, images, batch_size, mesh)
        count = len(data.outputs.logits)
        if len(values) != count:
            raise UserError(
                f"{score.name}: {set_name} has {len(values)} images but {count} outputs"
            )
    if np.isnan(values).any():
        raise UserError(
            f"{score.name}: {int(np.isnan(values).sum())} of {len(values)} ood_scores of {set_name}"
            " are NaN; look for extreme values in its outputs"
        )
    return values


def accuracy(data: Inputs) -> float:
    """Percentage of a labelled set's inputs whose largest logit is that of their class."""
    return 100 * id_accuracy(np.asarray(data.outputs.logits), data.labels)


def threshold(id_val_scores: Float[np.ndarray, " n"], keep: float = 0.95) -> float:
    """The lowest ood_score that keeps at least the share `keep` of ID validation inputs.

    An input is OOD where its ood_score is *above* the threshold. The threshold is one of the
    scores, and inputs that tie with it are ID.

    Raises:
      ValueError: no scores, a NaN, or `keep` not in (0, 1].
    """
    scores = np.sort(np.asarray(id_val_scores).ravel())
    if not len(scores) or np.isnan(scores).any() or not 0 < keep <= 1:
        raise ValueError(f"no threshold from {len(scores)} scores (NaN?) with keep={keep}")
    # 1e-9: rounding may bring 0.95 * n just above a whole number.
    return float(scores[max(int(np.ceil(keep * len(scores) - 1e-9)), 1) - 1])


def rejected(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Score -> set -> percentage of the set above the threshold; "ID validation", "ID test" first.

    For ID validation it is at most `100 * (1 - keep)` by construction. The difference to ID test
    shows how well the threshold transfers.
    """
    shares = {}
    for name, limit in evaluation.thresholds.items():
        sets = {"ID validation": evaluation.id_val_scores[name]}
        sets |= {"ID test": evaluation.id_scores[name]}
        sets |= evaluation.csid_scores[name] | evaluation.ood_scores[name]
        shares[name] = {key: 100 * float(np.mean(values > limit)) for key, values in sets.items()}
    return shares


def write_tables(folder: str | Path, evaluation: Evaluation) -> list[Path]:
    """Write the results into `folder`; return the files.

    `ood.csv`; `validation.csv`, `fullspectrum.csv` and `csid.csv` where there are such sets; for
    each score `openood/SCORE.csv` in OpenOOD's layout.
    """
    folder = Path(folder)
    written = {"ood": evaluation.rows}
    optional = {
        "validation": evaluation.validation_rows,
        "fullspectrum": evaluation.full_spectrum_rows,
    }
    written |= {name: rows for name, rows in optional.items() if rows}
    for name, rows in written.items():
        tables.write_csv(folder / f"{name}.csv", rows)
    paths = [folder / f"{name}.csv" for name in written]
    if evaluation.csid_rows:
        paths.append(folder / "csid.csv")
        tables.write_csv(paths[-1], evaluation.csid_rows, Shifted._fields)
    for score in evaluation.thresholds:
        paths.append(folder / "openood" / f"{score}.csv")
        tables.write_openood(paths[-1], evaluation.rows, score)
    return paths


def write_detectors(folder: str | Path, evaluation: Evaluation) -> list[Path]:
    """Write into `folder` what `detection.load` reads; return the files.

    `thresholds.json`: {score: threshold}. `parameters.json`: {score: {parameter: value}}.
    `detectors/SCORE.safetensors`: `state.KEY` for each key of the state, and the sorted float32
    `id_val_scores`, from which any other threshold follows.
    """
    folder = Path(folder)
    paths = [folder / "thresholds.json", folder / "parameters.json"]
    write_json(paths[0], evaluation.thresholds)
    write_json(paths[1], evaluation.params)
    for score, state in evaluation.states.items():
        tensors = {f"state.{key}": np.asarray(value) for key, value in state.items()}
        tensors["id_val_scores"] = evaluation.id_val_scores[score].astype(np.float32)
        paths.append(folder / "detectors" / f"{score}.safetensors")
        write_tensors(paths[-1], tensors)
    return paths


def _row(score, name, group, id_scores, values, percent_right) -> Row:
    metrics = ood_metrics(id_scores, values)
    return Row(score, name, group, *(100 * metrics[m] for m in METRICS), percent_right)


def _check_names(score_names, ood, groups, params) -> None:
    if len(set(score_names)) != len(score_names):
        raise UserError(f"a score is listed twice: {', '.join(score_names)}")
    for name in params:
        if name not in score_names:
            raise UserError(f"parameters for score {name!r}, which is not evaluated")
    for name in ood:
        if groups.get(name) not in GROUPS:
            raise UserError(
                f"OOD set {name!r} needs a group out of {', '.join(GROUPS)}, got {groups.get(name)}"
            )
        if name in MEANS.values():
            raise UserError(f"OOD set {name!r} has the name of a mean row; call it otherwise")
