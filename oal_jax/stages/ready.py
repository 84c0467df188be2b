"""The config for the stages: what it leaves open is chosen, what `smoke` shrinks is shrunk."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from oal_jax.config import GENERATED, Config, expand
from oal_jax.config.class_names import generated_names
from oal_jax.config.rules import validate
from oal_jax.config.smoke import shrink
from oal_jax.data import generated, own
from oal_jax.data.stored import MAX_BYTES
from oal_jax.errors import UserError
from oal_jax.stages.choose import Weights, choose
from oal_jax.stages.plan import plan

_SUPPLY = "give a ViT or ResNet as timm, torchvision or Hugging Face publish it (.safetensors)"


def ready(config: Config) -> tuple[Config, list[str]]:
    """The config for the stages, and the lines about what was chosen.

    Raises:
      UserError: the config is not valid, or a file that it names can't be read.
    """
    config = sized(expand(config))
    validate(config)
    config, lines = chosen(config)
    config = shrunk(config)
    validate(config)
    check_method(config)
    return config, lines


def shrunk(config: Config) -> Config:
    """The config of a smoke run, if it is one."""
    return shrink(config) if config.smoke else config


def check_method(config: Config) -> None:
    """Raise `UserError` where the method can't be trained as the config says."""
    from oal_jax.methods import registry

    registry.check(config)
    if config.data.stream:
        from oal_jax.stages.batches import check_streamed

        check_streamed(config)


def chosen(config: Config) -> tuple[Config, list[str]]:
    """`choose` with the folder and the weights that the config names; unchanged for other data."""
    data = config.data
    if data.source != "own":
        return config, []
    generate = config.smoke and not data.root
    summary = _generated() if generate else own.summarise(Path(data.root).expanduser())
    weights = None
    if config.student.weights and not config.smoke:
        described = _describe("student.weights", config.student.weights)
        names = ("image_size", "channels", "architecture")
        weights = Weights(*(described[name] for name in names))
    config, lines = choose(config, summary, weights, memory=min(MAX_BYTES, _memory() // 2))
    return config, [] if generate else lines


def sized(config: Config) -> Config:
    """The config with the teacher's sizes read off the file `teacher.weights`.

    Raises:
      UserError: there is no such file, or none that can be read.
    """
    weights, name = config.teacher.weights, config.method.name
    if not isinstance(weights, str) or weights in ("", GENERATED) or config.smoke:
        return config
    from oal_jax.methods.registry import METHODS

    if name not in METHODS or "teacher" not in {stage.name for stage in plan(config)}:
        return config
    described = _describe("teacher.weights", weights)
    names = ("patch", "width", "depth", "heads", "mlp_ratio")
    sizes = {name: described[name] for name in names if name in described}
    return dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, **sizes))


def _describe(key: str, file: str) -> dict[str, Any]:
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(
            f"config {key}={file}: there is no such file; {_SUPPLY}, or Google (.npz), such as the"
            " model.safetensors of timm/vit_base_patch16_224.orig_in21k"
        )
    from oal_jax.pretrained.classifiers import describe

    return describe(path)


def _generated() -> own.FolderSummary:
    """Stands for the folder in a smoke run without one."""
    names = generated_names("own")
    side, each = generated.SIZE, generated.PER_CLASS
    counts = {split: np.full(len(names), each) for split in ("train", "validation", "test")}
    return own.FolderSummary(names, counts, (), {}, np.full((1, 2), side), False, [])


def _memory() -> int:
    """Bytes of this machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2 * MAX_BYTES
