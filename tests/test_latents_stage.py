"""Stages `generator` and `latents` with a Stable Diffusion of other sizes than the data's."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_stable_diffusion import write_small

from oal_jax.config import Config
from oal_jax.data.sources import ImageSet
from oal_jax.errors import UserError
from oal_jax.generator import create
from oal_jax.runtime import artifacts, distributed
from oal_jax.stages import generator, latents
from oal_jax.stages.context import Context

WORDS = ("top", "trousers", "pullover", "dress", "coat", "[polo] shirt", "shoe", "boot")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """16 px, three channels, 32 wide; the images have 28 px and one channel."""
    return write_small(tmp_path_factory.mktemp("small"), (*create.FASHION_CLASSES, *WORDS))


@pytest.fixture
def context(model, tmp_path):
    config = Config()
    config.data.train_images = 12
    config.teacher.width = 32
    config.generator.directory = str(model)
    config.outliers.source = "diffusion"
    config.latents.per_class, config.latents.steps, config.latents.chunk = 2, 2, 8
    outliers = np.random.default_rng(0).standard_normal((8, 3, 32)).astype(np.float32)
    tensors = {"outliers": outliers, "labels": np.arange(8, dtype=np.int32)}
    artifacts.write_tensors(tmp_path / "outliers" / "outliers.safetensors", tensors)
    return Context(config, tmp_path, distributed.make_mesh(), jax.random.key(0))


def test_generator_stage_names_its_files(context, model):
    (path,) = generator.run(context)
    source = json.loads(path.read_text())
    assert source["directory"] == str(model) and "class_words" not in source
    assert "unet/diffusion_pytorch_model.safetensors" in source["files"]


def test_class_words(context):
    context.config.generator.class_words = WORDS
    (path,) = generator.run(context)
    assert json.loads(path.read_text())["class_words"] == list(WORDS)
    assert generator.class_words(context) == WORDS
    context.config.generator.class_words = (",".join(WORDS),)  # as a flag gives them
    assert generator.class_words(context) == WORDS
    context.config.generator.class_words = WORDS[:3]
    with pytest.raises(UserError, match=r"class_words .*3 .*fashion .*8"):
        generator.class_words(context)
    context.config.generator.class_words = (*WORDS[:7], "hippopotamus of the river")
    with pytest.raises(UserError, match="hippopotamus .*16"):
        generator.run(context)


def test_the_stage_writes_what_the_pools_read(context):
    """Latents of sampled outliers and of ID images, at the generator's size."""
    assert latents.samples(context.config)
    paths = {path.name: load_file(path) for path in latents.run(context) if path.suffix != ".json"}
    assert paths.keys() == latents.files(context.config) | {"pictures.safetensors"}
    sampled = paths["latents.safetensors"]
    assert sampled["latents"].shape == (16, 8, 8, 4) and sampled["latents"].dtype == np.float32
    assert len(np.unique(sampled["latents"][:, 0, 0, 0])) == 16
    assert sampled["labels"].tolist() == [*range(8), *range(8)]
    assert latents.pictures(context)["outliers"].shape == (8, 2, 28, 28, 1)
    id_latents = paths["id_latents.safetensors"]["latents"]
    assert id_latents.shape == (12, 8, 8, 4) and id_latents.dtype == np.float16
    assert np.isfinite(id_latents).all() and id_latents.std() > 0


def test_without_sampled_latents_none_is_sampled(context):
    context.config.outliers.source = "random"
    assert not latents.samples(context.config) and latents.pictures(context) == {}
    assert {path.name for path in latents.run(context)} == latents.files(context.config)


@pytest.mark.slow
def test_streamed_images_have_the_same_latents(context):
    class Halves(ImageSet):
        def chunks(self, size, rows=None):
            return super().chunks(5, rows)

    sd, params = generator.load(context, components=("vae",))
    data = context.train_images()
    whole = generator.encode(context, sd, params, data, np.float16)
    streamed = generator.encode(context, sd, params, Halves(*data), np.float16)
    np.testing.assert_array_equal(streamed, whole)


def test_chunks_are_of_one_area(context):
    chunk = context.config.latents.chunk = 200
    assert latents.chunk_size(context, (8, 8, 4), 1000) == chunk
    assert latents.chunk_size(context, (16, 16, 4), 1000) == 50
    assert latents.chunk_size(context, (64, 64, 4), 1000) == 3
    assert latents.chunk_size(context, (512, 512, 4), 1000) == 1
    assert latents.chunk_size(context, (8, 8, 4), 10) == 20  # all that are sampled


@pytest.mark.slow
def test_bfloat16_samples_are_near(context):
    run = {}
    for dtype in ("float32", "bfloat16"):
        context.config.generator.dtype = dtype
        latents.run(context)
        run[dtype] = load_file(context.directory("latents") / "latents.safetensors")["latents"]
    assert run["bfloat16"].dtype == np.float32 and not np.array_equal(*run.values())
    error = np.linalg.norm(run["bfloat16"] - run["float32"]) / np.linalg.norm(run["float32"])
    assert error < 0.1


def test_a_generator_that_does_not_fit_is_one_line(context, model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    file = broken / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({name: v for name, v in tensors.items() if "quant_conv" not in name}, file)
    context.config.generator.directory = str(broken)
    with pytest.raises(UserError, match=r"missing (post_)?quant_conv"):
        generator.run(context)
    context.config.generator.directory = ""
    with pytest.raises(UserError, match="outliers .*32 .* 128"):
        latents.run(context)
