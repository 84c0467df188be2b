"""Our Stable Diffusion modules against the Flax modules of diffusers and transformers.

Run with `-m diffusers` where the extra `diffusers` is installed.
"""

import functools
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_stable_diffusion import SHIPPED, draw, write_small, write_small_v2

from oal_jax.generator import conditioning, samplers, stable_diffusion_v1
from oal_jax.generator import stable_diffusion as stable
from oal_jax.generator import tokenizer as clip
from oal_jax.generator.create import FASHION_CLASSES

pytestmark = pytest.mark.diffusers
BACKENDS = ("native", "diffusers")
WORDS = ("cat", "aquarium_fish", "pickup_truck")
RANDOM = np.random.default_rng(0)
# Both know every assigned character but one, a mark that the older one drops.
ASSIGNED = [c for c in map(chr, range(0x20000)) if unicodedata.category(c)[0] != "C"]
TEXTS = (
    *("", "a cat", "A High-Quality  image\tof\nthe PICKUP truck!!", "don't we'll they're I'VE"),
    *("naïve café Ünïcode", "e\u0301 cat", "猫 and 犬cat魚", "日本語のテキスト", "한국어", "ΑΣ Σ"),
    *("42 7x3 ½ ²", "\x00\x07 cat\u200b", "🙂🙃 cat", "İstanbul", "a_b-c/d", "<|endoftext|> cat"),
    *("".join(RANDOM.choice(ASSIGNED, 20)).replace("\u0345", "") for _ in range(100)),
)


def assert_close(ours, theirs, tolerance: float) -> None:
    """The largest difference, relative to the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"relative error {error:.1e}")
    assert error < tolerance


@pytest.fixture(scope="module", params=["shipped", "v1", "v2"])
def models(request, tmp_path_factory):
    """(static part, parameters) by backend; parameters are the same."""
    write = {"v1": write_small, "v2": write_small_v2}.get(request.param)
    directory = write(tmp_path_factory.mktemp(request.param)) if write else SHIPPED
    return {backend: stable.load(directory, backend=backend) for backend in BACKENDS}


def both(models, function):
    """The function of each backend's model, jitted."""
    return [jax.jit(functools.partial(function, models[b][0]))(models[b][1]) for b in BACKENDS]


def words_of(sd):
    return FASHION_CLASSES if sd.vae.in_channels == 1 else WORDS


def test_parameters_are_the_same(models):
    ours, theirs = (models[backend][1] for backend in BACKENDS)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    shapes = [stable.param_shapes(models[backend][0], SHIPPED) for backend in BACKENDS]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("mode", conditioning.INJECTION_MODES)
def test_text_states(models, mode):
    def states(sd, params):
        ids, mask, _ = conditioning.class_tokens(sd, words_of(sd), mode)
        vectors = draw("vectors", len(ids), sd.text_width)
        plain = stable.encode_prompts(sd, params, ids)
        return plain, conditioning.encode_with_injection(sd, params, ids, mask, vectors)

    ours, theirs = both(models, states)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, 1e-5)


def test_unet(models):
    def predict(sd, params):
        latents = draw("latents", 3, *sd.latent_shape)
        states = draw("states", 3, 5, sd.text_width)
        return stable.apply_unet(sd, params, latents, np.array([0, 481, 999]), states)

    assert_close(*both(models, predict), 1e-5)


def test_autoencoder(models):
    def encode(sd, params):
        size = sd.image_size
        images = np.clip(draw("pixels", 2, size, size, sd.vae.in_channels), -1, 1)
        return stable.encode_pixels(sd, params, images)

    def decode(sd, params):
        return stable.decode_pixels(sd, params, draw("latents", 2, *sd.latent_shape))

    ours, theirs = both(models, encode)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, 1e-5)
    assert_close(*both(models, decode), 1e-5)


def test_samplers(models):
    """Tokenizer, injection, text encoder, 20 steps with guidance; all three of one model."""
    shipped = models["native"][0].vae.in_channels == 1

    def sample(name, sd, params):
        ids, mask, empty = conditioning.class_tokens(sd, words_of(sd)[:3])
        vectors = draw("vectors", 3, sd.text_width)
        cond = conditioning.encode_with_injection(sd, params, ids, mask, vectors)
        uncond = stable.encode_prompts(sd, params, empty)
        apply = functools.partial(stable.apply_unet, sd)
        sampler = samplers.make_sampler(apply, sd.schedule, name, 20, guidance=7.5)
        return sampler(params, draw("noise", 3, *sd.latent_shape), cond, uncond)

    for name in samplers.SAMPLERS if shipped else samplers.SAMPLERS[:1]:
        assert_close(*both(models, functools.partial(sample, name)), 1e-4)


def test_bfloat16(tmp_path):
    """As far from float32 as theirs."""
    directory = write_small(tmp_path)
    exact, params = stable.load(directory)
    latents, states = draw("latents", 3, *exact.latent_shape), draw("states", 3, 5, 32)
    times = np.array([0, 481, 999])
    expected = stable.apply_unet(exact, params, latents, times, states)
    errors = []
    for backend in BACKENDS:
        sd, params = stable.load(directory, jnp.bfloat16, backend=backend)
        out = jax.jit(functools.partial(stable.apply_unet, sd))(params, latents, times, states)
        assert sd.unet.dtype == jnp.bfloat16 and out.dtype == jnp.float32
        errors.append(float(jnp.abs(out - expected).max()))
    assert errors[0] < 1.5 * errors[1]


def test_the_tokenizer_is_that_of_clip(tmp_path):
    from transformers import CLIPTokenizer

    for name, write in {"v1": write_small, "v2": write_small_v2}.items():
        folder = write(tmp_path / name) / "tokenizer"
        ours, theirs = clip.read(folder), CLIPTokenizer.from_pretrained(str(folder))
        expected = theirs(list(TEXTS), padding="max_length", max_length=120).input_ids
        np.testing.assert_array_equal(ours.encode(TEXTS, 120), expected)


@pytest.mark.slow
def test_v1_at_its_size():
    """The same tree of parameters; one step of the UNet; the text encoder."""
    sds = [stable_diffusion_v1.build(backend=backend) for backend in BACKENDS]
    shapes = [stable.param_shapes(sd, SHIPPED) for sd in sds]
    assert shapes[0] == shapes[1]
    rng = np.random.default_rng(0)

    def parameter(path, leaf):
        values = rng.standard_normal(leaf.shape, np.float32)
        if leaf.ndim == 1:
            return np.float32(0.1) * values + np.float32(path[-1].key == "scale")
        return values / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))

    states = []
    fill = functools.partial(jax.tree_util.tree_map_with_path, parameter)
    params = fill({"text_encoder": shapes[0]["text_encoder"]})
    ids = rng.integers(0, 49408, (1, 77))
    for sd in sds:
        states.append(jax.jit(functools.partial(stable.encode_prompts, sd))(params, ids))
    assert_close(*states, 1e-5)
    params = fill({"unet": shapes[0]["unet"]})
    latents = rng.standard_normal((1, 32, 32, 4), np.float32)
    outs = []
    for sd in sds:
        apply = jax.jit(functools.partial(stable.apply_unet, sd))
        outs.append(apply(params, latents, np.array([481]), states[0]))
    assert_close(*outs, 1e-5)
