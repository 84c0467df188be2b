"""Choice of a score's parameters on validation OOD sets. Test sets never enter.

The score is fitted again for every value, since parameters such as a number of components or a
percentile enter the state. OpenOOD v1.5 sets the attribute but uses the old state, so for such
parameters it compares a score with itself.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from oal_jax import scores as post_hoc
from oal_jax.errors import UserError
from oal_jax.evaluation import protocol
from oal_jax.evaluation.metrics import auroc
from oal_jax.evaluation.protocol import Inputs
from oal_jax.evaluation.tables import write_csv


class Trial(NamedTuple):
    """One point of the grid."""

    score: str
    params: dict[str, Any]
    auroc: float | None  # percent, mean over the validation OOD sets; None: the score refused
    chosen: bool = False
    refusal: str = ""  # why there is no auroc


def search(
    name: str,
    grid: Mapping[str, Sequence[Any]],
    id_train: Inputs,
    id_val: Inputs,
    validation_ood: Mapping[str, Inputs],
    head: post_hoc.Head | None = None,
    forward: post_hoc.Forward | None = None,
    batch_size: int = 512,
    mesh: Mesh | None = None,
) -> tuple[dict[str, Any], list[Trial]]:
    """The parameters with the highest mean AUROC of validation OOD sets against ID validation.

    Args:
      name: key of `scores.SCORES`.
      grid: parameter to its values, as in `scores.GRIDS`; their full product is tried, in order.
      id_train, id_val: ID sets as for `protocol.evaluate`.
      validation_ood: OOD sets for choosing, by name; disjoint from what is reported.
      head, forward, batch_size, mesh: as for `protocol.evaluate`.

    Returns:
      The best parameters, the first of equally good ones; and a `Trial` for each point. A trial of
      parameters that the score refuses, such as a `k` above the number of inputs, says why.

    Raises:
      UserError: an empty grid, no validation OOD sets, or every point is refused (first reason).
    """
    if not grid or not all(grid.values()):
        raise UserError(f"score {name!r} has no grid to search; leave it out of the search")
    if not validation_ood:
        raise UserError(
            "a search needs validation OOD sets and this benchmark has none; add some, or set"
            " evaluation.search=False"
        )
    trials = []
    for values in itertools.product(*grid.values()):
        params = dict(zip(grid, values, strict=True))
        try:
            score = post_hoc.make(name, **params)
            state = protocol.fit(score, id_train, id_val, head, mesh)
            sets = {"ID validation": id_val, **validation_ood}
            known, *unknown = (
                protocol.apply(score, state, data, forward, batch_size, set_name, mesh)
                for set_name, data in sets.items()
            )
        except UserError as error:
            trials.append(Trial(name, params, None, refusal=str(error)))
            continue
        mean = float(np.mean([auroc(known, scores) for scores in unknown]))
        trials.append(Trial(name, params, 100 * mean))
    tried = [trial for trial in trials if trial.auroc is not None]
    if not tried:
        raise UserError(f"no value of the grid of {name} can be used: {trials[0].refusal}")
    best = max(tried, key=lambda trial: trial.auroc)  # max keeps the first of equals
    return best.params, [trial._replace(chosen=trial is best) for trial in trials]


def describe(params: Mapping[str, Any]) -> str:
    """`k=50 power=2`: parameters on one line."""
    return " ".join(f"{key}={value}" for key, value in params.items())


def write_search(path: str | Path, trials: Sequence[Trial]) -> None:
    """Write `search.csv`, atomically: auroc in percent, empty where refused; chosen is 1 or 0."""
    lines = [(t.score, describe(t.params), t.auroc, int(t.chosen)) for t in trials]
    write_csv(path, lines, ("score", "parameters", "auroc", "chosen"))
