"""Means, covariances and other sums over an ID set, computed in batches on the devices.

Sums are float32 within a batch and float64 over the batches, always of centred data: a common
offset would cost the digits that a covariance consists of. The set stays on the host.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from oal_jax.errors import UserError
from oal_jax.runtime import batched, distributed

_ROWS = 4096  # inputs of a batch

Prepare = Callable[[Float[Array, "n d"]], Float[Array, "n d"]]


class Moments(NamedTuple):
    """Counts, means and covariance of classes, float64. Classes without an input are left out."""

    counts: Float[np.ndarray, " k"]
    means: Float[np.ndarray, "k d"]
    within: Float[np.ndarray, "d d"]  # covariance about the class means, divided by n

    @property
    def mean(self) -> Float[np.ndarray, " d"]:
        """The mean of all inputs."""
        return self.counts @ self.means / self.counts.sum()

    @property
    def total(self) -> Float[np.ndarray, "d d"]:
        """The covariance of all inputs about their mean, divided by n."""
        offsets = self.means - self.mean[None, :]
        return self.within + offsets.T @ (offsets * (self.counts / self.counts.sum())[:, None])


def moments(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"] | None,
    mesh: Mesh,
    prepare: Prepare = lambda x: x,
) -> Moments:
    """Class means and the covariance within classes.

    Args:
      features: of n inputs.
      labels: class indices; None for one class.
      mesh: the devices.
      prepare: traceable, row by row; applied to the features first.
    """
    if labels is None:
        start = _amid(features, prepare)
        both = accumulate(partial(_sum_and_scatter, prepare, start), (features,), mesh)
        both = both / len(features)
        offset = both[0]
        within = both[1:] - offset[:, None] * offset[None, :]
        return Moments(np.array([float(len(features))]), (start + offset)[None, :], within)
    present, index = np.unique(labels, return_inverse=True)
    means, counts = class_means(features, index, len(present), mesh, prepare)
    about_means = partial(_scatter, prepare, np.float32(means))
    scatter = accumulate(about_means, (features, np.int32(index)), mesh)
    return Moments(counts, means, scatter / len(features))


def class_means(
    features: Float[np.ndarray, "n d"],
    index: Int[np.ndarray, " n"],
    classes: int,
    mesh: Mesh,
    prepare: Prepare = lambda x: x,
) -> tuple[Float[np.ndarray, "c d"], Float[np.ndarray, " c"]]:
    """Mean of the features of each class, zeros where there is none, and the counts; float64."""
    start = _amid(features, prepare)
    sums = accumulate(partial(_sums, prepare, classes, start), (features, np.int32(index)), mesh)
    counts = np.bincount(index, minlength=classes).astype(np.float64)
    means = start[None, :] + sums / np.maximum(counts, 1)[:, None]
    return np.where(counts[:, None] > 0, means, 0.0), counts


def whitening(
    covariance: Float[np.ndarray, "d d"],
    floor: float,
    noise: float,
    what: str,
) -> Float[np.ndarray, "d d"]:
    """W with W^T S W = 1: the length of `(x - mean) @ W` is the Mahalanobis distance.

    Args:
      covariance: S.
      floor: smallest eigenvalue as a share of the largest; a singular S gives finite distances.
      noise: what rounding alone can make of the largest eigenvalue, which must exceed it.
      what: begins the error message.

    Raises:
      UserError: no variation at all.
    """
    values, vectors = np.linalg.eigh(covariance)
    if not values[-1] > noise:
        raise UserError(f"{what} do not vary within any class")
    return vectors / np.sqrt(np.maximum(values, floor * values[-1]))[None, :]


def accumulate(function: Callable, tree: Any, mesh: Mesh, combine: Callable = np.add) -> np.ndarray:
    """`function(*batch, count)` of every batch of the arrays in `tree`, combined in float64.

    Args:
      function: jitted; a batch's arrays, whose first `count` rows count, to one array.
      tree: a tuple of arrays with a row for each input.
      mesh: the devices.
      combine: takes two float64 arrays; associative.
    """
    total, last = None, None
    for batch, count in batched.batches([tree], min(_ROWS, len(tree[0])), mesh):
        part = function(*batch, np.int32(count))
        # One batch behind, so that the device has work while the host adds.
        total, last = _combined(combine, total, last), part
    return _combined(combine, total, last)


def _combined(combine, total, part):
    if part is None:
        return total
    part = distributed.to_host(part).astype(np.float64)
    return part if total is None else combine(total, part)


def counted(values: Float[Array, "n ..."], count, other: float = 0.0) -> Float[Array, "n ..."]:
    """`values` with `other` in the rows from `count` on, which only fill up a batch."""
    inside = jnp.arange(values.shape[0]) < count
    return jnp.where(inside.reshape(-1, *[1] * (values.ndim - 1)), values, other)


def _amid(features, prepare) -> Float[np.ndarray, " d"]:
    # A point near the mean to centre on; rows from all over, since a set may be ordered by class.
    some = features[:: -(-len(features) // _ROWS)]
    return np.mean(np.asarray(prepare(some)), axis=0, dtype=np.float64).astype(np.float32)


@partial(jax.jit, static_argnums=0)
def _sum_and_scatter(prepare, start, features, count):
    centred = counted(prepare(features) - start[None, :], count)
    product = jnp.matmul(centred.T, centred, precision=lax.Precision.HIGHEST)
    return jnp.concatenate([jnp.sum(centred, axis=0)[None, :], product])


@partial(jax.jit, static_argnums=(0, 1))
def _sums(prepare, classes, start, features, index, count):
    return jax.ops.segment_sum(counted(prepare(features) - start[None, :], count), index, classes)


@partial(jax.jit, static_argnums=0)
def _scatter(prepare, means, features, index, count):
    centred = counted(prepare(features) - means[index], count)
    return jnp.matmul(centred.T, centred, precision=lax.Precision.HIGHEST)
