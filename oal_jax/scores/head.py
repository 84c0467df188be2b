"""The last linear layer of a classifier: given by the caller, or found among its arrays."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from oal_jax.errors import UserError
from oal_jax.scores.base import Head
from oal_jax.scores.outputs import Outputs

_FORMS = 'give (kernel, bias), (kernel,), or a dict {"kernel": ..., "bias": ...}'
# A model in bfloat16 rounds its logits to about this share of their spread.
_TOLERANCE = 0.02
_ROWS = 512  # of the outputs are enough to recognise a kernel


def as_head(head: Any) -> Head | None:
    """A head in any form that `calibrate` takes; None stays None.

    Args:
      head: `Head`, (kernel (d, c), bias (c,)), (kernel,), the kernel alone, or a dict of a Flax
        layer, {"kernel", "bias"}. Without a bias it is 0.

    Raises:
      UserError: anything else.
    """
    if head is None:
        return None
    if isinstance(head, Mapping):
        if "kernel" not in head or not set(head) <= {"kernel", "bias"}:
            raise UserError(
                f"head is a dict with {', '.join(map(str, head)) or 'nothing'}; {_FORMS}"
            )
        parts = [head["kernel"], head.get("bias")]
    elif isinstance(head, tuple | list) and 1 <= len(head) <= 2:
        parts = [*head, None][:2]
    else:
        parts = [head, None]
    try:
        kernel, bias = (None if x is None else np.asarray(x, np.float32) for x in parts)
    except (TypeError, ValueError):
        raise UserError(f"head is of type {type(head).__name__}; {_FORMS}") from None
    if kernel is None or kernel.ndim != 2 or (bias is not None and bias.ndim != 1):
        shapes = ", ".join(str(np.shape(x)) for x in (kernel, bias) if x is not None)
        raise UserError(f"head has the shapes {shapes}; {_FORMS}")
    return Head(kernel, np.zeros(kernel.shape[1], np.float32) if bias is None else bias)


def find_head(forward: Partial, outputs: Outputs, images: Any) -> Head | None:
    """The array of the model by which `features @ kernel + bias` gives its logits, if there is one.

    Args:
      forward: from `as_forward`. Its arrays are the leaves, and what a plain function closes over.
      outputs: of three inputs or more, with features.
      images: a few images, to trace the function with.
    """
    if outputs.features is None or len(outputs.logits) < 3:
        return None
    features, logits = (
        np.asarray(x[:_ROWS], np.float64) for x in (outputs.features, outputs.logits)
    )
    shape = features.shape[1], logits.shape[1]
    arrays = [
        x
        for x in _arrays(forward, images)
        if np.issubdtype(x.dtype, np.floating) or x.dtype.itemsize == 2
    ]
    biases = [np.asarray(x, np.float32) for x in arrays if x.shape == shape[1:]]
    for kernel in _kernels(arrays, shape):
        bias = _bias(features, logits, kernel)
        if bias is not None:
            # The array itself, where there is one: the mean over the inputs is rounded.
            near = [x for x in biases if np.abs(x - bias).max() <= _TOLERANCE * logits.std()]
            return Head(kernel, near[0] if near else bias.astype(np.float32))
    return None


def _arrays(forward: Partial, images) -> list[Any]:
    """The leaves of the function, and the constants of its trace."""
    shape = jax.ShapeDtypeStruct(np.shape(images), np.float32)
    constants = _constants(jax.make_jaxpr(forward)(shape))
    return [x for x in [*jax.tree.leaves(forward), *constants] if hasattr(x, "dtype")]


def _constants(closed: Any) -> list[Any]:
    """What a traced function closes over, within jitted functions too."""
    constants = list(closed.consts)
    for equation in closed.jaxpr.eqns:
        for value in equation.params.values():
            if hasattr(value, "consts") and hasattr(value, "jaxpr"):
                constants += _constants(value)
    return constants


def _kernels(arrays: Iterable[Any], shape: tuple[int, int]) -> Iterable[Float[np.ndarray, "d c"]]:
    """Arrays of this shape or its transpose; convolutions of 1 x 1 among them."""
    for array in arrays:
        if array.ndim < 2 or array.size != shape[0] * shape[1]:
            continue
        sides = tuple(n for n in array.shape if n > 1) if array.ndim > 2 else array.shape
        for candidate in dict.fromkeys([shape, shape[::-1]]):
            if sides == candidate:
                matrix = np.asarray(array, np.float32).reshape(candidate)
                yield matrix if candidate == shape else matrix.T
        if shape[0] == shape[1] and sides == shape:
            yield np.asarray(array, np.float32).reshape(shape).T


def _bias(features, logits, kernel) -> Float[Array, " c"] | None:
    """What is left of the logits, where it is the same for every input."""
    rest = logits - features @ kernel
    bias = rest.mean(axis=0)
    spread = logits.std()
    return bias if spread > 0 and np.abs(rest - bias).max() <= _TOLERANCE * spread else None
