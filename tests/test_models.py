"""Models against NumPy transcriptions, plain XLA convolutions, and the published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_variables, shapes
from model_formulas import batch_norm, convolve, normal
from scipy.special import erf

from oal_jax.models.conv import Conv, patches_product
from oal_jax.models.resnet import ResNet, ResNetBlock
from oal_jax.models.vit import VisionTransformer


def count(module, image_shape):
    params = shapes(module, jnp.zeros((1, *image_shape)))["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(params))


# Vision Transformer


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, 86_567_656),  # timm vit_base_patch16_224
        ({"width": 384, "heads": 6}, 22_050_664),  # vit_small_patch16_224
        ({"width": 192, "heads": 3}, 5_717_416),  # vit_tiny_patch16_224
    ],
)
def test_vit_has_as_many_parameters_as_timm(sizes, expected):
    model = VisionTransformer(num_classes=1000, mean=(0.5,) * 3, std=(0.5,) * 3, **sizes)
    assert count(model, (224, 224, 3)) == expected


def numpy_vit(params, images, patch, heads, mean, std):
    """The ViT step by step in float64, one head and one patch at a time."""
    layer = lambda x, p: x @ p["kernel"] + p["bias"]

    def norm(x, p):
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]
        )

    b, h, w, _ = images.shape
    x = (images - mean) / std
    patches = [
        x[:, i : i + patch, j : j + patch].reshape(b, -1)
        for i in range(0, h, patch)
        for j in range(0, w, patch)
    ]
    tokens = layer(np.stack(patches, 1), params["patch_embed"])
    cls = np.repeat(params["cls_token"], b, axis=0)
    x = np.concatenate([cls, tokens], 1) + params["pos_embed"]
    width = x.shape[-1]
    size = width // heads
    for i in range(sum(name.startswith("blocks") for name in params)):
        p = params[f"blocks_{i}"]
        qkv = layer(norm(x, p["norm1"]), p["attn"]["qkv"])
        mixed = []
        for head in range(heads):
            q, k, v = (
                qkv[..., s * width + head * size : s * width + (head + 1) * size] for s in range(3)
            )
            scores = np.einsum("bnd,bmd->bnm", q, k) / np.sqrt(size)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            mixed.append(np.einsum("bnm,bmd->bnd", weights, v))
        x = x + layer(np.concatenate(mixed, -1), p["attn"]["proj"])
        h = layer(norm(x, p["norm2"]), p["mlp_fc1"])
        x = x + layer(h * (1 + erf(h / np.sqrt(2))) / 2, p["mlp_fc2"])
    features = norm(x, params["norm"])[:, 0]
    return layer(features, params["head"]), features


def test_vit_equals_numpy_and_its_features_are_the_cls_token_after_the_last_norm():
    model = VisionTransformer(3, 4, 16, 2, 2, 2.0, mean=(0.3, 0.6), std=(0.4, 0.2))
    images = np.random.default_rng(0).uniform(size=(2, 8, 12, 2)).astype(np.float32)
    variables = random_variables(model, images)
    logits, features = jax.jit(model.apply)(variables, images)
    expected = numpy_vit(
        variables["params"], images.astype(np.float64), 4, 2, (0.3, 0.6), (0.4, 0.2)
    )
    np.testing.assert_allclose(logits, expected[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(features, expected[1], rtol=1e-4, atol=1e-4)


# Convolutions


@pytest.mark.parametrize("size", [(5, 8), (2, 2)])
@pytest.mark.parametrize(("kernel", "stride", "pad"), [(1, 2, 0), (3, 1, 1), (3, 2, 1), (5, 3, 2)])
def test_patches_product_equals_the_convolution(size, kernel, stride, pad):
    x, weights = normal(2, *size, 3), normal(kernel, kernel, 3, 4, seed=2)
    expected = convolve(x, weights, stride, pad)
    actual = jax.jit(patches_product, static_argnums=(2, 3))(x, weights, stride, pad)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=2e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("size", "kernel"), [(2, 3), (7, 1), (9, 3), (9, 7)])
def test_conv_and_its_gradient_are_those_of_pytorch_s_padding_by_every_route(size, kernel, stride):
    module, x = Conv(4, kernel, stride), normal(2, size, size, 3)
    variables = random_variables(module, x)
    plain = lambda v, x: convolve(x, v["params"]["kernel"], stride, (kernel - 1) // 2)
    actual, expected = jax.jit(lambda *a: (module.apply(*a), plain(*a)))(variables, x)
    assert actual.shape == expected.shape == (2, -(-size // stride), -(-size // stride), 4)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    squared = lambda f: lambda v, x: jnp.sum(f(v, x) ** 2)
    gradient = jax.jit(lambda *a: [jax.grad(squared(f), (0, 1))(*a) for f in (module.apply, plain)])
    for one, other in zip(*map(jax.tree.leaves, gradient(variables, x)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_conv_starts_like_torchvision_s():
    kernel = Conv(64, 3).init(jax.random.key(0), jnp.zeros((1, 4, 4, 32)))["params"]["kernel"]
    np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / (9 * 64)), rtol=0.02)


# ResNet


@pytest.mark.parametrize(
    ("depth", "expected"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032)]
)
def test_resnet_has_as_many_parameters_as_torchvision(depth, expected):
    model = ResNet(num_classes=1000, depth=depth, stem="imagenet")
    assert count(model, (224, 224, 3)) == expected
    assert model.feature_width == (2048 if depth == 50 else 512)


@pytest.mark.parametrize(
    ("stem", "size", "last"), [("imagenet", 224, 7), ("cifar", 32, 4), ("small", 28, 2)]
)
def test_resnet_s_last_map(stem, size, last):
    model = ResNet(num_classes=10, width=4, stem=stem)
    images = jnp.zeros((1, size, size, 1))
    _, state = jax.eval_shape(
        lambda k: model.apply(model.init(k, images), images, capture_intermediates=True),
        jax.random.key(0),
    )
    assert state["intermediates"]["layer4_1"]["__call__"][0].shape == (1, last, last, 32)


def test_resnet_head_reads_the_pooled_last_map():
    model = ResNet(num_classes=3, width=2, stem="small")
    images = np.random.default_rng(0).uniform(size=(2, 16, 16, 1)).astype(np.float32)
    variables = random_variables(model, images)
    apply = jax.jit(lambda v, x: model.apply(v, x, capture_intermediates=True))
    (logits, features), state = apply(variables, images)
    logits, features = np.asarray(logits), np.asarray(features)
    last = np.asarray(state["intermediates"]["layer4_1"]["__call__"][0])
    head = variables["params"]["fc"]
    np.testing.assert_allclose(features, last.mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(logits, features @ head["kernel"] + head["bias"], atol=1e-4)
    assert features.shape == (2, model.feature_width) and (features >= 0).all()


@pytest.mark.parametrize("bottleneck", [False, True])
def test_resnet_block_equals_its_formula(bottleneck):
    module, x = ResNetBlock(4, 2, bottleneck), normal(2, 8, 8, 6)
    variables = random_variables(module, x, False)
    params, stats = variables["params"], variables["batch_stats"]
    relu = lambda v: np.maximum(v, 0)

    def stage(h, i, stride):
        kernel = params[f"conv{i}"]["kernel"]
        h = np.asarray(convolve(h, kernel, stride, (len(kernel) - 1) // 2))
        return batch_norm(h, params[f"bn{i}"], stats[f"bn{i}"])

    strides = (1, 2, 1) if bottleneck else (2, 1)  # the stride is on the 3 x 3, as torchvision's
    h = x
    for i, stride in enumerate(strides, 1):
        h = stage(h, i, stride)
        h = relu(h) if i < len(strides) else h
    shortcut = np.asarray(convolve(x, params["downsample_conv"]["kernel"], 2, 0))
    shortcut = batch_norm(shortcut, params["downsample_bn"], stats["downsample_bn"])
    expected = relu(h + shortcut)
    actual = jax.jit(lambda v: module.apply(v, x, False))(variables)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_batch_statistics_in_training_and_running_ones_otherwise():
    model = ResNet(num_classes=3, width=2, stem="small")
    images = np.random.default_rng(0).uniform(size=(4, 16, 16, 1)).astype(np.float32)
    variables = random_variables(model, images)
    other = images.copy()
    other[1:] = 1 - other[1:]

    @jax.jit
    def train(images):
        return model.apply(
            variables,
            images,
            train=True,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=True,
        )

    evaluate = jax.jit(lambda images: model.apply(variables, images)[0])
    (logits, _), state = train(images)
    assert np.abs(logits[0] - train(other)[0][0][0]).max() > 1e-2
    np.testing.assert_allclose(evaluate(images)[0], evaluate(other)[0], atol=1e-5)
    before = variables["batch_stats"]["bn1"]
    seen = np.asarray(state["intermediates"]["conv1"]["__call__"][0])
    after = state["batch_stats"]["bn1"]
    np.testing.assert_allclose(
        after["mean"], 0.9 * before["mean"] + 0.1 * seen.mean((0, 1, 2)), atol=1e-5
    )
    np.testing.assert_allclose(
        after["var"], 0.9 * before["var"] + 0.1 * seen.var((0, 1, 2)), rtol=1e-4
    )
