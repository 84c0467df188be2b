"""The modules of a Stable Diffusion: precision, image sizes, imports; and the shipped model."""

import functools
import importlib.metadata
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_stable_diffusion import SHIPPED, shipped, tiny, write_tiny

from oal_jax.data import sources
from oal_jax.errors import UserError
from oal_jax.generator import conditioning, samplers
from oal_jax.generator import stable_diffusion as stable
from oal_jax.generator.create import FASHION_CLASSES


@pytest.fixture(scope="module")
def garments():
    """The last images of the test split, on which the generator was not trained."""
    split = sources.load("bundled", "fashion", "test")
    return split.images[-400:].astype(np.float32) / 255.0, split.labels[-400:]


# --- imports --------------------------------------------------------------------------------------


def test_no_other_framework_is_imported():
    code = """
import sys
from oal_jax.generator import conditioning, create, samplers, stable_diffusion_v1, training
stable_diffusion_v1.build()
assert not {"diffusers", "transformers", "torch"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({}, "diffusers is not installed"),
        ({"diffusers": "0.42.1", "transformers": "4.57.6"}, r"diffusers 0\.42\.1 has no Flax"),
        ({"diffusers": "0.39.0", "transformers": "5.0.0rc1"}, r"transformers 5\.0\.0rc1 has no"),
    ],
)
def test_a_missing_extra_is_one_line(monkeypatch, versions, words):
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UserError, match=rf"{words}.*pip install 'oal-jax\[diffusers\]'") as raised:
        stable.build(SHIPPED, backend="diffusers")
    assert "\n" not in str(raised.value)


# --- precision and sizes --------------------------------------------------------------------------


def test_bfloat16(tmp_path):
    sd, params = stable.load(write_tiny(tmp_path), jnp.bfloat16)
    assert params["unet"]["conv_in"]["kernel"].dtype == jnp.bfloat16
    assert params["vae"]["quant_conv"]["kernel"].dtype == jnp.float32
    apply = jax.jit(functools.partial(stable.apply_unet, sd))
    out = apply(params, jnp.ones((1, 4, 4, 4)), jnp.ones((1,), jnp.int32), jnp.ones((1, 16, 32)))
    assert out.dtype == jnp.float32 and np.isfinite(out).all()


@pytest.mark.parametrize("side", [8, 9, 12, 16, 32])
def test_images_of_other_sizes(side):
    """The autoencoder has 16 px, 4 a latent: 9 to 16 px are padded, others resized."""
    sd, params = tiny()
    images = np.random.default_rng(0).random((2, side, side, 1), np.float32)
    fitted = np.asarray(stable.fit_images(sd, images))
    assert fitted.shape == (2, 16, 16, 1)
    if 8 < side <= 16:
        start = (16 - side) // 2
        np.testing.assert_array_equal(fitted[:, start : start + side, start : start + side], images)
        assert fitted.sum() == pytest.approx(images.sum(), rel=1e-5)
    else:
        np.testing.assert_allclose(fitted.mean(), images.mean(), atol=0.02)
        assert fitted.min() >= 0 and fitted.max() <= 1
    decode = functools.partial(stable.decode_latents, sd, size=(side, side))
    shape = jax.eval_shape(decode, params, jnp.zeros((2, *sd.latent_shape))).shape
    assert shape == (2, side, side, 1)


def test_images_that_are_not_square():
    with pytest.raises(UserError, match="not square"):
        stable.fit_images(tiny()[0], jnp.zeros((1, 40, 30, 1)))


def test_pad_images_faults():
    sd, _ = tiny()
    with pytest.raises(UserError, match="17 x 14"):
        stable.pad_images(sd, jnp.zeros((1, 17, 14, 1)))
    with pytest.raises(UserError, match="1 channels, not 3"):
        stable.pad_images(sd, jnp.zeros((1, 14, 14, 3)))


# --- the shipped model ----------------------------------------------------------------------------


def test_shipped_directory_is_small():
    assert sum(f.stat().st_size for f in SHIPPED.rglob("*") if f.is_file()) < 6_000_000


def test_shipped_autoencoder_reconstructs_garments(garments):
    sd, params = shipped()
    images = garments[0][:24]
    latents = jax.jit(functools.partial(stable.encode_images, sd))(params, images)
    assert latents.shape == (24, 8, 8, 4) and 0.8 < float(jnp.std(latents)) < 1.2
    decode = jax.jit(functools.partial(stable.decode_latents, sd, size=(28, 28)))
    decoded = decode(params, latents)
    assert decoded.shape == images.shape
    psnr = -10.0 * np.log10(np.mean((decoded - images) ** 2, axis=(1, 2, 3)))
    assert psnr.mean() > 24.0


@pytest.mark.slow
def test_generated_garments_are_of_the_prompted_class(garments):
    """The nearest real image, by squared distance of pixels, is mostly of the prompted class."""
    sd, params = shipped()
    ids, _, empty = conditioning.class_tokens(sd, FASHION_CLASSES)
    labels = np.arange(48) % 8
    encode = jax.jit(functools.partial(stable.encode_prompts, sd))
    cond, uncond = encode(params, ids)[labels], encode(params, empty)
    noise = samplers.initial_noise(jax.random.key(0), jnp.arange(48), sd.latent_shape)
    apply = functools.partial(stable.apply_unet, sd)
    latents = jax.jit(samplers.make_sampler(apply, sd.schedule))(params, noise, cond, uncond)
    images = jax.jit(functools.partial(stable.decode_latents, sd, size=(28, 28)))(params, latents)
    real, real_labels = garments
    distances = ((images[:, None] - real[None]) ** 2).sum(axis=(2, 3, 4))
    nearest = real_labels[np.argsort(distances, axis=1)[:, 0]]
    # Chance is 1/8; real test images reach about 0.8 (t-shirt, shirt, coat and pullover are
    # mistaken for each other).
    assert (nearest == labels).mean() > 0.6
