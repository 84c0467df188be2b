"""Trainers of the small Stable Diffusion: a few steps lower the loss on their batch."""

import jax
import numpy as np
import pytest
from small_stable_diffusion import write_tiny

from oal_jax.generator import conditioning, training
from oal_jax.generator import stable_diffusion as stable


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return stable.build(write_tiny(tmp_path_factory.mktemp("tiny")))


def after_steps(trainer, batch, count):
    """The states before and after `count` steps, and the loss of each for the draws of step 0."""
    init, step = trainer
    # This generator compiles fast: an init draws arrays of a hundred shapes.
    first, step = jax.jit(init)(jax.random.key(0, impl="unsafe_rbg")), jax.jit(step)
    state = first
    for _ in range(count):
        state, _ = step(state, batch)
    losses = [step(s.replace(step=first.step), batch)[1]["loss"] for s in (first, state)]
    return first, state, losses


def test_autoencoder(sd):
    images = np.zeros((4, 14, 14, 1), np.float32)
    images[:, 4:10, 4:10] = 1.0
    trainer = training.make_vae_trainer(sd, jax.random.key(0), steps=9, learning_rate=1e-2)
    first, state, (before, after) = after_steps(trainer, {"image": images}, 4)
    assert int(state.step) == 4 and state.ema_params is None
    assert after < 0.9 * before


def test_diffusion(sd):
    ids, _, empty = conditioning.class_tokens(sd, ("cat", "dog"))
    batch = {
        "latent": np.tile(np.float32([1, -1])[:, None, None, None], (4, *sd.latent_shape)),
        "label": np.tile(np.int32([0, 1]), 4),
    }
    trainer = training.make_diffusion_trainer(sd, jax.random.key(0), ids, empty[0], steps=9)
    first, state, (before, after) = after_steps(trainer, batch, 4)
    assert int(state.step) == 4 and set(state.ema_params) == {"text_encoder", "unet"}
    assert after < 0.9 * before
    # The average: decay (1 + n) / (10 + n) in step n. No step moves it past the parameters.
    one = jax.jit(trainer[1])(first, batch)[0]
    mean = jax.tree.map(lambda a, b: 0.1 * a + 0.9 * b, first.params, one.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one.ema_params, mean)


def test_velocities_are_refused(sd):
    velocities = sd._replace(schedule=sd.schedule._replace(prediction_type="v_prediction"))
    with pytest.raises(ValueError, match="noise"):
        training.make_diffusion_trainer(
            velocities, jax.random.key(0), np.zeros((1, 16)), np.zeros(16)
        )
