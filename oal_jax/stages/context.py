"""What every stage is given, and the inputs that several of them share."""

import dataclasses
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, Int32, Key

from oal_jax.config import Config
from oal_jax.config.benchmarks import LEFT_OUT, MADE, Benchmark, resolve, split_names
from oal_jax.data.info import DatasetInfo, read_info
from oal_jax.data.sources import ImageSet, open_source, read_set
from oal_jax.data.stored import SetSpec, Source
from oal_jax.data.stream import Streamed, open_stream
from oal_jax.runtime.batched import rows_per_batch
from oal_jax.scores import Forward, Outputs, compute


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """One run: its resolved config, its directory, its devices, its root key.

    It reads `info` and the training images once and keeps them.
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
        return resolve(
            *(d.id_set, d.near, d.far, d.validation, d.csid, d.leave_out), source=d.source
        )

    @property
    def image_limit(self) -> int:
        """Number of images that are read of a set; 0: all."""
        return 200 if self.config.smoke else 0

    def images(self, split: str, name: str = "", limit: int = 0) -> ImageSet:
        """A split of the ID set, or of the OOD or covariate-shifted set `name`, in memory."""
        return read_set(self._spec(split, name, limit))

    def opened(self, split: str, name: str = "", limit: int = 0) -> ImageSet | Streamed:
        """The same, as a stream if `data.stream`. Sets made from ID images are small."""
        if not self.config.data.stream or name in MADE:
            return self.images(split, name, limit)
        return open_stream(self.source(split, name, limit), self.config.data.workers)

    def source(self, split: str, name: str = "", limit: int = 0) -> Source:
        """The same on disk, nothing decoded."""
        return open_source(self._spec(split, name, limit))

    @cached_property
    def info(self) -> DatasetInfo:
        """Classes and sizes of the ID set."""
        return read_info(self._spec("train", "", self.config.data.train_images))

    def _spec(self, split: str, name: str, limit: int) -> SetSpec:
        data, benchmark = self.config.data, self.benchmark
        name = name or benchmark.id_set
        left_out = bool(data.leave_out) and name in LEFT_OUT.values()
        name = benchmark.id_set if left_out else name
        labelled = name in (benchmark.id_set, *benchmark.csid)
        return SetSpec(
            data.source,
            name,
            split,
            root=data.root,
            limit=limit or self.image_limit,
            id_set=benchmark.id_set,
            id_splits=split_names(data.id_splits),
            labelled=labelled,
            leave_out=data.leave_out if labelled or name in MADE else (),
            left_out=left_out,
            image_size=data.image_size,
            channels=data.channels,
            on_corrupt=data.on_corrupt,
        )

    def train_images(self) -> ImageSet | Streamed:
        """The ID images that the student trains on. The arrays are read-only."""
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


def outputs_of_set(
    forward: Forward,
    data: ImageSet | Streamed,
    batch_size: int,
    mesh: Mesh,
    fields: Collection[str] = (),
    rows: Int[np.ndarray, " m"] | None = None,
) -> tuple[Outputs, Int32[np.ndarray, " n"]]:
    """`scores.compute` over a set, or its `rows`; and the labels of the images that were read."""
    labels = []

    def images() -> Iterator[np.ndarray]:
        for chunk in data.chunks(rows_per_batch(batch_size, mesh), rows):
            labels.append(chunk.labels)
            yield chunk.images

    outputs = compute(forward, images(), batch_size, fields, mesh)
    return outputs, np.concatenate(labels)
