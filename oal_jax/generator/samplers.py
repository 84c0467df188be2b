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


class Plan(NamedTuple):
    """What a sampler does at each call of the network; every array has one row a call.

    Attributes:
        times: time passed to the network, in training steps.
        alpha, sigma: of the noise process at that time.
        a: weight of the point the step starts from.
        b: (calls, order) weights of the outputs, the newest first.
        push: whether the output enters the history (the corrector call of PLMS does not).
        hold: whether the step starts from the previous start instead of the newest point (that same
            call).
        predicts_clean: whether the outputs are predicted clean latents instead of noise.
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
    """Descending times with equal spacing from the schedule's end; that spacing."""
    ratio = schedule.train_steps // steps
    return np.arange(steps)[::-1] * ratio + schedule.steps_offset, ratio


def _ddim_coefficients(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of x and of the noise for a step between two alpha^2.

    arXiv 2010.02502, equation 12 with sigma = 0.
    """
    a = np.sqrt(end / start)
    return a, np.sqrt(1.0 - end) - a * np.sqrt(1.0 - start)


def _plan_ddim(schedule: NoiseSchedule, steps: int) -> Plan:
    squared = schedule.alphas_cumprod()
    times, ratio = _leading_times(schedule, steps)
    ends = times - ratio
    end = np.where(ends >= 0, squared[np.maximum(ends, 0)], schedule.final_alpha_cumprod())
    a, b = _ddim_coefficients(squared[times], end)
    always, never = np.ones(steps, bool), np.zeros(steps, bool)
    return _plan(squared, times, a, b[:, None], always, never, predicts_clean=False)


def _plan_pndm(schedule: NoiseSchedule, steps: int) -> Plan:
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
    return _plan(
        squared, calls, a, slope[:, None] * weights, ~corrector, corrector, predicts_clean=False
    )


def _plan_dpm(schedule: NoiseSchedule, steps: int) -> Plan:
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
    return _plan(squared, points[:-1], a, b, always, never, predicts_clean=True)


def _plan(squared, times, a, b, push, hold, *, predicts_clean: bool) -> Plan:
    alpha, sigma = np.sqrt(squared[times]), np.sqrt(1.0 - squared[times])
    f32 = (np.asarray(v, np.float32) for v in (alpha, sigma, a, b))
    return Plan(np.asarray(times, np.int32), *f32, push, hold, predicts_clean)


_PLANS = {"ddim": _plan_ddim, "pndm": _plan_pndm, "dpm_solver_pp_2m": _plan_dpm}


def make_plan(schedule: NoiseSchedule, name: str, steps: int) -> Plan:
    """The coefficients of a sampler.

    Args:
        schedule: the noise process.
        name: "pndm" (steps + 1 network calls), "ddim" or "dpm_solver_pp_2m" (steps calls).
            The history of "pndm" is of noise even where the network predicts velocities; diffusers
            averages the velocities there.
        steps: number of intervals, 1 to the number of training steps less one.

    Raises:
        UserError: an unknown name or an impossible number of steps.
    """
    if name not in _PLANS:
        raise UserError(f"sampler {name!r} is none of {', '.join(SAMPLERS)}")
    if not 1 <= steps < schedule.train_steps:
        raise UserError(f"sampler steps must be in 1 .. {schedule.train_steps - 1}, not {steps}")
    return _PLANS[name](schedule, steps)


def initial_noise(
    key: jax.Array, indices: Array, latent_shape: tuple[int, int, int]
) -> Float[Array, "N h w C"]:
    """Standard normal noise of the samples with these indices.

    It depends on the key and a sample's own index, not on how samples are batched.
    """
    height, width, channels = latent_shape
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)
    # Drawn channels first, as published samplers draw it.
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
        schedule: the noise process that the network was trained on.
        name: see `make_plan`.
        steps: see `make_plan`.
        guidance: scale w of classifier-free guidance (arXiv 2207.12598): uncond + w (cond -
            uncond). With 1 the network is called with the condition only.

    Returns:
        `sample(params, noise, cond, uncond) -> latents`, float32, to be jitted by the caller:
        `noise` (N, h, w, C) standard normal, `cond` (N, L, D), `uncond` (1, L, D) or (N, L, D).
        Each sample is computed on its own: results do not depend on the batch, up to rounding.
    """
    plan = make_plan(schedule, name, steps)
    rows = {
        "time": jnp.asarray(plan.times),
        "alpha": jnp.asarray(plan.alpha),
        "sigma": jnp.asarray(plan.sigma),
        "a": jnp.asarray(plan.a),
        "b": jnp.asarray(plan.b),
        "push": jnp.asarray(plan.push),
        "hold": jnp.asarray(plan.hold),
    }
    order = plan.b.shape[1]
    corrects = bool(plan.hold.any())

    def predict(params, x, time, states):
        """The guided output of the network at one time for all samples."""
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
            alpha, sigma = row["alpha"], row["sigma"]
            out = predict(params, x, row["time"], states)
            if schedule.prediction_type == "v_prediction":
                out = alpha * out + sigma * x
            if plan.predicts_clean:
                out = (x - sigma * out) / alpha
            start = jnp.where(row["hold"], start, x) if corrects else x
            recent = (out, *history)
            x = row["a"] * start + sum(row["b"][j] * recent[j] for j in range(order))
            pushed = recent[: order - 1]
            if corrects:
                pushed = jax.tree.map(lambda n, o: jnp.where(row["push"], n, o), pushed, history)
            return (x, start if corrects else (), pushed), None

        history = (jnp.zeros_like(x),) * (order - 1)
        carry = (x, x if corrects else (), history)
        (x, _, _), _ = jax.lax.scan(body, carry, rows)
        return x

    return sample
