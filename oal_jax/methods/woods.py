"""WOODS: learning from wild data, a mixture of outliers and unlabelled ID (arXiv 2202.03299).

Fine-tunes a classifier so that as much wild data as possible counts as OOD, while few ID images do
and ID images are still classified. With E = -logsumexp of the logits and a learned
h(E) = a E - b, a > 0:

    minimise mean sigmoid(-h(E_wild))
    subject to mean sigmoid(h(E_id)) <= id_limit  and  CE <= ce_limit.

Each constraint has an augmented Lagrangian with its own multiplier and penalty; the official code
stores both multipliers in one tensor by accident. The slope of its h may have either sign; here it
is positive, as the energy score needs a lower E of ID.

At the end of an epoch the official code measures the constraints on all ID images in evaluation
mode and moves the multipliers. Here they move every `epoch_steps` steps, by the mean of the
batches' constraints in training mode. That needs no pass over the images, but the values lag behind
the weights by half an epoch and have the noise of the batch statistics.
"""

from typing import Any

import jax
import jax.numpy as jnp

from oal_jax.methods import losses
from oal_jax.methods.base import Groups, Method
from oal_jax.methods.student import Transform, forward, id_loss, init_student


def wild_mixture(
    model: Any,
    image_shape: tuple[int, int, int],
    *,
    epoch_steps: int,
    ce_limit: float,
    id_limit: float = 0.05,
    wild_weight: float = 1.0,
    multiplier_rate: float = 1.0,
    penalty_growth: float = 1.5,
    tolerance: float = 0.0,
    shared_statistics: bool = False,
    ce_transform: Transform | None = None,
) -> Method:
    """The objective above on `image`, `label` and `wild_image`.

    Groups: "student"; "energy" (`scale`, `offset`; a = softplus(scale), b = offset). State "woods":
    multipliers (from 0), penalties (from 1), and the running sum of the constraints; the first
    entry of each is for the ID energy, the second for CE.

    Args:
      model: the student.
      image_shape: of an image.
      epoch_steps: steps between two updates of the multipliers.
      ce_limit: largest cross-entropy, in nats; as published twice that of the start on its training
        images.
      id_limit: alpha, the share of ID images that may count as OOD.
      wild_weight: weight of the wild term.
      multiplier_rate: step of the multipliers (0.1, 1 or 2 in the published search).
      penalty_growth: factor on the penalty of a constraint above `tolerance` (1.1 or 1.5).
      tolerance: largest constraint whose penalty stays.
      shared_statistics: take batch statistics over ID and wild images, as published.
      ce_transform: maps the mean ID cross-entropy before `ce_limit` is subtracted.
    """

    def init(key):
        params, model_state = init_student(key, model, image_shape)
        params["energy"] = {"scale": jnp.zeros(()), "offset": jnp.zeros(())}
        model_state["woods"] = {
            "multiplier": jnp.zeros((2,)),
            "penalty": jnp.ones((2,)),
            "total": jnp.zeros((2,)),
            "count": jnp.zeros((), jnp.int32),
        }
        return params, model_state

    def loss(params, model_state, batch, step, key):
        del step
        (logits, _), (wild_logits, _), student = forward(
            model,
            params,
            model_state,
            key,
            batch["image"],
            batch["wild_image"],
            shared_statistics=shared_statistics,
        )
        ce, metrics = id_loss(logits, batch["label"], ce_transform)
        slope = jax.nn.softplus(params["energy"]["scale"])
        id_neg_energy, wild_neg_energy = (
            jax.nn.logsumexp(z, axis=-1) for z in (logits, wild_logits)
        )
        id_ood, wild_ood = (
            jax.nn.sigmoid(-(slope * neg_energy + params["energy"]["offset"]))
            for neg_energy in (id_neg_energy, wild_neg_energy)
        )
        id_as_ood = jnp.mean(id_ood)
        constraints = jnp.stack([id_as_ood - id_limit, ce - ce_limit])
        old = model_state["woods"]
        terms = losses.augmented_lagrangian(constraints, old["multiplier"], old["penalty"])
        wild = 1 - jnp.mean(wild_ood)
        metrics |= {
            "id_as_ood": id_as_ood,
            "wild_as_ood": jnp.mean(wild_ood),
            "id_neg_energy": jnp.mean(id_neg_energy),
            "wild_neg_energy": jnp.mean(wild_neg_energy),
            "id_multiplier": old["multiplier"][0],
            "ce_multiplier": old["multiplier"][1],
            "id_penalty": old["penalty"][0],
            "ce_penalty": old["penalty"][1],
        }
        woods = old | {"total": old["total"] + constraints, "count": old["count"] + 1}
        ended = woods["count"] == epoch_steps
        moved = updated(woods, multiplier_rate, penalty_growth, tolerance)
        woods = jax.tree.map(lambda a, b: jnp.where(ended, a, b), moved, woods)
        woods = jax.lax.stop_gradient(woods)
        return wild_weight * wild + jnp.sum(terms), (
            {**model_state, "student": student, "woods": woods},
            metrics,
        )

    return Method(init, loss)


def updated(woods: Groups, rate: float, growth: float, tolerance: float) -> Groups:
    """Multipliers and penalties after an epoch, from the mean constraints; sums become zero.

    multiplier += rate * c where penalty * c + multiplier >= 0, else -= rate * multiplier / penalty:
    the gradient of the augmented Lagrangian in the multiplier.
    """
    constraint = woods["total"] / woods["count"]
    multiplier, penalty = woods["multiplier"], woods["penalty"]
    active = penalty * constraint + multiplier >= 0
    move = jnp.where(active, constraint, -multiplier / penalty)
    return {
        "multiplier": multiplier + rate * move,
        "penalty": jnp.where(constraint > tolerance, penalty * growth, penalty),
        "total": jnp.zeros_like(woods["total"]),
        "count": jnp.zeros_like(woods["count"]),
    }
