"""Samplers of a diffusion model, each compiled as one `lax.scan`.

PNDM as Stable Diffusion v1 uses it (PLMS: arXiv 2202.09778 without the Runge-Kutta start), DDIM
(arXiv 2010.02502, eta = 0) and DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2) are all linear
multistep methods: the next point is

    x' = a_i x + sum_j b_ij m_j

with m_j the newest network outputs (noise for the first two, predicted clean latents for the last).
The coefficients depend on the schedule alone; they are computed on the host in float64, so that the
compiled loop is the network and one weighted sum.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from oal_jax.errors import UserError
from oal_jax.generator.schedule import NoiseSchedule

SAMPLERS = ("dpm_solver_pp_2m", "pndm", "ddim")

ApplyUNet = Callable[[Any, Array, Array, Array], Array]


class Coefficients(NamedTuple):
    """The multistep coefficients of a sampler; every array has one row per network call.

    Attributes:
      times: time passed to the network, in training steps.
      alpha, sigma: coefficients of the noise process at that time.
      a: weight of the point that the step starts from.
      b: (calls, order) weights of the outputs, the newest first.
      push: whether the output enters the history (the corrector call of PLMS does not).
      hold: whether the step starts where the previous step started, not from the newest point (the
        corrector call of PLMS).
      predicts_clean: whether m_j are predicted clean latents instead of noise.
    """

    times: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    a: np.ndarray
    b: np.ndarray
    push: np.ndarray
    hold: np.ndarray
    predicts_clean: bool


def _leading_times(schedule: NoiseSchedule, steps: int) -> tuple[np.ndarray, int]:
    """Descending times at equal distances from the schedule's end; and that distance."""
    ratio = schedule.train_steps // steps
    return np.arange(steps)[::-1] * ratio + schedule.steps_offset, ratio


def _ddim_coefficients(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of x and of the noise for a step from `start` to `end`, both alpha^2.

    arXiv 2010.02502, equation 12 with sigma = 0.
    """
    a = np.sqrt(end / start)
    return a, np.sqrt(1.0 - end) - a * np.sqrt(1.0 - start)


def _ddim(schedule: NoiseSchedule, steps: int) -> Coefficients:
    squared = schedule.alphas_cumprod()
    times, ratio = _leading_times(schedule, steps)
    ends = times - ratio
    end = np.where(ends >= 0, squared[np.maximum(ends, 0)], schedule.final_alpha_cumprod())
    a, b = _ddim_coefficients(squared[times], end)
    always, never = np.ones(steps, bool), np.zeros(steps, bool)
    return _rounded(squared, times, a, b[:, None], always, never, predicts_clean=False)


def _pndm(schedule: NoiseSchedule, steps: int) -> Coefficients:
    """A Heun-like pair of calls for the first interval, then Adams-Bashforth of order 2, 3, 4."""
    squared = schedule.alphas_cumprod()
    times, ratio = _leading_times(schedule, steps)
    # The network is called at the end of the first interval twice: once to correct it, once to
    # start the second.
    calls = np.insert(times, 1, times[1]) if steps > 1 else np.repeat(times, 2)
    starts = calls.copy()
    starts[1] = times[0]
    ends = starts - ratio
    end = np.where(ends >= 0, squared[np.maximum(ends, 0)], schedule.final_alpha_cumprod())
    a, slope = _ddim_coefficients(squared[starts], end)
    # After its push the output is number 0 of the history; the unpushed corrector averages with
    # number 0.
    orders = np.array(
        [
            [1, 0, 0, 0],
            [1 / 2, 1 / 2, 0, 0],
            [3 / 2, -1 / 2, 0, 0],
            [23 / 12, -16 / 12, 5 / 12, 0],
            [55 / 24, -59 / 24, 37 / 24, -9 / 24],
        ]
    )
    weights = orders[np.minimum(np.arange(steps + 1), 4)]
    corrector = np.arange(steps + 1) == 1
    return _rounded(
        squared, calls, a, slope[:, None] * weights, ~corrector, corrector, predicts_clean=False
    )


def _dpm(schedule: NoiseSchedule, steps: int) -> Coefficients:
    squared = schedule.alphas_cumprod()
    points = np.round(np.linspace(0, schedule.train_steps - 1, steps + 1)).astype(np.int64)
    points = points[::-1]
    alpha, sigma = np.sqrt(squared[points]), np.sqrt(1.0 - squared[points])
    log_snr = np.log(alpha) - np.log(sigma)
    h = np.diff(log_snr)
    a = sigma[1:] / sigma[:-1]
    gain = -alpha[1:] * np.expm1(-h)
    # D1 = (m_0 - m_1) / r with r = h_previous / h; the first step has no predecessor and is of
    # first order.
    half = np.zeros(steps)
    half[1:] = 0.5 * h[1:] / h[:-1]
    if steps < 15:
        half[-1] = 0.0  # diffusers' rule: with few steps, a last one of first order is stabler
    b = np.stack([gain * (1.0 + half), -gain * half], axis=1)
    always, never = np.ones(steps, bool), np.zeros(steps, bool)
    return _rounded(squared, points[:-1], a, b, always, never, predicts_clean=True)


def _rounded(squared, times, a, b, push, hold, *, predicts_clean: bool) -> Coefficients:
    alpha, sigma = np.sqrt(squared[times]), np.sqrt(1.0 - squared[times])
    f32 = (np.asarray(v, np.float32) for v in (alpha, sigma, a, b))
    return Coefficients(np.asarray(times, np.int32), *f32, push, hold, predicts_clean)


_FORMULAS = {"ddim": _ddim, "pndm": _pndm, "dpm_solver_pp_2m": _dpm}


def coefficients(schedule: NoiseSchedule, name: str, steps: int) -> Coefficients:
    """The coefficients of a sampler.

    Args:
      schedule: the noise process.
      name: "pndm" (steps + 1 network calls), "ddim" or "dpm_solver_pp_2m" (steps calls). "pndm"
        averages noise even if the network predicts velocities; diffusers averages the velocities.
      steps: number of intervals, 1 to the number of training steps less one.

    Raises:
      UserError: an unknown name or an impossible number of steps.
    """
    if name not in _FORMULAS:
        raise UserError(f"sampler {name!r} is none of {', '.join(SAMPLERS)}")
    if not 1 <= steps < schedule.train_steps:
        raise UserError(f"sampler steps must be in 1 .. {schedule.train_steps - 1}, not {steps}")
    return _FORMULAS[name](schedule, steps)


def initial_noise(
    key: jax.Array, indices: Array, latent_shape: tuple[int, int, int]
) -> Float[Array, "N h w C"]:
    """Standard normal noise of the samples `indices`.

    A sample's noise depends on the key and its own index, not on the batch.
    """
    height, width, channels = latent_shape
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)
    # Drawn channels first, as diffusers draws it.
    noise = jax.vmap(lambda k: jax.random.normal(k, (channels, height, width)))(keys)
    return jnp.moveaxis(noise, 1, -1)


def make_sampler(
    apply_unet: ApplyUNet,
    schedule: NoiseSchedule,
    name: str = "dpm_solver_pp_2m",
    steps: int = 20,
    guidance: float = 3.0,
) -> Callable[..., Float[Array, "N h w C"]]:
    """Builds a pure sampling function.

    Args:
      apply_unet: `(params, latents (B, h, w, C), times (B,), states (B, L, D)) -> (B, h, w, C)`.
      schedule: noise process of the network's training.
      name, steps: as for `coefficients`.
      guidance: scale w of classifier-free guidance (arXiv 2207.12598): uncond + w (cond -
        uncond). With 1 the network is called with the condition alone.

    Returns:
      `sample(params, noise, cond, uncond) -> latents`, float32, to be jitted by the caller:
      `noise` (N, h, w, C) standard normal, `cond` (N, L, D), `uncond` (1, L, D) or (N, L, D).
      A sample does not depend on the others of its batch, up to rounding.
    """
    table = coefficients(schedule, name, steps)
    rows = jax.tree.map(jnp.asarray, table._replace(predicts_clean=None))
    order = table.b.shape[1]
    corrects = bool(table.hold.any())

    def predict(params, x, time, states):
        """The guided output of the network for all samples, at one time."""
        count = x.shape[0]
        if guidance == 1.0:
            return apply_unet(params, x, jnp.full((count,), time), states).astype(jnp.float32)
        # The pair is the second axis: merging it into a sharded first axis moves no data between
        # devices, which concatenating two halves along that axis would.
        pairs = jnp.broadcast_to(x[:, None], (count, 2, *x.shape[1:]))
        flat = pairs.reshape(2 * count, *x.shape[1:])
        out = apply_unet(params, flat, jnp.full((2 * count,), time), states).astype(jnp.float32)
        out = out.reshape(pairs.shape)
        return out[:, 0] + guidance * (out[:, 1] - out[:, 0])

    def sample(params, noise, cond, uncond):
        x = noise.astype(jnp.float32)
        if guidance == 1.0:
            states = cond
        else:
            pair = jnp.stack([jnp.broadcast_to(uncond, cond.shape), cond], axis=1)
            states = pair.reshape(-1, *cond.shape[1:])

        def body(carry, row):
            x, start, history = carry
            out = predict(params, x, row.times, states)
            if schedule.prediction_type == "v_prediction":
                out = row.alpha * out + row.sigma * x
            if table.predicts_clean:
                out = (x - row.sigma * out) / row.alpha
            start = jnp.where(row.hold, start, x) if corrects else x
            recent = (out, *history)
            x = row.a * start + sum(row.b[j] * recent[j] for j in range(order))
            pushed = recent[: order - 1]
            if corrects:
                pushed = jax.tree.map(lambda n, o: jnp.where(row.push, n, o), pushed, history)
            return (x, start if corrects else (), pushed), None

        history = (jnp.zeros_like(x),) * (order - 1)
        carry = (x, x if corrects else (), history)
        (x, _, _), _ = jax.lax.scan(body, carry, rows)
        return x

    return sample
