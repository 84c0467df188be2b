"""Stage `outliers`: per-class k-NN boundary sampling in the teacher's feature space."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from oal_jax import artifacts
from oal_jax.errors import UserError
from oal_jax.keys import at_step
from oal_jax.outliers.knn import sample_class, unit
from oal_jax.stages import generator
from oal_jax.stages.context import Context


def run(context: Context) -> list[Path]:
    """Write `outliers.safetensors`: `outliers` (C, n, d) float32 and `labels` (C,) int32."""
    knn = context.config.outliers.knn
    source = artifacts.read_tensors(context.directory("features") / "features.safetensors")
    features, labels = source["features"], source["labels"]
    smallest = np.bincount(labels).min()
    if smallest < knn.features_per_class:
        raise UserError(
            f"a class of {context.benchmark.id_set} has {smallest} training images, fewer than"
            f" outliers.knn.features_per_class={knn.features_per_class}; lower that"
        )
    # The first of each class in data order stand for it, as unit vectors.
    classes = [
        unit(features[labels == c][: knn.features_per_class]) for c in range(labels.max() + 1)
    ]
    sampled = [
        np.asarray(
            sample_class(
                at_step(context.key, "outliers", c),
                of_class,
                k=knn.neighbour,
                count=knn.boundary,
                anchors=knn.anchors,
                sigma=knn.sigma,
                noise_rows=knn.noise_rows,
                keep=knn.keep,
                repeats=knn.repeats,
                selection=knn.selection,
            )
        )
        for c, of_class in enumerate(tqdm(classes, desc="k-NN outliers", unit="class"))
    ]
    outliers = np.stack(sampled)
    if knn.scale_by_token:
        # The scale of what they replace: a row of the text encoder's token table.
        outliers *= generator.token_norms(context)[:, None, None]
    path = context.directory("outliers") / "outliers.safetensors"
    labels = np.arange(len(outliers), dtype=np.int32)
    artifacts.write_tensors(path, {"outliers": outliers, "labels": labels})
    return [path]


def flat(context: Context) -> np.ndarray:
    """All outliers of all classes, (C * n, d)."""
    tensors = artifacts.read_tensors(context.directory("outliers") / "outliers.safetensors")
    return tensors["outliers"].reshape(-1, tensors["outliers"].shape[-1])
