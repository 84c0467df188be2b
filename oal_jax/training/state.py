"""The state of a training run, and the training step of every method."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from oal_jax.errors import UserError
from oal_jax.methods.base import Batch, Groups, Method, Metrics
from oal_jax.runtime import distributed
from oal_jax.runtime.keys import at_step


@flax.struct.dataclass
class TrainState:
    """Everything that a step reads beside its batch. Random keys follow from the step number."""

    step: Int[Array, ""]
    params: dict[str, Any]  # parameters of each group of the method (student, projector, ...)
    model_state: dict[str, Any]  # batch statistics of each group
    opt_state: optax.OptState
    # Moving averages of both, {"params", "model_state"}; None without `train.ema`.
    average: dict[str, Any] | None = None


def init_state(
    method: Method,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    mesh: Mesh | None = None,
) -> TrainState:
    """Fresh state of the method at step 0, compiled as one program.

    With a mesh each device initialises its own shards alone.
    """
    init = partial(fresh_state, method, optimizer)
    options = {"compiler_options": _quick_compilation()}
    if mesh is None:
        return jax.jit(init, **options)(key)
    return distributed.init_parameters(init, key, mesh, **options)


def fresh_state(
    method: Method, optimizer: optax.GradientTransformation, key: Key[Array, ""]
) -> TrainState:
    """The state of `init_state`, without compilation; for `jax.eval_shape`."""
    params, model_state = method.init(key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=optimizer.init(params),
    )


def _quick_compilation() -> dict[str, Any] | None:
    """Compiler options of a program that runs once, where compiling is most of the cost on CPU.

    The result has the same bits. A ResNet-18 compiles in 2.8 s instead of 6.9.
    """
    if jax.default_backend() != "cpu":
        return None
    return {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": True}


def make_train_step(
    method: Method,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    accumulate: int = 1,
    unroll: bool | None = None,
    ema: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The pure step of a method: gradient of its loss, one optimizer update.

    With `accumulate` > 1 the gradient is the mean over microbatches, which pass one after another.
    So the activations of one are in memory at a time:
    - The loss must be a mean over examples; `methods.registry.check` refuses the others.
    - Batch statistics are those of a microbatch, and the running ones move once per microbatch.
    - Metrics are means over the microbatches; `gradient_norm` is that of the mean gradient.
    - Random draws (virtual outliers, dropout) are independent in each microbatch, and queues take
      the microbatches in turn.

    The loop applies jit, donation and sharding.

    Args:
      method: its loss and parameters.
      optimizer: updates all groups.
      key: root key of the steps' draws.
      accumulate: microbatches. Row i of an array is in microbatch i % accumulate, so each stays
        split over the devices as the batch is, and no row moves between them.
      unroll: compile the microbatches as copies of one program instead of a `lax.scan`. None: on
        CPU, where the gradient of a convolution inside a scan is about a hundred times slower.
      ema: decay of the moving average of a state made by `with_average`.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        step_key = at_step(key, "step", state.step)
        if accumulate == 1:
            gradient = jax.value_and_grad(method.loss, has_aux=True)
            (loss, (model_state, metrics)), grads = gradient(
                state.params, state.model_state, batch, state.step, step_key
            )
        else:
            unrolled = jax.default_backend() == "cpu" if unroll is None else unroll
            loss, model_state, metrics, grads = _accumulated(
                method, state, split(batch, accumulate), step_key, unrolled
            )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = metrics | {
            "loss": loss,
            "gradient_norm": optax.tree.norm(grads),
            # The loop stops when it is not finite: then some parameter is not.
            "parameter_norm": optax.tree.norm(params),
        }
        average = state.average
        if average is not None:
            average = _moved(average, _averaged_of(params, model_state), state.step, ema)
        return TrainState(state.step + 1, params, model_state, opt_state, average), metrics

    return train_step


def with_average(state: TrainState) -> TrainState:
    """The state with moving averages of its parameters and batch statistics."""
    # Copies: a step donates the memory of the originals.
    copied = jax.tree.map(jnp.copy, _averaged_of(state.params, state.model_state))
    return state.replace(average=copied)


def averaged(state: TrainState) -> TrainState:
    """The state to evaluate and save: its moving averages in place of the originals, if any."""
    if state.average is None:
        return state
    params, model_state = state.average["params"], state.average["model_state"]
    return state.replace(params=params, model_state=state.model_state | model_state)


def _averaged_of(params: Groups, model_state: Groups) -> dict[str, Any]:
    # Other groups of the model's state are queues and multipliers of a method.
    statistics = {group: s for group, s in model_state.items() if group in params}
    return {"params": params, "model_state": statistics}


def _moved(average: Any, new: Any, step: Int[Array, ""], decay: float) -> Any:
    """The average after update number `step`, counted from 0.

    The decay is min(decay, (1 + step) / (10 + step)), as in TensorFlow's ExponentialMovingAverage
    with `num_updates`. So the average of a short training is over about its last tenth, and its
    initial weights do not count. Weights and batch statistics are averaged alike.
    """
    warm_decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))

    def one(old, latest):
        if not jnp.issubdtype(latest.dtype, jnp.inexact):
            return latest
        return old + (1.0 - warm_decay).astype(latest.dtype) * (latest - old)

    return jax.tree.map(one, average, new)


def compiler_options(platform: str) -> dict[str, Any] | None:
    """Compiler options of a step on a platform ("cpu", "gpu", "tpu").

    XLA's CPU compiler drops optimization barriers before it schedules the operations. Then all
    microbatches, and all activations that `remat` recomputes, are in memory at once. The option
    keeps the barriers. It changes no program without them.
    """
    return {"xla_disable_hlo_passes": "cse_barrier_expander"} if platform == "cpu" else None


def check_split(name: str, batch_size: int, accumulate: int, devices: int) -> None:
    """Raise `UserError` if the microbatches of a batch can't be split evenly over the devices."""
    parts = accumulate * devices
    if batch_size % parts:
        raise UserError(
            f"config {name}={batch_size} is not divisible by train.accumulate={accumulate} times"
            f" the {devices} devices; use for example {max(1, batch_size // parts) * parts}"
        )


def split(batch: Batch, count: int) -> Batch:
    """Every array (B, ...) as (count, B / count, ...): row i is in microbatch i % count.

    A device that holds a contiguous piece of the batch keeps its rows: the reshape leaves the axis
    that is split over the devices in front, and the new axis moves before it afterwards.
    """

    def one(array):
        rows = array.reshape(-1, count, *array.shape[1:])
        return jnp.moveaxis(rows, 1, 0)

    return jax.tree.map(one, batch)


def _accumulated(
    method: Method, state: TrainState, microbatches: Batch, key: Key[Array, ""], unroll: bool
) -> tuple[Float[Array, ""], Groups, Metrics, Groups]:
    """(loss, model_state, metrics, gradient) as means over the microbatches, one after another."""
    count = jax.tree.leaves(microbatches)[0].shape[0]
    gradient = jax.value_and_grad(method.loss, has_aux=True)

    def learn(carry, microbatch, i):
        model_state, grads = carry
        microbatch_key = at_step(key, "microbatch", i)
        (loss, (model_state, metrics)), more = gradient(
            state.params, model_state, microbatch, state.step, microbatch_key
        )
        return (model_state, jax.tree.map(jnp.add, grads, more)), metrics | {"loss": loss}

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    each = _unrolled if unroll else _scanned
    (model_state, grads), metrics = each(learn, (state.model_state, zeros), microbatches, count)
    grads = jax.tree.map(lambda g: g / count, grads)
    return metrics.pop("loss"), model_state, metrics, grads


def _scanned(function: Callable, carry: Any, microbatches: Batch, count: int) -> tuple[Any, Any]:
    """The last carry and the mean output of `carry, output = function(carry, microbatch, i)`."""
    carry, outputs = jax.lax.scan(
        lambda carry, x: function(carry, *x), carry, (microbatches, jnp.arange(count))
    )
    return carry, jax.tree.map(lambda x: jnp.mean(x, axis=0), outputs)


def _unrolled(function: Callable, carry: Any, microbatches: Batch, count: int) -> tuple[Any, Any]:
    """As `_scanned`, without a loop."""
    outputs = []
    for i in range(count):
        carry, output = function(carry, jax.tree.map(lambda x, i=i: x[i], microbatches), i)
        outputs.append(output)
        # No microbatch may begin before the previous one has ended.
        carry, microbatches = jax.lax.optimization_barrier((carry, microbatches))
    return carry, jax.tree.map(lambda *x: jnp.mean(jnp.stack(x), axis=0), *outputs)
