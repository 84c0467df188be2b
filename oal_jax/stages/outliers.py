"""Stage `outliers`: per-class k-NN boundary sampling in the teacher's feature space."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from oal_jax import artifacts
from oal_jax.keys import at_step
from oal_jax.outliers.knn import sample_class
from oal_jax.stages import generator
from oal_jax.stages.context import Context
from oal_jax.stages.features import unit_by_class


def run(context: Context) -> list[Path]:
    """Write `outliers.safetensors`: `outliers` (C, n, d) float32 and `labels` (C,) int32."""
    knn = context.config.outliers.knn
    source = artifacts.read_tensors(context.directory("features") / "features.safetensors")
    classes = unit_by_class(source["features"], source["labels"], knn.features_per_class)
    sampled = [
        np.asarray(
            sample_class(
                at_step(context.key, "outliers", c),
                features,
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
        for c, features in enumerate(tqdm(classes, desc="k-NN outliers", unit="class"))
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
