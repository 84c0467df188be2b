"""Post-hoc OOD scores: one file a family, one registry of factories over all of them.

A new family is a file with its own `SCORES` dict and one more line in the registry below.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from oal_jax.errors import UserError
from oal_jax.scores import (
    gradnorm,
    gram,
    kl_matching,
    knn,
    logits,
    mahalanobis,
    odin,
    openmax,
    prototypes,
    shaping,
    subspace,
    temperature,
)
from oal_jax.scores.base import Head, Score, State, apply, apply_to_images, fit
from oal_jax.scores.outputs import FIELDS, Forward, Outputs, compute, summarise
from oal_jax.scores.parameters import checked, nearest

SCORES: dict[str, Callable[..., Score]] = {
    **logits.SCORES,
    **temperature.SCORES,
    **shaping.SCORES,
    **odin.SCORES,
    **gradnorm.SCORES,
    **openmax.SCORES,
    **kl_matching.SCORES,
    **knn.SCORES,
    **mahalanobis.SCORES,
    **subspace.SCORES,
    **prototypes.SCORES,
    **gram.SCORES,
}

# For each score that has any, the values of its parameters that a search tries.
GRIDS: dict[str, dict[str, tuple]] = {
    **logits.GRIDS,
    **temperature.GRIDS,
    **shaping.GRIDS,
    **odin.GRIDS,
    **gradnorm.GRIDS,
    **openmax.GRIDS,
    **kl_matching.GRIDS,
    **knn.GRIDS,
    **mahalanobis.GRIDS,
    **subspace.GRIDS,
    **prototypes.GRIDS,
    **gram.GRIDS,
}

__all__ = [
    "FIELDS",
    "GRIDS",
    "SCORES",
    "Forward",
    "Head",
    "Outputs",
    "Score",
    "State",
    "apply",
    "apply_to_images",
    "compute",
    "fit",
    "make",
    "needed",
    "summarise",
]


def make(name: str, **params) -> Score:
    """The score called `name` with these parameters.

    Args:
      name: a key of `SCORES`.
      **params: parameters of its factory, such as `k` of `knn`.

    Raises:
      UserError: no such score or parameter (names the nearest), another type, or out of range.
    """
    if not isinstance(name, str) or name not in SCORES:
        raise UserError(f"no score called {name!r}; {nearest(name, SCORES)}")
    values = checked(name, SCORES[name], params)
    return _make(name, tuple(sorted(values.items())))


# Cached, so that the same score with the same parameters is the same function to jit. The values
# have the declared types: 5 and 5.0, which are equal as keys, both arrive as 5.
@functools.cache
def _make(name: str, params: tuple[tuple[str, Any], ...]) -> Score:
    return SCORES[name](**dict(params))._replace(name=name)


def needed(names: Iterable[str]) -> set[str]:
    """The fields of `Outputs`, besides the logits, that any of these scores reads."""
    return {field for name in names for field in make(name).needs}
