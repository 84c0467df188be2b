"""Random rows of a pool, drawn inside jit at a cost that does not grow with the pool."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, UInt32

_PERMUTED = 2**14  # largest pool that is permuted whole
_ROUNDS = 8


def draw_rows(key: Key[Array, ""], size: int, count: int) -> Int[Array, " n"]:
    """`count` rows of a pool of `size`, without replacement where it has enough.

    Small pools are permuted whole. For large ones see `distinct_rows`: a permutation of a million
    rows takes longer than a training step that reads a hundred of them.
    """
    if size <= _PERMUTED or size < count:
        return jax.random.choice(key, size, (count,), replace=size < count)
    return distinct_rows(key, size, count)


def distinct_rows(key: Key[Array, ""], size: int, count: int) -> Int[Array, " n"]:
    """`count` different numbers in [0, size) in O(count): a keyed permutation of 0, 1, 2, ...

    A Feistel network (Luby and Rackoff 1988) permutes the numbers of an even number of bits, at
    most 4 * size of them. Results outside [0, size) are permuted again until they are inside (cycle
    walking, Black and Rogaway 2002), so all numbers stay different.
    """
    half = max(1, -(-(size - 1).bit_length() // 2))
    keys = jax.random.bits(key, (_ROUNDS,), jnp.uint32)

    def permute(x: UInt32[Array, " n"]) -> UInt32[Array, " n"]:
        mask = jnp.uint32((1 << half) - 1)
        left, right = x >> half, x & mask
        for i in range(_ROUNDS):
            left, right = right, left ^ (_mix(right ^ keys[i]) & mask)
        return (left << half) | right

    def walk(x):
        return jnp.where(x >= size, permute(x), x)

    first = permute(jnp.arange(count, dtype=jnp.uint32))
    inside = jax.lax.while_loop(lambda x: jnp.any(x >= size), walk, first)
    return inside.astype(jnp.int32)


def _mix(x: UInt32[Array, " n"]) -> UInt32[Array, " n"]:
    """A bijection of 32 bits in which every bit depends on every bit (Wellons's lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
