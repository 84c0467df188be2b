"""The shipped Stable Diffusion in PyTorch diffusers: same files, same numbers."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oal_jax.pretrained
from oal_jax.generator import conditioning, create, samplers
from oal_jax.generator import stable_diffusion as stable

pytestmark = [
    pytest.mark.parity,
    # PyTorch's and diffusers' own warnings are not ours to mend.
    pytest.mark.filterwarnings("default"),
]

DIRECTORY = Path(oal_jax.pretrained.__file__).parent / "weights" / "fashion_sd"
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def ours():
    return stable.load(DIRECTORY)


@pytest.fixture(scope="module")
def torch():
    module = pytest.importorskip("torch")
    module.set_grad_enabled(False)
    return module


@pytest.fixture(scope="module")
def pipeline(torch):
    diffusers = pytest.importorskip("diffusers")
    made = diffusers.StableDiffusionPipeline.from_pretrained(
        str(DIRECTORY), torch_dtype=torch.float32
    )
    made.vae.float(), made.unet.float(), made.text_encoder.float()
    return made


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).standard_normal((4, 4, 8, 8)).astype(np.float32)


def _ids(sd):
    ids, _, empty = conditioning.class_tokens(sd, create.FASHION_CLASSES, create.PROMPT)
    return ids, empty


def test_tokens_and_text_states(torch, pipeline, ours):
    sd, params = ours
    ids, _ = _ids(sd)
    prompts = [create.PROMPT.format(name) for name in create.FASHION_CLASSES]
    length = ids.shape[1]
    theirs = pipeline.tokenizer(prompts, padding="max_length", max_length=length).input_ids
    np.testing.assert_array_equal(ids, theirs)
    expected = pipeline.text_encoder(torch.tensor(ids, dtype=torch.long))[0]
    np.testing.assert_allclose(stable.encode_prompts(sd, params, ids), expected, atol=TOLERANCE)


def test_vae(torch, pipeline, ours, latents):
    sd, params = ours
    images = np.random.default_rng(1).random((2, 28, 28, 1), np.float32)
    padded = np.asarray(stable.pad_images(sd, images)).transpose(0, 3, 1, 2) * 2 - 1
    expected = pipeline.vae.encode(torch.from_numpy(padded)).latent_dist.mean * sd.scaling_factor
    encode = jax.jit(functools.partial(stable.encode_images, sd))
    np.testing.assert_allclose(encode(params, images), expected, atol=TOLERANCE)
    decoded = pipeline.vae.decode(torch.from_numpy(latents) / sd.scaling_factor).sample
    expected = (decoded.permute(0, 2, 3, 1) * 0.5 + 0.5).clamp(0, 1)
    decode = jax.jit(functools.partial(stable.decode_latents, sd))
    np.testing.assert_allclose(decode(params, latents), expected, atol=TOLERANCE)


def test_unet(torch, pipeline, ours, latents):
    sd, params = ours
    states = np.array(stable.encode_prompts(sd, params, _ids(sd)[0][:4]))
    times = np.array([0, 1, 500, 999], np.int32)
    expected = pipeline.unet(
        torch.from_numpy(latents), torch.from_numpy(times).long(), torch.from_numpy(states)
    ).sample
    apply = jax.jit(functools.partial(stable.apply_unet, sd))
    np.testing.assert_allclose(apply(params, latents, times, states), expected, atol=TOLERANCE)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_twenty_guided_steps(torch, pipeline, ours, latents, name):
    diffusers = pytest.importorskip("diffusers")
    sd, params = ours
    ids, empty = _ids(sd)
    cond = np.array(stable.encode_prompts(sd, params, ids[:4]))
    uncond = np.array(stable.encode_prompts(sd, params, empty))
    apply = functools.partial(stable.apply_unet, sd)
    sampler = jax.jit(samplers.make_sampler(apply, sd.schedule, name, 20, guidance=3.0))
    ours_out = sampler(params, jnp.asarray(latents), cond, uncond)

    config = pipeline.scheduler.config
    scheduler = {
        "pndm": lambda: diffusers.PNDMScheduler.from_config(config),
        "ddim": lambda: diffusers.DDIMScheduler.from_config(config, clip_sample=False),
        "dpm_solver_pp_2m": lambda: diffusers.DPMSolverMultistepScheduler.from_config(
            config,
            timestep_spacing="linspace",
            # As the Flax scheduler and the paper: the last step ends at the least noise trained on.
            final_sigmas_type="sigma_min",
        ),
    }[name]()
    scheduler.set_timesteps(20)
    x = torch.from_numpy(latents)
    conditions = torch.from_numpy(cond), torch.from_numpy(uncond).expand(cond.shape)
    for time in scheduler.timesteps:
        with_text, without = (pipeline.unet(x, time, states).sample for states in conditions)
        x = scheduler.step(without + 3.0 * (with_text - without), time, x).prev_sample
    np.testing.assert_allclose(ours_out, x, atol=TOLERANCE)


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
    x = rng.standard_normal((2, 4, 16, 16)).astype(np.float32)
    times = np.array([3, 801], np.int32)
    expected = unet(torch.tensor(x), torch.tensor(times).long(), states).sample
    out = jax.jit(functools.partial(stable.apply_unet, sd))(params, x, times, states.numpy())
    np.testing.assert_allclose(out, expected, atol=TOLERANCE)
    images = rng.random((1, 128, 128, 3), np.float32)
    pixels = torch.tensor(images).permute(0, 3, 1, 2) * 2 - 1
    expected = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    latents = jax.jit(functools.partial(stable.encode_images, sd))(params, images)
    np.testing.assert_allclose(latents, expected, atol=TOLERANCE)
