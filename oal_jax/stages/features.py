"""Stage `features`: cached teacher outputs of the ID images, unaugmented and per augmented view."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from oal_jax.data.augment import augment
from oal_jax.runtime import artifacts, batched
from oal_jax.runtime.keys import named
from oal_jax.runtime.progress import Bar
from oal_jax.scores import compute
from oal_jax.stages import outliers, teacher
from oal_jax.stages.context import Context, outputs_of_set


def view_key(context: Context) -> jax.Array:
    """The key of the augmented views, which the student's batches share."""
    return named(context.key, "views")


def run(context: Context) -> list[Path]:
    """Writes `features.safetensors` (without augmentation) and `views.safetensors`.

    features: `features` (N, T), `logits` (N, K) float32, `labels` (N,). views: `features`
    (V, N, T) and `logits` (V, N, K) float16, V = teacher.views. Without views the teacher runs in
    the student's steps, and this stage runs it only on the images that the k-NN sampling reads: the
    first of each class.
    """
    config, directory = context.config, context.directory("features")
    data = context.train_images()
    forward = teacher.load(context)
    batch = config.evaluation.batch_size
    rows = None
    if not config.teacher.views:
        rows = outliers.first_of_classes(data.labels, config.outliers.knn.features_per_class)
    outputs, labels = outputs_of_set(forward, data, batch, context.mesh, ("features",), rows)
    plain = directory / "features.safetensors"
    tensors = {"features": outputs.features, "logits": outputs.logits, "labels": labels}
    artifacts.write_tensors(plain, tensors)
    if not config.teacher.views:
        return [plain]
    views = []
    with Bar(config.teacher.views, "teacher views", "view") as bar:
        for view in range(config.teacher.views):
            images = _augmented(context, data.images, view)
            views.append(compute(forward, images, batch, ("features",), context.mesh))
            bar.update()
    cached = directory / "views.safetensors"
    artifacts.write_tensors(
        cached,
        {
            "logits": np.stack([v.logits for v in views]).astype(np.float16),
            "features": np.stack([v.features for v in views]).astype(np.float16),
        },
    )
    return [plain, cached]


def _augmented(context: Context, images: np.ndarray, view: int) -> Iterator[np.ndarray]:
    """The images as uint8 batches of one augmented view."""
    config, mesh = context.config, context.mesh

    @jax.jit
    def draw(batch):
        images, indices = batch
        views = jnp.full_like(indices, view)
        shift, flip = config.data.shift, config.data.flip
        augmented = augment(view_key(context), images, indices, views, shift=shift, flip=flip)
        return jnp.round(augmented * 255).astype(jnp.uint8)

    rows = images, np.arange(len(images), dtype=np.int32)
    return batched.results(draw, [rows], config.evaluation.batch_size, mesh)
