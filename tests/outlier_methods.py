"""The methods without a teacher that train on outliers or directions, on a tiny batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers import CLASSES, Net, standard_like

from oal_jax.methods import logitnorm, npos, outlier_exposure, vos, woods

ROWS, WIDTH, IMAGE = 16, 8, (12, 12, 1)
NET = Net(feature_width=WIDTH)

NPOS = {"queue_size": 6, "neighbour": 3, "boundary_points": 4, "anchors": 2, "candidates": 10}
BUILD = {
    "oe": (outlier_exposure.exposure, {}),
    "energy": (outlier_exposure.energy, {"margin_in": -6.0, "margin_out": -1.0}),
    "vos": (vos.virtual_outliers, {"queue_size": 6, "samples": 50, "per_class": 2}),
    "npos": (npos.boundary_outliers, NPOS | {"per_anchor": 3, "contrastive_weight": 0.1}),
    "logitnorm": (logitnorm.normalised_cross_entropy, {}),
    "woods": (woods.wild_mixture, {}),
}
# Numbers that a test may change without another compilation: they are traced. `factor` and `shift`
# make the transform of the cross-entropy.
TRACED = {
    "oe": {"weight": 0.5},
    "energy": {"weight": 0.1},
    "vos": {"weight": 0.1, "start_step": 0, "refresh": 1},
    "npos": {"weight": 0.1, "start_step": 0, "refresh": 1},
    "logitnorm": {"temperature": 0.5},
    "woods": {"epoch_steps": 3, "ce_limit": 0.5, "multiplier_rate": 1.0, "wild_weight": 1.0},
}


def make_method(name, factor=1.0, shift=0.0, **options):
    build, fixed = BUILD[name]
    transform = lambda ce: factor * ce + shift
    return build(NET, IMAGE, **fixed | TRACED[name] | options, ce_transform=transform)


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(ROWS) % CLASSES
    others = rng.uniform(size=(2 * ROWS, *IMAGE)) * rng.uniform(0.2, 2, size=(2 * ROWS, 1, 1, 1))
    batch = {
        "image": 0.3 * rng.uniform(size=(ROWS, *IMAGE)) + labels[:, None, None, None] / 4,
        "outlier_image": others[:ROWS],
        "wild_image": others[ROWS:],
    }
    batch = {k: jnp.asarray(v, jnp.float32) for k, v in batch.items()}
    return batch | {"label": jnp.asarray(labels, jnp.int32)}


@functools.cache
def fixed_variables(name):
    """The student's parameters and statistics from NumPy's generator; the rest as it starts."""
    params, state = jax.jit(make_method(name).init)(jax.random.key(0))
    student = standard_like({"params": params["student"], "state": state["student"]})
    return params | {"student": student["params"]}, state | {"student": student["state"]}


def loss_and_gradient(name, options, params, model_state, batch, step, key):
    (value, (state, metrics)), grads = jax.value_and_grad(
        make_method(name, **options).loss, has_aux=True
    )(params, model_state, batch, step, key)
    return grads, state, metrics | {"loss": value}


@functools.cache
def compiled(name):
    return jax.jit(functools.partial(loss_and_gradient, name))


def gradients(name, batch=None, params=None, state=None, step=0, key=0, **options):
    """Gradient, new state and metrics of one batch."""
    fixed, fixed_state = fixed_variables(name)
    every = {"factor": 1.0, "shift": 0.0} | TRACED[name] | options
    batch = make_batch() if batch is None else batch
    state = fixed_state if state is None else state
    arguments = (params or fixed, state, batch, jnp.int32(step), jax.random.key(key))
    return jax.tree.map(np.asarray, compiled(name)(every, *arguments))


@functools.cache
def warm_state(name):
    """The state after two batches, when all queues are full."""
    state = fixed_variables(name)[1]
    for step in range(2):
        _, state, _ = gradients(name, make_batch(step), state=state, step=step)
    return state
