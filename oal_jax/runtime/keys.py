"""Random keys: derived from the root by name and step, so none is ever stored."""

import zlib

import jax
from jaxtyping import Array, Int, Key


def named(root: Key[Array, ""], name: str) -> Key[Array, ""]:
    """The key of a purpose: `root` folded with a hash of `name` that is equal on every host."""
    return jax.random.fold_in(root, zlib.crc32(name.encode()))


def at_step(root: Key[Array, ""], name: str, step: Int[Array, ""] | int) -> Key[Array, ""]:
    """The key of a purpose at a step."""
    return jax.random.fold_in(named(root, name), step)
