"""Any classifier as the function of images that scores read."""

import difflib
from collections.abc import Callable, Collection, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from oal_jax.errors import UserError
from oal_jax.models.conv import with_maps
from oal_jax.scores import FIELDS, Outputs, summarise


def make_forward(net: Any, variables: Mapping[str, Any], fields: Collection[str]) -> Partial:
    """A linen module and its variables as a function of float images in [0, 1] to `Outputs`.

    Training, evaluation, detectors and the teacher all run a module through this function.

    Args:
      net: a module that returns (logits, features) and sows its feature maps.
      variables: its parameters and batch statistics.
      fields: names out of `scores.FIELDS` to compute besides the logits.
    """
    return Partial(_bound(net, tuple(sorted(fields))), variables)


# Cached, so that equal models are one function to jit.
@cache
def _bound(net, fields):
    return partial(_apply, net, fields)


def _apply(net, fields, variables, images: Float[Array, "n h w c"]) -> Outputs:
    return summarise(*with_maps(net, variables, images), fields)


def as_forward(function: Callable) -> Partial:
    """A user's function of images as one that returns `scores.Outputs`.

    The weights of a callable that is a pytree of arrays (`jax.tree_util.Partial`, an `nnx.Module`)
    are arguments of compiled programs. Weights that a plain function closes over become constants.

    Args:
      function: float images in [0, 1] to logits (n, c); (logits, features), the features (n, d)
        being the input of the last linear layer; (logits, features, maps), a sequence of feature
        maps (n, h, w, d) from the input's side to the last; a dict with these names; or `Outputs`.

    Raises:
      UserError: it is not callable, or, once called, returns anything else.
    """
    if not callable(function):
        raise UserError(f"forward must be a function of images, is a {type(function).__name__}")
    leaves = jax.tree.leaves(function)
    if leaves and all(map(_is_weight, leaves)):
        return Partial(_outputs_of, function)
    # A lambda is hashable even where the callable is not.
    return Partial(lambda images: _outputs_of(function, images))


def _is_weight(leaf: Any) -> bool:
    # Random keys are not weights: nothing draws from them in evaluation mode.
    is_array = isinstance(leaf, jax.Array | np.ndarray)
    return is_array and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


_PARTS = ("logits", "features", "maps")
_ALLOWED = "return logits, (logits, features), (logits, features, maps), or a dict with these names"


def _outputs_of(function: Callable, images) -> Outputs:
    returned = function(images)
    if isinstance(returned, Outputs):
        return returned
    if isinstance(returned, Mapping):
        for name in returned:
            if name not in _PARTS:
                near = difflib.get_close_matches(str(name), _PARTS, n=1, cutoff=0.0)
                raise UserError(f"forward returned a dict with {name!r}; nearest: {near[0]!r}")
        parts = dict(returned)
    elif isinstance(returned, tuple | list):
        if not 1 <= len(returned) <= 3:
            raise UserError(f"forward returned {len(returned)} values; {_ALLOWED}")
        parts = dict(zip(_PARTS, returned, strict=False))
    else:
        parts = {"logits": returned}
    if parts.get("logits") is None:
        raise UserError(f"forward returned no logits; {_ALLOWED}")
    maps = parts.get("maps")
    maps = (maps,) if hasattr(maps, "ndim") else tuple(maps or ())
    count = images.shape[0]
    _check_part("logits", parts["logits"], 2, count)
    if parts.get("features") is not None:
        _check_part("features", parts["features"], 2, count)
    for i, feature_map in enumerate(maps):
        _check_part(f"maps[{i}]", feature_map, 4, count)
    return summarise(parts["logits"], parts.get("features"), maps, FIELDS)


def _check_part(name: str, value: Any, ndim: int, count: int) -> None:
    shape = getattr(value, "shape", None)
    if shape is None:
        raise UserError(f"forward's {name} are a {type(value).__name__}, not an array; {_ALLOWED}")
    if len(shape) != ndim or shape[0] != count:
        rest = ", ".join({2: ["width"], 4: ["height", "width", "channels"]}[ndim])
        raise UserError(
            f"forward's {name} have shape {tuple(shape)} for {count} images, not ({count}, {rest})"
        )
