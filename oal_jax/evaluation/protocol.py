"""The near/far protocol: fit a score once on ID train, score all sets, compare with ID test."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from oal_jax import scores as post_hoc
from oal_jax.errors import UserError
from oal_jax.evaluation.metrics import METRICS, id_accuracy, ood_metrics
from oal_jax.evaluation.tables import MEANS, Row, with_means, write_csv


class Labelled(NamedTuple):
    """Outputs of an ID set and its class indices."""

    outputs: post_hoc.Outputs
    labels: Int[np.ndarray, " n"]


class Evaluation(NamedTuple):
    """Everything that tables, the report and a detector need; dicts are keyed by score name."""

    rows: list[Row]  # near and far sets, then their means
    validation_rows: list[Row]  # validation sets, then their mean
    id_scores: dict[str, np.ndarray]  # ood_scores of ID test
    ood_scores: dict[str, dict[str, np.ndarray]]  # score -> set -> ood_scores
    thresholds: dict[str, float]  # an input is OOD where its ood_score is above
    states: dict[str, post_hoc.State]


def evaluate(
    score_names: Sequence[str],
    id_train: Labelled,
    id_val: Labelled,
    id_test: Labelled,
    ood: Mapping[str, post_hoc.Outputs],
    groups: Mapping[str, str],
    head: post_hoc.Head,
    params: Mapping[str, Mapping[str, object]] | None = None,
    keep: float = 0.95,
    batch_size: int = 512,
) -> Evaluation:
    """Runs the protocol.

    Args:
      score_names: keys of `scores.SCORES`; no name twice.
      id_train: what scores are fitted on.
      id_val: what thresholds are set on.
      id_test: what every OOD set is compared with.
      ood: the OOD sets by name.
      groups: "near", "far" or "validation" for each of them. Validation sets are for choosing
        hyper-parameters: they get rows of their own and enter no near or far mean.
      head: the last linear layer.
      params: parameters of scores, by score name.
      keep: share of ID validation inputs that a threshold keeps.
      batch_size: inputs a call of a score.

    Raises:
      UserError: an unknown score, a set without a group, a set called like a mean row, a NaN.
    """
    params = params or {}
    _check_names(score_names, ood, groups, params)
    accuracy = id_accuracy(np.asarray(id_test.outputs.logits), id_test.labels)
    order = [name for group in MEANS for name in ood if groups[name] == group]
    rows, id_scores, ood_scores, thresholds, states = [], {}, {}, {}, {}
    for score_name in score_names:
        score = post_hoc.make(score_name, **params.get(score_name, {}))
        state = post_hoc.fit(score, id_train.outputs, id_train.labels, head)

        def on(outputs, set_name, score=score, state=state):
            return post_hoc.apply(score, state, outputs, batch_size, set_name)

        id_scores[score_name] = on(id_test.outputs, "ID test")
        thresholds[score_name] = threshold(on(id_val.outputs, "ID val"), keep)
        ood_scores[score_name] = {name: on(ood[name], name) for name in order}
        states[score_name] = state
        for name, values in ood_scores[score_name].items():
            metrics = ood_metrics(id_scores[score_name], values)
            percent = [100 * metrics[m] for m in METRICS]
            rows.append(Row(score_name, name, groups[name], *percent, 100 * accuracy))
    test = [row for row in rows if row.group != "validation"]
    validation = [row for row in rows if row.group == "validation"]
    return Evaluation(
        rows=with_means(test, ("near", "far")),
        validation_rows=with_means(validation, ("validation",)),
        id_scores=id_scores,
        ood_scores=ood_scores,
        thresholds=thresholds,
        states=states,
    )


def threshold(id_val_scores: Float[np.ndarray, " n"], keep: float = 0.95) -> float:
    """The lowest ood_score that keeps at least the share `keep` of ID validation inputs.

    An input is called OOD where its ood_score is *above* the threshold, so the threshold itself is
    one of the scores and ties with it are kept.

    Raises:
      ValueError: no scores, a NaN, or `keep` not in (0, 1].
    """
    scores = np.sort(np.asarray(id_val_scores).ravel())
    if not len(scores) or np.isnan(scores).any() or not 0 < keep <= 1:
        raise ValueError(f"no threshold from {len(scores)} scores (NaN?) with keep={keep}")
    # The margin is against 0.95 * n coming out a hair above a whole number.
    return float(scores[max(int(np.ceil(keep * len(scores) - 1e-9)), 1) - 1])


def write_tables(folder: str | Path, evaluation: Evaluation) -> None:
    """Writes `ood.csv`, and `validation.csv` where there are validation sets, into `folder`."""
    write_csv(Path(folder) / "ood.csv", evaluation.rows)
    if evaluation.validation_rows:
        write_csv(Path(folder) / "validation.csv", evaluation.validation_rows)


def _check_names(score_names, ood, groups, params) -> None:
    if len(set(score_names)) != len(score_names):
        raise UserError(f"a score is listed twice: {', '.join(score_names)}")
    for name in params:
        if name not in score_names:
            raise UserError(f"parameters for score {name!r}, which is not evaluated")
    for name in ood:
        if groups.get(name) not in MEANS:
            raise UserError(
                f"OOD set {name!r} needs a group out of {', '.join(MEANS)}, got {groups.get(name)}"
            )
        if name in MEANS.values():
            raise UserError(f"OOD set {name!r} has the name of a mean row; call it otherwise")
