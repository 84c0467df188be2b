"""Post-hoc OOD scores: one file a family, one registry of factories over all of them.

A new family is a file with its own `SCORES` dict and one more line in the registry below.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable

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


# Cached, so that the same score with the same parameters is the same function to jit.
@functools.cache
def make(name: str, **params) -> Score:
    """The score called `name` with these parameters.

    Args:
      name: a key of `SCORES`.
      **params: parameters of its factory, such as `k` of `knn`.

    Raises:
      UserError: no such score or parameter (names the nearest), or a parameter out of range.
    """
    if name not in SCORES:
        raise UserError(f"no score called {name!r}; {_nearest(name, SCORES)}")
    known = inspect.signature(SCORES[name]).parameters
    for param in params:
        if param not in known:
            raise UserError(f"score {name!r} has no parameter {param!r}; {_nearest(param, known)}")
    return SCORES[name](**params)._replace(name=name)


def needed(names: Iterable[str]) -> set[str]:
    """The fields of `Outputs`, besides the logits, that any of these scores reads."""
    return {field for name in names for field in make(name).needs}


def _nearest(name, known) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known) or 'none'}"
