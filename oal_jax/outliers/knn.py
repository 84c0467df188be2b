"""k-NN boundary sampling in a teacher's feature space, as OAL takes it from NPOS.

For a class: the ID features whose K-th nearest neighbour is furthest are its boundary; Gaussian
noise around boundary points gives candidates; the candidates furthest from the class are kept.
Source: arXiv 2406.16525, section 3; NPOS, arXiv 2303.02966, section 3.1.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def unit(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Rows scaled to unit L2 norm."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def kth_distance(
    queries: Float[Array, "q d"], bank: Float[Array, "n d"], k: int
) -> Float[Array, " q"]:
    """Squared Euclidean distance of each unit query to its k-th nearest unit row of `bank`.

    On the unit sphere that is 2 - 2 <q, x>, so one matrix product and the k-th largest inner
    product are all it takes. A query that is itself in the bank counts as its own nearest.
    """
    similarity = queries @ bank.T
    n = bank.shape[0]
    # top_k on the shorter side of the order statistic.
    if k <= n // 2:
        kth = jax.lax.top_k(similarity, k)[0][:, -1]
    else:
        kth = -jax.lax.top_k(-similarity, n - k + 1)[0][:, -1]
    return jnp.maximum(2 - 2 * kth, 0)


@partial(jax.jit, static_argnames=("k", "count"))
def boundary(features: Float[Array, "n d"], k: int, count: int) -> Int[Array, " b"]:
    """Indices of the `count` unit features with the largest distance to their k-th neighbour."""
    return jax.lax.top_k(kth_distance(features, features, k), count)[1]


def select_top(distance: Float[Array, "a l"], keep: int) -> Int[Array, "a m"]:
    """For each anchor, the noise rows of its `keep` furthest candidates."""
    return jax.lax.top_k(distance, keep)[1]


def select_reference(distance: Float[Array, "a l"], keep: int) -> Int[Array, "a m"]:
    """The rows that the official code returns: those of another anchor's candidates.

    The distances of all candidates, anchor by anchor, are viewed as (noise rows, anchors); the
    column of an anchor then holds every anchors-th entry of the whole list and not its block.
    """
    anchors, rows = distance.shape
    mixed = distance.reshape(-1).reshape(rows, anchors)
    return jax.lax.top_k(mixed.T, keep)[1]


SELECTIONS = {"top": select_top, "reference": select_reference}


@partial(
    jax.jit,
    static_argnames=("k", "count", "anchors", "noise_rows", "keep", "repeats", "selection"),
)
def sample_class(
    key: Key[Array, ""],
    features: Float[Array, "n d"],
    *,
    k: int,
    count: int,
    anchors: int,
    sigma: float,
    noise_rows: int,
    keep: int,
    repeats: int,
    selection: str,
) -> Float[Array, "m d"]:
    """Unit-norm outliers of one class, m = repeats * anchors * keep, anchor by anchor.

    The boundary does not depend on the noise, so it is found once and shared by all repeats.
    Memory is bounded by the candidates of one anchor: (noise_rows, max(n, d)) floats.

    Args:
      features: unit-norm ID features of the class.
      k: the neighbour whose distance counts, 1 being the point itself (K of the paper).
      count: number of boundary points; `anchors` of them are drawn a repeat without replacement.
      sigma: standard deviation of the noise, a coordinate.
      noise_rows: noise vectors a repeat, shared by all anchors of the repeat.
      keep: candidates kept an anchor.
      selection: a key of `SELECTIONS`.
    """
    edge = features[boundary(features, k, count)]

    def repeat(repeat_key):
        key_anchor, key_noise = jax.random.split(repeat_key)
        chosen = edge[jax.random.choice(key_anchor, count, (anchors,), replace=False)]
        noise = sigma * jax.random.normal(key_noise, (noise_rows, features.shape[1]))

        def candidates(anchor):
            return unit(anchor[None] + noise)

        distance = jax.lax.map(lambda a: kth_distance(candidates(a), features, k), chosen)
        rows = SELECTIONS[selection](distance, keep)
        return unit(chosen[:, None] + noise[rows]).reshape(anchors * keep, -1)

    return jax.lax.map(repeat, jax.random.split(key, repeats)).reshape(repeats * anchors * keep, -1)


def sample_random(key: Key[Array, ""], count: int, width: int) -> Float[Array, "m d"]:
    """Isotropic directions: `count` unit vectors that know nothing of the data. The control."""
    return unit(jax.random.normal(key, (count, width)))
