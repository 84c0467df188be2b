"""Stable Diffusions in PyTorch diffusers: same files, same numbers.

Tests with PyTorch run with `-m parity`. Its numbers for a small random model are also in a file,
which the other tests compare with; `python tests/test_parity_generator.py` writes the file.
"""

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_stable_diffusion import SHIPPED, WORDS, draw, write_small

from oal_jax.generator import conditioning, create, samplers
from oal_jax.generator import stable_diffusion as stable

GOLDEN = Path(__file__).parent / "golden" / "small_stable_diffusion.safetensors"
TOLERANCE = 1e-3


def parity(test):
    # PyTorch and diffusers give warnings of their own.
    return pytest.mark.parity(pytest.mark.filterwarnings("default")(test))


@pytest.fixture(scope="module")
def ours():
    return stable.load(SHIPPED)


@pytest.fixture(scope="module")
def torch():
    module = pytest.importorskip("torch")
    module.set_grad_enabled(False)
    return module


@pytest.fixture(scope="module")
def pipeline(torch):
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        str(SHIPPED), torch_dtype=torch.float32
    )
    pipe.vae.float(), pipe.unet.float(), pipe.text_encoder.float()
    return pipe


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).standard_normal((4, 8, 8, 4)).astype(np.float32)


def first(array):
    """Channels first, as PyTorch has them."""
    return np.moveaxis(np.asarray(array), -1, 1).copy()


def last(array):
    """Channels last, as JAX has them."""
    return np.moveaxis(np.asarray(array), 1, -1)


def _ids(sd):
    ids, _, empty = conditioning.class_tokens(sd, create.FASHION_CLASSES)
    return ids, empty


@parity
def test_tokens_and_text_states(torch, pipeline, ours):
    sd, params = ours
    ids, _ = _ids(sd)
    prompts = conditioning.class_prompts(create.FASHION_CLASSES)
    length = ids.shape[1]
    theirs = pipeline.tokenizer(prompts, padding="max_length", max_length=length).input_ids
    np.testing.assert_array_equal(ids, theirs)
    expected = pipeline.text_encoder(torch.tensor(ids, dtype=torch.long))[0]
    np.testing.assert_allclose(stable.encode_prompts(sd, params, ids), expected, atol=TOLERANCE)


@parity
def test_vae(torch, pipeline, ours, latents):
    sd, params = ours
    images = np.random.default_rng(1).random((2, 28, 28, 1), np.float32)
    padded = first(stable.pad_images(sd, images)) * 2 - 1
    expected = pipeline.vae.encode(torch.from_numpy(padded)).latent_dist.mean * sd.scaling_factor
    encode = jax.jit(functools.partial(stable.encode_images, sd))
    np.testing.assert_allclose(encode(params, images), last(expected), atol=TOLERANCE)
    decoded = pipeline.vae.decode(torch.from_numpy(first(latents)) / sd.scaling_factor).sample
    expected = last((decoded * 0.5 + 0.5).clamp(0, 1))
    decode = jax.jit(functools.partial(stable.decode_latents, sd))
    np.testing.assert_allclose(decode(params, latents), expected, atol=TOLERANCE)


@parity
def test_unet(torch, pipeline, ours, latents):
    sd, params = ours
    states = np.array(stable.encode_prompts(sd, params, _ids(sd)[0][:4]))
    times = np.array([0, 1, 500, 999], np.int32)
    expected = pipeline.unet(
        torch.from_numpy(first(latents)), torch.from_numpy(times).long(), torch.from_numpy(states)
    ).sample
    apply = jax.jit(functools.partial(stable.apply_unet, sd))
    ours_out = apply(params, latents, times, states)
    np.testing.assert_allclose(ours_out, last(expected), atol=TOLERANCE)


@parity
@pytest.mark.parametrize(("steps", "guidance"), [(20, 3.0), (50, 7.5)])
@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_guided_sampling(torch, pipeline, ours, latents, name, steps, guidance):
    diffusers = pytest.importorskip("diffusers")
    sd, params = ours
    ids, empty = _ids(sd)
    cond = np.array(stable.encode_prompts(sd, params, ids[:4]))
    uncond = np.array(stable.encode_prompts(sd, params, empty))
    apply = functools.partial(stable.apply_unet, sd)
    sampler = jax.jit(samplers.make_sampler(apply, sd.schedule, name, steps, guidance))
    ours_out = sampler(params, jnp.asarray(latents), cond, uncond)

    config = pipeline.scheduler.config
    scheduler = torch_scheduler(diffusers, name, config)
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == steps + (name == "pndm")
    x = torch.from_numpy(first(latents))
    conditions = torch.from_numpy(cond), torch.from_numpy(uncond).expand(cond.shape)
    for time in scheduler.timesteps:
        with_text, without = (pipeline.unet(x, time, states).sample for states in conditions)
        x = scheduler.step(without + guidance * (with_text - without), time, x).prev_sample
    np.testing.assert_allclose(ours_out, last(x), atol=TOLERANCE * float(x.abs().max()))


@parity
def test_a_standard_directory_of_pytorch(torch, tmp_path):
    """A model with every kind of block of Stable Diffusion v1, sharded, as PyTorch saves it."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    cross = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64, 64),
        down_block_types=(cross[0],) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + (cross[1],) * 3,
        layers_per_block=2,
        cross_attention_dim=32,
        attention_head_dim=4,
    ).eval()
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    ).eval()
    text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=1000,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
        )
    ).eval()
    unet.save_pretrained(tmp_path / "unet", max_shard_size="400KB")
    vae.save_pretrained(tmp_path / "vae")
    text_encoder.save_pretrained(tmp_path / "text_encoder")
    create.write_tokenizer(tmp_path / "tokenizer", ("cat",), 77)
    diffusers.PNDMScheduler(**create.SCHEDULER).save_pretrained(tmp_path / "scheduler")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").exists()

    sd, params = stable.load(tmp_path)
    ids = stable.tokenize(sd, ["a cat", ""])
    states = text_encoder(torch.tensor(ids, dtype=torch.long))[0]
    np.testing.assert_allclose(stable.encode_prompts(sd, params, ids), states, atol=TOLERANCE)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 16, 16, 4)).astype(np.float32)
    times = np.array([3, 801], np.int32)
    expected = unet(torch.tensor(first(x)), torch.tensor(times).long(), states).sample
    out = jax.jit(functools.partial(stable.apply_unet, sd))(params, x, times, states.numpy())
    np.testing.assert_allclose(out, last(expected), atol=TOLERANCE)
    images = rng.random((1, 128, 128, 3), np.float32)
    pixels = torch.tensor(first(images)) * 2 - 1
    expected = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    latents = jax.jit(functools.partial(stable.encode_images, sd))(params, images)
    np.testing.assert_allclose(latents, last(expected), atol=TOLERANCE)


# --- golden numbers -------------------------------------------------------------------------------


def edited_rows(pipe, word: str, mode: str) -> list[int]:
    """The rows of the token table that the reference overwrites, or all of the word's."""
    ids = pipe.tokenizer(word.replace("_", " "), add_special_tokens=False).input_ids
    return ids[:1] if mode == "first_piece" else sorted(set(ids))


def golden_of_pytorch(torch, directory: Path) -> dict[str, np.ndarray]:
    """What transformers, diffusers' modules and its pipeline make of the small model."""
    import diffusers
    import transformers

    loaded = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
    }
    for component, cls in loaded.items():
        model, info = cls.from_pretrained(str(directory / component), output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        loaded[component] = model.eval()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(str(directory), **loaded)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config
    table = pipe.text_encoder.get_input_embeddings().weight
    vectors, noise = torch.tensor(draw("vectors", 3, 32)), torch.tensor(draw("noise", 3, 4, 8, 8))
    numbers = {}
    for mode in conditioning.INJECTION_MODES:
        states, sampled = [], {name: [] for name in samplers.SAMPLERS}
        for row, word in enumerate(WORDS):
            prompt = conditioning.PROMPT.format(word.replace("_", " "))
            rows = edited_rows(pipe, word, mode)
            before = table[rows].clone()
            table[rows] = vectors[row]
            states.append(pipe.encode_prompt(prompt, "cpu", 1, False)[0])
            for name in samplers.SAMPLERS if mode == "first_piece" else ():
                pipe.scheduler = torch_scheduler(diffusers, name, config)
                sample = pipe(
                    prompt,
                    num_inference_steps=20,
                    guidance_scale=7.5,
                    latents=noise[row : row + 1],
                    output_type="latent",
                )
                sampled[name].append(sample.images)
            table[rows] = before
        numbers[f"states.{mode}"] = torch.cat(states)
        numbers |= {f"latents.{n}": torch.cat(parts) for n, parts in sampled.items() if parts}
    time = torch.tensor([17, 481, 999])
    numbers["unet"] = pipe.unet(noise, time, numbers["states.first_piece"]).sample
    pixels = torch.tensor(draw("pixels", 2, 3, 16, 16)).clamp(-1, 1)
    numbers["encoded"] = pipe.vae.encode(pixels).latent_dist.mean * 0.18215
    numbers["decoded"] = pipe.vae.decode(noise / 0.18215).sample.clamp(-1, 1) / 2 + 0.5
    return {name: np.ascontiguousarray(value.numpy()) for name, value in numbers.items()}


def torch_scheduler(diffusers, name: str, config):
    if name == "pndm":
        return diffusers.PNDMScheduler.from_config(config)
    if name == "ddim":
        return diffusers.DDIMScheduler.from_config(config, clip_sample=False)
    # As the Flax scheduler and the paper: the last step ends at the least noise trained on.
    more = {"timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"}
    return diffusers.DPMSolverMultistepScheduler.from_config(config, **more)


@parity
def test_the_golden_numbers_are_those_of_pytorch(torch, tmp_path):
    pytest.importorskip("diffusers")
    numbers, stored = golden_of_pytorch(torch, write_small(tmp_path)), load_file(GOLDEN)
    assert numbers.keys() == stored.keys() and GOLDEN.stat().st_size < 300_000
    for name, value in stored.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(numbers[name], value, atol=1e-4 * scale, err_msg=name)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return stable.load(write_small(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


def assert_relative(ours, golden: np.ndarray) -> None:
    np.testing.assert_allclose(ours, golden, atol=TOLERANCE * np.abs(golden).max(), rtol=0)


@pytest.mark.parametrize("mode", conditioning.INJECTION_MODES)
def test_golden_text_states(small, golden, mode):
    sd, params = small
    ids, mask, _ = conditioning.class_tokens(sd, WORDS, mode)
    assert mask.sum(axis=1).tolist() == ([1, 1, 1] if mode == "first_piece" else [1, 2, 2])
    vectors = draw("vectors", 3, 32)
    ours = jax.jit(functools.partial(conditioning.encode_with_injection, sd))(
        params, ids, mask, vectors
    )
    np.testing.assert_allclose(ours, golden[f"states.{mode}"], atol=1e-5)


def test_golden_networks(small, golden):
    sd, params = small
    times = np.array([17, 481, 999], np.int32)
    noise = last(draw("noise", 3, 4, 8, 8))
    unet = jax.jit(functools.partial(stable.apply_unet, sd))
    assert_relative(unet(params, noise, times, golden["states.first_piece"]), last(golden["unet"]))
    pixels = last(np.clip(draw("pixels", 2, 3, 16, 16), -1, 1))
    encode = jax.jit(functools.partial(stable.encode_images, sd))
    assert_relative(encode(params, pixels / 2 + 0.5), last(golden["encoded"]))
    decode = jax.jit(functools.partial(stable.decode_latents, sd))
    assert_relative(decode(params, noise), last(golden["decoded"]))


@pytest.mark.parametrize(
    "name",
    [n if n == "ddim" else pytest.param(n, marks=pytest.mark.slow) for n in samplers.SAMPLERS],
)
def test_golden_chain(small, golden, name):
    """Tokenizer, injection, text encoder, 20 steps with guidance: diffusers' pipeline."""
    sd, params = small
    ids, mask, empty = conditioning.class_tokens(sd, WORDS)
    apply = functools.partial(stable.apply_unet, sd)
    sampler = samplers.make_sampler(apply, sd.schedule, name, 20, guidance=7.5)

    @jax.jit
    def chain(params, vectors, noise):
        cond = conditioning.encode_with_injection(sd, params, ids, mask, vectors)
        return sampler(params, noise, cond, stable.encode_prompts(sd, params, empty))

    ours = chain(params, draw("vectors", 3, 32), last(draw("noise", 3, 4, 8, 8)))
    assert_relative(ours, last(golden[f"latents.{name}"]))


if __name__ == "__main__":
    import torch as library

    library.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as scratch:
        tensors = golden_of_pytorch(library, write_small(Path(scratch)))
    GOLDEN.parent.mkdir(exist_ok=True)
    save_file(tensors, GOLDEN)
    print({name: value.shape for name, value in tensors.items()}, GOLDEN.stat().st_size)
