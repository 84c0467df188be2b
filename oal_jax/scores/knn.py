"""Distance to the k-th nearest training feature."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from oal_jax.errors import UserError
from oal_jax.scores.base import Score


def knn(k: int = 50, bank_chunk: int = 4096, query_chunk: int = 1024) -> Score:
    """Euclidean distance to the k-th nearest ID training feature, all features of length 1.

    Exact, and the (queries, bank) matrix is never whole: blocks of (query_chunk, bank_chunk) pass
    by and a running list of the k best is kept, so memory does not grow with the bank. Distances
    come from inner products, `d^2 = 2 - 2 q.b`, hence below about 3e-4 they are float32 noise.

    Args:
      k: which neighbour, at least 1.
      bank_chunk: training features a block.
      query_chunk: inputs a block.

    Raises:
      UserError: at `fit`, where the training set has fewer than k inputs.

    References:
      Sun et al., Out-of-Distribution Detection with Deep Nearest Neighbors, 2022, arXiv 2204.06507,
      section 3. The official OAL code takes the *squared* distance, which ranks alike.
    """
    if k < 1 or bank_chunk < 1 or query_chunk < 1:
        raise UserError(
            f"knn: k, bank_chunk, query_chunk must be 1 or more, got {k}, "
            f"{bank_chunk}, {query_chunk}"
        )

    def fit(outputs, labels, head):
        count = len(outputs.features)
        if count < k:
            raise UserError(f"knn: k={k} needs at least {k} training features, got {count}")
        features = np.asarray(outputs.features, np.float32)
        norm = np.linalg.norm(features, axis=1, keepdims=True)
        return {"bank": features / np.maximum(norm, 1e-12)}

    def score(state, outputs):
        features = outputs.features
        norm = jnp.linalg.norm(features, axis=1, keepdims=True)
        queries = features / jnp.maximum(norm, 1e-12)
        similarity = kth_similarity(queries, state["bank"], k, bank_chunk, query_chunk)
        return jnp.sqrt(jnp.maximum(2.0 - 2.0 * similarity, 0.0))

    return Score(fit, score, needs=("features",))


def kth_similarity(
    queries: Float[Array, "n d"],
    bank: Float[Array, "m d"],
    k: int,
    bank_chunk: int,
    query_chunk: int,
) -> Float[Array, " n"]:
    """The k-th largest inner product of each query with the rows of `bank`; 1 <= k <= m.

    Needs memory for `query_chunk * (bank_chunk + k)` similarities.
    """
    n, width = queries.shape
    m = bank.shape[0]
    bank_chunk = min(bank_chunk, m)
    query_chunk = min(query_chunk, n)
    chunks = -(-m // bank_chunk)

    def block(q: Float[Array, "b d"]) -> Float[Array, " b"]:
        def step(best, i):
            # The last chunk is moved back to end at m, without a padded copy of the bank; the
            # columns that the chunk before it already counted are masked.
            start = jnp.minimum(i * bank_chunk, m - bank_chunk)
            rows = lax.dynamic_slice_in_dim(bank, start, bank_chunk)
            # Full float32: TF32 or bfloat16 products would blur distances to about 0.04.
            similarity = jnp.matmul(q, rows.T, precision=lax.Precision.HIGHEST)
            fresh = start + jnp.arange(bank_chunk) >= i * bank_chunk
            similarity = jnp.where(fresh[None, :], similarity, -jnp.inf)
            best, _ = lax.top_k(jnp.concatenate([best, similarity], axis=1), k)
            return best, None

        best = jnp.full((q.shape[0], k), -jnp.inf, q.dtype)
        best, _ = lax.scan(step, best, jnp.arange(chunks))
        # Without the barrier XLA joins this slice with that of top_k, no longer sees a top-k, and
        # sorts whole rows on CPU: 28 times slower where the bank is a single chunk.
        return lax.optimization_barrier(best)[:, -1]

    blocks = -(-n // query_chunk)
    padded = jnp.pad(queries, ((0, blocks * query_chunk - n), (0, 0)))
    return lax.map(block, padded.reshape(blocks, query_chunk, width)).reshape(-1)[:n]


SCORES = {"knn": knn}
GRIDS = {"knn": {"k": (1, 5, 10, 20, 50, 100, 200)}}
