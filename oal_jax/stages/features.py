"""Stage `features`: the teacher's outputs on the ID images, unaugmented and per cached view."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from oal_jax.data.augment import augment
from oal_jax.runtime import artifacts
from oal_jax.runtime.keys import named
from oal_jax.scores import compute
from oal_jax.stages import outliers, teacher
from oal_jax.stages.context import Context, outputs_of_set


def view_key(context: Context) -> jax.Array:
    """The key of the augmented views: the student's batches draw from it too."""
    return named(context.key, "views")


def run(context: Context) -> list[Path]:
    """Write `features.safetensors` (deterministic, no augmentation) and `views.safetensors`.

    features: `features` (N, T), `logits` (N, K) float32, `labels` (N,). views: `features`
    (V, N, T) and `logits` (V, N, K) float16, V = teacher.views. Without views the teacher runs in
    the student's steps: then only the images that the k-NN sampling reads, the first of each
    class, pass through it here.
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
    views = [
        compute(forward, _augmented(context, data.images, v), batch, ("features",), context.mesh)
        for v in tqdm(range(config.teacher.views), desc="teacher views", unit="view")
    ]
    cached = directory / "views.safetensors"
    artifacts.write_tensors(
        cached,
        {
            "logits": np.stack([v.logits for v in views]).astype(np.float16),
            "features": np.stack([v.features for v in views]).astype(np.float16),
        },
    )
    return [plain, cached]


def _augmented(context: Context, images: np.ndarray, view: int) -> np.ndarray:
    data = context.config.data

    @jax.jit
    def draw(images):
        indices = jnp.arange(len(images))
        views = jnp.full(len(images), view)
        drawn = augment(view_key(context), images, indices, views, shift=data.shift, flip=data.flip)
        return jnp.round(drawn * 255).astype(jnp.uint8)

    return np.asarray(draw(images))
