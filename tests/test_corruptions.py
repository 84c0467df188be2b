"""The covariate-shifted copies of the embedded ID images."""

import functools
import io

import numpy as np
import pytest
from PIL import Image

from oal_jax.config.benchmarks import BENCHMARKS
from oal_jax.data import corruptions, sources

NAMES = BENCHMARKS["fashion"].csid
COUNT = 400


@functools.cache
def read(name: str, split: str = "test", limit: int = COUNT) -> sources.ImageSet:
    return sources.load("bundled", name, split, limit=limit)


def test_the_benchmark_names_every_corruption():
    assert set(NAMES) == set(corruptions.SETS)


@pytest.mark.parametrize("name", NAMES)
def test_sets_are_the_test_images_changed(name):
    clean, shifted = read("fashion"), read(name)
    assert shifted.name == f"{name}/test"
    assert shifted.images.shape == clean.images.shape
    assert shifted.images.dtype == np.uint8
    assert shifted.class_names == clean.class_names
    np.testing.assert_array_equal(shifted.labels, clean.labels)
    change = np.abs(shifted.images.astype(float) - clean.images).mean(axis=(1, 2, 3))
    # Plain to see on the whole; only nearly empty images change little.
    assert np.median(change) > 8
    assert (change > 2).all()


@pytest.mark.parametrize("name", NAMES)
def test_draws_depend_on_name_and_index_alone(name):
    np.testing.assert_array_equal(read(name).images[:5], read(name, limit=5).images)
    images = np.repeat(read("fashion").images[:1], 2, axis=0)
    first, second = corruptions.corrupt(name, images)
    random = name in ("fashion_gaussian", "fashion_blur")
    assert (first != second).any() == random


@pytest.mark.parametrize("name", NAMES)
def test_classes_stay_recognisable(name):
    # Correlation with the class means of clean training images: blind to brightness and contrast.
    train = read("fashion", "train", 4000)
    means = np.stack([train.images[train.labels == k].mean(axis=0).ravel() for k in range(8)])

    def accuracy(image_set):
        similarity = np.corrcoef(image_set.images.reshape(COUNT, -1), means)[:COUNT, COUNT:]
        return (similarity.argmax(axis=1) == image_set.labels).mean()

    clean = accuracy(read("fashion"))
    assert clean > 0.6
    assert accuracy(read(name)) > clean - 0.1


def test_noise_has_its_moments():
    gray = np.full((64, 64, 64, 1), 128, np.uint8)
    noise = corruptions.corrupt("fashion_gaussian", gray) - 128.0
    assert abs(noise.mean()) < 0.3
    np.testing.assert_allclose(noise.std(), 0.12 * 255, rtol=0.01)
    # Independent: neighbours do not go together, unlike in the smooth validation noise.
    assert abs(np.mean(noise[:, 1:] * noise[:, :-1])) < 0.02 * noise.var()


def test_blur_spreads_a_point_along_a_line_and_keeps_its_sum():
    point = np.zeros((50, 15, 15, 1), np.uint8)
    point[:, 7, 7] = 250
    spread = corruptions.corrupt("fashion_blur", point)[..., 0].astype(float)
    np.testing.assert_allclose(spread.sum(axis=(1, 2)), 250, atol=8)
    offsets = np.arange(15) - 7
    lengths, widths = [], []
    for image in spread:
        weight = image / image.sum()
        y, x = weight.sum(axis=1) @ offsets, weight.sum(axis=0) @ offsets
        assert abs(y) < 0.1 and abs(x) < 0.1
        yy, xx = weight.sum(axis=1) @ offsets**2, weight.sum(axis=0) @ offsets**2
        small, large = np.linalg.eigvalsh([[yy, offsets @ weight @ offsets], [0, xx]], UPLO="U")
        lengths.append(large)
        widths.append(small)
    # A line from -2 to 2 has a variance of 1.5 with 17 points, and sharing adds less than 1/4.
    assert 1.4 < np.mean(lengths) < 1.8
    assert np.mean(widths) < 0.3
    assert len(np.unique(spread, axis=0)) > 40  # directions close to each other round to one


def test_contrast_jpeg_and_pixels_are_what_they_say():
    images = read("fashion").images[:10]
    mean = images.mean(axis=(1, 2, 3), keepdims=True)
    expected = mean + (images - mean) * 0.3
    assert np.abs(read("fashion_contrast").images[:10] - expected).max() <= 0.5 + 1e-9
    for image, shifted in zip(images, read("fashion_jpeg").images, strict=False):
        stored = io.BytesIO()
        Image.fromarray(image[..., 0]).save(stored, "JPEG", quality=20)
        np.testing.assert_array_equal(np.asarray(Image.open(stored)), shifted[..., 0])
    for shifted in read("fashion_pixelate").images[:10, ..., 0].astype(int):
        # 13 rows and columns are left of 28: a new one begins 12 times.
        assert np.diff(shifted, axis=0).any(axis=1).sum() <= 12
        assert np.diff(shifted, axis=1).any(axis=0).sum() <= 12


def test_colour_images_are_corrupted_too():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 32, 24, 3), dtype=np.uint8)
    for name in NAMES:
        shifted = corruptions.corrupt(name, images)
        assert shifted.shape == images.shape and shifted.dtype == np.uint8
        assert (shifted != images).mean() > 0.3
