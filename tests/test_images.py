"""Images in memory as callers have them."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from oal_jax.detection.images import check_images
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
