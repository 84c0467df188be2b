"""k-NN boundary sampling in a teacher's feature space, as OAL takes it from NPOS.

For a class: the ID features whose K-th nearest neighbour is furthest are its boundary; Gaussian
noise around boundary points gives candidates; the candidates furthest from the class are kept.
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

    On the unit sphere that is 2 - 2 <q, x>, so one matrix product and the k-th largest inner
    product are all it takes. A query that is itself in the bank counts as its own nearest. More
    than `_PRODUCTS` inner products are taken a block of queries at a time.
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

    <unit(a + e), x> = (<a, x> + <e, x>) / |a + e|, so the products are shared by all candidates
    and the length is divided out after the k-th largest is found. Memory: the (n, l) products
    with the noise, and one block of candidates.
    """
    rows, block = noise.shape[0], _block()
    blocks = -(-rows // block)
    of_noise = jnp.pad(_product(bank, noise), ((0, 0), (0, blocks * block - rows)))
    of_noise = of_noise.reshape(-1, blocks, block).swapaxes(0, 1)

    def one(of_anchor):
        return jax.lax.map(lambda e: kth_largest(of_anchor[:, None] + e, k), of_noise)

    kth = jax.lax.map(one, _product(anchors, bank)).reshape(-1, blocks * block)[:, :rows]
    squares = jnp.sum(anchors**2, axis=1)[:, None] + jnp.sum(noise**2, axis=1)[None]
    length = jnp.sqrt(squares + 2 * _product(anchors, noise))
    return jnp.maximum(2 - 2 * kth / jnp.maximum(length, 1e-12), 0)


def _block() -> int:
    # Candidates at once. 128 beside 500 features stay in a CPU core's cache: 3 times faster than
    # 1500; accelerators want few, large steps.
    return 128 if jax.default_backend() == "cpu" else 4096


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


_STATIC = ("k", "count", "anchors", "noise_rows", "keep", "repeats", "selection")


@partial(jax.jit, static_argnames=_STATIC)
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
    Memory is bounded by the inner products of features and noise: (n, noise_rows) floats.

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
        rows = SELECTIONS[selection](candidate_distances(chosen, noise, features, k), keep)
        return unit(chosen[:, None] + noise[rows]).reshape(anchors * keep, -1)

    return jax.lax.map(repeat, jax.random.split(key, repeats)).reshape(repeats * anchors * keep, -1)


@partial(jax.jit, static_argnames=_STATIC)
def select_class(
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
) -> tuple[Float[Array, "b d"], Int[Array, " m"], Int[Array, " m"], Float[Array, " m"]]:
    """What `redraw` computes the outliers of a class from, arguments as those of `sample_class`.

    The noise has another stream than there, a key a row, so that a single row can be drawn again:
    outlier i is that of repeat i // (anchors * keep). `sigma` must not be 0.

    Returns:
      The boundary points over sigma (count, d); for each outlier the boundary point it is around,
      the row of its repeat's noise, both int32, and the factor that gives it unit norm.
    """
    edge = features[boundary(features, k, count)]
    points = edge / sigma
    key_anchor, key_noise = jax.random.split(key)

    def repeat(number):
        of_repeat = jax.random.fold_in(key_anchor, number)
        chosen = jax.random.choice(of_repeat, count, (anchors,), replace=False)
        of_row = lambda row: noise_row(key_noise, number, row, features.shape[1])
        noise = jax.vmap(of_row)(jnp.arange(noise_rows))
        distance = candidate_distances(edge[chosen], sigma * noise, features, k)
        rows = SELECTIONS[selection](distance, keep)
        around = jnp.broadcast_to(chosen[:, None], rows.shape)
        factor = 1 / jnp.linalg.norm(points[around] + noise[rows], axis=-1)
        return around.astype(jnp.int32), rows.astype(jnp.int32), factor

    around, rows, factor = jax.lax.map(repeat, jnp.arange(repeats))
    return points, around.reshape(-1), rows.reshape(-1), factor.reshape(-1)


def noise_row(
    key: Key[Array, ""], repeat: Int[Array, ""], row: Int[Array, ""], width: int
) -> Float[Array, " d"]:
    """One row of a repeat's standard normal noise, rounded to 22 bits of mantissa.

    The rounding keeps compilers from contracting its last product with a sum that follows, which
    they do in one program and not in another: so a row is the same to the bit in all.
    """
    of_row = jax.random.fold_in(jax.random.fold_in(key, repeat), row)
    return jax.lax.reduce_precision(jax.random.normal(of_row, (width,)), 8, 22)


def redraw(
    key: Key[Array, ""],
    point: Float[Array, " d"],
    repeat: Int[Array, ""],
    row: Int[Array, ""],
    factor: Float[Array, ""],
) -> Float[Array, " d"]:
    """One outlier of `select_class`, which got the same key: a sum and a product, exact; vmaps."""
    _, key_noise = jax.random.split(key)
    return (point + noise_row(key_noise, repeat, row, point.shape[0])) * factor


def sample_random(key: Key[Array, ""], count: int, width: int) -> Float[Array, "m d"]:
    """Isotropic directions: `count` unit vectors that know nothing of the data. The control."""
    return unit(jax.random.normal(key, (count, width)))
