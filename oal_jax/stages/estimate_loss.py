"""Stage `estimate_loss`: the constraint of Unleashing Mask, from the initial model of the training.

The constraint is the mean cross-entropy of that model on the augmented training images, in
evaluation mode, with a random few per cent of the weights of every tensor removed. It varies with
the mask, so it is averaged over several masks (arXiv 2306.03715 and its code use one).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oal_jax.data.augment import augment
from oal_jax.data.sources import ImageSet
from oal_jax.data.stream import Streamed
from oal_jax.methods import losses, masking
from oal_jax.runtime import artifacts, batched, distributed
from oal_jax.runtime.batched import rows_per_batch
from oal_jax.runtime.keys import at_step, named
from oal_jax.runtime.progress import Bar
from oal_jax.stages import student, train
from oal_jax.stages.context import Context


def run(context: Context) -> list[Path]:
    """Writes `constraint.json`.

    `constraint` (nats, the mean of `per_mask`), `std` (of `per_mask`, 0 for one mask), `unmasked`
    (the loss without a mask), `keep_rate`, and the numbers of `weights` and of `removed` ones.
    """
    m, key = context.config.method.um, named(context.key, "estimate_loss")
    data = context.train_images()
    net = student.network(context.config, len(data.class_names))
    params, model_state = train.start(context, net, data)
    mean_loss = make_mean_loss(context, net, data)

    @jax.jit
    def masked(key, params):
        # Scores are uniform, so every set of weights is equally likely to be removed.
        return masking.apply_masks(params, masking.init_scores(key, params), m.mask_density)

    unmasked = mean_loss({"params": params, **model_state})
    per_mask = []
    with Bar(m.n_masks, "estimate_loss", "mask") as bar:
        for i in range(m.n_masks):
            weights = masked(at_step(key, "mask", i), params)
            per_mask.append(mean_loss({"params": weights, **model_state}))
            bar.update()
    sizes = [weight.size for weight in masking.masked_tensors(params).values()]
    path = context.directory("estimate_loss") / train.CONSTRAINT
    result = {
        "constraint": float(np.mean(per_mask)),
        "per_mask": per_mask,
        "std": float(np.std(per_mask, ddof=1)) if m.n_masks > 1 else 0.0,
        "unmasked": unmasked,
        "keep_rate": m.mask_density,
        "removed": sum(masking.zero_count(m.mask_density, size) for size in sizes),
        "weights": sum(sizes),
    }
    artifacts.write_json(path, result)
    print(
        "estimate_loss: constraint {constraint:.4f} +- {std:.4f}, unmasked {unmasked:.4f}".format(
            **result
        ),
        flush=True,
    )
    return [path]


def make_mean_loss(context: Context, net: Any, data: ImageSet | Streamed):
    """The function `variables -> mean cross-entropy` (nats) over one view of every image."""
    config, mesh = context.config, context.mesh
    view_key = named(context.key, "estimate_loss views")

    @jax.jit
    def batch_losses(variables, images, labels, indices):
        views = jnp.zeros_like(indices)
        shift, flip = config.data.shift, config.data.flip
        augmented = augment(view_key, images, indices, views, shift=shift, flip=flip)
        logits, _ = net.apply(variables, distributed.shard_batch(augmented, mesh), train=False)
        return losses.cross_entropy(logits.astype(jnp.float32), labels)

    def mean_loss(variables) -> float:
        variables = distributed.replicate(variables, mesh)
        total, examples = 0.0, 0
        size = rows_per_batch(config.evaluation.batch_size, mesh)
        loss = lambda batch: batch_losses(variables, *batch)
        for values in batched.results(loss, _numbered(data.chunks(size)), size, mesh):
            total += float(np.sum(values, dtype=np.float64))
            examples += len(values)
        return total / examples

    return mean_loss


def _numbered(chunks: Iterable[tuple]) -> Iterator[tuple]:
    """(images, labels, indices) from the chunks (images, labels) of a set."""
    start = 0
    for images, labels in chunks:
        yield images, labels, np.arange(start, start + len(labels), dtype=np.int32)
        start += len(labels)
