"""k-NN boundary sampling in a teacher's feature space, as OAL takes it from NPOS.

The boundary of a class are the ID features whose K-th nearest neighbour is furthest. Gaussian noise
around boundary points gives candidates. The candidates furthest from the class are its outliers.
Source: arXiv 2406.16525, section 3; NPOS, arXiv 2303.02966, section 3.1.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from oal_jax.runtime.ops import kth_largest, unit

_PRODUCTS = 2**24  # inner products held at once: 64 MiB


def _product(x: Float[Array, "a d"], y: Float[Array, "b d"]) -> Float[Array, "a b"]:
    # Full float32: TF32 or bfloat16 products would blur distances by more than what is compared.
    return jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)


def kth_distance(
    queries: Float[Array, "q d"], bank: Float[Array, "n d"], k: int
) -> Float[Array, " q"]:
    """Squared Euclidean distance of each unit query to its k-th nearest unit row of `bank`.

    On the unit sphere that is 2 - 2 <q, x>, so it takes one matrix product and the k-th largest
    inner product. A query that is in the bank is its own nearest neighbour. Blocks of queries bound
    the memory where there are more than `_PRODUCTS` inner products.
    """

    def distances(queries):
        return jnp.maximum(2 - 2 * kth_largest(_product(bank, queries), k), 0)

    count, rows = queries.shape[0], max(1, _PRODUCTS // bank.shape[0])
    if count <= rows:
        return distances(queries)
    return jax.lax.map(distances, queries, batch_size=rows)


def candidate_distances(
    anchors: Float[Array, "a d"], noise: Float[Array, "l d"], bank: Float[Array, "n d"], k: int
) -> Float[Array, "a l"]:
    """`kth_distance` of every candidate unit(anchor + noise row), without forming candidates.

    <unit(a + e), x> = (<a, x> + <e, x>) / |a + e|: all candidates share the products, and the
    length is divided out after the k-th largest is selected. Memory: the (n, l) products with the
    noise, and one block of candidates.
    """
    rows, block = noise.shape[0], _block()
    blocks = -(-rows // block)
    noise_products = jnp.pad(_product(bank, noise), ((0, 0), (0, blocks * block - rows)))
    noise_products = noise_products.reshape(-1, blocks, block).swapaxes(0, 1)

    def one(anchor_products):
        return jax.lax.map(lambda e: kth_largest(anchor_products[:, None] + e, k), noise_products)

    kth = jax.lax.map(one, _product(anchors, bank)).reshape(-1, blocks * block)[:, :rows]
    squares = jnp.sum(anchors**2, axis=1)[:, None] + jnp.sum(noise**2, axis=1)[None]
    length = jnp.sqrt(squares + 2 * _product(anchors, noise))
    return jnp.maximum(2 - 2 * kth / jnp.maximum(length, 1e-12), 0)


def _block() -> int:
    # Candidates per step. On a CPU 128 of them and 500 features fit a core's cache, which is 3
    # times faster than 1500. Accelerators are faster with few large steps.
    return 128 if jax.default_backend() == "cpu" else 4096


@partial(jax.jit, static_argnames=("k", "count"))
def boundary(features: Float[Array, "n d"], k: int, count: int) -> Int[Array, " b"]:
    """Indices of the `count` unit features with the largest distance to their k-th neighbour."""
    return jax.lax.top_k(kth_distance(features, features, k), count)[1]


def select_top(distance: Float[Array, "a l"], count: int) -> Int[Array, "a m"]:
    """For each anchor, the noise rows of its `count` furthest candidates."""
    return jax.lax.top_k(distance, count)[1]


def select_reference(distance: Float[Array, "a l"], count: int) -> Int[Array, "a m"]:
    """For each anchor, the noise rows that the official code selects by mistake.

    That code views the distances of all candidates, stored anchor by anchor, as (noise rows,
    anchors). The column of an anchor then holds distances of other anchors' candidates.
    """
    anchors, rows = distance.shape
    mixed = distance.reshape(-1).reshape(rows, anchors)
    return jax.lax.top_k(mixed.T, count)[1]


SELECTIONS = {"top": select_top, "reference": select_reference}


@partial(
    jax.jit,
    static_argnames=("k", "count", "anchors", "noise_rows", "per_anchor", "repeats", "selection"),
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
    per_anchor: int,
    repeats: int,
    selection: str,
) -> Float[Array, "m d"]:
    """Unit-norm outliers of one class, m = repeats * anchors * per_anchor, anchor by anchor.

    The boundary does not depend on the noise, so all repeats share it. Memory is bounded by the
    inner products of features and noise: (n, noise_rows) floats.

    Args:
      key: of all draws.
      features: unit-norm ID features of the class.
      k: the neighbour whose distance counts, 1 being the point itself (K of the paper).
      count: number of boundary points.
      anchors: boundary points per repeat, drawn without replacement.
      sigma: standard deviation of the noise, per coordinate.
      noise_rows: noise vectors per repeat, shared by its anchors.
      per_anchor: outliers per anchor and repeat.
      repeats: draws of anchors and noise.
      selection: a key of `SELECTIONS`.
    """
    edge = features[boundary(features, k, count)]

    def repeat(repeat_key):
        key_anchor, key_noise = jax.random.split(repeat_key)
        chosen = edge[jax.random.choice(key_anchor, count, (anchors,), replace=False)]
        noise = sigma * jax.random.normal(key_noise, (noise_rows, features.shape[1]))
        rows = SELECTIONS[selection](candidate_distances(chosen, noise, features, k), per_anchor)
        return unit(chosen[:, None] + noise[rows]).reshape(anchors * per_anchor, -1)

    outliers = jax.lax.map(repeat, jax.random.split(key, repeats))
    return outliers.reshape(repeats * anchors * per_anchor, -1)


def sample_random(key: Key[Array, ""], count: int, width: int) -> Float[Array, "m d"]:
    """`count` unit vectors of isotropic directions, independent of the data: the control."""
    return unit(jax.random.normal(key, (count, width)))
