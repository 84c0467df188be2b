"""The student's network: by the sizes of the config, or read from the file `student.weights`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from oal_jax.config import Config
from oal_jax.models.densenet import DenseNet
from oal_jax.models.normalise import moments
from oal_jax.models.resized import Resized
from oal_jax.models.resnet import ResNet
from oal_jax.models.wide_resnet import WideResNet
from oal_jax.pretrained import classifiers
from oal_jax.stages import file_networks

HEAD = "fc"  # name of the last layer in every student


def network(config: Config, num_classes: int, card: Mapping[str, Any] | None = None) -> Any:
    """The student's network; it normalises and resizes images itself.

    Args:
      config: of the run.
      num_classes: of the ID set.
      card: content of a finished training's `classifier.json`, which describes the network of a
        file. Without it the file is read.
    """
    s = config.student
    if not s.weights:
        return _by_sizes(config, num_classes)
    if card is not None:
        description = card["network"]
    else:
        file = _load(config, num_classes, jax.random.key(0))
        size, _, channels = file.config.image_shape
        description = file_networks.describe(file.net, size, channels)
    options = {"num_classes": num_classes, "dtype": jnp.dtype(s.dtype), "remat": s.remat}
    return file_networks.rebuild(description, head=HEAD, **options)


def description(net: Any) -> dict[str, Any] | None:
    """What `network` needs of a network that was read from a file; None for any other."""
    if not isinstance(net, Resized):
        return None
    return file_networks.describe(net.net, net.size, net.channels)


def variables_of_file(config: Config, num_classes: int, key: jax.Array) -> dict[str, Any]:
    """The variables of `student.weights`, with a random head for these classes."""
    classifier = _load(config, num_classes, key)
    variables = {name: dict(tree) for name, tree in classifier.variables.items()}
    for head in ("head", HEAD):
        if head in variables["params"]:
            variables["params"][HEAD] = variables["params"].pop(head)
    return variables


def _load(config: Config, num_classes: int, key: jax.Array) -> classifiers.Classifier:
    path = Path(config.student.weights).expanduser()
    return classifiers.load_classifier(path, num_classes=num_classes, new_head=key)


def _by_sizes(config: Config, num_classes: int) -> Any:
    """A network that normalises images by the ID set's mean and standard deviation."""
    s, (mean, std) = config.student, moments(config.data.id_set)
    common = {"num_classes": num_classes, "depth": s.depth, "affine_bn": s.affine_bn}
    common |= {"mean": mean, "std": std, "dtype": jnp.dtype(s.dtype), "remat": s.remat}
    if s.architecture == "densenet":
        return DenseNet(**common, growth=s.width, dropout=s.dropout)
    if s.architecture == "wide_resnet":
        return WideResNet(**common, widen=s.width, dropout=s.dropout)
    return ResNet(**common, width=s.width, stem=s.stem)


def architecture(net: Any) -> dict[str, Any]:
    """Name and fields of a linen module, for readers outside of this package."""
    if isinstance(net, Resized):
        return architecture(net.net) | {"image_size": net.size, "channels": net.channels}
    fields = {f.name: getattr(net, f.name) for f in dataclasses.fields(net)}
    for name in ("parent", "name", "num_classes", "remat"):
        del fields[name]
    fields["dtype"] = jnp.dtype(net.dtype).name
    return {"name": type(net).__name__.lower(), **fields}
