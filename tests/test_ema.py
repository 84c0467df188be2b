"""The moving average of weights and batch statistics: its values, resumption, what is saved."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import refusal

from oal_jax.config import Config
from oal_jax.methods.base import Method, unchanged
from oal_jax.runtime import artifacts, distributed
from oal_jax.stages import run as pipeline
from oal_jax.training import loop, session
from oal_jax.training.state import averaged, init_state, make_train_step, with_average

KEY = jax.random.key(5)
PLAN = loop.Plan(examples=40, batch_size=8, epochs=3, log_every=2)  # 15 steps
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
DECAY = 0.5  # reached at step 8


def tiny() -> Method:
    """Linear regression with a running mean, a step counter in it, and a queue of the method."""

    def init(key):
        params = {"student": {"w": jax.random.normal(key, (3,))}}
        statistics = {"batch_stats": {"mean": jnp.zeros(3), "count": jnp.zeros((), jnp.int32)}}
        return params, {"student": statistics, "queue": {"last": jnp.zeros(3)}}

    def loss(params, model_state, batch, step, key):
        del step, key
        error = batch["x"] @ params["student"]["w"] - batch["y"]
        before = model_state["student"]["batch_stats"]
        mean = 0.9 * before["mean"] + 0.1 * jnp.mean(batch["x"], axis=0)
        statistics = {"batch_stats": {"mean": mean, "count": before["count"] + 1}}
        new = {"student": statistics, "queue": {"last": batch["x"][0]}}
        return jnp.mean(error**2), (new, {})

    return Method(init, loss, unchanged)


def arrays():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(PLAN.examples, 3)).astype(np.float32)
    return {"x": x, "y": x @ np.float32([1, -2, 3])}


def batches():
    held = arrays()
    rows = np.random.default_rng(1).integers(0, PLAN.examples, (PLAN.steps, 8))
    return [{name: value[r] for name, value in held.items()} for r in rows]


def trajectory(ema: float):
    """The states after 0, 1, ... steps."""
    method = tiny()
    step = jax.jit(make_train_step(method, OPTIMIZER, KEY, ema=ema))
    state = init_state(method, OPTIMIZER, KEY)
    states = [with_average(state) if ema else state]
    for batch in batches():
        states.append(step(states[-1], batch)[0])
    return states


def test_the_average_is_that_of_the_steps_with_the_warm_start():
    states = trajectory(DECAY)
    # Weights of every state by unrolling the recursion, in float64.
    decays = [min(DECAY, (1 + t) / (10 + t)) for t in range(PLAN.steps)]
    weights = [np.prod(decays)]
    weights += [(1 - d) * np.prod(decays[t + 1 :]) for t, d in enumerate(decays)]
    assert np.sum(weights) == pytest.approx(1)
    for of in (
        lambda s: (s.params["student"]["w"], averaged(s).params["student"]["w"]),
        lambda s: (
            s.model_state["student"]["batch_stats"]["mean"],
            averaged(s).model_state["student"]["batch_stats"]["mean"],
        ),
    ):
        raw = np.stack([np.float64(of(s)[0]) for s in states])
        np.testing.assert_allclose(of(states[-1])[1], weights @ raw, rtol=2e-6, atol=1e-6)
    # The start has next to no weight: a short run is not pulled to random weights.
    assert weights[0] < 1e-6


def test_what_is_no_average_is_the_last():
    last = trajectory(DECAY)[-1]
    state = averaged(last)
    assert int(state.model_state["student"]["batch_stats"]["count"]) == PLAN.steps
    np.testing.assert_array_equal(state.model_state["queue"]["last"], batches()[-1]["x"][0])
    assert set(last.average["model_state"]) == {"student"}


def test_the_training_itself_is_the_same_bit_for_bit():
    with_it, without = trajectory(DECAY)[-1], trajectory(0.0)[-1]
    for name in ("params", "model_state", "opt_state"):
        leaves = [jax.tree.leaves(getattr(state, name)) for state in (with_it, without)]
        for a, b in zip(*leaves, strict=True):
            np.testing.assert_array_equal(a, b)


def test_without_it_the_state_has_no_further_tree():
    state = init_state(tiny(), OPTIMIZER, KEY)
    assert state.average is None and averaged(state) is state
    step = jax.jit(make_train_step(tiny(), OPTIMIZER, KEY, ema=DECAY))
    assert jax.tree.structure(step(state, batches()[0])[0]) == jax.tree.structure(state)


class Stopped(Exception):
    pass


def fit(directory: Path, ema: float, until: int = 99):
    """`session.train`, as stage `train` calls it; raises at the end of epoch `until`."""
    method, mesh = tiny(), distributed.make_mesh()
    fresh = init_state(method, OPTIMIZER, KEY, mesh)
    weights = []

    def evaluate(state):
        weights.append(averaged(state).params["student"]["w"])
        if len(weights) > until:
            raise Stopped
        return {"w": float(weights[-1][0])}

    state = session.train(
        make_train_step(method, OPTIMIZER, KEY, ema=ema),
        with_average(fresh) if ema else fresh,
        arrays(),
        lambda held, rows, epoch, step: {k: v[rows] for k, v in held.items()},
        PLAN,
        workdir=directory,
        directory=directory / "checkpoints",
        name="tiny",
        evaluate=evaluate,
        key=KEY,
        mesh=mesh,
    )
    return state


@pytest.mark.parametrize("ema", [0.0, DECAY])
def test_a_resumed_run_has_the_same_average_bit_for_bit(tmp_path, ema):
    straight = fit(tmp_path / "straight", ema)
    with pytest.raises(Stopped):
        fit(tmp_path / "stopped", ema, until=1)
    resumed = fit(tmp_path / "stopped", ema)
    leaves = [jax.tree.leaves(s) for s in (straight, resumed)]
    assert len(leaves[0]) == len(leaves[1]) == (9 if ema else 6)
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_array_equal(a, b)


def test_it_is_a_share_below_one(tmp_path):
    config = Config()
    config.train.ema = 1.0
    assert "train.ema=1.0" in refusal(pipeline.run, config, tmp_path / "run")


@pytest.mark.slow
def test_the_saved_student_is_the_average(tmp_path, monkeypatch):
    """The average in the last checkpoint of the same training, not its last weights."""
    states = []
    real = session.train

    def train(*args, **kwargs):
        states.append(real(*args, **kwargs))
        return states[-1]

    monkeypatch.setattr(session, "train", train)
    tensors = []
    for ema in (0.0, 0.9):
        config = Config(smoke=True)
        config.method.name, config.train.ema = "ce", ema
        run = pipeline.run(config, tmp_path / str(ema), only="train")
        tensors.append(artifacts.read_tensors(run / "train" / "student.safetensors"))
    raw, saved = tensors
    assert raw.keys() == saved.keys()
    name = "params.student.fc.kernel"
    assert np.abs(raw[name] - saved[name]).max() > 1e-4
    for state, file, of in zip(states, tensors, (lambda s: s, averaged), strict=True):
        np.testing.assert_array_equal(of(state).params["student"]["fc"]["kernel"], file[name])
    np.testing.assert_array_equal(states[1].params["student"]["fc"]["kernel"], raw[name])
