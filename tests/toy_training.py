"""A small training for the tests of the loop: noisy linear regression with momentum."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from oal_jax.runtime.keys import at_step
from oal_jax.training import loop

KEY = jax.random.key(3)
PLAN = loop.Plan(examples=30, batch_size=4, epochs=4, log_every=3)  # 7 steps an epoch


@flax.struct.dataclass
class State:
    step: Any
    params: Any
    model_state: Any
    opt_state: Any


def fresh():
    return State(
        step=jnp.zeros((), jnp.int32),
        params={"w": jnp.ones((5,)), "b": jnp.zeros(())},
        model_state={"mean": jnp.zeros((5,))},
        opt_state={"w": jnp.zeros((5,)), "b": jnp.zeros(())},
    )


def train_step(state, batch):
    """Noisy linear regression with momentum and a running mean."""

    def loss_of(params):
        noise = 0.1 * jax.random.normal(at_step(KEY, "noise", state.step), batch["x"].shape)
        error = (batch["x"] + noise) @ params["w"] + params["b"] - batch["y"]
        return jnp.mean(error**2)

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state.opt_state, grads)
    params = jax.tree.map(lambda p, m: p - 0.02 * m, state.params, momentum)
    mean = 0.9 * state.model_state["mean"] + 0.1 * jnp.mean(batch["x"], axis=0)
    drawn = batch["index"].astype(jnp.float32) @ jnp.array([1.0, 32.0, 32.0**2, 32.0**3])
    metrics = {"loss": loss, "drawn": drawn}
    return State(state.step + 1, params, {"mean": mean}, momentum), metrics


def arrays():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(PLAN.examples, 5)).astype(np.float32)
    return {"x": x, "y": x @ np.arange(5, dtype=np.float32)}


def make_batch(arrays, indices, epoch, step):
    del epoch, step
    return {"x": arrays["x"][indices], "y": arrays["y"][indices], "index": indices}


def evaluate(state):
    return {"val": float(jnp.sum(state.params["w"]))}
