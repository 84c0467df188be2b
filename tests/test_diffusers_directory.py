"""Diffusers directories: layouts that are read, files that are written, and every fault."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import load_file, save_file
from small_stable_diffusion import write_tiny

from oal_jax.errors import UserError
from oal_jax.generator import stable_diffusion as stable
from oal_jax.pretrained import diffusers_directory, torch_layout
from oal_jax.pretrained.diffusers_directory import COMPONENTS

UNET, VAE = (f"{name}/diffusion_pytorch_model.safetensors" for name in ("unet", "vae"))


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def shapes(tiny_directory):
    """Shapes of all parameters. Computing them takes most of the time of a load."""
    return stable.param_shapes(stable.build(tiny_directory), tiny_directory)


@pytest.fixture(scope="module")
def tiny(tiny_directory, shapes):
    return read(tiny_directory, shapes, *COMPONENTS)


@pytest.fixture
def copied(tiny_directory, tmp_path):
    return Path(shutil.copytree(tiny_directory, tmp_path / "sd"))


def read(directory, shapes, *components):
    return {
        name: diffusers_directory.read_params(directory / name, shapes[name]) for name in components
    }


def assert_equal(params, expected):
    assert params.keys() == expected.keys()
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_round_trip_is_bit_equal(tiny, shapes, copied):
    before = {f: f.read_bytes() for f in copied.rglob("*.safetensors")}
    diffusers_directory.save(copied, tiny, scaling_factor=0.5)
    assert before == {f: f.read_bytes() for f in copied.rglob("*.safetensors")}
    sd, params = stable.load(copied)
    assert sd.scaling_factor == 0.5
    assert_equal(params, tiny)


def test_names_and_layout_are_those_of_pytorch(tiny_directory, tiny):
    tensors = load_file(tiny_directory / UNET)
    kernel = tiny["unet"]["up_blocks_0"]["attentions_0"]["transformer_blocks_0"]["ff"]["net_0"]
    name = "up_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight"
    np.testing.assert_array_equal(tensors[name], kernel["proj"]["kernel"].T)
    np.testing.assert_array_equal(
        tensors["conv_in.weight"], tiny["unet"]["conv_in"]["kernel"].transpose(3, 2, 0, 1)
    )
    assert "time_embedding.linear_1.weight" in tensors
    text = load_file(tiny_directory / "text_encoder" / "model.safetensors")
    assert "text_model.encoder.layers.1.self_attn.q_proj.weight" in text


def test_sharded_index_old_names_and_buffers(tiny, shapes, copied):
    folder = copied / "vae"
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in renames.items():
        tensors = {name.replace(new, old): value for name, value in tensors.items()}
    # The first Stable Diffusion stores these as 1 x 1 convolutions.
    for name in [n for n in tensors if n.endswith("query.weight")]:
        tensors[name] = tensors[name][:, :, None, None]
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    text = copied / "text_encoder" / "model.safetensors"
    ids = np.arange(16, dtype=np.int64)[None]
    save_file(load_file(text) | {"text_model.embeddings.position_ids": ids}, text)
    assert_equal(read(copied, shapes, *COMPONENTS), tiny)
    (folder / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b\.safetensors"):
        diffusers_directory.files(copied)


def test_flax_msgpack(tiny, shapes, copied):
    (copied / VAE).unlink()
    file = copied / "vae" / "diffusion_flax_model.msgpack"
    data = serialization.msgpack_serialize(jax.tree.map(np.asarray, tiny["vae"]))
    file.write_bytes(data)
    assert_equal(read(copied, shapes, "vae")["vae"], tiny["vae"])
    diffusers_directory.check_params(copied / "vae", shapes["vae"])
    file.write_bytes(data[:100])
    with pytest.raises(UserError, match=file.name):
        read(copied, shapes, "vae")
    kernels = dict(tiny["vae"])
    kernels["extra"] = kernels.pop("quant_conv")
    file.write_bytes(serialization.msgpack_serialize(jax.tree.map(np.asarray, kernels)))
    with pytest.raises(UserError, match=r"missing quant_conv\.\S+, .*left over extra\."):
        read(copied, shapes, "vae")


def fails(copied, shapes, component, message):
    """Both readers raise one line: that of the headers, and that of the tensors."""
    for function in (diffusers_directory.check_params, diffusers_directory.read_params):
        with pytest.raises(UserError, match=message) as raised:
            function(copied / component, shapes[component])
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("fault", ["missing", "left over", "wrong shape", "of type I32", "in all"])
def test_checkpoint_that_does_not_fit(copied, shapes, fault):
    tensors = load_file(copied / UNET)
    name, message = "conv_in.bias", rf"{fault} conv_in\.bias"
    if fault == "missing":
        del tensors[name]
    elif fault == "left over":
        tensors[f"{name}.bias"] = np.zeros(3, np.float32)
    elif fault == "wrong shape":
        tensors[name] = tensors[name][:-1]
    elif fault == "of type I32":
        tensors[name] = tensors[name].astype(np.int32)
        message = r"conv_in\.bias of type I32"
    else:
        tensors = {name: tensors[name]}
        message = r"missing (\S+, ){5}\.\.\. \(\d+ in all\)"
    save_file(tensors, copied / UNET)
    fails(copied, shapes, "unet", message)


def test_load_and_check_read_the_weights_of_all_components(copied):
    tensors = load_file(copied / VAE)
    del tensors["quant_conv.bias"]
    save_file(tensors, copied / VAE)
    for function in (stable.check, stable.load):
        with pytest.raises(UserError, match=r"missing quant_conv\.bias"):
            function(copied)


@pytest.mark.parametrize("length", [0, 5, 200, -1])
def test_truncated_file(copied, shapes, length):
    (copied / UNET).write_bytes((copied / UNET).read_bytes()[:length])
    fails(copied, shapes, "unet", "diffusion_pytorch_model.*damaged")


def test_pickles_are_refused(copied, shapes):
    file = copied / UNET
    whole = file.read_bytes()
    file.rename(file.with_suffix(".bin"))
    fails(copied, shapes, "unet", r"convert --input \S*\.bin --output \S*/diffusion_")
    file.with_suffix(".bin").unlink()
    fails(copied, shapes, "unet", "no weights")
    for start in (b"PK\x03\x04archive/data.pkl", b"\x80\x02ctorch\n_utils"):
        file.write_bytes(start * 20)
        fails(copied, shapes, "unet", r"unet/.* pickle.*pretrained\.convert")
    file.write_bytes(whole)
    diffusers_directory.check_params(copied / "unet", shapes["unet"])


def test_other_files_of_real_directories_are_ignored(tiny, shapes, copied):
    """Other folders, pickles, single-file checkpoints and variants."""
    for name in ("safety_checker/pytorch_model.bin", "v1-4.ckpt", "unet/diffusion_model.bin"):
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_bytes(b"\x80\x04 not to be read")
    (copied / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not to be read")
    assert_equal(read(copied, shapes, *COMPONENTS), tiny)
    names = [str(path) for path in diffusers_directory.files(copied)]
    assert not any("v1-4" in name or "safety" in name for name in names)


def test_the_half_precision_variant_is_read_as_float32(tiny, shapes, copied):
    half = {name: value.astype(np.float16) for name, value in load_file(copied / UNET).items()}
    save_file(half, (copied / UNET).with_suffix(".fp16.safetensors"))
    (copied / UNET).unlink()
    params = read(copied, shapes, "unet")["unet"]
    assert params["conv_in"]["bias"].dtype == jnp.float32
    rounded = jax.tree.map(lambda x: np.float32(np.float16(x)), tiny["unet"])
    assert_equal(params, rounded)


@pytest.mark.parametrize("variants", [("bf16",), ("non_ema",), ("ema", "non_ema")])
def test_other_variants(tiny, shapes, copied, variants):
    file = copied / UNET
    for name in variants:
        shutil.copy(file, file.with_suffix(f".{name}.safetensors"))
    file.unlink()
    if variants == ("bf16",):
        assert_equal(read(copied, shapes, "unet")["unet"], tiny["unet"])
    else:
        fails(copied, shapes, "unet", f"unet: only the variants {', '.join(variants)} are there")


@pytest.mark.parametrize(
    ("folder", "model"), [("transformer", "Diffusion 3"), ("text_encoder_2", "Diffusion XL")]
)
def test_a_directory_of_another_model(copied, folder, model):
    """SD3 has no UNet; SDXL has one and a second text encoder."""
    (copied / "unet").rename(copied / folder) if folder == "transformer" else None
    (copied / folder).mkdir(exist_ok=True)
    (copied / folder / "config.json").write_text("{}")
    for function in (stable.check, stable.load):
        with pytest.raises(UserError, match=model) as raised:
            function(copied)
        assert "\n" not in str(raised.value)


def test_one_component_alone(tiny, copied):
    (copied / UNET).write_bytes(b"never opened")
    _, params = stable.load(copied, components=("vae",))
    assert_equal(params, {"vae": tiny["vae"]})


def test_config_faults(copied):
    config = copied / "unet" / "config.json"
    content = json.loads(config.read_text())
    changes = {"norm_num_groups": "norm_num_groups", "cross_attention_dim": "width"}
    for name, message in changes.items():
        config.write_text(json.dumps(content | {name: 8}))
        with pytest.raises(UserError, match=message):
            stable.build(copied)
    config.write_text("{")
    with pytest.raises(UserError, match=r"unet/config\.json.* JSON"):
        stable.load(copied)
    config.unlink()
    with pytest.raises(UserError, match=r"unet/config\.json"):
        stable.load(copied)
    with pytest.raises(UserError, match=r"model_index\.json is a file"):
        stable.load(copied / "model_index.json")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model_index", {"_class_name": "StableDiffusionXLPipeline"}, "StableDiffusionXLPipeline"),
        ("model_index", {"_class_name": "FluxPipeline"}, "Stable Diffusion v1 or v2"),
        ("unet/config", {"_class_name": "UNet3DConditionModel"}, "UNet3DConditionModel"),
        ("unet/config", {"down_block_types": ["AttnDownBlock2D"] * 2}, "'AttnDownBlock2D'"),
        ("unet/config", {"in_channels": 9}, "inpainting"),
        ("unet/config", {"addition_embed_type": "text_time"}, "addition_embed_type"),
        ("unet/config", {"block_out_channels": [32, 40]}, "describe no network"),
        ("unet/config", {"block_out_channels": "wide"}, "block_out_channels='wide'"),
        ("unet/config", {"block_out_channels": [32]}, "differ in length"),
        ("unet/config", {"attention_head_dim": [4]}, "attention_head_dim"),
        ("unet/config", {"attention_head_dim": None}, "attention_head_dim"),
        ("unet/config", {"attention_head_dim": 3}, "describe no network"),
        ("vae/config", {"up_block_types": ["AttnUpDecoderBlock2D"] * 3}, "AttnUpDecoderBlock2D"),
        ("vae/config", {"use_quant_conv": False}, "use_quant_conv"),
        ("vae/config", {"scaling_factor": None}, "scaling_factor .*None"),
        ("vae/config", {"scaling_factor": "0.18"}, "scaling_factor .*'0.18'"),
        ("text_encoder/config", {"model_type": "t5"}, "'t5'"),
        ("text_encoder/config", {"hidden_act": "relu"}, "'relu'"),
        ("text_encoder/config", {"num_hidden_layers": "two"}, "num_hidden_layers"),
        ("scheduler/scheduler_config", {"beta_schedule": "squaredcos_cap_v2"}, "squaredcos"),
        ("scheduler/scheduler_config", {"rescale_betas_zero_snr": True}, "rescale_betas"),
        ("scheduler/scheduler_config", {"beta_start": "low"}, "low"),
    ],
)
def test_another_architecture(copied, file, change, message):
    path = copied / f"{file}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as raised:
        stable.check(copied)
    assert "\n" not in str(raised.value)


def test_layout_functions_are_inverse():
    for shape in ((3,), (3, 4), (2, 3, 4, 5)):
        path = ("m", "kernel" if len(shape) > 1 else "bias")
        array = np.arange(np.prod(shape)).reshape(shape)
        there = torch_layout.to_torch(path, array)
        assert there.shape == torch_layout.torch_shape(path, shape)
        np.testing.assert_array_equal(torch_layout.from_torch(path, there), array)
