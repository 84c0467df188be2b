"""DOE: outlier exposure under the worst perturbation of the weights (arXiv 2303.05033).

A perturbed net sees given outliers as the net itself would see other ones, so training under the
worst perturbation covers more outliers than were given. Worst is where the regret is largest: the
squared slope of the outlier loss in a factor on the logits, as in invariant risk
minimisation. Per batch, once `start_step` is reached:

    d  = gradient of the regret on the outliers in the weights, each tensor scaled to its weight's
         norm; averaged over steps by 0.6 old + 0.4 new
    loss = CE at w on ID + OE at w + g d on outliers, g drawn from `sizes`, no gradient through d

Before, the loss is CE + OE at w. Differences from the official code:
- It makes two updates of the optimizer a batch, OE's and then CE's, each with its gradient clipped
  to a norm of 1; here both gradients are one update, to first order the same.
- Its proxy takes a step that *lowers* the regret. The default ascends, as the paper has it;
  `ascend=False` does as the code.
- The proxy's learning rate and gradient clipping are absent: scaling each tensor cancels both.
- Running statistics are those of the unperturbed net alone, and dropout is the same in all passes.
"""

from typing import Any

import jax
import jax.numpy as jnp

from oal_jax.methods import losses
from oal_jax.methods.base import Method
from oal_jax.methods.student import Transform, forward, id_loss, init_student
from oal_jax.runtime.keys import named


def worst_perturbation(
    model: Any,
    image_shape: tuple[int, int, int],
    *,
    start_step: float,
    weight: float = 1.0,
    sizes: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4),
    average: float = 0.6,
    ascend: bool = True,
    shared_statistics: bool = False,
    ce_transform: Transform | None = None,
) -> Method:
    """CE + `weight` * OE, the latter at perturbed weights from `start_step` on.

    Group "student". State "doe": the averaged direction (a tree like the student's parameters)
    and how many steps it has seen. A step costs two forward and backward passes beside that of
    CE, before `start_step` too: a conditional would make its convolutions 40 times slower on CPU.

    Args:
      start_step: half of the training as published (5 of 10 epochs).
      sizes: g, relative to the norm of each weight; one is drawn a step. To a bfloat16 model those
        under 2^-9 = 0.002 are mostly lost in the rounding of its weights.
      average: weight of the old direction in the running average.
    """

    def init(key):
        params, model_state = init_student(key, model, image_shape)
        model_state["doe"] = {
            "direction": jax.tree.map(jnp.zeros_like, params["student"]),
            "steps": jnp.zeros((), jnp.int32),
        }
        return params, model_state

    def loss(params, model_state, batch, step, key):
        def run(student):
            return forward(
                model,
                {**params, "student": student},
                model_state,
                key,
                batch["image"],
                batch["outlier_image"],
                shared_statistics=shared_statistics,
            )

        def exposure(logits):
            return jnp.mean(losses.uniform_cross_entropy(logits))

        def regret(student):
            _, (logits, _), _ = run(student)
            return jax.grad(lambda factor: exposure(factor * logits))(1.0) ** 2

        (logits, _), _, student = run(params["student"])
        value, metrics = id_loss(logits, batch["label"], ce_transform, batch.get("part"))
        weights = jax.lax.stop_gradient(params["student"])
        size_of_regret, slope = jax.value_and_grad(regret)(weights)
        old, active = model_state["doe"], step >= start_step
        kept = jnp.where(old["steps"] > 0, average, 0.0)
        new = relative_direction(weights, slope, 1.0 if ascend else -1.0)
        direction = jax.tree.map(
            lambda a, b: jnp.where(active, kept * a + (1 - kept) * b, a), old["direction"], new
        )
        drawn = jax.random.choice(named(key, "size"), jnp.array(sizes))
        size = jnp.where(active, drawn, 0.0)
        perturbed = jax.tree.map(lambda w, d: w + size * d, params["student"], direction)
        _, (outlier_logits, _), _ = run(perturbed)
        term = exposure(outlier_logits)
        metrics |= {"outlier_exposure": term, "regret": size_of_regret, "perturbation": size}
        doe = {"direction": direction, "steps": old["steps"] + active}
        return value + weight * term, (
            {**model_state, "student": student, "doe": doe},
            metrics,
        )

    return Method(init, loss)


def relative_direction(weights: Any, gradient: Any, sign: float) -> Any:
    """The gradient with each weight's own norm; zero for biases, scales and where it is zero."""

    def one(w, g):
        if w.ndim < 2:
            return jnp.zeros_like(w)
        # Scaled by its largest entry first: the squares of a small gradient would underflow.
        g = g / jnp.maximum(jnp.max(jnp.abs(g)), jnp.finfo(g.dtype).tiny)
        norm = jnp.linalg.norm(g.reshape(-1))
        return sign * jnp.linalg.norm(w.reshape(-1)) * g / jnp.maximum(norm, 1.0)

    return jax.tree.map(one, weights, gradient)
