"""Files of small classifiers with random weights in timm's format."""

import jax.numpy as jnp
from helpers import random_variables

from oal_jax.models.resnet import ResNet
from oal_jax.models.vit import VisionTransformer
from oal_jax.pretrained.classifiers import save_timm

SIZES = {"patch": 8, "width": 16, "depth": 1, "heads": 2, "mlp_ratio": 2.0}
MOMENTS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}


def vit_file(path, classes=10, **sizes):
    """A ViT for images of 16 pixels."""
    net = VisionTransformer(classes, **SIZES | sizes, **MOMENTS)
    params = random_variables(net, jnp.zeros((1, 16, 16, 3)))["params"]
    return save_timm(path, params, None, net, image_size=16)


def resnet_file(path, classes=10):
    """A ResNet-18 for images of 32 pixels."""
    net = ResNet(classes, width=2, stem="imagenet", **MOMENTS)
    variables = random_variables(net, jnp.zeros((1, 32, 32, 3)))
    return save_timm(path, variables["params"], variables["batch_stats"], net, image_size=32)
