"""A small training for the tests of the loop: noisy linear regression with momentum."""

import json
from pathlib import Path
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from oal_jax.runtime.keys import at_step
from oal_jax.training import log, loop
from oal_jax.training.checkpoints import Checkpoints

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


def mesh_of_one():
    types = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((1,), ("data",), types, devices=jax.devices()[:1])


def fit(
    directory=None,
    *,
    step=train_step,
    held=None,
    draw=make_batch,
    plan=PLAN,
    metrics_log=None,
    **more,
):
    """`loop.fit` as a stage calls it: resumes from `directory`, logs there."""
    mesh, held = mesh_of_one(), held or arrays()
    if directory is None:
        return loop.fit(step, fresh(), held, draw, plan, key=KEY, mesh=mesh, name="tiny", **more)
    checkpoints = Checkpoints(Path(directory) / "checkpoints")
    try:
        state = checkpoints.restore(fresh()) or fresh()
        metrics_log = (metrics_log or log.MetricsLog)(Path(directory), "train", int(state.step))
        try:
            return loop.fit(
                *(step, state, held, draw, plan),
                **{"key": KEY, "mesh": mesh, "name": "tiny", "evaluate": evaluate, **more},
                log=metrics_log,
                checkpoints=checkpoints,
            )
        finally:
            metrics_log.close()
    finally:
        checkpoints.close()


def rows(directory):
    lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same(directory, state, straight):
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(straight[0]))
    assert rows(directory) == straight[1]


def latest(directory):
    """Newest checkpoint by the names of the directories alone."""
    found = (directory / "checkpoints").glob("[0-9]*")
    return max((int(p.name) for p in found if p.name.isdigit()), default=0)
