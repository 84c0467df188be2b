"""Divergence from the nearest typical prediction."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from oal_jax.scores.base import Score
from oal_jax.scores.logits import log_probabilities


def kl_matching() -> Score:
    """`min_k KL(p || d_k)`, d_k the mean softmax of the ID validation inputs predicted as class k.

    Classes that are never predicted have no d_k; the labels are not used. Means are taken of
    logarithms in float64, so that no d_k has a zero, under which the divergence would be infinite.

    References:
      Hendrycks et al., Scaling Out-of-Distribution Detection for Real-World Settings, 2022,
      arXiv 1911.11132, section 3 (KL matching).
    """

    def fit(outputs, labels, head, mesh):
        from scipy import special

        logits = np.asarray(outputs.logits, np.float64)
        log_p = special.log_softmax(logits, axis=1)
        predicted = logits.argmax(axis=1)
        typical = []
        for k in np.unique(predicted):
            rows = log_p[predicted == k]
            typical.append(special.logsumexp(rows, axis=0) - np.log(len(rows)))
        return {"log_typical": np.array(typical, np.float32)}

    def score(state, outputs):
        log_p = log_probabilities(outputs.logits)
        p = jnp.exp(log_p)
        cross = jnp.matmul(p, state["log_typical"].T, precision=lax.Precision.HIGHEST)
        return jnp.sum(p * log_p, axis=-1) - jnp.max(cross, axis=-1)

    return Score(fit, score, fit_on="validation")


SCORES = {"kl_matching": kl_matching}
GRIDS: dict[str, dict[str, tuple]] = {}
