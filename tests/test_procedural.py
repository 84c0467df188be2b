"""The drawn outlier images: sizes, what a seed decides, what the pictures have in common."""

import numpy as np
import pytest

from oal_jax.data import procedural, sources


@pytest.fixture(scope="module")
def images():
    """More than are drawn at a time."""
    return procedural.draw(1200, 28)


@pytest.mark.parametrize(("count", "size"), [(0, 28), (1, 12), (7, 33)])
def test_shape_and_type(count, size):
    drawn = procedural.draw(count, size)
    assert drawn.shape == (count, size, size, 1) and drawn.dtype == np.uint8


def test_a_seed_decides_and_a_longer_set_begins_with_the_shorter(images):
    np.testing.assert_array_equal(procedural.draw(1050, 28), images[:1050])
    other = procedural.draw(30, 28, seed=1)
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
    drawn = kind(np.random.default_rng(0), 50, 20)
    assert drawn.shape == (50, 20, 20)
    assert 0 <= drawn.min() < 0.2 and 0.8 < drawn.max() <= 1
    assert (drawn.std(axis=(1, 2)) > 0).mean() > 0.95


def test_as_an_image_set():
    found = sources.load("bundled", procedural.NAME, "train", limit=40)
    np.testing.assert_array_equal(found.images, procedural.draw(40, procedural.SIZE))
    assert found.class_names == ("outlier",) and not found.labels.any()
    again = sources.load("bundled", procedural.NAME, "validation", limit=40)
    np.testing.assert_array_equal(again.images, found.images)  # every split is the same
