"""DenseNet and Wide ResNet, what all students share, and the small networks beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_variables, shapes
from model_formulas import assert_uniform, batch_norm, convolve, normal

from oal_jax.models.densenet import DenseLayer, DenseNet
from oal_jax.models.mutual_information import GaussianPredictor
from oal_jax.models.normalise import moments, normalise
from oal_jax.models.projector import FeatureProjector, LatentProjector
from oal_jax.models.resnet import ResNet
from oal_jax.models.wide_resnet import WideBlock, WideResNet


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (DenseNet(10, affine_bn=False), 745_174),  # DenseNet-BC-100-12 of arXiv 2306.03715
        (DenseNet(100, affine_bn=False), 776_044),
        (DenseNet(10), 769_162),  # of arXiv 1608.06993, 0.8 M
        (WideResNet(10, affine_bn=False), 8_938_426),
        (WideResNet(10), 8_949_210),  # WRN-40-4 of arXiv 1605.07146, 8.9 M
        (ResNet(10), 11_173_962),  # ResNet-18 for 32 px
        (ResNet(10, affine_bn=False), 11_164_362),
    ],
    ids=lambda v: f"{type(v).__name__}-{v.affine_bn}" if hasattr(v, "affine_bn") else str(v),
)
def test_students_have_as_many_parameters_as_published(model, expected):
    variables = shapes(model, jnp.zeros((1, 32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == expected
    assert variables["params"]["fc"]["kernel"].shape == (model.feature_width, model.num_classes)
    assert set(variables) == {"params", "batch_stats"}  # no map has become a variable
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(variables["params"])}
    assert names == {"kernel", "bias"} | ({"scale"} if model.affine_bn else set())


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        (DenseNet(10), [(32, 24), (16, 108), (8, 150), (8, 342)]),
        (WideResNet(10), [(32, 16), (32, 64), (16, 128), (8, 256)]),
        (ResNet(10), [(32, 64), (32, 64), (16, 128), (8, 256), (4, 512)]),
        (ResNet(10, depth=50), [(32, 64), (32, 256), (16, 512), (8, 1024), (4, 2048)]),
    ],
    ids=lambda v: type(v).__name__,
)
def test_students_sow_their_maps(model, sizes):
    images = jnp.zeros((2, 32, 32, 3))
    _, sown = jax.eval_shape(
        lambda k: model.apply(model.init(k, images), images, mutable=["maps"]), jax.random.key(0)
    )
    maps = [sown["maps"][name][0].shape for name in sorted(sown["maps"])]
    assert maps == [(2, side, side, channels) for side, channels in sizes]


def convolution(x, params, stride=1):
    kernel = params["kernel"]
    return np.asarray(convolve(x, kernel, stride, (len(kernel) - 1) // 2))


def activated(x, variables, name):
    normed = batch_norm(x, variables["params"][name], variables["batch_stats"][name])
    return np.maximum(normed, 0)


def numpy_dense_layer(x, v):
    h = convolution(activated(x, v, "bn1"), v["params"]["conv1"])
    h = convolution(activated(h, v, "bn2"), v["params"]["conv2"])
    return np.concatenate([x, h], -1)


def test_dense_layer_equals_its_formula():
    module, x = DenseLayer(3, affine=True, dropout=0.5), normal(2, 5, 5, 4)
    variables = random_variables(module, x, False)
    assert variables["params"]["conv1"]["kernel"].shape == (1, 1, 4, 12)
    actual = jax.jit(lambda v: module.apply(v, x, False))(variables)
    np.testing.assert_allclose(actual, numpy_dense_layer(x, variables), atol=1e-4)


def test_densenet_equals_its_formula():
    model = DenseNet(3, depth=10, growth=2, mean=(0.2,), std=(0.5,))
    images = np.random.default_rng(0).uniform(size=(2, 7, 7, 1)).astype(np.float32)
    variables = random_variables(model, images)
    params = variables["params"]
    x = convolution((images - 0.2) / 0.5, params["conv1"])
    for i in (1, 2, 3):
        x = numpy_dense_layer(x, {kind: tree[f"block{i}_0"] for kind, tree in variables.items()})
        x = activated(x, variables, f"bn{i}")
        if i < 3:
            x = convolution(x, params[f"trans{i}"])
            half = x.shape[1] // 2  # an odd last row and column are left out, as PyTorch's
            x = x[:, : 2 * half, : 2 * half].reshape(2, half, 2, half, 2, -1).mean((2, 4))
    features = x.mean((1, 2))
    logits, actual = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(actual, features, atol=1e-4)
    expected = features @ params["fc"]["kernel"] + params["fc"]["bias"]
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize(("channels", "stride"), [(6, 2), (4, 1)])
def test_wide_block_equals_its_formula(channels, stride):
    module, x = WideBlock(channels, stride, affine=True, dropout=0.5), normal(2, 8, 8, 4)
    variables = random_variables(module, x, False)
    params = variables["params"]
    assert ("shortcut" in params) == (channels != 4)
    active = activated(x, variables, "bn1")
    h = activated(convolution(active, params["conv1"], stride), variables, "bn2")
    shortcut = convolution(active, params["shortcut"], stride) if channels != 4 else x
    expected = shortcut + convolution(h, params["conv2"])
    actual = jax.jit(lambda v: module.apply(v, x, False))(variables)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


SMALL = [
    DenseNet(3, depth=10, growth=2, affine_bn=False, dropout=0.3),
    WideResNet(3, depth=10, widen=1, affine_bn=False, dropout=0.3),
]


@pytest.mark.parametrize("model", SMALL, ids=lambda m: type(m).__name__)
def test_dropout_is_of_the_key_and_only_in_training(model):
    images = np.random.default_rng(0).uniform(size=(4, 8, 8, 1)).astype(np.float32)
    variables = random_variables(model, images)

    @jax.jit
    def both(key):
        trained, state = model.apply(
            variables,
            images,
            train=True,
            statistics=jnp.arange(4) < 2,
            rngs={"dropout": key},
            mutable=["batch_stats", "maps"],
        )
        return trained[1], state, model.apply(variables, images, mutable=["maps"])

    (first, state, (_, sown)), (again, _, _), (other, _, _) = (
        both(jax.random.key(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-2
    last = np.asarray(sown["maps"]["stage3"][0])
    plain = jax.jit(model.apply)(variables, images)[1]
    np.testing.assert_allclose(plain, last.mean((1, 2)), atol=1e-5)
    before = variables["batch_stats"]
    assert jax.tree.structure(state["batch_stats"]) == jax.tree.structure(before)
    assert "maps" in state


@pytest.mark.parametrize("model", SMALL, ids=lambda m: type(m).__name__)
def test_statistics_are_of_the_marked_images_alone(model):
    model = model.clone(dropout=0.0)
    images = np.random.default_rng(0).uniform(size=(4, 8, 8, 1)).astype(np.float32)
    variables = random_variables(model, images)
    apply = jax.jit(
        lambda images: model.apply(
            variables, images, train=True, statistics=jnp.arange(4) < 2, mutable=["batch_stats"]
        )
    )
    (logits, _), state = apply(images)
    changed = images.copy()
    changed[2:] = 1 - changed[2:]
    (other, _), same = apply(changed)
    np.testing.assert_allclose(logits[:2], other[:2], atol=1e-5)
    assert np.abs(logits[2:] - other[2:]).max() > 1e-2
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_students_of_the_mask_start_as_its_code_does():
    params = jax.jit(DenseNet(200, depth=10, growth=60).init)(
        jax.random.key(0), jnp.zeros((1, 4, 4, 1))
    )["params"]
    kernel = params["block1_0"]["conv2"]["kernel"]  # 3 x 3, 240 to 60
    np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / (9 * 240)), rtol=0.02)
    assert_uniform(params["fc"], params["fc"]["kernel"].shape[0])


def test_moments_are_of_the_image_set():
    mean, std = moments("cifar100")
    np.testing.assert_allclose(np.multiply(mean, 255), [125.3, 123.0, 113.9])
    np.testing.assert_allclose(np.multiply(std, 255), [63.0, 62.1, 66.7])
    assert moments("cifar10") == (mean, std) and moments("fashion") == ((0.33,), (0.35,))
    images = np.random.default_rng(0).uniform(size=(2, 3, 3, 3)).astype(np.float32)
    np.testing.assert_allclose(
        normalise(images, mean, std), (images - mean) / np.array(std), rtol=1e-5, atol=1e-5
    )
    # A set that is not known, of any number of channels.
    np.testing.assert_allclose(
        normalise(images, *moments("mine")), (images - 0.5) / 0.25, rtol=1e-5
    )


# The projectors, q of CLUB


def test_feature_projector_s_relu_stands_before_the_last_norm():
    module, x = FeatureProjector(5), normal(6, 7)
    variables = random_variables(module, x, train=False)
    params, stats = variables["params"], variables["batch_stats"]
    h = batch_norm(x, params["bn1"], stats["bn1"])
    h = np.maximum(h @ params["linear"]["kernel"] + params["linear"]["bias"], 0)
    expected = batch_norm(h, params["bn2"], stats["bn2"])
    np.testing.assert_allclose(module.apply(variables, x, train=False), expected, atol=1e-5)
    trained, _ = module.apply(variables, x, train=True, mutable=["batch_stats"])
    scaled = (np.asarray(trained) - params["bn2"]["bias"]) / params["bn2"]["scale"]
    np.testing.assert_allclose(np.mean(scaled, axis=0), 0, atol=1e-5)


def test_feature_projector_s_linear_layer_starts_like_pytorch_s():
    linear = FeatureProjector(300).init(jax.random.key(0), jnp.zeros((2, 400)), train=False)
    assert_uniform(linear["params"]["linear"], 400)


@pytest.mark.parametrize("hidden", [(256,), (32, 16, 256)])
def test_gaussian_predictor_has_the_reference_s_layers_and_pytorch_s_start(hidden):
    module = GaussianPredictor(512, hidden)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 64)))["params"]
    widths = (64, *hidden, 512)
    names = [f"mean_{i}" for i in range(len(hidden))] + ["mean_out"]
    for name, fan_in, fan_out in zip(names, widths, widths[1:], strict=False):
        assert params[name]["kernel"].shape == (fan_in, fan_out)
    assert params["log_variance_0"]["kernel"].shape == (64, 256)
    assert_uniform(params["mean_out"], 256)
    assert_uniform(params["log_variance_0"], 64)
    assert_uniform(params["log_variance_out"], 256)


def test_gaussian_predictor_equals_its_formula():
    module, x = GaussianPredictor(3, (5, 4), (6,)), 3 * normal(4, 2)
    variables = random_variables(module, x)
    p = variables["params"]
    layer = lambda x, name: x @ p[name]["kernel"] + p[name]["bias"]
    relu = lambda v: np.maximum(v, 0)
    mean, log_variance = jax.jit(module.apply)(variables, x)
    expected = layer(relu(layer(relu(layer(x, "mean_0")), "mean_1")), "mean_out")
    np.testing.assert_allclose(mean, expected, atol=1e-5)
    expected = np.tanh(layer(relu(layer(x, "log_variance_0")), "log_variance_out"))
    np.testing.assert_allclose(log_variance, expected, atol=1e-5)


@pytest.mark.parametrize("size", [7, 8, 64])
def test_latent_projector_brings_latents_of_any_size_down_to_four_by_four(size):
    variables = shapes(LatentProjector(32), jnp.zeros((1, size, size, 4)))
    assert variables["params"]["fc1"]["kernel"].shape == (4 * 4 * 64, 64)
    assert "batch_stats" not in variables


def test_latent_projector_maps_a_latent_alike_in_any_batch():
    module, latents = LatentProjector(8), normal(5, 7, 7, 4)
    variables = random_variables(module, latents)
    apply = jax.jit(module.apply)
    whole, part = (np.asarray(apply(variables, x)) for x in (latents, latents[3:]))
    np.testing.assert_allclose(whole[3:], part, atol=1e-5)
    assert np.abs(np.diff(whole, axis=0)).min(axis=0).max() > 1e-3
