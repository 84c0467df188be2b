"""What every stage is given, and the inputs that several of them share."""

import dataclasses
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Int32, Key

from oal_jax.config import Config
from oal_jax.config.benchmarks import LEFT_OUT, Benchmark, resolve, split_names
from oal_jax.data.info import DatasetInfo, read_info
from oal_jax.data.sources import ImageSet, load, open_stored
from oal_jax.data.stream import Streamed, open_stream
from oal_jax.runtime import distributed
from oal_jax.runtime.ops import to_unit


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """One run: its resolved config, its directory, its devices, its root key.

    What is read of the ID set is read once and kept as long as the context.
    """

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
        d = self.config.data
        return resolve(d.id_set, d.near, d.far, d.validation, d.csid, d.leave_out)

    @property
    def image_limit(self) -> int:
        """So many images of a set are taken; 0: all."""
        return 200 if self.config.smoke else 0

    def images(self, split: str, name: str = "", limit: int = 0) -> ImageSet:
        """A split of the ID set, or of the OOD or covariate-shifted set `name`, in memory."""
        return load(**self._wanted(split, name, limit))

    def opened(self, split: str, name: str = "", limit: int = 0) -> ImageSet | Streamed:
        """The same in memory, or a stream where the config asks for that."""
        wanted, data = self._wanted(split, name, limit), self.config.data
        return open_stream(open_stored(**wanted), data.workers) if data.stream else load(**wanted)

    @cached_property
    def info(self) -> DatasetInfo:
        """Classes and sizes of the ID set."""
        return read_info(**self._wanted("train", "", self.config.data.train_images))

    def _wanted(self, split: str, name: str, limit: int) -> dict[str, Any]:
        data, benchmark = self.config.data, self.benchmark
        name = name or benchmark.id_set
        left_out = bool(data.leave_out) and name in LEFT_OUT.values()
        name = benchmark.id_set if left_out else name
        labelled = name in (benchmark.id_set, *benchmark.csid)
        return {
            "source": data.source,
            "name": name,
            "split": split,
            "root": data.root or None,
            "limit": limit or self.image_limit,
            "id_set": benchmark.id_set,
            "id_splits": split_names(data.id_splits),
            "labelled": labelled,
            "leave_out": data.leave_out if labelled else (),
            "left_out": left_out,
            "image_size": data.image_size,
            "on_corrupt": data.on_corrupt,
        }

    def train_images(self) -> ImageSet | Streamed:
        """The ID images that the student trains on; arrays are read-only."""
        return self._train_images

    @cached_property
    def _train_images(self) -> ImageSet | Streamed:
        data = self.opened("train", limit=self.config.data.train_images)
        if isinstance(data, ImageSet):  # all stages share the arrays
            data.images.flags.writeable = data.labels.flags.writeable = False
        return data

    def all_train_images(self) -> ImageSet | Streamed:
        """The ID images that the teacher and the generator train on."""
        if self.config.data.source != "bundled":
            return self.opened("train")
        # The embedded set keeps more images than its students use.
        first, more = self.images("train"), self.images("extra")
        return first._replace(
            images=np.concatenate([first.images, more.images]),
            labels=np.concatenate([first.labels, more.labels]),
        )


def whole_batch(batch_size: int, mesh: Mesh) -> int:
    """The batch size, made a multiple of the devices that share it."""
    return max(1, batch_size // mesh.shape["data"]) * mesh.shape["data"]


def apply_in_batches(
    function, images: np.ndarray | Iterable[np.ndarray], batch_size: int, mesh: Mesh
) -> list[np.ndarray]:
    """`function(float images in [0, 1])`, a tuple of arrays a batch, over a whole set.

    The last batch is padded with zeros, and what comes of the padding is cut away, so one
    program serves a set of any size; the batch is split over the devices. Images that are not in
    memory come in chunks, best of `whole_batch` each: every chunk's last batch is padded. Of no
    images at all nothing is computed, and there are no arrays.
    """
    size = whole_batch(batch_size, mesh)
    arrays = (images,) if isinstance(images, np.ndarray) else images
    parts: list[tuple[np.ndarray, ...]] = []
    for chunk in (chunk for array in arrays for chunk in _sliced(array, size)):
        padded = np.pad(chunk, [(0, size - len(chunk))] + [(0, 0)] * (chunk.ndim - 1))
        outputs = function(distributed.place(padded, distributed.over_data(mesh)))
        parts.append(tuple(distributed.to_host(o)[: len(chunk)] for o in outputs))
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def _sliced(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(array), size):
        yield array[start : start + size]


def apply_to_set(
    function,
    data: ImageSet | Streamed,
    batch_size: int,
    mesh: Mesh,
    rows: Int[np.ndarray, " m"] | None = None,
) -> tuple[list[np.ndarray], Int32[np.ndarray, " n"]]:
    """`apply_in_batches` over a set, or its `rows`; and the labels of the images that were read."""
    labels = []

    def images():
        for chunk in data.chunks(whole_batch(batch_size, mesh), rows):
            labels.append(chunk.labels)
            yield chunk.images

    return apply_in_batches(function, images(), batch_size, mesh), np.concatenate(labels)


def forward_pass(model, mesh: Mesh):
    """`(variables, uint8 images) -> (logits, features) in float32`, jitted."""

    @jax.jit
    def forward(variables, images) -> tuple[Float[Array, "b k"], Float[Array, "b d"]]:
        images = distributed.shard_batch(to_unit(images), mesh)
        logits, features = model.apply(variables, images, train=False)
        return logits.astype(jnp.float32), features.astype(jnp.float32)

    return forward


def classifier(model, mesh: Mesh):
    """`(variables) -> (uint8 images -> (logits, features) in float32)`, jitted once."""
    forward = forward_pass(model, mesh)

    def bind(variables):
        on_devices = distributed.place_parameters(variables, mesh)
        return lambda images: forward(on_devices, images)

    return bind
