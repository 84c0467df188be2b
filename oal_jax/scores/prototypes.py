"""Scores that compare a feature with its predicted class alone: she, fdbd."""

import jax.numpy as jnp
import numpy as np

from oal_jax.errors import UserError
from oal_jax.scores.base import Score
from oal_jax.scores.statistics import class_means


def she() -> Score:
    """Minus the inner product of the feature and the pattern of its predicted class.

    The pattern is the mean of the correctly classified training features of the class, or of all
    training features where the class has none.

    References:
      Zhang et al., Out-of-Distribution Detection based on In-Distribution Data Patterns
      Memorization with Modern Hopfield Energy, ICLR 2023, section 3 (the simplified energy).
    """

    def fit(outputs, labels, head, mesh):
        predicted = np.argmax(outputs.logits, axis=1)
        classes = outputs.logits.shape[1]
        index = np.where(predicted == labels, predicted, classes)  # a last class for the mistakes
        means, counts = class_means(outputs.features, index, classes + 1, mesh)
        mean = counts @ means / counts.sum()
        patterns = np.where(counts[:-1, None] > 0, means[:-1], mean[None, :])
        return {"patterns": patterns.astype(np.float32)}

    def score(state, outputs):
        pattern = state["patterns"][jnp.argmax(outputs.logits, axis=1)]
        return -jnp.sum(outputs.features * pattern, axis=1)

    return Score(fit, score, needs=("features",))


def fdbd() -> Score:
    """Minus the mean distance to the decision boundaries / distance to the mean training feature.

    The boundary between the predicted class a and another class c is `(z_a - z_c) / |w_a - w_c|`
    away. Two classes with equal weight vectors have no boundary and do not count. Features far from
    the mean lie far from all boundaries, hence the quotient.

    Raises:
      UserError: at `fit`, where there is one class only.

    References:
      Liu and Qin, Fast Decision Boundary based Out-of-Distribution Detector, 2024,
      arXiv 2312.11536, section 3.
    """

    def fit(outputs, labels, head, mesh):
        classes = outputs.logits.shape[1]
        if classes < 2:
            raise UserError("fdbd needs two classes or more; one class has no decision boundary")
        weights = np.asarray(head.kernel, np.float64).T
        # A row at a time: neither a (c, c, d) array nor the cancellation of a^2 - 2ab + b^2.
        distance = np.stack([np.linalg.norm(weights - w[None, :], axis=1) for w in weights])
        inverse = np.where(distance > 0, 1 / np.where(distance > 0, distance, 1), 0)
        mean, _ = class_means(outputs.features, np.zeros(len(labels), np.int32), 1, mesh)
        return {"mean": mean[0].astype(np.float32), "inverse": inverse.astype(np.float32)}

    def score(state, outputs):
        logits = outputs.logits
        below = jnp.max(logits, axis=1, keepdims=True) - logits
        distances = below * state["inverse"][jnp.argmax(logits, axis=1)]
        spread = jnp.linalg.norm(outputs.features - state["mean"][None, :], axis=1)
        return -jnp.sum(distances, axis=1) / (logits.shape[1] - 1) / jnp.maximum(spread, 1e-12)

    return Score(fit, score, needs=("features",), needs_head=True)


SCORES = {"she": she, "fdbd": fdbd}
GRIDS: dict[str, dict[str, tuple]] = {}
