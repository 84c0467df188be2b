"""The state of a training run, and the step that every method shares."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from oal_jax.keys import at_step
from oal_jax.methods.base import Batch, Method, Metrics


@flax.struct.dataclass
class TrainState:
    """All that a step needs beside its batch. No random key: keys come from the step number."""

    step: Int[Array, ""]
    params: dict[str, Any]  # a group of the method (student, projector, ...) to its parameters
    model_state: dict[str, Any]  # the same groups to their batch statistics
    opt_state: optax.OptState


def init_state(
    method: Method, optimizer: optax.GradientTransformation, key: Key[Array, ""]
) -> TrainState:
    """Fresh parameters of every group of the method, at step 0; compiled as one program."""

    def init(key):
        params, model_state = method.init(key)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            model_state=model_state,
            opt_state=optimizer.init(params),
        )

    return jax.jit(init, compiler_options=_quick_compilation())(key)


def _quick_compilation() -> dict[str, Any] | None:
    """Options for a program that runs once: on CPU its compilation is most of its cost.

    The bits of the result are the same; compiling a ResNet-18's takes 2.8 s instead of 6.9.
    """
    if jax.default_backend() != "cpu":
        return None
    return {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": True}


def make_train_step(
    method: Method, optimizer: optax.GradientTransformation, key: Key[Array, ""]
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The pure step of a method: gradient of its loss, one optimizer update.

    Jit, donation and sharding are applied by the loop.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        gradient = jax.value_and_grad(method.loss, has_aux=True)
        step_key = at_step(key, "step", state.step)
        (loss, (model_state, metrics)), grads = gradient(
            state.params, state.model_state, batch, state.step, step_key
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = metrics | {
            "loss": loss,
            "gradient_norm": optax.tree.norm(grads),
            # Read by the guard: finite only if every parameter after the update is.
            "parameter_norm": optax.tree.norm(params),
        }
        return TrainState(state.step + 1, params, model_state, opt_state), metrics

    return train_step
