"""OOD detection metrics: exact, in float64, ties included, all from one sort.

OOD is the positive class and a higher score means more OOD. Tied scores share one threshold. All
values are shares in [0, 1]; tables show them in percent.

The literature calls two metrics FPR95, and both are here: `fpr_at_95_ood_tpr` (OpenOOD v1.5 and the
OAL code: share of ID rejected when 95 % of OOD is caught) and `fpr_at_95_id_tpr` (the classic one:
share of OOD accepted when 95 % of ID is accepted).

In `aupr_in` ID is the positive class, in `aupr_out` OOD is. The official OAL code and early
versions of OpenOOD have the two names swapped.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

METRICS = ("auroc", "aupr_in", "aupr_out", "fpr_at_95_ood_tpr", "fpr_at_95_id_tpr")


class Curve(NamedTuple):
    """Counts above every threshold, from above the highest score down to below the lowest.

    At point i an input counts as OOD where its score is among the i highest distinct ones: none at
    point 0, all at the last point.
    """

    ood_above: Float[np.ndarray, " t"]  # OOD inputs that count as OOD
    id_above: Float[np.ndarray, " t"]  # ID inputs that count as OOD

    @property
    def ood_rate(self) -> Float[np.ndarray, " t"]:
        """Share of OOD inputs that count as OOD: the true positive rate of the ROC curve."""
        return self.ood_above / self.ood_above[-1]

    @property
    def id_rate(self) -> Float[np.ndarray, " t"]:
        """Share of ID inputs that count as OOD: the false positive rate of the ROC curve."""
        return self.id_above / self.id_above[-1]


def curve(id_scores, ood_scores) -> Curve:
    """Counts above every threshold, from one sort of both sets' ood_scores.

    Args:
      id_scores: (n,) ood_scores of ID inputs.
      ood_scores: (m,) ood_scores of OOD inputs.

    Raises:
      ValueError: an empty set, a NaN, or not one axis.
    """
    id_scores = checked(id_scores, "id_scores")
    ood_scores = checked(ood_scores, "ood_scores")
    scores = np.concatenate([id_scores, ood_scores])
    order = np.argsort(-scores)
    is_ood = order >= len(id_scores)
    ranked = scores[order]
    last_of_tie = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
    ood_above = np.cumsum(is_ood)[last_of_tie]
    id_above = last_of_tie + 1 - ood_above
    return Curve(*(np.concatenate([[0.0], x]) for x in (ood_above, id_above)))


def ood_metrics(id_scores, ood_scores) -> dict[str, float]:
    """All `METRICS` by name, as shares in [0, 1], from one sort.

    Args:
      id_scores: (n,) ood_scores of ID inputs.
      ood_scores: (m,) ood_scores of OOD inputs.

    Raises:
      ValueError: an empty set, a NaN, or not one axis.
    """
    c = curve(id_scores, ood_scores)
    return {
        "auroc": float(np.trapezoid(c.ood_rate, c.id_rate)),
        "aupr_in": _aupr(c.id_above[-1] - c.id_above[::-1], c.ood_above[-1] - c.ood_above[::-1]),
        "aupr_out": _aupr(c.ood_above, c.id_above),
        "fpr_at_95_ood_tpr": float(c.id_rate[np.argmax(c.ood_rate >= 0.95)]),
        "fpr_at_95_id_tpr": _fpr_at_95_id_tpr(c),
    }


def auroc(id_scores, ood_scores) -> float:
    """Area under the ROC curve: P(OOD score > ID score) + P(equal) / 2; arguments of `curve`."""
    return ood_metrics(id_scores, ood_scores)["auroc"]


def aupr_in(id_scores, ood_scores) -> float:
    """Area under precision-recall, ID positive, ranked by -ood_score; arguments of `curve`.

    Trapezoids, as sklearn's `auc(recall, precision)`. The official OAL code calls this AUPR_OUT.
    """
    return ood_metrics(id_scores, ood_scores)["aupr_in"]


def aupr_out(id_scores, ood_scores) -> float:
    """Area under precision-recall, OOD positive; arguments of `curve`.

    Trapezoids, as sklearn's `auc(recall, precision)`. The official OAL code calls this AUPR_IN.
    """
    return ood_metrics(id_scores, ood_scores)["aupr_out"]


def fpr_at_95_ood_tpr(id_scores, ood_scores) -> float:
    """Share of ID rejected at the highest threshold that catches >= 95 % of OOD (OpenOOD v1.5).

    Arguments of `curve`. OpenOOD reads it off sklearn's thinned curve (`drop_intermediate=True`),
    which can miss the first such point on a diagonal piece of ties; this one does not.
    """
    return ood_metrics(id_scores, ood_scores)["fpr_at_95_ood_tpr"]


def fpr_at_95_id_tpr(id_scores, ood_scores) -> float:
    """Share of OOD accepted at the lowest threshold that accepts >= 95 % of ID (classic FPR95).

    Arguments of `curve`.
    """
    return ood_metrics(id_scores, ood_scores)["fpr_at_95_id_tpr"]


def id_accuracy(logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> float:
    """Share of ID inputs whose largest logit is that of their class, in [0, 1].

    Raises:
      ValueError: no inputs, a NaN, or lengths that differ.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"logits {logits.shape} and labels {labels.shape} do not go together")
    if np.isnan(logits).any():
        raise ValueError("logits hold NaN")
    return float(np.mean(np.argmax(logits, axis=1) == labels))


def checked(scores, name: str) -> Float[np.ndarray, " n"]:
    """Scores as float64 with one axis; a `ValueError` that names them if empty or with a NaN."""
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"{name} must have one axis and at least one entry, got {scores.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"{name} hold {int(np.isnan(scores).sum())} NaN")
    return scores


def _aupr(hits: np.ndarray, misses: np.ndarray) -> float:
    """Trapezoid area; `hits` and `misses` count positives and negatives among the first ranks."""
    # At the first point precision is 0 / 0; by convention it is 1.
    precision = np.append(1.0, hits[1:] / (hits[1:] + misses[1:]))
    return float(np.trapezoid(precision, hits / hits[-1]))


def _fpr_at_95_id_tpr(c: Curve) -> float:
    accepted = (c.id_above[-1] - c.id_above) / c.id_above[-1]
    lowest = np.flatnonzero(accepted >= 0.95)[-1]
    return float((c.ood_above[-1] - c.ood_above[lowest]) / c.ood_above[-1])
