"""Method oal with outlier images: energies, gradients, and whose statistics normalise them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from helpers import CLASSES, Net, assert_trees_close, difference, norm, numpy_net, standard_like

from oal_jax.methods import oal

IMAGE, TEACHER, ROWS = (6, 6, 1), 6, 8
NET = Net()


def method(images):
    return oal.energy(
        NET,
        IMAGE,
        TEACHER,
        None,
        logit_weight=1.0,
        feature_weight=1.0,
        energy_weight=0.5,
        latent_projector_weight=0.05,
        ramp_steps=(-2.0, -1.0),
        feature_outliers=False,
        image_outliers=images,
    )


def batch(seed=0):
    rng = np.random.default_rng(seed)
    arrays = {
        "outlier_image": rng.uniform(size=(ROWS // 2, *IMAGE)),
        "image": np.random.default_rng(9).uniform(size=(ROWS, *IMAGE)),
        "teacher_logits": np.random.default_rng(7).normal(size=(ROWS, CLASSES)),
        "teacher_features": np.random.default_rng(8).normal(size=(ROWS, TEACHER)),
    }
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in arrays.items()}
    return arrays | {"label": jnp.arange(ROWS, dtype=jnp.int32) % CLASSES}


@functools.cache
def variables():
    return standard_like(jax.eval_shape(method(True).init, jax.random.key(0)))


@functools.cache
def compiled(images):
    return jax.jit(jax.grad(method(images).loss, has_aux=True))


def gradients(images, data):
    """(gradient, (model_state, metrics)) at step 0."""
    return compiled(images)(*variables(), data, jnp.zeros((), jnp.int32), jax.random.key(1))


def test_energies_are_of_images_normalised_by_the_id_images():
    data = batch()
    params, _ = variables()
    _, (_, metrics) = gradients(True, data)
    (logits, _), (outlier_logits, _) = numpy_net(params, data["image"], data["outlier_image"])
    neg_energies = [scipy.special.logsumexp(z, axis=1) for z in (logits, outlier_logits)]
    assert metrics["id_neg_energy"] == pytest.approx(neg_energies[0].mean(), rel=1e-4)
    assert metrics["outlier_neg_energy_image"] == pytest.approx(neg_energies[1].mean(), rel=1e-4)
    slope = np.log1p(np.exp(params["energy"]["scale"]))
    offset = params["energy"]["offset"]
    expected = np.log1p(np.exp(-(slope * neg_energies[0] + offset))).mean()
    expected += np.log1p(np.exp(slope * neg_energies[1] + offset)).mean()
    assert metrics["energy_image"] == pytest.approx(expected, rel=1e-4)


def test_outlier_images_train_the_whole_student_and_move_no_statistics():
    one, other = (gradients(True, batch(seed)) for seed in (0, 1))
    change = difference(one[0], other[0])
    for layer in ("conv", "bn", "fc"):
        assert norm(change["student"][layer]) > 1e-4
    assert norm(change["projector"]) < 1e-5
    _, (without, _) = gradients(False, batch())
    for state in (one[1][0], other[1][0]):
        assert_trees_close(state["student"], without["student"], rtol=1e-5, atol=1e-6)
