"""Scores from Gaussians: mahalanobis, relative_mahalanobis, mahalanobis_ensemble, mood."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from oal_jax.errors import UserError
from oal_jax.runtime.ops import unit
from oal_jax.scores.base import Score, State
from oal_jax.scores.parameters import AtLeast0, Share
from oal_jax.scores.statistics import moments, whitening


def mahalanobis(floor: Share = 1e-6, noise: AtLeast0 = 0.0) -> Score:
    """Squared Mahalanobis distance to the nearest class mean, with one covariance for all classes.

    `min_c (f - mu_c)^T S^-1 (f - mu_c)`, where S is the covariance (divided by n) of the training
    features about the means of their classes. S is often singular: units that are dead on ID data,
    or fewer inputs than dimensions. Its eigenvalues are raised to at least `floor` times the
    largest, so a direction in which ID features do not vary has a large finite weight. (A
    pseudo-inverse, as in the official code, ignores such directions.)

    Args:
      floor: smallest eigenvalue as a share of the largest, above 0.
      noise: length, in units of the image, of a step that first moves every image against the sign
        of the distance's gradient; 0 for none.

    Raises:
      UserError: at `fit`, where no class has two different features.

    References:
      Lee et al., A Simple Unified Framework for Detecting Out-of-Distribution Samples and
      Adversarial Attacks, 2018, arXiv 1807.03888, eq. 1 and 2; section 2.2 for the noise.
    """

    def fit(outputs, labels, head, mesh):
        statistics = moments(outputs.features, labels, mesh)
        return _gaussians(
            statistics.means, statistics.within, floor, "mahalanobis: the training features"
        )

    def score(state, outputs):
        return _nearest(state, outputs.features)

    def perturb(state, forward, images):
        distance = lambda x: jnp.sum(score(state, forward(x)))
        return forward(images - noise * jnp.sign(jax.grad(distance)(lax.stop_gradient(images))))

    return Score(fit, score, needs=("features",), perturb=perturb if noise else None)


def relative_mahalanobis(floor: Share = 1e-6) -> Score:
    """`mahalanobis` less the squared distance under one Gaussian of all training features.

    `min_c d_c(f) - d_0(f)`. The second distance removes what says how typical an image is of the
    whole training set, and little about classes. The difference may be negative.

    Args:
      floor: smallest eigenvalue of both covariances as a share of their largest, above 0.

    Raises:
      UserError: at `fit`, where no class has two different features.

    References:
      Ren et al., A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection, 2021,
      arXiv 2106.09022, section 2.
    """

    def fit(outputs, labels, head, mesh):
        statistics = moments(outputs.features, labels, mesh)
        what = "relative_mahalanobis: the training features"
        background = _gaussians(statistics.mean[None, :], statistics.total, floor, what)
        return _gaussians(statistics.means, statistics.within, floor, what) | {
            f"background_{key}": value for key, value in background.items()
        }

    def score(state, outputs):
        features = outputs.features
        return _nearest(state, features) - _nearest(state, features, "background_")

    return Score(fit, score, needs=("features",))


def mahalanobis_ensemble(
    weights: tuple[float, ...] | None = None, floor: Share = 1e-6, noise: AtLeast0 = 0.0
) -> Score:
    """Weighted sum over the layers of `mahalanobis` on the channel means of their maps.

    The publication fits the weights by a logistic regression on OOD inputs. Here all are 1 unless
    `weights` gives them.

    Args:
      weights: one for each layer, from the input's side; None for 1 each.
      floor: smallest eigenvalue of a covariance as a share of its largest, above 0.
      noise: as of `mahalanobis`. Each layer has its own step, so a model of l layers runs 2 l + 1
        times.

    Raises:
      UserError: at `fit`, where another number of layers has weights, or a layer does not vary
        within any class.

    References:
      Lee et al., 2018, arXiv 1807.03888, section 2.2 and algorithm 1.
    """

    def fit(outputs, labels, head, mesh):
        layers = outputs.layers
        if weights is not None and len(weights) != len(layers):
            raise UserError(
                f"mahalanobis_ensemble: {len(weights)} weights for {len(layers)} layers; give one"
                " for each"
            )
        state = {"weights": np.float32(weights or np.ones(len(layers)))}
        for i, layer in enumerate(layers):
            statistics = moments(layer, labels, mesh)
            what = f"mahalanobis_ensemble: the training outputs of layer {i}"
            one = _gaussians(statistics.means, statistics.within, floor, what)
            state |= {f"layer{i}_{key}": value for key, value in one.items()}
        return state

    def score(state, outputs):
        each = [_nearest(state, x, f"layer{i}_") for i, x in enumerate(outputs.layers)]
        return state["weights"] @ jnp.stack(each)

    def perturb(state, forward, images):
        plain = forward(images)

        def layer_at_step(i):
            distance = lambda x: jnp.sum(_nearest(state, forward(x).layers[i], f"layer{i}_"))
            step = noise * jnp.sign(jax.grad(distance)(lax.stop_gradient(images)))
            return forward(images - step).layers[i]

        return plain._replace(layers=tuple(layer_at_step(i) for i in range(len(plain.layers))))

    return Score(fit, score, needs=("layers",), perturb=perturb if noise else None)


def mood(by_class: bool = False, floor: Share = 1e-6) -> Score:
    """Squared Mahalanobis distance of the feature at length 1 to all training features.

    The publication uses features of a transformer trained by masked image modelling. Only the
    direction of a feature counts.

    Args:
      by_class: use the nearest class mean and the covariance within classes, not the mean and
        covariance of all.
      floor: smallest eigenvalue of the covariance as a share of its largest, above 0. (The official
        code takes a pseudo-inverse.)

    Raises:
      UserError: at `fit`, where the directions of the features do not vary.

    References:
      Li et al., Rethinking Out-of-distribution (OOD) Detection: Masked Image Modeling is All You
      Need, 2023, arXiv 2302.02615, section 3; the official code for the length.
    """

    def fit(outputs, labels, head, mesh):
        statistics = moments(outputs.features, labels if by_class else None, mesh, unit)
        return _gaussians(
            statistics.means, statistics.within, floor, "mood: directions of training features"
        )

    def score(state, outputs):
        return _nearest(state, unit(outputs.features))

    return Score(fit, score, needs=("features",))


def _gaussians(means, covariance, floor, what) -> dict[str, np.ndarray]:
    # What float32 features that are all the same can seem to vary by.
    noise = (2e-7 * np.abs(means).max()) ** 2
    whiten = whitening(covariance, floor, noise, what)
    # Centred first: a common offset would cost float32 digits in the products.
    center = means.mean(axis=0)
    return {
        "center": center.astype(np.float32),
        "whiten": whiten.astype(np.float32),
        "means": ((means - center[None, :]) @ whiten).astype(np.float32),
    }


def _nearest(state: State, x: Float[Array, "n d"], prefix: str = "") -> Float[Array, " n"]:
    """Squared distance to the nearest mean."""
    center, whiten, means = (state[prefix + key] for key in ("center", "whiten", "means"))
    white = jnp.matmul(x - center[None, :], whiten, precision=lax.Precision.HIGHEST)

    # One class at a time: neither an (n, c, d) array nor the cancellation of a^2 - 2ab + b^2.
    def step(nearest, mean):
        distance = jnp.sum((white - mean[None, :]) ** 2, axis=1)
        return jnp.minimum(nearest, distance), None

    nearest = jnp.full(white.shape[:1], jnp.inf, white.dtype)
    return lax.scan(step, nearest, means)[0]


SCORES = {
    "mahalanobis": mahalanobis,
    "relative_mahalanobis": relative_mahalanobis,
    "mahalanobis_ensemble": mahalanobis_ensemble,
    "mood": mood,
}
GRIDS: dict[str, dict[str, tuple]] = {"mood": {"by_class": (False, True)}}
