"""Scores from the nearest training features: knn, mode, nnguide."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from oal_jax.errors import UserError
from oal_jax.runtime.ops import unit
from oal_jax.scores.base import Score, State
from oal_jax.scores.parameters import Count

NEIGHBOUR = 50  # of `knn`, by default


def knn(k: Count | None = None, bank_chunk: Count = 4096) -> Score:
    """Euclidean distance to the k-th nearest ID training feature, all features of length 1.

    Exact. The (queries, bank) matrix is never held as a whole: see `top_similarities`. Distances
    come from inner products, `d^2 = 2 - 2 q.b`, so below about 3e-4 they are float32 noise.

    Args:
      k: which neighbour; None: the 50th, or a tenth of the training images where these are few.
      bank_chunk: training features of one block of the bank.

    Raises:
      UserError: at `fit`, where the training set has fewer than k inputs.

    References:
      Sun et al., Out-of-Distribution Detection with Deep Nearest Neighbors, 2022, arXiv 2204.06507,
      section 3. The official OAL code takes the *squared* distance, which ranks alike.
    """

    def fit(outputs, labels, head, mesh):
        _check_enough("knn", k, outputs.features)
        return _bank(outputs.features)

    def score(state, outputs):
        count = neighbours(k, NEIGHBOUR, state["bank"])
        return jnp.sqrt(_squared(unit(outputs.features), state, count, bank_chunk))

    return Score(fit, score, needs=("features",))


def mode(k: Count | None = None, bank_chunk: Count = 4096) -> Score:
    """Smallest squared distance of an input's six regions to their k-th nearest training region.

    Regions are vectors of length 1. The bank holds all six regions of every training input. One
    region that looks like the training set makes an input ID.

    Args:
      k: which neighbour; None: the 10th, or a tenth of the training regions where these are few.
      bank_chunk: training regions of one block of the bank.

    Raises:
      UserError: at `fit`, where the training set has fewer than k regions.

    References:
      Zhang et al., From Global to Local: Multi-scale Out-of-distribution Detection, 2023,
      arXiv 2308.10239, the cross-scale decision; on any classifier, without its training loss.
    """

    def fit(outputs, labels, head, mesh):
        regions = np.asarray(outputs.regions)
        regions = regions.reshape(-1, regions.shape[-1])
        _check_enough("mode", k, regions, "regions")
        return _bank(regions)

    def score(state, outputs):
        regions = jnp.moveaxis(unit(outputs.regions), 1, 0)
        # One region at a time holds a sixth of the similarities.
        count = neighbours(k, 10, state["bank"])
        each = lax.map(lambda q: _squared(q, state, count, bank_chunk), regions)
        return jnp.min(each, axis=0)

    return Score(fit, score, needs=("regions",))


def nnguide(k: Count | None = None, bank_chunk: Count = 4096) -> Score:
    """Energy times the similarity to the training features, weighted by their negative energies.

    `E(x) G(x)`, where E is -logsumexp of the logits and G the mean of the k largest inner products
    of the input's feature with `-E(z) z` over the training features z, all of length 1. The bank
    is the whole training set; the publication takes a random share of a large one.

    Args:
      k: number of neighbours; None: 10, or a tenth of the training images where these are few.
      bank_chunk: training features of one block of the bank.

    Raises:
      UserError: at `fit`, where the training set has fewer than k inputs.

    References:
      Park et al., Nearest Neighbor Guidance for Out-of-Distribution Detection, 2023,
      arXiv 2309.14888, section 3.
    """

    def fit(outputs, labels, head, mesh):
        _check_enough("nnguide", k, outputs.features)
        state = _bank(outputs.features)
        from scipy.special import logsumexp

        neg_energy = logsumexp(np.asarray(outputs.logits), axis=1)
        return state | {"scale": np.float32(state["scale"] * neg_energy)}

    def score(state, outputs):
        count = neighbours(k, 10, state["bank"])
        top = top_similarities(unit(outputs.features), *_of(state), count, bank_chunk)
        neg_energy = jax.nn.logsumexp(outputs.logits, axis=1)
        return -jnp.mean(top, axis=1) * neg_energy

    return Score(fit, score, needs=("features",))


def top_similarities(
    queries: Float[Array, "n d"],
    bank: Float[Array, "m d"],
    scale: Float[Array, " m"],
    k: int,
    bank_chunk: int,
) -> Float[Array, "n k"]:
    """The k largest inner products of each query with `bank * scale[:, None]`; 1 <= k <= m.

    Exact, in falling order. A scan over blocks of the bank carries the k best, so memory holds one
    block and `n * (bank_chunk + k)` similarities.
    """
    m = bank.shape[0]
    blocks = -(-m // bank_chunk)
    # For `_grouped_candidates`: this size of a group makes m / group + k * group smallest.
    group = max(int((m // blocks / k) ** 0.5), 1)
    size = m // blocks // group * group

    def product(start, count):
        # Scaled here, where the block is copied anyway: a scaled bank would be a second one.
        rows = lax.dynamic_slice_in_dim(bank, start, count)
        rows = rows * lax.dynamic_slice_in_dim(scale, start, count)[:, None]
        # Full float32: TF32 or bfloat16 products would blur distances to about 0.04.
        return jnp.matmul(queries, rows.T, precision=lax.Precision.HIGHEST)

    def step(best, i):
        return _largest(_grouped_candidates(product(i * size, size), k, group), k, best), None

    best = jnp.full((queries.shape[0], k), -jnp.inf, queries.dtype)
    if m > blocks * size:  # whole groups leave over less than one group a block
        best = _largest(product(blocks * size, m - blocks * size), k, best)
    return lax.scan(step, best, jnp.arange(blocks))[0]


def _grouped_candidates(values: Float[Array, "n m"], k: int, group: int) -> Float[Array, "n q"]:
    """Fewer values a row, the k largest among them; m is a multiple of `group`.

    The k largest all lie in the k groups of columns with the largest maxima: a value outside them
    is below k others. Maxima are cheap; the time of a selection grows with its width.
    """
    if group == 1:
        return values
    n, m = values.shape
    grouped = values.reshape(n, group, m // group)
    _, which = lax.top_k(jnp.max(grouped, axis=1), k)
    candidates = jnp.take_along_axis(grouped, which[:, None, :], axis=2, mode="promise_in_bounds")
    return candidates.reshape(n, group * k)


def _largest(values, k, best):
    # Without the barrier XLA may merge a later slice with that of top_k. It then sees no top-k and
    # sorts whole rows on CPU: 28 times slower.
    top = lax.top_k(jnp.concatenate([best, values], axis=1), k)[0]
    return lax.optimization_barrier(top)


def _squared(queries, state, k, bank_chunk) -> Float[Array, " n"]:
    nearest = top_similarities(queries, *_of(state), k, bank_chunk)[:, -1]
    return jnp.maximum(2.0 - 2.0 * nearest, 0.0)


def _bank(features) -> State:
    """The features and the factor that scales each to length 1: no second copy of the set."""
    features = np.asarray(features, np.float32)
    norm = np.sqrt(np.einsum("nd,nd->n", features, features))
    return {"bank": features, "scale": 1 / np.maximum(norm, np.float32(1e-12))}


def _of(state: State) -> tuple[Array, Array]:
    return state["bank"], state["scale"]


def neighbours(k: int | None, usual: int, bank) -> int:
    """`k`, or by default the usual number of neighbours, at most a tenth of the bank.

    With more, the neighbours of an input of a small class are those of other classes.
    """
    return max(1, min(usual, len(bank) // 10)) if k is None else k


def _check_enough(name: str, k: int | None, bank, what: str = "features") -> None:
    if k is not None and len(bank) < k:
        raise UserError(f"{name}: k={k} needs at least {k} training {what}, got {len(bank)}")


SCORES = {"knn": knn, "mode": mode, "nnguide": nnguide}
GRIDS = {
    "knn": {"k": (1, 5, 10, 20, 50, 100, 200, 500, 1000)},
    "mode": {"k": (1, 5, 10, 20, 50)},
    "nnguide": {"k": (1, 5, 10, 20, 50, 100)},
}
