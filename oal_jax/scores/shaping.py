"""Energy after the features, or the last layer's kernel, have been clipped, pruned or scaled."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from oal_jax.scores.base import Head, Score, State
from oal_jax.scores.parameters import Percentile

_PERCENTILES = (65.0, 70.0, 75.0, 80.0, 85.0, 90.0, 95.0)

# exp(60) times any sensible logit is a finite float32. Non-negative features reach this exponent
# only where more than 98 % of their sum is pruned.
_MAX_EXPONENT = 60.0


def react(percentile: Percentile = 90.0) -> Score:
    """Energy of the logits of `min(features, threshold)`.

    The threshold is the percentile of all features of all ID training inputs together, as
    published; OpenOOD takes it from ID validation inputs.

    Args:
      percentile: at least 0 and below 100.

    References:
      Sun et al., ReAct: Out-of-distribution Detection With Rectified Activations, 2021,
      arXiv 2111.12797, section 3.
    """

    def fit(outputs, labels, head, mesh):
        return _head_state(head) | {
            "threshold": np.float32(np.percentile(outputs.features, percentile))
        }

    def score(state, outputs):
        return _energy(state, jnp.minimum(outputs.features, state["threshold"]))

    return Score(fit, score, needs=("features",), needs_head=True)


def ash_p(percentile: Percentile = 90.0) -> Score:
    """Energy of the logits of the largest features of each input, the others set to 0.

    Args:
      percentile: percentage of an input's features that are set to 0, at least 0 and below 100.
        At least one is kept, and all ties with the smallest kept one.

    References:
      Djurisic et al., Extremely Simple Activation Shaping for Out-of-Distribution Detection, 2023,
      arXiv 2209.09858, algorithm 1, on the features after pooling. OpenOOD's `main.py` does not
      wrap the network and so takes the percentile for a clipping threshold; its
      `evaluation_api` does what is published.
    """
    return _ash(percentile, lambda features, pruned: pruned)


def ash_b(percentile: Percentile = 90.0) -> Score:
    """As `ash_p`, with every kept feature replaced by the sum of all features / number of kept.

    Features that are 0 before the pruning stay 0 and do not count as kept. Otherwise an input with
    fewer active features than are to be kept would have arbitrary ones switched on.

    Args:
      percentile: as of `ash_p`.

    References:
      As `ash_p`, algorithm 2.
    """

    def shape(features, pruned):
        nonzero = pruned != 0
        count = jnp.maximum(jnp.sum(nonzero, axis=-1), 1)
        return jnp.where(nonzero, (jnp.sum(features, axis=-1) / count)[:, None], 0.0)

    return _ash(percentile, shape)


def ash_s(percentile: Percentile = 90.0) -> Score:
    """As `ash_p`, then multiplied by `exp(sum of all features / sum of the kept)`.

    Meant for non-negative features. The exponent is clipped to [-60, 60].

    Args:
      percentile: as of `ash_p`.

    References:
      As `ash_p`, algorithm 3.
    """

    def shape(features, pruned):
        return _scaled(pruned, jnp.sum(features, axis=-1), jnp.sum(pruned, axis=-1))

    return _ash(percentile, shape)


def scale(percentile: Percentile = 85.0) -> Score:
    """Energy of the logits of all features times `exp(sum of all features / sum of the largest)`.

    As `ash_s` without the pruning: the percentile only enters the factor.

    Args:
      percentile: percentage of an input's features that are left out of the second sum, at least 0
        and below 100. At least one feature counts.

    References:
      Xu et al., Scaling for Training Time and Post-hoc Out-of-distribution Detection Enhancement,
      2024, arXiv 2310.00227, section 4.
    """

    def fit(outputs, labels, head, mesh):
        return _head_state(head)

    def score(state, outputs):
        features = outputs.features
        count = _remaining(features.shape[-1], percentile)
        largest = jnp.sort(features, axis=-1)[:, -count:]
        total = jnp.sum(features, axis=-1)
        return _energy(state, _scaled(features, total, jnp.sum(largest, axis=-1)))

    return Score(fit, score, needs=("features",), needs_head=True)


def dice(percentile: Percentile = 90.0) -> Score:
    """Energy of the logits of a sparse last layer.

    A weight's contribution is the weight times the mean ID training feature. Weights whose
    contribution does not exceed the percentile of all contributions are set to 0; the bias stays.

    Args:
      percentile: percentage of the weights that are set to 0, at least 0 and below 100.

    References:
      Sun and Li, DICE: Leveraging Sparsification for Out-of-Distribution Detection, 2022,
      arXiv 2111.09805, section 3.
    """

    def fit(outputs, labels, head, mesh):
        mean = np.mean(outputs.features, axis=0, dtype=np.float64)
        contribution = mean[:, None] * head.kernel
        keep = contribution > np.percentile(contribution, percentile)
        return _head_state(Head(np.where(keep, head.kernel, np.float32(0)), head.bias))

    def score(state, outputs):
        return _energy(state, outputs.features)

    return Score(fit, score, needs=("features",), needs_head=True)


def _ash(
    percentile: float,
    shape: Callable[[Float[Array, "n d"], Float[Array, "n d"]], Float[Array, "n d"]],
) -> Score:
    """An ASH score. `shape` turns the features and the pruned features into the head's input."""

    def fit(outputs, labels, head, mesh):
        return _head_state(head)

    def score(state, outputs):
        features = outputs.features
        count = _remaining(features.shape[-1], percentile)
        smallest = jnp.sort(features, axis=-1)[:, -count]
        pruned = jnp.where(features >= smallest[:, None], features, 0.0)
        return _energy(state, shape(features, pruned))

    return Score(fit, score, needs=("features",), needs_head=True)


def _remaining(width: int, percentile: float) -> int:
    return max(width - round(width * percentile / 100), 1)


def _scaled(
    features: Float[Array, "n d"], total: Float[Array, " n"], part: Float[Array, " n"]
) -> Float[Array, "n d"]:
    # An input whose features are all 0 stays so, whatever the factor.
    exponent = total / jnp.where(part == 0, 1.0, part)
    return features * jnp.exp(jnp.clip(exponent, -_MAX_EXPONENT, _MAX_EXPONENT))[:, None]


def _head_state(head: Head) -> dict[str, np.ndarray]:
    return {"kernel": head.kernel, "bias": head.bias}


def _energy(state: State, features: Float[Array, "n d"]) -> Float[Array, " n"]:
    logits = jnp.matmul(features, state["kernel"], precision=lax.Precision.HIGHEST)
    return -jax.nn.logsumexp(logits + state["bias"][None, :], axis=-1)


SCORES = {
    "react": react,
    "ash_p": ash_p,
    "ash_b": ash_b,
    "ash_s": ash_s,
    "scale": scale,
    "dice": dice,
}
GRIDS = {
    "react": {"percentile": (85.0, 90.0, 95.0, 99.0)},
    "ash_p": {"percentile": _PERCENTILES},
    "ash_b": {"percentile": _PERCENTILES},
    "ash_s": {"percentile": _PERCENTILES},
    "scale": {"percentile": _PERCENTILES},
    "dice": {"percentile": (10.0, 30.0, 50.0, 70.0, 90.0)},
}
