"""The stages in order: which of them a config needs, and what each depends on."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from oal_jax.config import Config, flatten, hub_names
from oal_jax.config.methods import SECTIONS
from oal_jax.runtime import artifacts
from oal_jax.stages.context import Context

# Keys that change no result: on which devices, and with how many readers, a run works.
DEVICE_KEYS = ("mesh.model", "data.workers")


class Stage(NamedTuple):
    """One stage. It reruns when something that it reads has changed.

    Attributes:
      name: of the module in `oal_jax.stages`, and of the directory of its files.
      reads: the config values that it reads, as JSON.
      needs: the stages whose files it reads.
      files: the other files that it reads, by name, with their hashes.
      logs: the names of its trainings in the log.
    """

    name: str
    reads: Callable[[Config], dict[str, Any]]
    needs: Callable[[Config], tuple[str, ...]]
    files: Callable[[Config], dict[str, Any]] = lambda config: {}
    logs: tuple[str, ...] = ()


def plan(config: Config) -> list[Stage]:
    """The stages that the report needs, directly or through others, in order."""
    by_name = {stage.name: stage for stage in STAGES}
    names, waiting = set(), ["report"]
    while waiting:
        name = waiting.pop()
        if name not in names:
            names.add(name)
            waiting += by_name[name].needs(config)
    return [stage for stage in STAGES if stage.name in names]


def inputs_of(stage: Stage, context: Context) -> dict[str, Any]:
    """All that a stage depends on, as JSON."""
    config = context.config
    needed = stage.needs(config)
    return {
        "config": stage.reads(config),
        "stages": {name: artifacts.output_hashes(context.directory(name)) for name in needed},
        "files": stage.files(config),
    }


def _without(section: Any, *names: str) -> dict[str, Any]:
    return {key: value for key, value in flatten(section).items() if key not in names}


def _id_images(config: Config) -> dict[str, Any]:
    # Which sets the detector is tested on changes nothing before the evaluation.
    data = _without(config.data, "workers", "near", "far", "validation", "csid")
    return {"data": data, "seed": config.seed, "smoke": config.smoke}


def _teacher(config: Config) -> dict[str, Any]:
    return {
        "teacher": _without(config.teacher, "views", "remat"),
        **_teacher_stem(config),
        **_id_images(config),
    }


def _teacher_stem(config: Config) -> dict[str, Any]:
    of_student = config.teacher.architecture == "resnet" and not config.teacher.weights
    return {"student.stem": config.student.stem} if of_student else {}


def _generator(config: Config) -> dict[str, Any]:
    return {
        "generator": _without(config.generator, "dtype", "backend"),
        "teacher.width": config.teacher.width,
        **_id_images(config),
    }


def _features(config: Config) -> dict[str, Any]:
    # With other heads the same weights are another function, so it reads all sizes of the teacher.
    teacher = {"teacher": _without(config.teacher, "remat"), **_teacher_stem(config)}
    reads = {**teacher, **_id_images(config)}
    if config.teacher.views:
        return reads
    # Then only the images that the k-NN sampling reads pass through the teacher.
    return reads | {"features_per_class": config.outliers.knn.features_per_class}


def _outliers(config: Config) -> dict[str, Any]:
    return {"outliers": _without(config.outliers, "source", "images", "image_share")} | {
        "seed": config.seed
    }


def _outliers_needs(config: Config) -> tuple[str, ...]:
    """The generator's token norms matter where outliers take the place of tokens."""
    from oal_jax.stages.latents import samples

    return ("features", "generator") if samples(config) else ("features",)


def _latents(config: Config) -> dict[str, Any]:
    from oal_jax.stages.latents import files

    return {
        "latents": flatten(config.latents),
        "dtype": config.generator.dtype,
        "backend": config.generator.backend,
        "official_code": config.outliers.official_code,
        "files": sorted(files(config)),
        **_id_images(config),
    }


def _latents_needs(config: Config) -> tuple[str, ...]:
    from oal_jax.stages.latents import samples

    return ("generator", "outliers") if samples(config) else ("generator",)


def _estimate_loss(config: Config) -> dict[str, Any]:
    return {
        "um": _without(config.method.um, "constraint", "beta"),
        "train.start": config.train.start,
        "student": _without(config.student, "dropout", "remat"),
        **_id_images(config),
    }


def _train(config: Config) -> dict[str, Any]:
    method = config.method
    sections = {*SECTIONS[method.name], *(("um",) if method.unleash else ())}
    return {
        "method": {
            "name": method.name,
            "unleash": method.unleash,
            "outlier_batch": method.outlier_batch,
            **{section: flatten(getattr(method, section)) for section in sorted(sections)},
        },
        "student": _without(config.student, "remat"),
        "train": _without(config.train, "keep_checkpoints"),
        "outliers": {
            name: getattr(config.outliers, name) for name in ("source", "images", "image_share")
        },
        "teacher.views": config.teacher.views,
        **_id_images(config),
    }


def _train_needs(config: Config) -> tuple[str, ...]:
    from oal_jax.methods import registry

    needs = {stage for stage, _ in registry.files_read(config)}
    if registry.recipe_of(config).teacher:
        needs.add("features" if config.teacher.views else "teacher")
    if registry.reads_estimate(config):
        needs.add("estimate_loss")
    return tuple(sorted(needs))


def _evaluate(config: Config) -> dict[str, Any]:
    # Beside the features, outputs that no score reads are not saved: another list can need more.
    from oal_jax.scores import needed

    return {
        "data": _without(config.data, "workers"),
        "smoke": config.smoke,
        "batch_size": config.evaluation.batch_size,
        "outputs": sorted(needed(config.evaluation.scores) | {"features"}),
    }


def _report_needs(config: Config) -> tuple[str, ...]:
    from oal_jax.stages.latents import samples

    trained = _train_needs(config)
    return ("evaluate", "train") + (
        ("latents",) if "latents" in trained and samples(config) else ()
    )


def _data_files(config: Config) -> dict[str, Any]:
    data, root = config.data, Path(config.data.root).expanduser()
    if data.source == "imglist":
        return _hashes(root / "benchmark_imglist" / data.id_set)
    if data.source == "tfds":
        from oal_jax.data import tfds

        root = tfds.sets_root(data.root or None)
    if data.source in ("own", "folder"):
        from oal_jax.data import image_files

        return _stats(root, image_files.find(root).names)
    if data.source == "tfds":
        return _stats(root)
    if data.source != "bundled":
        return {}
    # The manifest vouches for every bundled file, and each is checked when it is read.
    return _hashes(_package("data", "embedded", "manifest.json"))


def _teacher_files(config: Config) -> dict[str, Any]:
    teacher, read = config.teacher, _data_files(config)
    if teacher.weights:
        return read | _hashes(Path(teacher.weights).expanduser())
    shipped = _package("pretrained", "weights", "fashion_teacher.safetensors")
    return read if teacher.train else read | _hashes(shipped)


def _generator_files(config: Config) -> dict[str, Any]:
    directory = config.generator.directory
    if directory:
        # A commit of the hub stands for its files; those of a directory are several GB.
        return {} if hub_names.parse(directory) else _stats(Path(directory).expanduser())
    shipped = _package("pretrained", "weights", "fashion_sd")
    read = _data_files(config)
    return read if config.generator.train else read | _hashes(shipped)


def _train_files(config: Config) -> dict[str, Any]:
    from oal_jax.stages.train import start_file

    read = _data_files(config)
    if config.student.weights:
        read |= _hashes(Path(config.student.weights).expanduser())
    return read | _hashes(start_file(config)) if config.train.start else read


def _stats(directory: Path, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Digest of the sizes and change times of files below a directory; None: of all.

    It stands for their contents, which may be millions of files.
    """
    digest = hashlib.sha256()
    for name in sorted(_names(directory)) if names is None else names:
        path = directory / name
        if path.exists():  # not a link to nothing
            stat = path.stat()
            line = f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return {str(directory): digest.hexdigest()}


def _names(directory: Path) -> Iterator[str]:
    for parent, _, names in os.walk(directory):
        yield from (os.path.join(parent, name) for name in names if "." in name)


def _package(*parts: str) -> Path:
    return Path(str(files("oal_jax"))).joinpath(*parts)


def _hashes(path: Path) -> dict[str, str]:
    """Name to sha256 of a file, or of the files below a directory; what is missing has none."""
    present = [p for p in (path, *sorted(path.rglob("*"))) if p.is_file()]
    return {str(p.relative_to(path.parent)): artifacts.sha256(p) for p in present}


STAGES = (
    Stage("teacher", _teacher, lambda config: (), _teacher_files, ("teacher",)),
    Stage("generator", _generator, lambda config: (), _generator_files, ("vae", "diffusion")),
    Stage("features", _features, lambda config: ("teacher",), _data_files),
    Stage("outliers", _outliers, _outliers_needs),
    Stage("latents", _latents, _latents_needs, _data_files),
    Stage("estimate_loss", _estimate_loss, lambda config: (), _train_files),
    Stage("train", _train, _train_needs, _train_files, ("train",)),
    Stage("evaluate", _evaluate, lambda config: ("train",), _data_files),
    # The page shows the whole config.
    Stage("report", lambda config: _without(config, *DEVICE_KEYS), _report_needs),
)
