"""What latents are sampled from: every kind, through the stage, with a small Stable Diffusion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_stable_diffusion import write_small

from oal_jax.config import Config
from oal_jax.generator import create, samplers
from oal_jax.runtime import artifacts, distributed
from oal_jax.runtime.keys import named
from oal_jax.stages import generator, latent_inputs, latents
from oal_jax.stages.context import Context

KINDS = ("outliers", "class", "noised", "partial", "mixture")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("small"), create.FASHION_CLASSES)


@pytest.fixture
def context(model, tmp_path):
    config = Config()
    config.data.train_images = 40
    config.teacher.width = 32
    config.generator.directory = str(model)
    config.outliers.knn.repeats, config.outliers.knn.anchors, config.outliers.knn.keep = 1, 3, 1
    config.latents.per_class, config.latents.pictures = 2, 1
    config.latents.steps, config.latents.chunk = 2, 8
    config.latents.partial = 0.5
    config.method.micl = "reference"  # which does not learn from the latents of ID images
    outliers = np.random.default_rng(0).standard_normal((8, 3, 32)).astype(np.float32)
    tensors = {"outliers": outliers, "labels": np.arange(8, dtype=np.int32)}
    artifacts.write_tensors(tmp_path / "outliers" / "outliers.safetensors", tensors)
    return Context(config, tmp_path, distributed.make_mesh(), jax.random.key(0))


@pytest.fixture
def sd(context):
    return generator.load(context)


def test_a_kind_has_the_inputs_it_needs(context, sd):
    found = {}
    for kind in KINDS:
        context.config.latents.kind = kind
        found[kind] = latent_inputs.draw(context, *sd, 8, 2)
        np.testing.assert_array_equal(found[kind].labels, np.tile(np.arange(8), 2))
        np.testing.assert_array_equal(found[kind].indices, np.arange(16))
        assert (found[kind].outliers is None) == (kind in ("class", "noised"))
        assert (found[kind].clean is None) == (kind in ("outliers", "class"))
    # Of one class only ID latents of that class are read, and the kinds read the same ones.
    every = np.moveaxis(latents.of_training_images(context), -1, 1).astype(np.float32)
    labels = context.train_images().labels
    np.testing.assert_array_equal(found["partial"].clean, found["noised"].clean)
    for clean, label in zip(found["partial"].clean, found["partial"].labels, strict=True):
        gaps = np.abs(every - clean).max(axis=(1, 2, 3))
        assert gaps.min() < 1e-2 and labels[gaps.argmin()] == label
    assert np.abs(found["mixture"].clean - found["partial"].clean).max() > 0.1


def test_other_classes_are_other_ones():
    labels = np.tile(np.arange(5, dtype=np.int32), 40)
    others = latent_inputs._other_classes(labels, 5, jax.random.key(0))
    assert (others != labels).all() and set(others) == set(range(5))


def test_the_middle_of_two_latents():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 4, 8, 8)).astype(np.float32)
    a, b = (x / np.linalg.norm(x.reshape(3, -1), axis=1)[:, None, None, None] for x in (a, b))
    linear = latent_inputs.interpolate(a, b, "linear")
    np.testing.assert_allclose(linear, (a + b) / 2, rtol=1e-6)
    found = latent_inputs.interpolate(a, b, "spherical")
    angle = np.arccos(np.sum(a * b, axis=(1, 2, 3)))
    weight = (np.sin(angle / 2) / np.sin(angle))[:, None, None, None]
    np.testing.assert_allclose(found, weight * a + weight * b, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found.reshape(3, -1), axis=1), 1, rtol=1e-4)
    np.testing.assert_allclose(latent_inputs.interpolate(a, a, "spherical"), a, rtol=1e-5)
    assert np.isfinite(latent_inputs.interpolate(a, -a, "spherical")).all()


def test_noised_latents_need_no_generator(context, sd):
    context.config.latents.kind, context.config.latents.noise = "noised", 0.5
    latents.run(context)
    written = load_file(context.directory("latents") / "latents.safetensors")
    inputs = latent_inputs.draw(context, *sd, 8, 2)
    noise = samplers.initial_noise(named(context.key, "noise"), jnp.arange(16), (4, 8, 8))
    np.testing.assert_allclose(
        written["latents"], inputs.clean + 0.5 * np.asarray(noise), atol=1e-5
    )
    shown = load_file(context.directory("latents") / "pictures.safetensors")
    assert shown["samples"].shape == (8, 1, 28, 28, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["partial", "class"])
def test_kinds_pass_through_the_stage(context, kind):
    context.config.latents.kind = kind
    latents.run(context)
    written = load_file(context.directory("latents") / "latents.safetensors")["latents"]
    assert written.shape == (16, 4, 8, 8) and np.isfinite(written).all()
    assert len(np.unique(written[:, 0, 0, 0])) == 16
