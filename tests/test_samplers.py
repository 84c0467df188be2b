"""Samplers: diffusers' numbers, independence of the batch, arithmetic.

`python tests/test_samplers.py` writes the numbers (extra diffusers).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_stable_diffusion import draw

from oal_jax.errors import UserError
from oal_jax.generator import create, diffusers_modules, samplers
from oal_jax.generator.schedule import NoiseSchedule

GOLDEN = Path(__file__).parent / "golden" / "samplers.safetensors"
# Sampler, prediction, steps. PNDM of diffusers averages velocities, ours noise.
PREDICTIONS = [(name, "epsilon") for name in samplers.SAMPLERS]
PREDICTIONS += [("ddim", "v_prediction"), ("dpm_solver_pp_2m", "v_prediction")]
CASES = [(*prediction, steps) for prediction in PREDICTIONS for steps in ("8", "20")]


def _network(params, x, times, states):
    """A smooth stand-in for a UNet that uses all its inputs."""
    mixed = jnp.einsum("nhwc,cd->nhwd", x, params)
    shift = jnp.cos(times / 300.0) + states.mean(axis=(1, 2))
    return jnp.tanh(mixed + shift[:, None, None, None])


def _problem():
    params = np.float32(0.5) * draw("params", 4, 4)
    return params, draw("noise", 3, 5, 6, 4), draw("cond", 3, 5, 6), draw("uncond", 1, 5, 6)


@pytest.fixture(scope="module")
def problem():
    return _problem()


def diffusers_latents(name: str, prediction: str, steps: int):
    """What diffusers' Flax scheduler makes of the problem."""
    diffusers_modules.libraries()
    import diffusers

    params, noise, cond, uncond = _problem()
    common = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction,
    }
    offset = {"set_alpha_to_one": False, "steps_offset": 1}
    scheduler = {
        "pndm": lambda: diffusers.FlaxPNDMScheduler(**common, **offset, skip_prk_steps=True),
        "ddim": lambda: diffusers.FlaxDDIMScheduler(**common, **offset, clip_sample=False),
        "dpm_solver_pp_2m": lambda: diffusers.FlaxDPMSolverMultistepScheduler(**common),
    }[name]()
    with jax.numpy_rank_promotion("allow"):
        state = scheduler.set_timesteps(scheduler.create_state(), steps, noise.shape)
        step = jax.jit(lambda s, o, t, x: scheduler.step(s, o, t, x, return_dict=False))
        x = jnp.asarray(noise)
        for time in np.asarray(state.timesteps):
            times = jnp.full((3,), time)
            without = _network(params, x, times, jnp.broadcast_to(uncond, cond.shape))
            out = without + 4.0 * (_network(params, x, times, cond) - without)
            x, state = step(state, out, jnp.int32(time), x)
    return np.asarray(x)


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.mark.parametrize("case", CASES, ids=".".join)
def test_golden_latents(problem, golden, case):
    """The latents of diffusers' schedulers."""
    name, prediction, steps = case
    params, noise, cond, uncond = problem
    schedule = NoiseSchedule(prediction_type=prediction)
    sampler = samplers.make_sampler(_network, schedule, name, int(steps), guidance=4.0)
    ours, theirs = jax.jit(sampler)(params, noise, cond, uncond), golden[".".join(case)]
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.diffusers
@pytest.mark.parametrize("case", CASES, ids=".".join)
def test_the_golden_latents_are_those_of_diffusers(golden, case):
    expected = golden[".".join(case)]
    latents = diffusers_latents(*case[:2], int(case[2]))
    np.testing.assert_allclose(latents, expected, atol=1e-5 * np.abs(expected).max())


def counting(network, calls):
    """The network, with the shape and type of its latents recorded for each trace."""

    def traced(params, x, times, states):
        calls.append((x.shape, x.dtype))
        return network(params, x, times, states)

    return traced


def test_pndm_calls_the_network_once_more_and_all_compile_it_once(problem):
    schedule = NoiseSchedule()
    times = samplers.coefficients(schedule, "pndm", 50).times
    assert len(times) == 51 and times[:4].tolist() == [981, 961, 961, 941]
    for name in samplers.SAMPLERS:
        calls = []
        sampler = samplers.make_sampler(counting(_network, calls), schedule, name, 20)
        jax.eval_shape(sampler, *problem)
        assert len(calls) == 1


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 3), (2.0, 6)])
def test_guidance_of_one_needs_no_unconditional_call(problem, guidance, rows):
    calls = []
    sampler = samplers.make_sampler(
        counting(_network, calls), NoiseSchedule(), steps=3, guidance=guidance
    )
    jax.eval_shape(sampler, *problem)
    assert [shape[0] for shape, _ in calls] == [rows]


def test_sampler_faults():
    with pytest.raises(UserError, match="sampler 'euler'"):
        samplers.coefficients(NoiseSchedule(), "euler", 10)
    for steps in (0, 1000):
        with pytest.raises(UserError, match="steps"):
            samplers.coefficients(NoiseSchedule(), "ddim", steps)


def test_scheduler_configs_of_real_checkpoints():
    config = create.SCHEDULER | {"clip_sample": True, "steps_offset": 0, "skip_prk_steps": False}
    assert NoiseSchedule.from_config(config) == NoiseSchedule()
    ddim = {k: v for k, v in config.items() if k != "set_alpha_to_one"}
    assert not NoiseSchedule.from_config(ddim).set_alpha_to_one
    assert NoiseSchedule.from_config(ddim | {"_class_name": "DDIMScheduler"}).set_alpha_to_one


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_arithmetic_is_float32_whatever_the_network(problem, name):
    """With a network in bfloat16 the latents are float32 between the calls and at the end."""
    params, noise, cond, uncond = problem
    calls = []

    def network(params, x, times, states):
        return _network(params, x, times, states).astype(jnp.bfloat16)

    sampler = samplers.make_sampler(
        counting(network, calls), NoiseSchedule(), name, 5, guidance=7.5
    )
    half = cond.astype(jnp.bfloat16), uncond.astype(jnp.bfloat16)
    result = jax.eval_shape(sampler, params, noise, *half)
    assert {dtype for _, dtype in calls} == {result.dtype} == {jnp.dtype("float32")}


def test_noise_depends_on_key_and_index_alone():
    key, shape = jax.random.key(3), (2, 3, 4)
    whole = samplers.initial_noise(key, jnp.arange(6), shape)
    parts = [samplers.initial_noise(key, jnp.arange(i, i + 2), shape) for i in (0, 2, 4)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert np.abs(whole - samplers.initial_noise(jax.random.key(4), jnp.arange(6), shape)).min() > 0
    first = jax.random.normal(jax.random.fold_in(key, 5), (4, 2, 3))  # channels first
    np.testing.assert_array_equal(whole[5], np.moveaxis(first, 0, -1))


def test_samples_do_not_depend_on_the_batch(problem):
    params, noise, cond, uncond = problem
    sample = jax.jit(samplers.make_sampler(_network, NoiseSchedule(), steps=4))
    whole = sample(params, noise, cond, uncond)
    assert whole.shape == noise.shape
    for i in range(len(noise)):
        alone = sample(params, noise[i : i + 1], cond[i : i + 1], uncond)
        np.testing.assert_allclose(alone[0], whole[i], atol=1e-5 * float(jnp.abs(whole).max()))


if __name__ == "__main__":
    save_file({".".join(c): diffusers_latents(*c[:2], int(c[2])) for c in CASES}, GOLDEN)
