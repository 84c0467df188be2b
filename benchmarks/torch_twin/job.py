"""The whole of OAL in PyTorch: teacher features, k-NN outliers, latents, student, evaluation.

    python -m benchmarks.torch_twin.job REQUEST.json OUTPUT.json

REQUEST.json holds `config` (one of our configs, flat), `moments` (mean and standard deviation of
the pixels), `form`, `device`, `dtype` and `eager`. OUTPUT.json gets `stages` (name to seconds),
`compile_s` and `metrics`.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import oal_jax
from benchmarks.torch_twin import data as batching
from benchmarks.torch_twin import diffusion, forms, outliers, training
from benchmarks.torch_twin.forms import Form
from benchmarks.torch_twin.losses import Oal
from benchmarks.torch_twin.models import Teacher, load_ours
from oal_jax.config import PROCEDURAL, Config, benchmarks, unflatten
from oal_jax.data import procedural, sources
from oal_jax.data.sources import ImageSet
from oal_jax.evaluation.metrics import ood_metrics
from oal_jax.runtime import artifacts, startup

_WEIGHTS = Path(oal_jax.__file__).parent / "pretrained" / "weights"
# Where features and latents of outliers come from, by outliers.source of the energy objective.
_SOURCES = {
    "knn": ("pool", None),
    "diffusion": ("pool", "pool"),
    "random": ("random", "random"),
    "none": (None, None),
}


class Job:
    """One run of the job. Each stage is a method, and leaves what the next stages read."""

    def __init__(
        self,
        config: Config,
        form: Form,
        moments: tuple[Sequence[float], Sequence[float]],
        device: torch.device,
    ) -> None:
        forms.check(config)
        self.uses_energy = config.method.oal.objective == "energy"
        self.sources = _SOURCES[config.outliers.source] if self.uses_energy else ("pool", "pool")
        self.config, self.form, self.moments, self.device = config, form, moments, device
        self.random = torch.Generator().manual_seed(config.seed)
        torch.manual_seed(config.seed)
        d = config.data
        self.benchmark = benchmarks.resolve(d.id_set, d.near, d.far, d.validation, d.csid)
        self.train_set = self._images("train", limit=d.train_images)
        self.pixels = batching.as_tensor(self.train_set.images, device)
        self.labels = torch.from_numpy(self.train_set.labels).long().to(device)

    def stages(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Name and function of each stage, in order."""
        for stage in (self.features, self.outliers, self.latents, self.train, self.evaluate):
            yield stage.__name__, stage

    @property
    def _limit(self) -> int:
        return 200 if self.config.smoke else 0

    def _images(self, split: str, name: str = "", limit: int = 0) -> ImageSet:
        d, limit = self.config.data, limit or self._limit
        name = name or d.id_set
        return sources.load(
            d.source, name, split, root=d.root or None, limit=limit, id_set=d.id_set
        )

    def _outlier_set(self) -> np.ndarray:
        name, shape = self.config.outliers.images, self.train_set.image_shape
        if name == PROCEDURAL:
            return procedural.draw(procedural.size_of(shape, self._limit), shape)
        return self._images("train", name).images

    def _draws(self, views: int) -> batching.Draws:
        shape = (views, len(self.labels))
        return batching.Draws(shape, self.config.data, self.device, self.random)

    def features(self) -> None:
        """Load the teacher; compute unit features of each class and outputs on cached views."""
        t, per_class = self.config.teacher, self.config.outliers.knn.features_per_class
        shape, classes = self.train_set.images.shape[1:], len(self.train_set.class_names)
        sizes = {n: getattr(t, n) for n in ("patch", "width", "depth", "heads", "mlp_ratio")}
        self.teacher = Teacher(shape, classes, self.moments, **sizes).to(self.device).eval()
        shipped = artifacts.read_tensors(_WEIGHTS / "fashion_teacher.safetensors")
        load_ours(self.teacher.vit, shipped, t.patch)
        look = forms.compiled(self.form, self.teacher)
        if self.form.per_image:  # the whole training set, in the order of the loader
            batches, order = [], []
            for images, indices in self._loader(128):
                batches.append(self._outputs(look, images.to(self.device))[1])
                order.append(indices)
            features, order = torch.cat(batches), torch.cat(order)
        else:
            order = torch.arange(len(self.labels))
            if self.form.augmented_features:
                order = torch.randperm(len(order), generator=self.random)
            labels = self.labels[order.to(self.device)]
            first = [(labels == c).nonzero()[:per_class, 0].cpu() for c in range(classes)]
            order = order[torch.cat(first)]
            draws = self._draws(1) if self.form.augmented_features else None
            features = self._in_batches(look, order, draws)[1]
        labels = self.labels[order.to(self.device)]
        self.class_features = [
            functional.normalize(features[labels == c][:per_class]) for c in range(classes)
        ]
        if t.views:
            self.views = self._draws(t.views)
            everything = torch.arange(len(self.labels))
            cached = [
                self._in_batches(look, everything, self.views, view) for view in range(t.views)
            ]
            self.cached = [torch.stack(part).half() for part in zip(*cached, strict=True)]

    def _loader(self, size: int):
        workers = len(os.sched_getaffinity(0))
        return batching.make_loader(self.train_set.images, self.config.data, size, workers)

    def _outputs(self, look: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        with forms.inference(self.form, self.device):
            logits, features = look(forms.images_as(self.form, images))
        return logits.clone(), features.clone()

    def _in_batches(
        self, look: nn.Module, order: Tensor, draws: batching.Draws | None, view: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Outputs for the training images in `order`. Full batches only: one program."""
        size, parts = self.config.evaluation.batch_size, []
        order = order.to(self.device)
        for chunk in functional.pad(order, (0, -len(order) % size)).split(size):
            images = self.pixels[chunk]
            views = torch.full_like(chunk, view)
            images = draws.augment(images, chunk, views) if draws else batching.to_unit(images)
            parts.append(self._outputs(look, images))
        logits, features = (torch.cat(part)[: len(order)] for part in zip(*parts, strict=True))
        return logits, features

    def outliers(self) -> None:
        """Sample the outlier pool (K, n, T), scaled to the norm of each class's embedding."""
        configured = self.config.generator.directory
        directory = Path(configured).expanduser() if configured else _WEIGHTS / "fashion_sd"
        self.generator = diffusion.load(directory, self.device)
        if "pool" not in self.sources:
            return
        sampled = [
            outliers.sample_class(features, self.config.outliers, self.form.knn, self.random)
            for features in self.class_features
        ]
        norms = diffusion.token_norms(self.generator, self.train_set.class_names)
        self.pool = torch.stack(sampled) * norms[:, None, None]

    def latents(self) -> None:
        """Sample outlier latents (N, C, h, w) and encode ID images, where the loss reads them."""
        if self.sources[1] == "pool":
            self.sampled = diffusion.sample(
                self.generator,
                forms.compiled(self.form, self.generator.unet),
                self.form,
                self.config,
                self.train_set.class_names,
                self.pool,
                torch.arange(len(self.pool)).repeat(self.config.latents.per_class),
                self.random,
            )
        if self.uses_energy and self.sources[1]:
            parts = []
            encode = forms.compiled(
                self.form, lambda images: diffusion.encode_images(self.generator, images)
            )
            size = self.config.evaluation.batch_size
            for start in range(0, len(self.pixels), size):
                images = batching.to_unit(self.pixels[start : start + size])
                count = len(images)
                images = functional.pad(images, (0, 0, 0, 0, 0, 0, 0, size - count))
                with forms.inference(self.form, self.device):
                    parts.append(encode(images)[:count].float().clone())
            self.id_latents = torch.cat(parts)

    def train(self) -> None:
        """Train the student, and print its validation accuracy after every epoch."""
        config, form = self.config, self.form
        t = config.train
        steps = len(self.labels) // t.batch_size * t.epochs
        latent_shape = self.generator.latent_shape if self.sources[1] else None
        if not self.uses_energy:  # the mean over channels and height, as in the official code
            self.sampled = self.sampled.mean((1, 2))
            latent_shape = tuple(self.sampled.shape[1:])
        channels, classes = self.pixels.shape[1], len(self.train_set.class_names)
        oal = Oal(config, channels, classes, self.moments, latent_shape, form.club)
        self.oal = oal.to(self.device)
        self.outlier_images = None
        if config.outliers.image_share > 0:
            self.outlier_images = batching.as_tensor(self._outlier_set(), self.device)
        look = None if config.teacher.views else self.teacher
        step = training.make_step(self.oal, look, config, form, steps)
        self.look = forms.compiled(form, self.oal.student)
        validation = self._images("validation")
        for epoch in range(t.epochs):
            self.oal.train()
            for batch in self._epoch(epoch):
                terms = step(batch)
            logits = self._student_logits(validation.images)
            accuracy = np.mean(logits.argmax(1) == validation.labels)
            print(f"epoch {epoch}: loss {terms['loss']:.3f}, accuracy {accuracy:.3f}", flush=True)

    def _epoch(self, epoch: int) -> Iterator[training.Batch]:
        size, views = self.config.train.batch_size, self.config.teacher.views
        if self.form.per_image:
            for images, indices in self._loader(size):
                yield self._batch(images.to(self.device), indices.to(self.device))
            return
        draws = self.views if views else self._draws(1)
        for indices in batching.orders(len(self.labels), size, self.random):
            indices = indices.to(self.device)
            view = (epoch + indices) % max(views, 1)
            batch = self._batch(draws.augment(self.pixels[indices], indices, view), indices)
            if views:
                logits, features = (part[view, indices] for part in self.cached)
                batch |= {"teacher_logits": logits, "teacher_features": features}
            yield batch

    def _batch(self, images: Tensor, indices: Tensor) -> training.Batch:
        config, count = self.config, self.config.method.outlier_batch or len(indices)
        batch = {"image": images, "label": self.labels[indices]}
        feature_source, latent_source = self.sources
        if feature_source == "pool":
            batch["outlier"] = self._rows(self.pool.flatten(0, 1), count)
        elif feature_source == "random":
            batch["outlier"] = self._normal(count, config.teacher.width)
        if latent_source == "pool":
            batch["outlier_latent"] = self._rows(self.sampled, count)
        elif latent_source == "random":
            batch["outlier_latent"] = self._normal(count, *self.generator.latent_shape)
        if latent_source and self.uses_energy:
            batch["latent"] = self.id_latents[indices]
        if self.outlier_images is not None:
            share = config.outliers.image_share
            batch["outlier_image"] = self._outlier_images(max(1, round(share * len(indices))))
        return batch

    def _outlier_images(self, count: int) -> Tensor:
        """`count` random outlier images, freshly augmented."""
        rows = torch.arange(count, device=self.device)
        draws = batching.Draws((1, count), self.config.data, self.device, self.random)
        return draws.augment(self._rows(self.outlier_images, count), rows, torch.zeros_like(rows))

    def _rows(self, pool: Tensor, count: int) -> Tensor:
        """Random rows of a pool, without repetition if the pool is large enough."""
        if len(pool) < count:
            rows = torch.randint(len(pool), (count,), generator=self.random)
        else:
            rows = torch.randperm(len(pool), generator=self.random)[:count]
        return pool[rows.to(pool.device)]

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random).to(self.device)

    def _student_logits(self, images: np.ndarray) -> np.ndarray:
        self.oal.eval()
        size, parts = self.config.evaluation.batch_size, []
        for start in range(0, len(images), size):
            chunk = images[start : start + size]
            padded = np.pad(chunk, [(0, size - len(chunk)), (0, 0), (0, 0), (0, 0)])
            pixels = batching.to_unit(batching.as_tensor(padded, self.device))
            parts.append(self._outputs(self.look, pixels)[0][: len(chunk)].cpu().numpy())
        return np.concatenate(parts)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Metrics of the energy score for each near and far set, and the ID accuracy."""

        def scores(data: ImageSet) -> np.ndarray:
            return -torch.from_numpy(self._student_logits(data.images)).logsumexp(1).numpy()

        test = self._images("test")
        logits = self._student_logits(test.images)
        id_scores = -torch.from_numpy(logits).logsumexp(1).numpy()
        metrics = {"id": {"accuracy": float(np.mean(logits.argmax(1) == test.labels))}}
        for name in (*self.benchmark.near, *self.benchmark.far):
            metrics[name] = ood_metrics(id_scores, scores(self._images("test", name)))
        return metrics


def run(
    config: Config,
    form: Form,
    moments: tuple[Sequence[float], Sequence[float]],
    device: torch.device,
) -> dict[str, Any]:
    """Run all stages. Returns their seconds, the compiler's seconds, and the metrics."""
    forms.prepare(form, device)
    start = time.perf_counter()
    job = Job(config, form, moments, device)
    seconds = {"data": time.perf_counter() - start}
    for name, stage in job.stages():
        start = time.perf_counter()
        metrics = stage()
        forms.synchronise(device)
        seconds[name] = time.perf_counter() - start
        print(f"{name}: {seconds[name]:.1f} s", flush=True)
    return {"stages": seconds, "compile_s": _compile_seconds(), "metrics": metrics}


def _compile_seconds() -> float:
    """Seconds of torch.compile in this process, for forward and backward passes."""
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent()["total_wall_time"]


def main(argv: Sequence[str]) -> None:
    """Run once: read REQUEST.json (`argv[1]`), write OUTPUT.json (`argv[2]`)."""
    request = json.loads(Path(argv[1]).read_text())
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    startup.keep_freed_memory()  # faster for PyTorch too
    form = forms.make(request["form"], eager=request["eager"], dtype=request["dtype"])
    config, device = unflatten(request["config"]), torch.device(request["device"])
    Path(argv[2]).write_text(json.dumps(run(config, form, request["moments"], device)))


if __name__ == "__main__":
    main(sys.argv)
