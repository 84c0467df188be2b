"""The headline score of a run, chosen on its validation OOD sets, and what speaks against it.

The headline is the score with the highest mean AUROC of the validation OOD sets against ID
validation. Test sets never enter. It is what the page shows first, and what a detector uses unless
another score is named.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from oal_jax.errors import UserError
from oal_jax.evaluation.metrics import auroc
from oal_jax.runtime import artifacts

if TYPE_CHECKING:  # these import JAX, which a comparison of runs does not need
    from oal_jax.evaluation.protocol import Evaluation, Inputs

FILE = "headline.json"
_LOW_AUROC = 60.0  # percent; below it a detector is of no use
FEW_STEPS = 100
_ROWS = 2000  # training features that are enough to see a degenerate fit
_EMPTY = 1e-4  # length of a residual as a share of the features'


class Headline(NamedTuple):
    """The chosen score. The AUROCs are in percent, and None without validation OOD sets."""

    score: str
    validation_auroc: float | None  # mean over the sets
    runner_up: str | None
    margin: float | None  # validation_auroc less that of the runner-up
    warnings: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """Why this score, in one sentence."""
        if self.validation_auroc is None:
            return "the first of evaluation.scores, as there are no validation OOD sets"
        reason = f"mean AUROC {self.validation_auroc:.2f} on the validation OOD sets"
        if self.runner_up is None:
            return f"{reason}; no other score was computed"
        if not self.margin:
            return f"{reason}, as {self.runner_up}, which comes after it in evaluation.scores"
        return f"{reason}, {self.margin:.2f} above {self.runner_up}"


def validation_aurocs(
    evaluation: "Evaluation", groups: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """Score -> validation OOD set -> AUROC against ID validation, in percent."""
    return {
        score: {
            name: 100 * auroc(evaluation.id_val_scores[score], values)
            for name, values in sets.items()
            if groups[name] == "validation"
        }
        for score, sets in evaluation.ood_scores.items()
    }


def choose(aurocs: Mapping[str, Mapping[str, float]], warnings: Sequence[str] = ()) -> Headline:
    """The score with the highest mean AUROC; the first of equal ones, to two decimals.

    Args:
      aurocs: score -> validation OOD set -> AUROC in percent, the scores in the order of the
        config. Without sets the first score is the headline.
      warnings: of the run; that of a low headline is added.
    """
    first = next(iter(aurocs))
    if not aurocs[first]:
        return Headline(first, None, None, None, tuple(warnings))
    means = {score: round(float(np.mean(list(v.values()))), 2) for score, v in aurocs.items()}
    best, *others = sorted(means, key=lambda score: -means[score])  # equal ones keep their order
    runner_up = others[0] if others else None
    margin = round(means[best] - means[runner_up], 2) if runner_up else None
    if means[best] < _LOW_AUROC:
        warnings = (
            f"the best score, {best}, has an AUROC of {means[best]:.1f} on the validation OOD sets:"
            " this detector is close to guessing",
            *warnings,
        )
    return Headline(best, means[best], runner_up, margin, tuple(warnings))


def run_warnings(accuracy: float, labels: np.ndarray, steps: int) -> list[str]:
    """What makes the classifier itself doubtful.

    Args:
      accuracy: on ID test, in percent.
      labels: of ID test.
      steps: optimizer steps of the training.
    """
    warnings = []
    chance = 100 * np.bincount(labels).max() / len(labels)
    if accuracy < chance + 0.1 * (100 - chance):
        warnings.append(
            f"ID accuracy {accuracy:.1f} % is near chance ({chance:.1f} % for always guessing the"
            " largest class): the classifier has learned little, and no score of it can be trusted"
        )
    if steps < FEW_STEPS:
        warnings.append(
            f"the training took {steps} optimizer steps, fewer than {FEW_STEPS}: raise"
            " train.epochs or lower train.batch_size"
        )
    return warnings


def fit_warnings(evaluation: "Evaluation", id_train: "Inputs") -> list[str]:
    """Scores that were left out, or whose fit on the training images is degenerate."""
    warnings = [f"{score} is left out: {why}" for score, why in evaluation.refused.items()]
    singular = []
    for score, state in evaluation.states.items():
        if _is_constant(evaluation, score):
            warnings.append(f"{score} is degenerate: it gives every image the same ood_score")
        elif "outside" in state and _residual_is_empty(state, id_train.outputs.features):
            same = ", so it ranks as energy does" if score == "vim" else ""
            warnings.append(
                f"{score} is degenerate: the training features lie inside its principal subspace"
                f"{same}"
            )
        elif score == "knn" and (k := _neighbour(evaluation)) > (most := _largest_class(id_train)):
            warnings.append(
                f"knn: k={k} is more than the {most} training images of the largest class, so the"
                " k-th neighbour is of another class; a smaller k or another score says more"
            )
        elif share := _singular_share(state, evaluation.params.get(score, {})):
            singular.append((score, share))
    if singular:
        width = id_train.outputs.features.shape[1]
        directions = max(share for _, share in singular)
        warnings.append(
            f"{', '.join(score for score, _ in singular)}: the covariance of"
            f" {len(id_train.outputs.logits)} training features of width {width} is singular; in"
            f" {100 * directions:.0f} % of the directions they do not vary, and the distance there"
            " is a guess"
        )
    return warnings


def write(folder: Path, headline: Headline) -> Path:
    """Write `headline.json` into a folder; return the file."""
    artifacts.write_json(folder / FILE, headline._asdict())
    return folder / FILE


def read(folder: Path) -> Headline | None:
    """The headline of a report; None if an older version wrote the report."""
    if not (folder / FILE).is_file():
        return None
    path = artifacts.verified(folder, FILE)
    values: Any = artifacts.read_json(path)
    kinds = {"score": str, "runner_up": str | None, "warnings": list}
    kinds |= dict.fromkeys(("validation_auroc", "margin"), float | int | None)
    sound = isinstance(values, dict) and values.keys() == kinds.keys()
    if not (sound and all(isinstance(values[name], kind) for name, kind in kinds.items())):
        raise UserError(f"{path} has another form than a report writes; run stage report again")
    return Headline(**values | {"warnings": tuple(map(str, values["warnings"]))})


def _is_constant(evaluation: "Evaluation", score: str) -> bool:
    values = [evaluation.id_val_scores[score], evaluation.id_scores[score]]
    values += evaluation.ood_scores[score].values()
    return len({float(end) for v in values for end in (v.min(), v.max())}) == 1


def _neighbour(evaluation: "Evaluation") -> int:
    from oal_jax.scores.knn import NEIGHBOUR, neighbours  # imports JAX

    bank = evaluation.states["knn"]["bank"]
    return neighbours(evaluation.params["knn"].get("k"), NEIGHBOUR, bank)


def _largest_class(id_train: "Inputs") -> int:
    return int(np.bincount(id_train.labels).max())


def _residual_is_empty(state: Mapping[str, Any], features: np.ndarray) -> bool:
    """Whether training features have nothing outside the subspace of `vim` and `residual`."""
    rows = features[:: -(-len(features) // _ROWS)]
    centred = np.asarray(rows, np.float64) - np.asarray(state["origin"], np.float64)
    outside = centred @ np.asarray(state["outside"], np.float64)
    return bool(np.linalg.norm(outside) <= _EMPTY * np.linalg.norm(centred))


def _singular_share(state: Mapping[str, Any], params: Mapping[str, Any]) -> float:
    """Share of the directions whose variance `mahalanobis` and its kin had to raise."""
    if "whiten" not in state:
        return 0.0
    # A column's length is the inverse root of a variance, and the largest that of the floor.
    inverse = np.sum(np.asarray(state["whiten"], np.float64) ** 2, axis=0)
    raised = inverse > 0.99 / params.get("floor", 1e-6) * inverse.min()
    return float(np.mean(raised))
