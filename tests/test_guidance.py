"""Guidance against finite differences and NumPy; samplers that begin late against their oracles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oal_jax.config import Config
from oal_jax.config.rules import validate
from oal_jax.errors import UserError
from oal_jax.generator import guidance, samplers
from oal_jax.generator.schedule import NoiseSchedule
from oal_jax.models import latent_features

WIDTH, CLASSES, SHAPE = 10, 4, (4, 4, 4)  # features, logits, a latent
SCHEDULE = NoiseSchedule()


def random_steering(module, strength=1.0):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4, 4, 4)))["params"]

    def draw(leaf):
        scale = 1 / np.sqrt(np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 0.3
        return (scale * rng.normal(size=leaf.shape)).astype(np.float32)

    bank = rng.normal(size=(30, WIDTH)).astype(np.float32)
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    kernel = rng.normal(size=(WIDTH, CLASSES)).astype(np.float32)
    bias = rng.normal(size=CLASSES).astype(np.float32)
    parts = jax.tree.map(draw, shapes), kernel, bias, bank
    return guidance.Steering(*parts, np.float32(strength))


@pytest.fixture(scope="module", params=["conv", "residual"])
def adapter(request):
    module = latent_features.make(request.param, WIDTH, 16)
    return module, random_steering(module)


def features_by(module):
    return lambda params, z: latent_features.apply_in_loop(module, params, z)


def latents(count=3, seed=1):
    return np.random.default_rng(seed).normal(size=(count, *SHAPE)).astype(np.float32)


def test_convolutions_in_a_loop_are_the_same_function(adapter):
    module, steering = adapter
    z = jnp.moveaxis(jnp.asarray(latents()), 1, -1)
    plain = module.apply({"params": steering.params}, z)
    np.testing.assert_allclose(features_by(module)(steering.params, z), plain, rtol=1e-5, atol=1e-5)


def test_closeness_is_the_mean_cosine_to_the_nearest():
    module = latent_features.make("conv", WIDTH, 16)
    steering = random_steering(module)
    features = np.random.default_rng(2).normal(size=(6, WIDTH)).astype(np.float32)
    cosines = features / np.linalg.norm(features, axis=1, keepdims=True) @ steering.bank.T
    for k in (1, 7, 30, 99):
        expected = np.sort(cosines, axis=1)[:, ::-1][:, :k].mean(1)
        found = guidance.closeness(jnp.asarray(features), steering, k)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by", guidance.LOSSES)
def test_the_push_is_along_the_gradient_and_of_the_asked_length(adapter, by):
    """Along the gradient of finite differences, losses one after another."""
    module, steering = adapter
    steering = steering._replace(strength=np.float32(0.7))
    clean, noise, time = latents(), 2 * latents(seed=3), 400
    guide = guidance.make_guide(features_by(module), SCHEDULE, by, neighbour=5)
    push = np.asarray(jax.jit(guide)(clean, noise, time, steering))

    @jax.jit
    def losses(z):
        features = module.apply({"params": steering.params}, jnp.moveaxis(z, 1, -1))
        return jnp.stack([loss(features, steering, 5) for loss in guidance.LOSSES[by]])

    eps, count = 1e-2, clean[0].size
    steps = eps * np.eye(count, dtype=np.float32).reshape(count, *SHAPE)
    for z, e, p in zip(clean, noise, push, strict=True):
        gradient = np.asarray(losses(z + steps) - losses(z - steps)) / (2 * eps)
        gradient /= np.linalg.norm(gradient, axis=1, keepdims=True)
        direction = gradient.sum(0)
        cosine = p.reshape(-1) @ direction / np.linalg.norm(p) / np.linalg.norm(direction)
        assert cosine > 0.99
        alpha = np.sqrt(SCHEDULE.alphas_cumprod()[time])
        assert np.linalg.norm(p) == pytest.approx(0.7 * alpha * np.linalg.norm(e), rel=1e-4)


def test_the_guide_acts_between_start_and_end_alone():
    module = latent_features.make("conv", WIDTH, 16)
    steering = random_steering(module)
    guide = guidance.make_guide(features_by(module), SCHEDULE, "energy", start=0.25, end=0.75)
    guide = jax.jit(guide)
    acts = [bool(np.any(guide(latents(), latents(), t, steering))) for t in (999, 760, 740, 260)]
    assert acts == [False, False, True, True]
    assert not np.any(guide(latents(), latents(), 240, steering))


def _network(params, x, times, states):
    """A smooth stand-in for a UNet that uses all its inputs."""
    mixed = jnp.einsum("nchw,cd->ndhw", x, params)
    shift = jnp.cos(times / 300.0) + states.mean(axis=(1, 2))
    return jnp.tanh(mixed + shift[:, None, None, None])


def run(name, guide, aux, **options):
    keys = jax.random.split(jax.random.key(1), 3)
    params = 0.5 * jax.random.normal(keys[0], (4, 4))
    cond, uncond = jax.random.normal(keys[1], (8, 5, 6)), jax.random.normal(keys[2], (1, 5, 6))
    sampler = samplers.make_sampler(_network, SCHEDULE, name, 10, 2.0, guide, **options)
    return jax.jit(sampler)(params, latents(8), cond, uncond, aux)


@pytest.mark.parametrize(
    "name",
    ["dpm_solver_pp_2m", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ddim", "pndm"))],
)
def test_guided_latents_look_less_like_id_than_those_of_the_same_noise(name):
    module = latent_features.make("conv", WIDTH, 16)
    steering = random_steering(module)
    plain = run(name, None, None)

    def judged(z, loss):
        features = module.apply({"params": steering.params}, jnp.moveaxis(z, 1, -1))
        return np.asarray(loss(features, steering, 5))

    for by, losses in guidance.LOSSES.items():
        guide = guidance.make_guide(features_by(module), SCHEDULE, by, neighbour=5)
        guided = run(name, guide, steering)
        assert np.isfinite(guided).all()
        for loss in losses:
            assert (judged(guided, loss) < judged(plain, loss)).mean() > 0.8
    # The same program with strength 0.
    none = run(name, guide, steering._replace(strength=np.float32(0)))
    np.testing.assert_allclose(none, plain, rtol=1e-5, atol=1e-5)


def test_guided_sampling_is_one_loop_with_one_call_of_the_network():
    module = latent_features.make("conv", WIDTH, 16)
    guide = guidance.make_guide(features_by(module), SCHEDULE, "both")
    sampler = samplers.make_sampler(_network, SCHEDULE, "pndm", 10, guide=guide)
    arguments = jnp.eye(4), latents(8), jnp.ones((8, 5, 6)), jnp.ones((1, 5, 6))
    program = jax.make_jaxpr(sampler)(*arguments, random_steering(module))
    (scan,) = (e for e in program.eqns if e.primitive.name == "scan")
    assert scan.params["length"] == 11


@pytest.mark.parametrize("name", samplers.SAMPLERS)
@pytest.mark.parametrize("partial", [0.1, 0.5, 1.0])
def test_a_late_start_is_the_end_of_the_whole_plan(name, partial):
    whole = samplers.make_plan(SCHEDULE, name, 20)
    late = samplers.make_plan(SCHEDULE, name, 20, partial)
    count = round(20 * partial) + (name == "pndm")
    assert len(late.times) == count
    np.testing.assert_array_equal(late.times[-1:], whole.times[-1:])
    if name == "ddim" or partial == 1.0:
        for a, b in zip(late, whole, strict=True):
            np.testing.assert_array_equal(a, b[-count:] if np.ndim(b) else b)
    # A step of the first order begins it: there is no history yet.
    assert np.count_nonzero(late.b[0]) == 1
    assert samplers.make_plan(SCHEDULE, name, 20, 0.001).times.size == 1 + (name == "pndm")


@pytest.mark.parametrize("name", samplers.SAMPLERS)
@pytest.mark.parametrize("partial", [0.3, 0.9])
def test_a_network_that_knows_the_noise_gives_back_what_was_noised(name, partial):
    clean = 0.5 * latents(2)
    alphas = jnp.asarray(SCHEDULE.alphas_cumprod(), jnp.float32)

    def knowing(params, x, times, states):
        squared = alphas[times][:, None, None, None]
        return (x - jnp.sqrt(squared) * params) / jnp.sqrt(1 - squared)

    sampler = samplers.make_sampler(knowing, SCHEDULE, name, 20, 1.0, partial=partial)
    cond = jnp.zeros((2, 5, 6))
    sample = jax.jit(functools.partial(sampler, jnp.asarray(clean)))
    out = sample(latents(2, seed=4), cond, cond, None, clean)
    # The last step goes to the end of the schedule, which keeps a little noise.
    np.testing.assert_allclose(out, clean, atol=0.15)
    other = sample(latents(2, seed=4), cond, cond, None, clean + 1)
    assert np.abs(other - out).max() > 1e-3  # what it begins at counts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guide.by": "enrgy"}, "nearest: 'energy'"),
        ({"guide.by": "energy", "guide.start": 0.6, "guide.end": 0.5}, "must be less than"),
        ({"guide.by": "energy", "kind": "noised"}, "'noised' has none"),
        ({"guide.strength": -1.0}, "must be 0 or greater"),
        ({"guide.end": 1.5}, r"must lie in 0\.\.1"),
        ({"partial": 1.0}, "must lie between 0 and 1"),
        ({"kind": "mixtur"}, "nearest: 'mixture'"),
    ],
)
def test_impossible_values_are_told(changes, message):
    config = Config()
    for path, value in changes.items():
        *parents, name = path.split(".")
        node = functools.reduce(getattr, parents, config.latents)
        setattr(node, name, value)
    with pytest.raises(UserError, match=message):
        validate(config)
