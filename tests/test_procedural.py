"""Procedural outlier images: sizes, seeds, and what the pictures have in common."""

import tracemalloc

import numpy as np
import pytest

from oal_jax.data import procedural

SHAPE = (28, 28, 1)


@pytest.fixture(scope="module")
def images():
    """More images than one chunk."""
    return procedural.draw(1200, SHAPE)


@pytest.mark.parametrize(
    ("count", "shape"), [(0, SHAPE), (1, (12, 12, 1)), (7, (33, 20, 3)), (9, (16, 24, 4))]
)
def test_shape_and_type(count, shape):
    images = procedural.draw(count, shape)
    assert images.shape == (count, *shape) and images.dtype == np.uint8


def test_a_set_is_bounded_in_images_and_bytes():
    assert procedural.size_of(SHAPE) == procedural.size_of((32, 32, 3)) == 12_000
    assert procedural.size_of(SHAPE, 200) == 200 and procedural.size_of(SHAPE, 10**6) == 12_000
    large = (224, 224, 3)
    assert procedural.size_of(large) > 200 and procedural.size_of(large) * 224**2 * 3 <= 2**28
    assert procedural.size_of((20_000, 20_000, 3)) == 1


def test_large_images_are_drawn_a_few_at_a_time():
    tracemalloc.start()
    longer = procedural.draw(30, (224, 224, 3))
    assert tracemalloc.get_traced_memory()[1] < 128 * 2**20
    tracemalloc.stop()
    np.testing.assert_array_equal(longer[:8], procedural.draw(8, (224, 224, 3)))
    assert len({image.tobytes() for image in longer}) == 30


def test_each_image_in_colour_has_a_palette_of_its_own():
    gray, images = (procedural.draw(60, (28, 28, c)) for c in (1, 3))
    grounds = set()
    for level, image in zip(gray[..., 0], images, strict=True):
        # The drawing is the gray one's: equal levels, rounded here, are about equal colours.
        for value in np.unique(level)[:3]:
            assert np.ptp(image[level == value].astype(int), axis=0).max() <= 4
        grounds.add(tuple(image[level == 0][0]) if (level == 0).any() else None)
    assert len(grounds) > 30
    # No channel is another's copy.
    assert (images[..., 0] != images[..., 1]).mean() > 0.9


def test_colours_lie_straight_between_those_of_the_palette():
    line = np.linspace(0, 1, 13)[None, None]
    image = procedural.coloured(np.random.default_rng(0), line, 3)[0, 0]
    np.testing.assert_allclose(
        np.diff(image, 2, axis=0)[[0, 1, 2, 4, 5, 6, 8, 9, 10]], 0, atol=1e-12
    )
    assert np.abs(np.diff(image, 2, axis=0)[[3, 7]]).max() > 0.01
    assert image.min() >= 0 and image.max() <= 1


def test_a_seed_decides_and_a_longer_set_begins_with_the_shorter(images):
    np.testing.assert_array_equal(procedural.draw(1050, SHAPE), images[:1050])
    other = procedural.draw(30, SHAPE, seed=1)
    assert all((a != b).any() for a, b in zip(other, images, strict=False))
    # A second thousand is no copy of the first.
    assert all((a != b).any() for a, b in zip(images[1000:], images, strict=False))


def test_no_image_is_another_nor_empty(images):
    assert len({image.tobytes() for image in images}) == len(images)
    assert all(np.unique(image).size > 1 for image in images)
    assert images.min() == 0 and images.max() == 255


def test_half_of_the_images_are_cut_to_an_outline_on_black(images):
    corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1], 0]
    # Kinds take turns within a thousand, and so do, within a kind, outlined and whole images.
    place = np.arange(len(images)) % 1000
    kinds, cut = place % 3, (place // 3) % 2 == 0
    for kind in range(3):
        black = (corners[kinds == kind] == 0).all(axis=1)
        assert black[cut[kinds == kind]].all()
        assert black[~cut[kinds == kind]].mean() < 0.2
    outlined = images[cut, 14, 14, 0]
    assert (outlined > 0).mean() > 0.8  # the middle is inside


def test_kinds_take_turns(images):
    full = images[1000:][3:6]  # the second of each kind of a thousand: without an outline
    leaves, grating, marble = full[..., 0]
    # Dead leaves have flat regions, a grating has next to none, marble has few gray levels.
    flat = lambda image: (np.diff(image.astype(int), axis=1) == 0).mean()
    assert flat(leaves) > 0.5 > flat(grating)
    assert np.unique(marble).size <= 6 < np.unique(grating).size
    by_kind = [images[k:1000:3] for k in range(3)]
    levels = [np.median([np.unique(image).size for image in kind]) for kind in by_kind]
    assert levels[2] <= 7 and levels[1] > 100 and levels[2] < levels[0] < levels[1]


def test_outlines_are_closed_curves_around_the_middle():
    masks = procedural.outlines(np.random.default_rng(0), 200, 28)
    assert masks.shape == (200, 28, 28) and set(np.unique(masks)) == {0, 1}
    assert masks[:, [0, 0, -1, -1], [0, -1, 0, -1]].max() == 0
    assert 0.1 < masks.mean() < 0.5
    # Along a ray from the middle the inside comes first: the curve is a function of the angle.
    row = masks[:, 14, 14:]
    assert (np.diff(row, axis=1) <= 0).all()


@pytest.mark.parametrize("kind", [procedural.dead_leaves, procedural.gratings, procedural.marble])
def test_every_kind_lies_in_the_unit_interval(kind):
    images = kind(np.random.default_rng(0), 50, 20)
    assert images.shape == (50, 20, 20)
    assert 0 <= images.min() < 0.2 and 0.8 < images.max() <= 1
    assert (images.std(axis=(1, 2)) > 0).mean() > 0.95
