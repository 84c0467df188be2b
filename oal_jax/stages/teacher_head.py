"""The teacher's linear head apart: what turns features, or what stands for them, into logits."""

import numpy as np
from jaxtyping import Float

from oal_jax.errors import UserError
from oal_jax.stages import teacher
from oal_jax.stages.context import Context

_NAMES = ("head", "fc")  # of a ViT, of a ResNet


def load(context: Context) -> tuple[Float[np.ndarray, "d k"], Float[np.ndarray, " k"]]:
    """(kernel, bias): logits are features @ kernel + bias.

    Raises:
      UserError: the teacher has no such layer.
    """
    params = teacher.variables(context)["params"]
    for name in _NAMES:
        if name in params:
            kernel = params[name]["kernel"]
            bias = params[name].get("bias", np.zeros(kernel.shape[1]))
            return np.asarray(kernel, np.float32), np.asarray(bias, np.float32)
    raise UserError(
        f"{context.directory('teacher')}: the teacher has no linear head ({' or '.join(_NAMES)});"
        " outliers.boundary='crossing', latents.guide and latents.select need one"
    )
