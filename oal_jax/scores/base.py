"""What a post-hoc score is, and how one is fitted and applied.

A score is a NamedTuple of two pure functions. `fit` turns the outputs of the ID training set into a
state, a dict of arrays that can be saved, sharded and exported; `score` turns a state and the
outputs of any inputs into one `ood_score` an input. **Higher always means more OOD.** Parameters go
into the factory that makes the score, and from there into the state or the shapes, so a search over
them can never read a state that was fitted with other ones.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from oal_jax.errors import UserError

State = Mapping[str, Array]


class Outputs(NamedTuple):
    """What a classifier says about n inputs: everything that a post-hoc score may look at."""

    logits: Float[Array, "n c"]
    features: Float[Array, "n d"]  # the input of the last linear layer


class Head(NamedTuple):
    """The last linear layer: `logits = features @ kernel + bias`."""

    kernel: Float[Array, "d c"]
    bias: Float[Array, " c"]


class Score(NamedTuple):
    """A post-hoc OOD score; see the docstring of the module.

    `fit(outputs, labels, head) -> state` runs once, on the host, on the ID training set.
    `score(state, outputs) -> (n,)` is traceable, works row by row, and gives ood_scores.
    """

    fit: Callable[[Outputs, Int[Array, " n"], Head], State]
    score: Callable[[State, Outputs], Float[Array, " n"]]
    needs_features: bool = False
    name: str = ""  # for messages; `make` sets it


def fit(score: Score, outputs: Outputs, labels, head: Head, set_name: str = "ID train") -> State:
    """Checks the outputs of the training set, then fits `score` on them.

    Args:
      score: from `oal_jax.scores.make`.
      outputs: of n ID training inputs.
      labels: (n,) class indices.
      head: the last linear layer of the classifier.
      set_name: how messages call the set.

    Returns:
      The state, a dict of arrays on the default device.

    Raises:
      UserError: wrong shapes, a NaN or an infinity in the outputs, or too few inputs for the score.
    """
    outputs = _checked(score, outputs, set_name)
    labels = np.asarray(labels)
    if labels.shape != (len(outputs.logits),):
        raise UserError(
            f"{score.name}: {set_name} has {len(outputs.logits)} outputs "
            f"but labels of shape {labels.shape}"
        )
    return jax.device_put(score.fit(outputs, labels, head))


def apply(
    score: Score, state: State, outputs: Outputs, batch_size: int = 512, set_name: str = "inputs"
) -> Float[np.ndarray, " n"]:
    """The ood_score of every input, `batch_size` at a time.

    The last chunk is filled up with copies of its last row and the results of those are cut off, so
    a score compiles once for a batch size, whatever the sizes of the sets.

    Args:
      score: from `oal_jax.scores.make`.
      state: what `fit` returned for this score.
      outputs: of n inputs; features are ignored where the score does not need them.
      batch_size: rows a call.
      set_name: how messages call the set.

    Returns:
      (n,) float32, higher = more OOD.

    Raises:
      UserError: wrong shapes, or a NaN or an infinity in the outputs.
    """
    outputs = _checked(score, outputs, set_name)
    state = jax.device_put(state)
    n = len(outputs.logits)
    parts = []
    for start in range(0, n, batch_size):
        chunk = Outputs(*(x[start : start + batch_size] for x in outputs))
        missing = batch_size - len(chunk.logits)
        if missing:
            chunk = Outputs(*(np.pad(x, ((0, missing), (0, 0)), mode="edge") for x in chunk))
        parts.append(_score_chunk(score.score, state, chunk))
    # Read only after every chunk was dispatched, so that the device never waits for the host.
    return np.concatenate([np.asarray(p) for p in parts])[:n] if parts else np.zeros(0, np.float32)


@partial(jax.jit, static_argnums=0)
def _score_chunk(score_fn, state, outputs):
    return score_fn(state, outputs)


def _checked(score: Score, outputs: Outputs, set_name: str) -> Outputs:
    """`outputs` as float32 arrays of the host, features dropped (width 0) where not needed."""
    logits = np.asarray(outputs.logits, np.float32)
    if score.needs_features:
        features = np.asarray(outputs.features, np.float32)
    else:
        features = np.zeros((len(logits), 0), np.float32)
    for kind, x in (("logits", logits), ("features", features)):
        if x.ndim != 2 or len(x) != len(logits):
            raise UserError(
                f"{score.name}: the {kind} of {set_name} have shape {x.shape}, "
                f"not ({len(logits)}, width)"
            )
        bad = ~np.isfinite(x).all(axis=1)
        if bad.any():
            raise UserError(
                f"{score.name}: the {kind} of {set_name} have NaN or infinite values in "
                f"{int(bad.sum())} of {len(x)} rows, the first in row {int(bad.argmax())}"
            )
    return Outputs(logits, features)
