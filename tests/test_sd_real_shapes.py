"""Stable Diffusion v1 at its published sizes: memory while it is read, parity with PyTorch."""

import functools
import gc
import json
import math
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file

from oal_jax.generator import conditioning, create, stable_diffusion_v1
from oal_jax.generator import stable_diffusion as stable
from oal_jax.pretrained import diffusers_directory, torch_layout

# The config files of v1-4.
UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.2.2",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.2.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT_ENCODER = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "torch_dtype": "float32",
    "transformers_version": "4.21.0.dev0",
    "vocab_size": 49408,
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
CONFIGS = {"unet": UNET, "vae": VAE, "text_encoder": TEXT_ENCODER}
# Published numbers of parameters.
COUNTS = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
STEMS = {
    "text_encoder": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
WORDS = ("cat", "aquarium_fish", "pickup_truck")
TOLERANCE = 1e-3
GIB = 2**30


def write_configs(directory: Path) -> None:
    for name, config in CONFIGS.items():
        diffusers_directory.write_json(directory / name / "config.json", config)
    diffusers_directory.write_json(directory / "scheduler" / "scheduler_config.json", SCHEDULER)
    create.write_tokenizer(directory / "tokenizer", WORDS, 77)
    # Real directories hold these too; they are never read.
    for name in ("safety_checker", "feature_extractor"):
        diffusers_directory.write_json(directory / name / "config.json", {})
    (directory / "safety_checker" / "pytorch_model.bin").write_bytes(b"\x80\x04")


def write_sparse(directory: Path, shapes: dict, dtype: str) -> None:
    """Write safetensors files of zeros with these shapes. They take no space on disk."""
    width = {"F32": 4, "F16": 2}[dtype]
    for name, tree in shapes.items():
        header, end = {}, 0
        for path, leaf in traverse_util.flatten_dict(tree).items():
            shape = torch_layout.torch_shape(path, leaf.shape)
            start, end = end, end + width * math.prod(shape)
            key = torch_layout.torch_names(path)[0]
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (directory / name / f"{STEMS[name]}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)


# Prints the peak memory of a process that loads a directory, and the bytes of its parameters.
_LOAD = """
import resource, sys
from pathlib import Path
import jax
from oal_jax.generator import stable_diffusion
sd, params = stable_diffusion.load(Path(sys.argv[1]))
jax.block_until_ready(params)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


def counts(shapes: dict) -> dict[str, int]:
    return {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in shapes.items()}


@pytest.mark.slow
def test_sizes_without_files_are_the_published_ones():
    init = functools.partial(stable.init_params, stable_diffusion_v1.build())
    assert counts(jax.eval_shape(init, jax.random.key(0))) == COUNTS


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_loading_holds_one_copy(tmp_path, dtype):
    write_configs(tmp_path)
    shapes = stable.param_shapes(stable.build(tmp_path), tmp_path)
    assert counts(shapes) == COUNTS
    write_sparse(tmp_path, shapes, dtype)
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-c", _LOAD, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    peak, held = map(int, run.stdout.split())
    assert held == 4 * sum(COUNTS.values())
    assert peak < 1.3 * held + GIB, f"{peak / GIB:.2f} GiB for {held / GIB:.2f}"


@pytest.fixture(scope="module")
def torch():
    module = pytest.importorskip("torch")
    module.set_grad_enabled(False)
    module.manual_seed(0)
    return module


@pytest.fixture
def directory(tmp_path):
    """A directory that is deleted after the test: pytest would keep its gigabytes."""
    write_configs(tmp_path)
    yield tmp_path
    shutil.rmtree(tmp_path)
    gc.collect()


def read(directory: Path, name: str):
    """The modules, and the parameters of one component as `load` reads them."""
    sd = stable.build(directory)
    tree = stable.param_shapes(sd, directory)[name]
    return sd, {name: diffusers_directory.read_params(directory / name, tree)}


def assert_close(ours, theirs) -> None:
    """Compare by the largest difference, relative to the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"relative error {error:.1e}")
    assert error < TOLERANCE


@pytest.mark.parity
@pytest.mark.filterwarnings("default")  # those of diffusers and transformers are no errors
@pytest.mark.parametrize("mode", conditioning.INJECTION_MODES)
def test_text_states(torch, directory, mode):
    """CLIP ViT-L/14: plain, and with the outliers in place of rows of its token table."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig.from_dict(TEXT_ENCODER)
    theirs = transformers.CLIPTextModel(config).eval()
    theirs.save_pretrained(directory / "text_encoder")
    sd, params = read(directory, "text_encoder")
    ids, mask, _ = conditioning.class_tokens(sd, WORDS, mode)
    plain = theirs(torch.tensor(ids, dtype=torch.long))[0]
    assert_close(stable.encode_prompts(sd, params, ids), plain)
    vectors = np.random.default_rng(0).standard_normal((len(WORDS), 768)).astype(np.float32)
    injected = jax.jit(functools.partial(conditioning.encode_with_injection, sd))
    ours = injected(params, ids, mask, vectors)
    table = theirs.get_input_embeddings().weight
    for row in range(len(WORDS)):
        pieces = np.unique(ids[row][mask[row]])
        # The reference replaces these ids at all positions; here they are at no others.
        assert (np.isin(ids[row], pieces) == mask[row]).all()
        before = table[pieces].clone()
        table[pieces] = torch.tensor(vectors[row])
        expected = theirs(torch.tensor(ids[row : row + 1], dtype=torch.long))[0]
        table[pieces] = before
        assert_close(ours[row : row + 1], expected)


@pytest.mark.parity
@pytest.mark.filterwarnings("default")  # those of diffusers and transformers are no errors
def test_unet(torch, directory):
    """All 860 million parameters, in half precision on disk."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UNet2DConditionModel.from_config(UNET).eval()
    for parameter in theirs.parameters():
        parameter.copy_(parameter.half().float())
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 64, 64, 4)).astype(np.float32)
    states = rng.standard_normal((1, 77, 768)).astype(np.float32)
    times = np.array([481], np.int32)
    latents = torch.tensor(x).permute(0, 3, 1, 2)
    expected = theirs(latents, torch.tensor(times).long(), torch.tensor(states)).sample
    theirs.half().save_pretrained(directory / "unet", variant="fp16")
    del theirs
    gc.collect()
    sd, params = read(directory, "unet")
    apply = jax.jit(functools.partial(stable.apply_unet, sd))
    assert_close(apply(params, x, times, states), expected.permute(0, 2, 3, 1))


@pytest.mark.parity
@pytest.mark.filterwarnings("default")  # those of diffusers and transformers are no errors
def test_vae(torch, directory):
    """An image of 512 x 512 and a latent of 64 x 64; attention has its old names on disk."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKL.from_config(VAE).eval()
    tensors = theirs.state_dict()
    for new, old in {
        "to_q": "query",
        "to_k": "key",
        "to_v": "value",
        "to_out.0": "proj_attn",
    }.items():
        tensors = {name.replace(new, old): value for name, value in tensors.items()}
    file = directory / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: value.numpy() for name, value in tensors.items()}, file)
    rng = np.random.default_rng(0)
    image = rng.random((1, 512, 512, 3), np.float32)
    pixels = torch.tensor(image).permute(0, 3, 1, 2) * 2 - 1
    mean = theirs.encode(pixels).latent_dist.mean * 0.18215
    latent = rng.standard_normal((1, 64, 64, 4)).astype(np.float32)
    decoded = theirs.decode(torch.tensor(latent).permute(0, 3, 1, 2) / 0.18215).sample
    mean, decoded = mean.permute(0, 2, 3, 1), decoded.permute(0, 2, 3, 1)
    decoded = (decoded * 0.5 + 0.5).clamp(0, 1)
    del theirs, tensors
    gc.collect()
    sd, params = read(directory, "vae")
    assert_close(jax.jit(functools.partial(stable.encode_images, sd))(params, image), mean)
    assert_close(jax.jit(functools.partial(stable.decode_latents, sd))(params, latent), decoded)
