"""Scores from the principal subspace of the training features: vim, residual, neco."""

from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from oal_jax.errors import UserError
from oal_jax.scores.base import Head, Score, State
from oal_jax.scores.parameters import Count, Range, Share
from oal_jax.scores.statistics import accumulate, counted, moments

_Dim = Annotated[int, Range(at_least=0)] | None


def vim(dim: _Dim = None) -> Score:
    """Virtual logit against the real ones: `alpha |r(f)| - logsumexp(logits)`.

    r is the part of `f - u` outside the `dim` largest principal directions of the training
    features, u = -pinv(W) b the point where all logits are 0, and alpha the mean largest logit over
    the mean |r| of the training set. The publication turns this into the softmax probability of the
    virtual logit, which ranks alike.

    Two changes keep alpha meaningful. Training features inside the subspace, such as fewer than
    `dim`, would make it infinite: the mean |r| counts as at least 1e-6 of the features' root mean
    square length. A negative mean logit would reverse the score: its absolute value is taken.

    Args:
      dim: dimensions of the principal subspace, from 0 to below the width; None for the paper's
        choice by the width d: 1000 from 2048 on, 512 from 768 on, else d // 2.

    Raises:
      UserError: at `fit`, where `dim` leaves nothing outside.

    References:
      Wang et al., ViM: Out-Of-Distribution with Virtual-logit Matching, 2022, arXiv 2203.10807,
      section 4. The subspace is part of the state, so a search over `dim` fits each value;
      OpenOOD v1.5 searches with the first subspace.
    """

    def fit(outputs, labels, head, mesh):
        state, length = _outside("vim", outputs.features, head, dim, mesh)
        total = accumulate(partial(_sum_of_residuals, state), (outputs.features,), mesh)
        residual = max(total / len(outputs.features), 1e-6 * length)
        logit = np.mean(np.max(outputs.logits, axis=1), dtype=np.float64)
        return state | {"alpha": np.float32(abs(logit) / max(residual, 1e-30))}

    def score(state, outputs):
        residual = _residual(state, outputs.features)
        return state["alpha"] * residual - jax.nn.logsumexp(outputs.logits, axis=1)

    return Score(fit, score, needs=("features",), needs_head=True)


def residual(dim: _Dim = None) -> Score:
    """Length of the feature outside the principal subspace of the training features.

    The |r| of `vim`, fitted on the ID *training* set. (OpenOOD fits it on the validation set, with
    as many dimensions as features have, where it is constant 0.)

    Args:
      dim: as of `vim`.

    Raises:
      UserError: at `fit`, where `dim` leaves nothing outside.

    References:
      Wang et al., 2022, arXiv 2203.10807, section 3.
    """

    def fit(outputs, labels, head, mesh):
        return _outside("residual", outputs.features, head, dim, mesh)[0]

    def score(state, outputs):
        return _residual(state, outputs.features)

    return Score(fit, score, needs=("features",), needs_head=True)


def neco(dim: Count | None = None, variance: Share = 0.9, max_logit: bool = True) -> Score:
    """Minus the share of the feature's length inside the principal subspace, times the max logit.

    `-|P f| / |f| max(logits)`: under neural collapse ID features fill the span of the class means
    and OOD features are orthogonal to it. As in the official code, f is standardised by the mean
    and deviation of every unit; a unit that is constant on the training set is only centred.

    Args:
      dim: dimensions of the principal subspace, from 1 to the width; None for the fewest that
        explain `variance`.
      variance: share of the variance to explain, above 0 and at most 1.
      max_logit: whether to multiply by the largest logit, which the authors do for all but their
        ResNet.

    Raises:
      UserError: at `fit`, where `dim` is above the width, or the features do not vary.

    References:
      Ben Ammar et al., NECO: Neural Collapse Based Out-of-distribution Detection, 2024,
      arXiv 2310.06823, eq. 6.
    """

    def fit(outputs, labels, head, mesh):
        statistics = moments(outputs.features, None, mesh)
        mean, deviation = statistics.mean, np.sqrt(np.diag(statistics.within))
        moving = deviation > 2e-7 * np.abs(mean)
        if not moving.any():
            raise UserError("neco: the training features do not vary")
        width = len(mean)
        if dim is not None and dim > width:
            raise UserError(f"neco: dim={dim} is above the features' width {width}")
        scale = 1 / np.where(moving, deviation, 1.0)
        values, vectors = np.linalg.eigh(statistics.within * scale[:, None] * scale[None, :])
        share = np.cumsum(values[::-1]) / np.sum(values)
        # Rounding may leave the last share below 1.
        count = dim or min(int(np.searchsorted(share, variance)) + 1, width)
        return {
            "mean": mean.astype(np.float32),
            "scale": scale.astype(np.float32),
            "principal": vectors[:, ::-1][:, :count].astype(np.float32),
        }

    def score(state, outputs):
        features = (outputs.features - state["mean"][None, :]) * state["scale"][None, :]
        inside = jnp.matmul(features, state["principal"], precision=lax.Precision.HIGHEST)
        length = jnp.maximum(jnp.linalg.norm(features, axis=1), 1e-12)
        share = jnp.linalg.norm(inside, axis=1) / length
        return -share * jnp.max(outputs.logits, axis=1) if max_logit else -share

    return Score(fit, score, needs=("features",))


def _outside(name: str, features, head: Head, dim: int | None, mesh: Mesh) -> tuple[dict, float]:
    """The state of `_residual`, and the root mean square length of `features - origin`."""
    width = features.shape[1]
    if dim is not None and dim >= width:
        raise UserError(
            f"{name}: dim={dim} leaves nothing outside in features of width {width}; take at most"
            f" {width - 1}"
        )
    kernel, bias = (np.asarray(x, np.float64) for x in head)
    # Weight decay drives the sum of the class weights towards 0. What float32 rounding leaves of it
    # is a direction without meaning, whose inverse would throw the origin far away.
    rounding = max(kernel.shape) * np.finfo(np.float32).eps
    origin = -np.linalg.pinv(kernel.T, rcond=rounding) @ bias
    statistics = moments(features, None, mesh)
    offset = statistics.mean - origin
    second = statistics.within + offset[:, None] * offset[None, :]
    _, vectors = np.linalg.eigh(second)
    count = width - (_default_dim(width) if dim is None else dim)
    state = {"origin": origin.astype(np.float32), "outside": vectors[:, :count].astype(np.float32)}
    return state, float(np.sqrt(np.trace(second)))


def _default_dim(width: int) -> int:
    if width >= 2048:
        return 1000
    return 512 if width >= 768 else width // 2


def _residual(state: State, features: Float[Array, "n d"]) -> Float[Array, " n"]:
    centred = features - state["origin"][None, :]
    outside = jnp.matmul(centred, state["outside"], precision=lax.Precision.HIGHEST)
    return jnp.linalg.norm(outside, axis=1)


@jax.jit
def _sum_of_residuals(state, features, count):
    return jnp.sum(counted(_residual(state, features), count))


SCORES = {"vim": vim, "residual": residual, "neco": neco}
_DIMS = (16, 32, 64, 128, 256, 512, 1000)  # those not below the width are refused by `fit`
GRIDS: dict[str, dict[str, tuple]] = {
    "vim": {"dim": _DIMS},
    "residual": {"dim": _DIMS},
    "neco": {"variance": (0.5, 0.8, 0.9, 0.95, 0.99)},
}
