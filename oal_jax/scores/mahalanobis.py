"""Distance to the nearest class mean in units of the shared within-class covariance."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from oal_jax.errors import UserError
from oal_jax.scores.base import Score

_ROWS = 16384  # features that are centred at a time in float64


def mahalanobis(floor: float = 1e-6) -> Score:
    """Squared Mahalanobis distance to the nearest class mean, one covariance for all classes.

    `min_c (f - mu_c)^T S^-1 (f - mu_c)`, where S is the covariance (divided by n) of the training
    features about the means of their classes. S is often singular: units that are dead on ID data,
    or fewer inputs than dimensions. Its eigenvalues are raised to at least `floor` times the
    largest, so a direction in which ID features never move counts much, but finitely. (A
    pseudo-inverse, as in the official code, ignores such directions.)

    Args:
      floor: smallest eigenvalue as a share of the largest, above 0.

    Raises:
      UserError: at `fit`, where no class has two different features.

    References:
      Lee et al., A Simple Unified Framework for Detecting Out-of-Distribution Samples and
      Adversarial Attacks, 2018, arXiv 1807.03888, eq. 1 and 2; without its input noise and layers.
    """
    if not 0 < floor <= 1:
        raise UserError(f"mahalanobis: floor must be above 0 and at most 1, got {floor}")

    def fit(outputs, labels, head):
        means, covariance = class_statistics(outputs.features, labels)
        values, vectors = np.linalg.eigh(covariance)
        if not values[-1] > 0:
            raise UserError("mahalanobis: the training features do not vary within any class")
        whiten = vectors / np.sqrt(np.maximum(values, floor * values[-1]))[None, :]
        # Centred first: a common offset would cost float32 digits in the products.
        center = means.mean(axis=0)
        return {
            "center": center.astype(np.float32),
            "whiten": whiten.astype(np.float32),
            "means": ((means - center) @ whiten).astype(np.float32),
        }

    def score(state, outputs):
        centred = outputs.features - state["center"][None, :]
        white = jnp.matmul(centred, state["whiten"], precision=lax.Precision.HIGHEST)

        # One class at a time: neither an (n, c, d) array nor the cancellation of a^2 - 2ab + b^2.
        def step(nearest, mean):
            distance = jnp.sum((white - mean[None, :]) ** 2, axis=1)
            return jnp.minimum(nearest, distance), None

        nearest = jnp.full(white.shape[:1], jnp.inf, white.dtype)
        return lax.scan(step, nearest, state["means"])[0]

    return Score(fit, score, needs=("features",))


def class_statistics(features, labels) -> tuple[np.ndarray, np.ndarray]:
    """Class means and the covariance within classes, in float64.

    Args:
      features: (n, d).
      labels: (n,) class indices; classes without an input are left out.

    Returns:
      Means (number of classes present, d), and the covariance (d, d) divided by n.
    """
    features, labels = np.asarray(features), np.asarray(labels)
    present, index = np.unique(labels, return_inverse=True)
    sums = np.zeros((len(present), features.shape[1]))
    np.add.at(sums, index, features)
    means = sums / np.bincount(index)[:, None]
    covariance = np.zeros((features.shape[1],) * 2)
    for start in range(0, len(features), _ROWS):
        rows = slice(start, start + _ROWS)
        centred = features[rows] - means[index[rows]]
        covariance += centred.T @ centred
    return means, covariance / len(features)


SCORES = {"mahalanobis": mahalanobis}
GRIDS: dict[str, dict[str, tuple]] = {}
