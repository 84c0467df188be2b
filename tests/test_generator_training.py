"""Trainers of the small Stable Diffusion: a few steps lower the loss on their batch."""

import jax
import numpy as np
import pytest
from small_stable_diffusion import tiny

from oal_jax.generator import conditioning, training


def after_steps(trainer, batch, count):
    """The states after 0 to `count` steps; first and last loss, both for the draws of step 0."""
    init, step = trainer
    # This generator compiles fast: an init draws arrays of a hundred shapes.
    states, step = [jax.jit(init)(jax.random.key(0, impl="unsafe_rbg"))], jax.jit(step)
    for _ in range(count):
        states.append(step(states[-1], batch)[0])
    ends = states[0], states[-1].replace(step=states[0].step)
    return states, [step(state, batch)[1]["loss"] for state in ends]


@pytest.mark.slow
def test_autoencoder():
    sd, _ = tiny()
    images = np.zeros((4, 14, 14, 1), np.float32)
    images[:, 4:10, 4:10] = 1.0
    trainer = training.make_vae_trainer(sd, jax.random.key(0), steps=9, learning_rate=1e-2)
    states, (before, after) = after_steps(trainer, {"image": images}, 4)
    assert int(states[-1].step) == 4 and states[-1].ema_params is None
    assert after < 0.9 * before


@pytest.mark.slow
def test_diffusion():
    sd, _ = tiny()
    ids, _, empty = conditioning.class_tokens(sd, ("cat", "dog"))
    batch = {
        "latent": np.tile(np.float32([1, -1])[:, None, None, None], (4, *sd.latent_shape)),
        "label": np.tile(np.int32([0, 1]), 4),
    }
    trainer = training.make_diffusion_trainer(sd, jax.random.key(0), ids, empty[0], steps=9)
    states, (before, after) = after_steps(trainer, batch, 4)
    assert int(states[-1].step) == 4 and set(states[-1].ema_params) == {"text_encoder", "unet"}
    assert after < 0.9 * before
    # The average: decay (1 + n) / (10 + n) in step n; here n = 1.
    decay, (_, before, after) = 2 / 11, states[:3]
    for average, old, new in zip(
        *map(jax.tree.leaves, (after.ema_params, before.ema_params, after.params)), strict=True
    ):
        np.testing.assert_allclose(average, decay * old + (1 - decay) * new, atol=1e-6)


def test_velocities_are_refused():
    sd, _ = tiny()
    velocities = sd._replace(schedule=sd.schedule._replace(prediction_type="v_prediction"))
    with pytest.raises(ValueError, match="noise"):
        training.make_diffusion_trainer(
            velocities, jax.random.key(0), np.zeros((1, 16)), np.zeros(16)
        )
