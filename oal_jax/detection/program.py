"""A classifier as the program that JAX traced, which runs without the code of the model.

The program takes float images in [0, 1], for any number of them, and gives the fields of
`scores.Outputs` that a score reads. Its weights are arguments.
"""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jax.custom_batching import custom_vmap
from jax.export import Exported
from jax.tree_util import Partial

from oal_jax.errors import UserError
from oal_jax.scores import Outputs, Score

PLATFORMS = ("cpu", "cuda", "tpu")
# A call into the process that wrote the program. `serialize` refuses it; nobody else should run it.
_CALLBACK = re.compile(r"custom_call\s*@([\w.]*(?:callback|python)[\w.]*)")


def trace(forward: Partial, image_shape: Sequence[int], needs: Collection[str]) -> bytes:
    """The serialized program of a classifier.

    Args:
      forward: float images in [0, 1] to `scores.Outputs`; its leaves are the weights.
      image_shape: (height, width, channels).
      needs: names out of `scores.FIELDS` to give besides the logits.

    Raises:
      UserError: JAX can't write the model as a program.
    """
    leaves, structure = jax.tree.flatten(forward)

    def call(leaves, images):
        outputs = jax.tree.unflatten(structure, leaves)(images)
        return {name: getattr(outputs, name) for name in ("logits", *needs)}

    return _with_gradient(by_rows(call, (leaves,), image_shape, jnp.float32))


def by_rows(
    call: Callable, arguments: tuple, image_shape: Sequence[int], dtype: Any, platforms=PLATFORMS
) -> Exported:
    """Export `call(*arguments, images)` for any number of images.

    A function that compares the size of its batch is mapped over single images instead.

    Raises:
      UserError: JAX can't write the function as a program.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    (batch,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *image_shape), dtype)

    error: Exception | None = None
    for function in _forms(call, len(arguments)):
        try:
            return export.export(jax.jit(function), platforms=list(platforms))(*shapes, images)
        except UserError:
            raise
        except Exception as failure:  # anything that a user's function or a lowering raises
            error = error or failure
    raise _no_program(error)


def _forms(call: Callable, count: int) -> tuple[Callable, Callable]:
    """`call(*arguments, images)` of `count` arguments; and the same, mapped over single images."""

    def one(*arguments):
        *others, image = arguments
        return jax.tree.map(lambda x: x[0], call(*others, image[None]))

    return call, jax.vmap(one, in_axes=(*(None for _ in range(count)), 0))


def _with_gradient(program: Exported) -> bytes:
    try:
        return bytes(program.serialize(vjp_order=1))
    except Exception:  # the model has no gradient, such as one with a loop of unknown length
        pass
    try:
        return bytes(program.serialize())
    except Exception as error:
        raise _no_program(error) from None


def _no_program(error: Exception | None) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(
        f"JAX can't write this model as a program ({reason[:200]}); a model that calls NumPy or"
        " PyTorch can't be saved or exported"
    )


def row_by_row(score: Score) -> Score:
    """The score of single rows, mapped over a batch of unknown size.

    Scores that work in blocks compare the batch's size with a block's, which a symbolic size does
    not allow.
    """

    def one(function):
        def of_row(state, *rest):
            *others, row = rest
            alone = jax.tree.map(lambda x: x[None], row)
            return jax.tree.map(lambda x: x[0], function(state, *others, alone))

        return lambda state, *rest: jax.vmap(lambda row: of_row(state, *rest[:-1], row))(rest[-1])

    return score._replace(score=one(score.score), perturb=score.perturb and one(score.perturb))


def read(data: bytes) -> Exported:
    """A serialized program. Raises ValueError for bytes that are none, or call into Python."""
    try:
        program = export.deserialize(bytearray(data))
        text = program.mlir_module()
        if program.has_vjp():
            text += program.vjp().mlir_module()
    except Exception as error:  # the reader of the format raises almost anything
        raise ValueError(f"no program of this version of JAX ({type(error).__name__})") from None
    callback = _CALLBACK.search(text)
    if callback:
        raise ValueError(f"it calls back into Python ({callback[1]})")
    return program


def as_function(program: Exported) -> Callable[[list, jax.Array], Outputs]:
    """(weights, images) to `Outputs`; for jit, vmap, scan, and gradients by the images."""
    forward = _over_rows(program.call)

    @jax.custom_vjp
    def outputs(leaves, images):
        return forward(leaves, images)

    def ahead(leaves, images):
        return forward(leaves, images), (leaves, images)

    def back(residuals, cotangents):
        if not program.has_vjp():
            raise UserError("the saved model has no gradient; its function is not differentiable")
        vjp = program.vjp()
        gradient = _over_rows(lambda leaves, rows: vjp.call(*leaves, *rows)[-1])
        leaves, images = residuals
        return None, gradient(leaves, (images, *jax.tree.leaves(cotangents)))

    outputs.defvjp(ahead, back)
    return lambda leaves, images: Outputs(**outputs(leaves, images))


def _over_rows(call: Callable) -> Callable:
    """`call(leaves, rows)` for vmap, which a program does not know: more rows of one batch."""

    @custom_vmap
    def run(leaves, rows):
        return call(leaves, rows)

    @run.def_vmap
    def _(size, is_mapped, leaves, rows):
        if any(jax.tree.leaves(is_mapped[0])):
            raise UserError("vmap over the weights of a saved detector is not possible")
        repeat = lambda x, mapped: x if mapped else jnp.broadcast_to(x, (size, *x.shape))
        rows = jax.tree.map(repeat, rows, is_mapped[1])
        count = jax.tree.leaves(rows)[0].shape[1]
        flat = jax.tree.map(lambda x: x.reshape((size * count, *x.shape[2:])), rows)
        results = jax.tree.map(lambda x: x.reshape((size, count, *x.shape[1:])), run(leaves, flat))
        return results, jax.tree.map(lambda _: True, results)

    return run
