"""Stage `outliers`: outliers around the boundary of each class in the teacher's feature space."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from oal_jax.config import Outliers
from oal_jax.errors import UserError
from oal_jax.outliers.knn import sample_class
from oal_jax.outliers.pools import OUTLIERS
from oal_jax.runtime import artifacts, distributed
from oal_jax.runtime.keys import at_step
from oal_jax.runtime.ops import unit
from oal_jax.runtime.progress import Bar
from oal_jax.stages import generator, latents
from oal_jax.stages.context import Context


def run(context: Context) -> list[Path]:
    """Write `outliers.safetensors`: `outliers` (C, n, d) float32 and `labels` (C,) int32.

    Where latents are sampled, each outlier has the norm of its class word's row in the text
    encoder's token table, which it replaces. Else it is as sampled.
    """
    classes = _class_features(context)
    keys = [at_step(context.key, "outliers", c) for c in range(len(classes))]
    keys = np.stack([jax.random.key_data(key) for key in keys])
    options = sampling(context.config.outliers)

    def of_class(key, features):
        return sample_class(jax.random.wrap_key_data(key), features, **options)

    arguments = keys, np.asarray(unit(classes))
    outliers = _class_by_class(context, of_class, arguments, "k-NN outliers")
    if latents.samples(context.config):
        outliers = outliers * generator.token_norms(context)[:, None, None]
    labels = np.arange(len(outliers), dtype=np.int32)
    path = context.directory("outliers") / OUTLIERS
    artifacts.write_tensors(path, {"outliers": outliers, "labels": labels})
    return [path]


def sampling(outliers: Outliers) -> dict[str, Any]:
    """The arguments of `sample_class` by the config."""
    knn = outliers.knn
    return {
        "k": knn.neighbour,
        "count": knn.boundary_points,
        "anchors": knn.anchors,
        "sigma": knn.sigma,
        "noise_rows": knn.noise_rows,
        "per_anchor": knn.per_anchor,
        "repeats": knn.repeats,
        "selection": "reference" if outliers.official_code else "top",
    }


def _class_by_class(
    context: Context, function: Callable[..., Any], arguments: tuple[np.ndarray, ...], name: str
) -> np.ndarray:
    """`function` of the rows of each class, stacked: one class a device at a time.

    Every device runs the program for one class. So the draws are the same on any number of them,
    the numbers equal up to rounding, and the memory is that of one class.

    Args:
      function: pure; one class's rows to an array.
      arguments: arrays (C, ...).
      name: of the progress bar.
    """
    mesh, classes = context.mesh, len(arguments[0])
    sharding = distributed.over_data(mesh)

    def one(*rows):
        return function(*(row[0] for row in rows))[None]

    run = jax.jit(
        jax.shard_map(
            one, mesh=mesh, in_specs=sharding.spec, out_specs=sharding.spec, check_vma=False
        )
    )
    at_once, parts = mesh.shape["data"], []
    with Bar(classes, name, "class") as bar:
        for start in range(0, classes, at_once):
            # The last step's spare devices repeat its last class.
            rows = np.minimum(np.arange(start, start + at_once), classes - 1)
            placed = distributed.place(tuple(a[rows] for a in arguments), sharding)
            parts.append(distributed.to_host(run(*placed)))
            bar.update(min(at_once, classes - start))
    return np.concatenate(parts)[:classes]


def first_of_classes(labels: Int[np.ndarray, " n"], count: int) -> Int[np.ndarray, " m"]:
    """Rows of the first `count` images of each class, in data order."""
    rows = [np.flatnonzero(labels == c)[:count] for c in range(labels.max() + 1)]
    return np.sort(np.concatenate(rows))


def _class_features(context: Context) -> Float[np.ndarray, "C n d"]:
    """The features that represent each class: the first in data order."""
    count = context.config.outliers.knn.features_per_class
    source = artifacts.read_tensors(context.directory("features") / "features.safetensors")
    features, labels = source["features"], source["labels"]
    smallest = np.bincount(labels).min()
    if smallest < count:
        raise UserError(
            f"a class of {context.benchmark.id_set} has {smallest} training images, fewer than"
            f" outliers.knn.features_per_class={count}; lower that"
        )
    return np.stack([features[labels == c][:count] for c in range(labels.max() + 1)])
