"""Images in memory as callers have them."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from oal_jax.data.decoding import Decoding, decode
from oal_jax.detection.images import check_images, to_shape
from oal_jax.errors import UserError

COLOUR = np.random.default_rng(0).integers(0, 256, (3, 5, 6, 3)).astype(np.uint8)
GREY = COLOUR[..., 0]


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (COLOUR, COLOUR),
        (list(COLOUR), COLOUR),
        (tuple(jnp.asarray(x) for x in COLOUR), COLOUR),
        ([Image.fromarray(x) for x in COLOUR], COLOUR),
        (GREY, GREY[..., None]),
        ([Image.fromarray(x) for x in GREY], GREY[..., None]),
        (COLOUR / 255, np.float32(COLOUR / 255)),
        (jnp.bfloat16(COLOUR[:1] // 255), np.float32(COLOUR[:1] // 255)),
    ],
)
def test_every_form_is_one_array(images, expected):
    for shape in (None, expected.shape[1:]):
        array = check_images(images, shape)
        np.testing.assert_array_equal(array, expected)
        assert array.dtype == expected.dtype


def test_the_overshoot_of_a_resize_is_clipped():
    images = np.array([-0.001, 0.5, np.nextafter(np.float32(1), np.float32(2)), 1.0019])
    clipped = check_images(images.reshape(1, 2, 2, 1))
    np.testing.assert_array_equal(clipped.ravel(), np.float32([0, 0.5, 1, 1]))


def test_no_images_are_an_empty_batch():
    for images in ([], np.zeros((0, 5, 6, 3))):
        assert check_images(images, (5, 6, 3)).shape == (0, 5, 6, 3)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([COLOUR[0], COLOUR[0][:4]], r"more than one shape: \(5, 6, 3\), \(4, 6, 3\)"),
        ([COLOUR[0], COLOUR[0] / 255], "more than one dtype: uint8, float64"),
        (np.full((2, 5, 6, 3), np.nan), "nan in 2 of 2 images, the first at index 0"),
        (np.full((2, 5, 6, 3), 1.01), "have 1.01 to 1.01"),
        (COLOUR.astype(int), "int64"),
        (COLOUR.transpose(0, 3, 1, 2), "channels last"),
        (COLOUR[0], r"images\[None\]"),
        ([Image.fromarray(GREY[0]).convert("P")], "mode P"),
        ([Image.new("F", (6, 5))], "mode F"),
        ("a.png", "strings.*score_files"),
        ({"image": COLOUR}, "dict"),
        (None, "NoneType"),
        ([[1, 2], [3]], "more than one shape"),
    ],
)
def test_what_is_no_batch_is_one_line(images, message):
    with pytest.raises(UserError, match=message) as caught:
        check_images(images, (5, 6, 3))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(5, 6), (9, 13)])
def test_other_channels_become_those_of_a_file(channels, size):
    shape = (5, 6, channels)
    decoding, rng = Decoding.to_shape(shape), np.random.default_rng(1)
    pixels = [rng.integers(0, 256, (*size, *c)).astype(np.uint8) for c in ((), (3,), (4,))]
    expected = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png")
        expected.append(decode(file.getvalue(), decoding))
        for one in (image, Image.fromarray(image), image[..., None] if image.ndim == 2 else image):
            array, single = to_shape(one, shape, decoding)
            np.testing.assert_array_equal(array[0], expected[-1])
            assert single
        if channels < 4 or size == shape[:2]:
            array, _ = to_shape(image / 255, shape, decoding)
            np.testing.assert_allclose(array[0] * 255, expected[-1], atol=1.6)
    mixed, _ = to_shape([Image.fromarray(pixels[0]), *pixels[1:]], shape, decoding)
    np.testing.assert_array_equal(mixed, expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 3, 20, 30), np.uint8), r"channels last: images.transpose\(0, 2, 3, 1\)"),
        (np.zeros((3, 20, 30), np.uint8), r"channels first: images.transpose\(1, 2, 0\)"),
        ([np.zeros((3, 20, 30), np.uint8)], r"channels last: image.transpose\(1, 2, 0\)"),
        (np.zeros((7, 5, 6), np.uint8), r"\(7, 5, 6\).*grey images: images\[..., None\]"),
        (np.zeros((2, 20, 30, 2), np.uint8), "2 channels are not"),
        (np.zeros((20, 30), int), "int64"),
    ],
)
def test_what_has_no_channels_of_a_file_is_one_line(images, message):
    with pytest.raises(UserError, match=message):
        to_shape(images, (5, 6, 3), Decoding.to_shape((5, 6, 3)))
