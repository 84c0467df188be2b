"""What every stage is given, and the inputs that several of them share."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from oal_jax import distributed
from oal_jax.config import Config
from oal_jax.data.augment import to_unit
from oal_jax.data.benchmarks import Benchmark, resolve
from oal_jax.data.sources import ImageSet, load


class Context(NamedTuple):
    """One run: its resolved config, its directory, its devices, its root key."""

    config: Config
    workdir: Path
    mesh: Mesh
    key: Key[Array, ""]

    def directory(self, stage: str) -> Path:
        """Where a stage keeps its files."""
        return self.workdir / stage

    @property
    def benchmark(self) -> Benchmark:
        """The ID set, and the OOD and covariate-shifted sets that belong to it."""
        data = self.config.data
        return resolve(data.id_set, data.near, data.far, data.validation, data.csid)

    def images(self, split: str, name: str = "", limit: int = 0) -> ImageSet:
        """A split of the ID set, or of the OOD or covariate-shifted set `name`."""
        data, benchmark = self.config.data, self.benchmark
        name = name or benchmark.id_set
        if self.config.smoke and not limit:
            limit = 200
        return load(
            data.source,
            name,
            split,
            root=data.root or None,
            limit=limit,
            id_set=benchmark.id_set,
            labelled=name in (benchmark.id_set, *benchmark.csid),
            image_size=data.image_size,
            on_corrupt=data.on_corrupt,
        )

    def train_images(self) -> ImageSet:
        """The ID images that the student trains on."""
        return self.images("train", limit=self.config.data.train_images)

    def all_train_images(self) -> ImageSet:
        """The ID images that the teacher and the generator train on."""
        first = self.images("train")
        if self.config.data.source != "bundled":
            return first
        # The embedded set keeps more images than its students use.
        more = self.images("extra")
        return first._replace(
            images=np.concatenate([first.images, more.images]),
            labels=np.concatenate([first.labels, more.labels]),
        )


def apply_in_batches(function, images: np.ndarray, batch_size: int, mesh: Mesh) -> list[np.ndarray]:
    """`function(float images in [0, 1])`, a tuple of arrays a batch, over a whole set.

    The last batch is padded with zeros, and what comes of the padding is cut away, so one
    program serves a set of any size; the batch is split over the devices.
    """
    size = max(1, batch_size // mesh.shape["data"]) * mesh.shape["data"]
    parts: list[tuple[np.ndarray, ...]] = []
    for start in range(0, len(images), size):
        chunk = images[start : start + size]
        padded = np.pad(chunk, [(0, size - len(chunk))] + [(0, 0)] * (images.ndim - 1))
        outputs = function(padded)
        parts.append(tuple(distributed.to_host(o)[: len(chunk)] for o in outputs))
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def classifier(model, mesh: Mesh):
    """`(variables) -> (uint8 images -> (logits, features) in float32)`, jitted once."""

    @jax.jit
    def forward(variables, images) -> tuple[Float[Array, "b k"], Float[Array, "b d"]]:
        images = distributed.shard_batch(to_unit(images), mesh)
        logits, features = model.apply(variables, images, train=False)
        return logits.astype(jnp.float32), features.astype(jnp.float32)

    def bind(variables):
        on_devices = distributed.replicate(variables, mesh)
        return lambda images: forward(on_devices, images)

    return bind
