"""Augmentation: the content of a view, exactly, and what it depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oal_jax.data.augment import augment
from oal_jax.runtime import keys
from oal_jax.runtime.ops import to_unit

KEY = jax.random.key(3)


def images(count=6, size=(8, 10), channels=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(1, 256, (count, *size, channels), dtype=np.uint8)


jitted = jax.jit(augment, static_argnames=("shift", "flip"))


def draw(batch, indices, views, shift=2, flip=True, key=KEY):
    indices, views = np.asarray(indices, np.int32), np.asarray(views, np.int32)
    return np.asarray(jitted(key, batch, indices, views, shift=shift, flip=flip))


def every_view(image, shift, flip):
    """All images that may come of one, by (row, column, flipped)."""
    h, w, _ = image.shape
    padded = np.zeros((h + 2 * shift, w + 2 * shift, image.shape[2]), np.uint8)
    padded[shift : shift + h, shift : shift + w] = image
    for dy in range(2 * shift + 1):
        for dx in range(2 * shift + 1):
            moved = padded[dy : dy + h, dx : dx + w]
            yield (dy, dx, False), moved
            if flip:
                yield (dy, dx, True), moved[:, ::-1]


@pytest.mark.parametrize("flip", [False, True])
def test_a_view_is_a_shift_and_a_flip_of_the_image_and_all_of_them_occur(flip):
    image, shift, count = images(1)[0], 1, 900
    views = draw(np.stack([image] * count), np.arange(count), np.zeros(count, int), shift, flip)
    views = np.round(views * 255).astype(np.uint8)
    table = {v.tobytes(): k for k, v in every_view(image, shift, flip)}
    assert len(table) == (18 if flip else 9)
    seen = [table[view.tobytes()] for view in views]  # a KeyError: not a shift of the image
    frequency = np.array([seen.count(k) for k in table.values()]) * len(table) / count
    assert frequency.min() > 0.4 and frequency.max() < 1.8


def test_bytes_become_float32_between_zero_and_one():
    whole = to_unit(jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1))
    assert whole.dtype == jnp.float32
    np.testing.assert_allclose(np.ravel(whole), np.arange(256) / 255, rtol=1e-6)
    # Rounded back to bytes nothing is lost: the teacher's cached views rely on it.
    np.testing.assert_array_equal(jnp.round(np.ravel(whole) * 255), np.arange(256))
    views = draw(images(), np.arange(6), np.zeros(6, int))
    assert views.dtype == np.float32 and views.min() >= 0 and views.max() <= 1


def test_without_shift_and_flip_nothing_changes():
    batch = images()
    views = draw(batch, np.arange(6), np.arange(6), shift=0, flip=False)
    np.testing.assert_array_equal(views, to_unit(jnp.asarray(batch)))


def test_a_view_does_not_depend_on_the_batch_or_its_order():
    batch, indices, views = images(), np.array([7, 3, 1000, 4, 0, 9]), np.array([0, 1, 2, 0, 1, 2])
    whole = draw(batch, indices, views)
    order = np.array([5, 0, 3])
    np.testing.assert_array_equal(draw(batch[order], indices[order], views[order]), whole[order])


@pytest.mark.parametrize("changed", ["key", "index", "view"])
def test_another_key_index_or_view_gives_another_image(changed):
    batch = np.stack([images(1)[0]] * 40)
    indices, views, key = np.arange(40), np.zeros(40, int), KEY
    first = draw(batch, indices, views, key=key)
    if changed == "key":
        key = jax.random.key(4)
    elif changed == "index":
        indices = indices + 100
    else:
        views = views + 1
    differ = (draw(batch, indices, views, key=key) != first).any(axis=(1, 2, 3))
    assert differ.mean() > 0.85  # 1 of 50 views is drawn again by chance


def test_keys_depend_on_name_and_step_alone_and_never_collide():
    root = jax.random.key(0)
    draws = {
        jax.random.key_data(keys.at_step(root, name, step)).tobytes()
        for name in ("step", "order", "views")
        for step in range(20)
    }
    assert len(draws) == 60
    traced = jax.jit(lambda step: keys.at_step(root, "step", step))(jnp.array(7))
    assert traced == keys.at_step(root, "step", 7)
