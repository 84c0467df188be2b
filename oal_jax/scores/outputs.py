"""Outputs of a classifier, computed once: all that a post-hoc score may read."""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Float

from oal_jax.errors import UserError
from oal_jax.runtime import batched, distributed
from oal_jax.runtime.ops import to_unit

GRAM_POWERS = (1, 2, 3, 4, 5)  # as OpenOOD; the paper goes on to 10, at twice the memory


class Outputs(NamedTuple):
    """Outputs for n inputs. Fields after the logits are None where the model has none."""

    logits: Float[Array, "n c"]
    features: Float[Array, "n d"] | None = None  # the input of the last linear layer
    layers: tuple[Float[Array, "n d_l"], ...] | None = None  # channel means of each feature map
    grams: tuple[Float[Array, "n p d_l"], ...] | None = None  # row sums of Gram matrices
    regions: Float[Array, "n 6 d_l"] | None = None  # the last map, averaged over six regions


# Pure. The weights of a `jax.tree_util.Partial` are arguments of the compiled program; weights that
# a plain function closes over become constants in it.
Forward = Callable[[Float[Array, "n h w c"]], Outputs]
Maps = Sequence[Float[Array, "n h w d_l"]]
FIELDS = Outputs._fields[1:]


def summarise(logits, features, maps: Maps | None, fields: Collection[str]) -> Outputs:
    """`Outputs` with the logits and `fields`, from a model's logits, features and feature maps.

    Pure. Call it inside jit, so that the maps, which are large, never leave the device.

    Args:
      logits: (n, c).
      features: (n, d), or None.
      maps: feature maps from the input's side to the last, (n, h, w, d_l) each, or None.
      fields: names out of `FIELDS`.
    """
    maps = maps or ()
    return Outputs(
        logits.astype(jnp.float32),
        features.astype(jnp.float32) if "features" in fields and features is not None else None,
        tuple(_mean(m) for m in maps) or None if "layers" in fields else None,
        tuple(gram_sums(m) for m in maps) or None if "grams" in fields else None,
        six_regions(maps[-1]) if "regions" in fields and maps else None,
    )


def _mean(x: Float[Array, "n h w d"]) -> Float[Array, "n d"]:
    return jnp.mean(x.astype(jnp.float32), axis=(1, 2))


def gram_sums(
    x: Float[Array, "n h w d"], powers: Sequence[int] = GRAM_POWERS
) -> Float[Array, "n p d"]:
    """Row sums of the Gram matrices of every power p, each with its p-th root taken.

    sign(s) |s|^(1/p) with s_i = sum_j <x_i^p, x_j^p>, over positions. The sum over j is one product
    with the summed channels, so there is no (d, d) matrix. A map is divided by its largest value
    before the power and multiplied by its square after the root, so that x^5 stays finite.

    Source: Sastry and Oore, arXiv 1912.12510, eq. 1 to 3; the root of the row sum, as OpenOOD.
    """
    x = x.reshape(x.shape[0], -1, x.shape[-1]).astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=(1, 2), keepdims=True), 1e-12)
    x = x / scale

    def sums(power):
        raised = x**power
        rows = jnp.einsum(
            "npd,np->nd", raised, jnp.sum(raised, axis=2), precision=jax.lax.Precision.HIGHEST
        )
        root = jnp.sign(rows) * jnp.abs(rows) ** (1 / power)
        return root * scale[:, 0] ** 2

    return jnp.stack([sums(power) for power in powers], axis=1)


def six_regions(x: Float[Array, "n h w d"]) -> Float[Array, "n 6 d"]:
    """Means over the whole map, its four quadrants, and its central half.

    A map of one position gives six equal vectors. Source: MODE, arXiv 2308.10239.
    """
    h, w = x.shape[1:3]
    top, left = slice(0, (h + 1) // 2), slice(0, (w + 1) // 2)
    bottom, right = slice(h // 2, h), slice(w // 2, w)
    middle = slice(h // 4, h - h // 4), slice(w // 4, w - w // 4)
    boxes = [(slice(0, h), slice(0, w)), (top, left), (top, right), (bottom, left), (bottom, right)]
    return jnp.stack([_mean(x[:, rows, columns]) for rows, columns in [*boxes, middle]], axis=1)


def compute(
    forward: Forward,
    images: np.ndarray | Iterator[np.ndarray],
    batch_size: int = 512,
    fields: Collection[str] = FIELDS,
    mesh: Mesh | None = None,
) -> Outputs:
    """`forward` over a whole set, in batches of one size, split over the devices.

    Args:
      forward: pure; float32 images in [0, 1] to `Outputs`. Jitted here.
      images: (n, h, w, c), uint8 or floats in [0, 1]; or an iterator of such arrays, for a set that
        is not in memory.
      batch_size: rounded up to a multiple of the devices.
      fields: which fields besides the logits are returned.
      mesh: the devices; None for all.

    Returns:
      `Outputs` of NumPy arrays of n rows.

    Raises:
      UserError: no images.
    """
    mesh = mesh or distributed.make_mesh()
    chunks = images if isinstance(images, Iterator) else iter([images] if len(images) else [])
    run = partial(jitted(frozenset(fields)), distributed.place_parameters(as_pytree(forward), mesh))
    try:
        return batched.apply(run, chunks, batch_size, mesh)
    except batched.NoRows:
        raise UserError("no images to compute outputs of") from None


def as_pytree(forward: Forward) -> Partial:
    """`forward` as a pytree whose leaves are its weights, so that jit takes it as an argument."""
    return forward if isinstance(forward, Partial) else Partial(forward)


@cache
def jitted(fields: frozenset[str]) -> Callable[[Partial, Array], Outputs]:
    """The compiled program of `compute`: (forward, images) to `Outputs` with these fields alone."""

    @jax.jit
    def outputs_of(forward: Partial, images) -> Outputs:
        outputs = forward(to_unit(images))
        return outputs._replace(**{name: None for name in FIELDS if name not in fields})

    return outputs_of


def check(outputs: Outputs, needs: Sequence[str], message: str) -> Outputs:
    """The logits and the fields in `needs` as float32 NumPy arrays, without the other fields.

    Args:
      outputs: of n inputs.
      needs: names out of `FIELDS`.
      message: begins every error message; its `{}` stands for the field.

    Raises:
      UserError: a field is missing, has another number of rows, or holds a NaN or an infinity.
    """
    count = len(outputs.logits)

    def checked(name, value, ndim):
        value = np.asarray(value, np.float32)
        if value.ndim != ndim or len(value) != count:
            shape = ", ".join([str(count), *["width"] * (ndim - 1)])
            raise UserError(f"{message.format(name)} have shape {value.shape}, not ({shape})")
        bad = ~np.isfinite(value).all(axis=tuple(range(1, ndim)))
        if bad.any():
            raise UserError(
                f"{message.format(name)} have NaN or infinite values in"
                f" {int(bad.sum())} of {len(value)} rows, the first in row {int(bad.argmax())}"
            )
        return value

    checked_fields: dict[str, Any] = {"logits": checked("logits", outputs.logits, 2)}
    for name in needs:
        value = getattr(outputs, name)
        if value is None:
            raise UserError(f"{message.format(name)} are not given by this model; {_HOW[name]}")
        ndim = {"features": 2, "layers": 2, "grams": 3, "regions": 3}[name]
        if name in ("layers", "grams"):
            checked_fields[name] = tuple(checked(name, x, ndim) for x in value)
        else:
            checked_fields[name] = checked(name, value, ndim)
    return Outputs(**checked_fields)


_HOW = {
    "features": "return (logits, features), the input of the last linear layer",
    "layers": "return (logits, features, maps), or take a score without them",
    "grams": "return (logits, features, maps), or take a score without them",
    "regions": "return (logits, features, maps), or take a score without them",
}
