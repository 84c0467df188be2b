"""What a classifier says about inputs: all that a post-hoc score may read, computed once."""

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
    """Outputs for n inputs. Fields after the logits are None where the model does not give them."""

    logits: Float[Array, "n c"]
    features: Float[Array, "n d"] | None = None  # the input of the last linear layer
    layers: tuple[Float[Array, "n d_l"], ...] | None = None  # channel means of each feature map
    grams: tuple[Float[Array, "n p d_l"], ...] | None = None  # row sums of Gram matrices
    regions: Float[Array, "n 6 d_l"] | None = None  # the last map, averaged over six regions


# Pure. A `jax.tree_util.Partial` carries its weights as arguments of the compiled program; those
# that a plain function closes over become constants in it.
Forward = Callable[[Float[Array, "n h w c"]], Outputs]
Maps = Sequence[Float[Array, "n h w d_l"]]
FIELDS = Outputs._fields[1:]


def summarise(logits, features, maps: Maps | None, wanted: Collection[str]) -> Outputs:
    """The `wanted` fields of `Outputs`, from a model's logits, features and feature maps.

    Pure, so it belongs inside jit: the maps themselves, which are large, never leave the device.

    Args:
      logits: (n, c).
      features: (n, d), or None.
      maps: feature maps from the input's side to the last, (n, h, w, d_l) each, or None.
      wanted: names out of `FIELDS`.
    """
    maps = maps or ()
    return Outputs(
        logits.astype(jnp.float32),
        features.astype(jnp.float32) if "features" in wanted and features is not None else None,
        tuple(_mean(m) for m in maps) or None if "layers" in wanted else None,
        tuple(gram_sums(m) for m in maps) or None if "grams" in wanted else None,
        six_regions(maps[-1]) if "regions" in wanted and maps else None,
    )


def _mean(x: Float[Array, "n h w d"]) -> Float[Array, "n d"]:
    return jnp.mean(x.astype(jnp.float32), axis=(1, 2))


def gram_sums(
    x: Float[Array, "n h w d"], powers: Sequence[int] = GRAM_POWERS
) -> Float[Array, "n p d"]:
    """Row sums of the Gram matrices of every power, each brought back by the p-th root.

    sign(s) |s|^(1/p) with s_i = sum_j <x_i^p, x_j^p>, over positions. As a sum over j it is one
    product with the summed channels, so no (d, d) matrix is made. A map is divided by its largest
    value before the power and multiplied by its square after the root, so that x^5 stays finite.

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

    Source: MODE, arXiv 2308.10239; a map of one position gives six equal vectors.
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
    """The logits and the fields in `needs` as float32 arrays of the host; the others dropped.

    Args:
      message: begins every complaint; its `{}` stands for the field.

    Raises:
      UserError: a field is missing, has another number of rows, or holds a NaN or an infinity.
    """
    count = len(outputs.logits)

    def checked(name, value, ndim):
        value = np.asarray(value, np.float32)
        if value.ndim != ndim or len(value) != count:
            wanted = ", ".join([str(count), *["width"] * (ndim - 1)])
            raise UserError(f"{message.format(name)} have shape {value.shape}, not ({wanted})")
        bad = ~np.isfinite(value).all(axis=tuple(range(1, ndim)))
        if bad.any():
            raise UserError(
                f"{message.format(name)} have NaN or infinite values in"
                f" {int(bad.sum())} of {len(value)} rows, the first in row {int(bad.argmax())}"
            )
        return value

    kept: dict[str, Any] = {"logits": checked("logits", outputs.logits, 2)}
    for name in needs:
        value = getattr(outputs, name)
        if value is None:
            raise UserError(f"{message.format(name)} are not given by this model; {_HOW[name]}")
        ndim = {"features": 2, "layers": 2, "grams": 3, "regions": 3}[name]
        if name in ("layers", "grams"):
            kept[name] = tuple(checked(name, x, ndim) for x in value)
        else:
            kept[name] = checked(name, value, ndim)
    return Outputs(**kept)


_HOW = {
    "features": "return (logits, features), the input of the last linear layer",
    "layers": "return (logits, features, maps), or take a score without them",
    "grams": "return (logits, features, maps), or take a score without them",
    "regions": "return (logits, features, maps), or take a score without them",
}
