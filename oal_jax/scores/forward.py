"""Any classifier as the function of images that scores read."""

import difflib
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping
from functools import cache, partial
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from oal_jax.errors import UserError
from oal_jax.models.conv import with_maps
from oal_jax.runtime.ops import to_unit
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


def as_forward(function: Callable, images: Any = None) -> Partial:
    """A user's function of images as one that returns `scores.Outputs`.

    The arrays of a callable that is a pytree (`jax.tree_util.Partial`, `functools.partial` with
    arguments, an `nnx.Module`, an Equinox module) are arguments of compiled programs; its other
    leaves, such as activations, are part of the program. Weights that a plain function closes over
    become constants.

    Args:
      function: float images in [0, 1] to logits (n, c); (logits, features), the features (n, d)
        being the input of the last linear layer; (logits, features, maps), a sequence of feature
        maps (n, h, w, d) from the input's side to the last; a dict with these names; or `Outputs`.
      images: (n, h, w, c). With them the function is tried, and one of NumPy arrays (PyTorch, ONNX
        Runtime, ...) is called through `jax.pure_callback`, which a line on stderr says.

    Raises:
      UserError: it is not callable, fails on the images, or returns anything else.
    """
    _check_kind(function)
    if type(function) is partial:
        function = Partial(function.func, *function.args, **function.keywords)
    leaves, structure = jax.tree.flatten(function)
    is_weight = tuple(_is_weight(leaf) for leaf in leaves)
    weights = [leaf for leaf, weight in zip(leaves, is_weight, strict=True) if weight]
    rest = [leaf for leaf, weight in zip(leaves, is_weight, strict=True) if not weight]
    forward = Partial(_Model(structure, is_weight, rest), weights)
    if images is None:
        return forward
    images = np.asarray(to_unit(images[:2]))
    problem = _trace_problem(forward, images)
    if problem is None:
        return forward
    on_host = Partial(HostModel(function, images, problem))
    print(
        "oal_jax: the model is a function of NumPy arrays: it is called through jax.pure_callback,"
        " on the host and without gradients",
        file=sys.stderr,
    )
    return on_host


class _Model:
    """A callable pytree without its arrays. Equal ones share the programs that jit compiled."""

    def __init__(self, structure: Any, is_weight: tuple[bool, ...], rest: list[Any]):
        self.key, self.rest = (structure, is_weight), rest

    def __call__(self, weights: list[Array], images: Float[Array, "n h w c"]) -> Outputs:
        structure, is_weight = self.key
        arrays, rest = iter(weights), iter(self.rest)
        leaves = [next(arrays if weight else rest) for weight in is_weight]
        return _outputs_of(structure.unflatten(leaves), images)

    def __eq__(self, other: Any) -> bool:
        return (
            isinstance(other, _Model)
            and self.key == other.key
            and all(_is_same(a, b) for a, b in zip(self.rest, other.rest, strict=True))
        )

    def __hash__(self) -> int:
        return hash(self.key[1])


def _is_same(a: Any, b: Any) -> bool:
    plain = bool | int | float | str | bytes | None
    return a is b or (type(a) is type(b) and isinstance(a, plain) and a == b)


def _check_kind(function: Any) -> None:
    """Raise a UserError for what is no function of images, with what to give instead."""
    if isinstance(function, nn.Module) and function.scope is None:
        raise UserError(
            "a linen module has no weights of its own; give jax.tree_util.Partial(module.apply,"
            " variables)"
        )
    if any(kind.__module__.partition(".")[0] == "torch" for kind in type(function).__mro__):
        raise UserError(
            "a PyTorch module takes tensors, channels first; give a function of NumPy arrays that"
            " calls it under torch.no_grad(), or the safetensors file of a ViT or ResNet"
        )
    if not callable(function):
        raise UserError(f"the model must be a function of images, is a {type(function).__name__}")


def _trace_problem(forward: Partial, images: np.ndarray) -> Exception | None:
    """Why JAX cannot trace the function, or None."""
    shape = jax.ShapeDtypeStruct(images.shape, jnp.float32)
    try:
        jax.eval_shape(forward, shape)
    except UserError:
        raise
    except Exception as error:  # a library that meets a tracer raises errors of its own
        return error
    return None


class HostModel:
    """A function of NumPy arrays, called from compiled programs on the host."""

    def __init__(self, function: Callable, images: np.ndarray, problem: Exception):
        """Tries the function on some images. `problem` is why JAX can't trace it."""
        self.function = function
        try:
            returned = function(images.copy())
        except Exception as error:
            is_foreign = "Tracer" in f"{type(problem).__name__} {problem}"
            raise _failure(images, error if is_foreign else problem) from error
        if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(returned)):
            raise UserError(
                f"JAX can't trace the model ({_reason(problem)}); call it in evaluation mode, such"
                " as model.eval() of an nnx module, and without conditions on values"
            ) from problem
        parts = self._parts(returned, len(images))
        self._rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), parts)

    def __call__(self, images: Float[Array, "n h w c"]) -> Outputs:
        """Traceable; one call of the function for a batch."""
        count = images.shape[0]
        shapes = jax.tree.map(
            lambda row: jax.ShapeDtypeStruct((count, *row.shape), row.dtype), self._rows
        )
        parts = jax.pure_callback(self._run, shapes, images, vmap_method="sequential")
        return summarise(**parts, fields=FIELDS)

    def _run(self, images) -> dict[str, Any]:
        images = np.array(images)  # writable, as PyTorch wants it
        return self._parts(self.function(images), len(images))

    def _parts(self, returned: Any, count: int) -> dict[str, Any]:
        try:
            arrays = jax.tree.map(lambda x: np.asarray(x, np.float32), returned)
        except Exception as error:  # a tensor with a gradient, a string
            raise UserError(f"the model returned no arrays ({_reason(error)})") from None
        return _parts_of(arrays, count)


def is_on_host(forward: Partial) -> bool:
    """Whether the model is called on the host, without gradients."""
    return isinstance(forward.func, HostModel)


# What linen raises in training mode, and where variables are missing.
_FLAX_ERRORS = (
    flax.errors.InvalidRngError,
    flax.errors.ModifyScopeVariableError,
    flax.errors.ScopeCollectionNotFound,
    flax.errors.ScopeParamNotFoundError,
    flax.errors.ScopeVariableNotFoundError,
)


def _failure(images: np.ndarray, error: Exception) -> UserError:
    hint = ""
    if isinstance(error, _FLAX_ERRORS):
        hint = (
            "; call it in evaluation mode, such as Partial(net.apply, variables, train=False), with"
            " all its variables"
        )
    return UserError(f"the model fails on float32 images {images.shape}: {_reason(error)}{hint}")


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    name = type(error).__name__
    return f"{name}: {textwrap.shorten(lines[0], 200, placeholder=' ...')}" if lines else name


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
    return summarise(**_parts_of(returned, images.shape[0]), fields=FIELDS)


def _parts_of(returned: Any, count: int) -> dict[str, Any]:
    """The logits, features and maps among what a function returned for `count` images."""
    if isinstance(returned, Mapping):
        for name in returned:
            if name not in _PARTS:
                near = difflib.get_close_matches(str(name), _PARTS, n=1, cutoff=0.0)
                raise UserError(f"the model returned a dict with {name!r}; nearest: {near[0]!r}")
        parts = dict(returned)
    elif isinstance(returned, tuple | list):
        if not 1 <= len(returned) <= 3:
            raise UserError(f"the model returned {len(returned)} values; {_ALLOWED}")
        parts = dict(zip(_PARTS, returned, strict=False))
    else:
        parts = {"logits": returned}
    if parts.get("logits") is None:
        raise UserError(f"the model returned no logits; {_ALLOWED}")
    maps = parts.get("maps")
    parts["maps"] = (maps,) if hasattr(maps, "ndim") else tuple(maps or ())
    _check_part("logits", parts["logits"], 2, count)
    if parts.setdefault("features", None) is not None:
        _check_part("features", parts["features"], 2, count)
    for i, feature_map in enumerate(parts["maps"]):
        _check_part(f"maps[{i}]", feature_map, 4, count)
    return parts


def _check_part(name: str, value: Any, ndim: int, count: int) -> None:
    shape = getattr(value, "shape", None)
    if shape is None:
        raise UserError(
            f"the model's {name} are a {type(value).__name__}, not an array; {_ALLOWED}"
        )
    if len(shape) != ndim or shape[0] != count:
        rest = ", ".join({2: ["width"], 4: ["height", "width", "channels"]}[ndim])
        raise UserError(
            f"the model's {name} have shape {tuple(shape)} for {count} images, not"
            f" ({count}, {rest})"
        )
