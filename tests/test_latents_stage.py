"""Stages `generator` and `latents` with a Stable Diffusion of other sizes than the data's."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_stable_diffusion import write_small

from oal_jax.config import Config
from oal_jax.errors import UserError
from oal_jax.generator import create, stable_diffusion
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
    config.outliers.knn.repeats, config.outliers.knn.anchors, config.outliers.knn.keep = 1, 3, 1
    config.latents.per_class, config.latents.pictures = 2, 1
    config.latents.steps, config.latents.chunk = 2, 8
    outliers = np.random.default_rng(0).standard_normal((8, 3, 32)).astype(np.float32)
    tensors = {"outliers": outliers, "labels": np.arange(8, dtype=np.int32)}
    artifacts.write_tensors(tmp_path / "outliers" / "outliers.safetensors", tensors)
    return Context(config, tmp_path, distributed.make_mesh(), jax.random.key(0))


def test_generator_names_its_files(context, model):
    (path,) = generator.run(context)
    said = json.loads(path.read_text())
    assert said["directory"] == str(model) and "class_words" not in said
    assert "unet/diffusion_pytorch_model.safetensors" in said["files"]
    context.config.generator.class_words = WORDS
    (path,) = generator.run(context)
    assert json.loads(path.read_text())["class_words"] == list(WORDS)
    assert generator.class_words(context) == WORDS
    context.config.generator.class_words = (",".join(WORDS),)  # as a flag may give them
    assert generator.class_words(context) == WORDS
    context.config.generator.class_words = WORDS[:3]
    with pytest.raises(UserError, match="class_words has 3 words, fashion has 8 classes"):
        generator.run(context)
    context.config.generator.class_words = (*WORDS[:7], "hippopotamus of the river")
    with pytest.raises(UserError, match="tokens, the text encoder takes 16"):
        generator.run(context)


def test_latents_at_another_size_and_of_id_images_on_demand(context):
    assert latents.learns_from_id_latents(context.config)
    context.config.method.micl = "reference"
    assert not latents.learns_from_id_latents(context.config)
    names = {path.name for path in latents.run(context)}
    assert names == {"latents.safetensors", "pictures.safetensors", "prompts.json"}
    written = load_file(context.directory("latents") / "latents.safetensors")
    assert written["latents"].shape == (16, 4, 8, 8)
    assert len(np.unique(written["latents"][:, 0, 0, 0])) == 16
    shown = load_file(context.directory("latents") / "pictures.safetensors")
    assert shown["outliers"].shape == shown["samples"].shape == (8, 1, 28, 28, 1)
    of_id = latents.of_training_images(context)
    assert of_id.shape == (12, 8, 8, 4) and of_id.dtype == np.float16
    assert np.isfinite(of_id).all() and of_id.std() > 0


@pytest.mark.parametrize(
    ("source", "kind", "left"),
    [
        ("random", "outliers", 0),
        ("random", "class", 0),
        ("random", "noised", 0),
        ("diffusion", "outliers", 16),
    ],
)
def test_without_pictures_none_is_drawn(context, monkeypatch, source, kind, left):
    context.config.latents.pictures, context.config.outliers.source = 0, source
    context.config.latents.kind = kind

    def none(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(stable_diffusion, "decode_latents", none)
    latents.run(context)
    assert latents.channels_last(context).shape == (left, 8, 8, 4)
    shown = latents.pictures(context)
    assert shown["outliers"].shape == shown["samples"].shape == (8, 0, 28, 28, 1)


def test_chunks_are_of_one_area(context):
    chunk = context.config.latents.chunk = 200
    assert latents.chunk_size(context, (4, 8, 8), 1000) == chunk
    assert latents.chunk_size(context, (4, 16, 16), 1000) == 48
    assert latents.chunk_size(context, (4, 64, 64), 1000) == 4  # one for each of the four devices
    # No larger than all that is sampled: the one of each class that the report shows, as the
    # training reads none of them.
    assert latents.per_class(context.config) == 1
    assert latents.chunk_size(context, (4, 8, 8), 10) == 12
    context.config.outliers.source = "diffusion"
    assert latents.chunk_size(context, (4, 8, 8), 10) == 20


@pytest.mark.slow
def test_bfloat16_samples_are_near(context):
    run = {}
    for dtype in ("float32", "bfloat16"):
        context.config.generator.dtype = dtype
        context.config.latents.per_class = 1
        latents.run(context)
        run[dtype] = load_file(context.directory("latents") / "latents.safetensors")["latents"]
    assert run["bfloat16"].dtype == np.float32 and not np.array_equal(*run.values())
    error = np.linalg.norm(run["bfloat16"] - run["float32"]) / np.linalg.norm(run["float32"])
    assert error < 0.1


def test_a_generator_that_does_not_fit_is_one_line(context, tmp_path):
    broken = write_small(tmp_path / "broken")
    file = broken / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({name: v for name, v in tensors.items() if "quant_conv" not in name}, file)
    context.config.generator.directory = str(broken)
    with pytest.raises(UserError, match=r"missing (post_)?quant_conv"):
        generator.run(context)
    context.config.generator.directory = ""
    with pytest.raises(UserError, match="outliers have 32 dimensions.* token embeddings 128"):
        latents.run(context)
