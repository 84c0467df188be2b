"""A teacher whose features mean something to the text encoder: trained against class words.

The cosines between an image's feature z and the token embeddings w_k of the class words, over a
temperature, are logits of their own, and their cross-entropy is minimised (DREAM-OOD, arXiv
2309.13415, equation 3):

    L = -log exp(cos(z, w_y) / t) / sum_k exp(cos(z, w_k) / t),  t = 0.1.

Then a boundary feature lies among token embeddings, and one that is injected in place of a class
word is near that word. DREAM-OOD trains its encoder by this loss alone and OAL (arXiv 2406.16525)
leaves it out; here it joins the cross-entropy of the head, whose logits the student distils.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from oal_jax.methods import losses
from oal_jax.methods.base import Method, accuracy, split_variables
from oal_jax.methods.student import forward, id_loss
from oal_jax.runtime.ops import unit

TEMPERATURE = 0.1


def aligned_cross_entropy(
    model: Any,
    image_shape: tuple[int, int, int],
    words: Float[Array, "k d"],
    *,
    weight: float,
    temperature: float = TEMPERATURE,
) -> Method:
    """Train `model` (group "student") by the cross-entropies of its head and of the word cosines.

    Args:
      words: the token embedding of each class word, of the width of the model's features.
      weight: of the second cross-entropy; the first has weight 1.
    """

    def init(key):
        params, rest = split_variables(model.init(key, jnp.zeros((1, *image_shape))))
        return {"student": params}, {"student": rest}

    def loss(params, model_state, batch, step, key):
        del step
        (logits, features), _, student = forward(model, params, model_state, key, batch["image"])
        value, metrics = id_loss(logits, batch["label"], None)
        cosines = unit(features) @ unit(words).T
        alignment = jnp.mean(losses.cross_entropy(cosines / temperature, batch["label"]))
        metrics |= {"alignment": alignment, "word_accuracy": accuracy(cosines, batch["label"])}
        return value + weight * alignment, ({"student": student}, metrics)

    return Method(init, loss)
