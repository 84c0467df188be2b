"""NPOS: outliers at the boundary of each class, without a density (Tao et al., arXiv 2303.02966).

A queue holds the latest features of each class. The boundary are those whose K-th nearest neighbour
in the queue is furthest. Gaussian noise around boundary points gives candidates, and the candidates
furthest from the class are the outliers (section 3.1, `outliers.knn`). A small network separates
them from ID features by a logistic loss (section 3.2).

This is the version for classification: cross-entropy, and optionally a supervised contrastive loss
on unit features, in place of the published loss of class prototypes on a projection head. It also
differs from the code in OpenOOD:
- Every anchor has its own furthest candidates. The code mixes in those of other anchors.
- Features, noise and candidates are on the unit sphere. The code measures distances between unit
  features, but adds the noise to features of any length and gives these to its network.
- The means of the loss over ID and over outliers are summed, as in the paper. The code takes one
  mean over both, in which thousands of outliers outweigh the batch.
- The queues last for the whole training. The code clears them each epoch and still counts them as
  full.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oal_jax.methods import class_queue, losses
from oal_jax.methods.base import Method
from oal_jax.methods.student import Transform, forward, id_loss, init_student, output_sizes
from oal_jax.outliers.knn import sample_class
from oal_jax.runtime.keys import named


class Discriminator(nn.Module):
    """A small network that separates ID features from outliers."""

    @nn.compact
    def __call__(self, features: Float[Array, "b d"]) -> Float[Array, " b"]:
        """Unit features to one logit, positive for ID: one hidden layer, as wide as its input."""
        hidden = nn.relu(nn.Dense(features.shape[-1], name="hidden")(features))
        return nn.Dense(1, name="out")(hidden)[:, 0]


def boundary_outliers(
    model: Any,
    image_shape: tuple[int, int, int],
    *,
    start_step: float,
    weight: float = 0.1,
    queue_size: int = 1000,
    neighbour: int = 300,
    boundary_points: int = 200,
    anchors: int = 2,
    sigma: float = 0.1,
    candidates: int = 600,
    per_anchor: int = 200,
    refresh: int = 1,
    contrastive_weight: float = 0.0,
    contrastive_temperature: float = 0.1,
    ce_transform: Transform | None = None,
) -> Method:
    """CE + `weight` * logistic loss, from `start_step` on and with full queues.

    Groups: "student", "discriminator". State "npos": the queues and the current outliers. The
    defaults are OpenOOD's for CIFAR-10, where the loss starts after 40 of 100 epochs.

    Args:
      model: the student.
      image_shape: of an image.
      start_step: first step with the logistic loss.
      weight: weight of the logistic loss.
      queue_size: unit features per class. Sampling waits until every queue is full.
      neighbour: `k` of `outliers.knn.sample_class`.
      boundary_points: its `count`.
      anchors: boundary points per class that are perturbed.
      sigma: standard deviation of the noise.
      candidates: its `noise_rows`.
      per_anchor: outliers per anchor.
      refresh: steps between two sets of outliers; 1 is as published. Sampling costs about
        K * queue_size * (queue_size + candidates) * d multiplications, for small nets more than
        the training step.
      contrastive_weight: weight of the supervised contrastive loss on the unit features.
      contrastive_temperature: its temperature.
      ce_transform: maps the mean ID cross-entropy.
    """
    classes, width = output_sizes(model, image_shape)
    discriminator = Discriminator()

    def init(key):
        params, model_state = init_student(key, model, image_shape)
        variables = discriminator.init(named(key, "discriminator"), jnp.zeros((1, width)))
        params["discriminator"] = variables["params"]
        model_state["npos"] = {
            "queue": class_queue.empty(classes, queue_size, width),
            "outliers": jnp.zeros((classes * anchors * per_anchor, width)),
            "ready": jnp.zeros((), bool),  # whether outliers have been sampled
        }
        return params, model_state

    def sample(key, rows):
        def one(inputs):
            return sample_class(
                *inputs,
                k=neighbour,
                count=boundary_points,
                anchors=anchors,
                sigma=sigma,
                noise_rows=candidates,
                per_anchor=per_anchor,
                repeats=1,
                selection="top",
            )

        return jax.lax.map(one, (jax.random.split(key, classes), rows)).reshape(-1, width)

    def loss(params, model_state, batch, step, key):
        (logits, features), _, student = forward(model, params, model_state, key, batch["image"])
        value, metrics = id_loss(logits, batch["label"], ce_transform)
        directions = losses.unit_rows(features)
        if contrastive_weight:
            contrast = losses.supervised_contrastive(
                directions, batch["label"], contrastive_temperature
            )
            metrics["contrastive"] = jnp.mean(contrast)
            value += contrastive_weight * metrics["contrastive"]
        old = model_state["npos"]
        queue = class_queue.push(old["queue"], directions, batch["label"])
        active = (step >= start_step) & class_queue.is_full(queue)
        due = active & (~old["ready"] | (step % refresh == 0))
        outliers = jax.lax.cond(
            due,
            lambda: sample(named(key, "npos"), queue["rows"]),
            lambda: old["outliers"],
        )
        id_score, outlier_score = (
            discriminator.apply({"params": params["discriminator"]}, x)
            for x in (directions, outliers)
        )
        separation = jnp.mean(jax.nn.softplus(-id_score))
        separation += jnp.mean(jax.nn.softplus(outlier_score))
        separation = jnp.where(active, separation, 0.0)
        metrics |= {
            "separation": separation,
            "id_score": jnp.mean(id_score),
            "outlier_score": jnp.where(active, jnp.mean(outlier_score), 0.0),
        }
        npos = {"queue": queue, "outliers": outliers, "ready": old["ready"] | due}
        return value + weight * separation, (
            {**model_state, "student": student, "npos": npos},
            metrics,
        )

    return Method(init, loss)
