"""Networks that were read from a weight file: described as JSON, and built again from that."""

from collections.abc import Mapping
from typing import Any

from oal_jax.models.resized import Resized
from oal_jax.models.resnet import ResNet
from oal_jax.models.vit import VisionTransformer
from oal_jax.pretrained import classifiers

_MODULES = {"VisionTransformer": VisionTransformer, "ResNet": ResNet}


def describe(net: Any, image_size: int, channels: int) -> dict[str, Any]:
    """A ViT or ResNet and the images that it takes, as JSON."""
    kind, fields = type(net).__name__, classifiers.fields(net)
    return {"kind": kind, "fields": fields, "image_size": image_size, "channels": channels}


def rebuild(description: Mapping[str, Any], **options: Any) -> Resized:
    """The network of a description, for images of any size.

    Args:
      description: as `describe` gives it.
      **options: fields of the module that replace those of the description.
    """
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in description["fields"].items()}
    module = _MODULES[description["kind"]]
    options = {k: v for k, v in options.items() if k in module.__dataclass_fields__}
    return Resized(module(**fields | options), description["image_size"], description["channels"])
