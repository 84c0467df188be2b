"""Teachers from files: what they compute, how they are fine-tuned, and every fault."""

from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from helpers import random_variables, refusal
from safetensors.numpy import load_file
from teacher_files import SIZES, resnet_file, vit_file

from oal_jax import main
from oal_jax.config import Config, Data, Teacher
from oal_jax.models.resized import Resized
from oal_jax.models.vit import VisionTransformer
from oal_jax.pretrained.classifiers import load_classifier
from oal_jax.runtime import distributed
from oal_jax.scores import compute
from oal_jax.stages import teacher
from oal_jax.stages.context import Context
from oal_jax.stages.ready import sized
from oal_jax.training.optimizer import adam_by_part

CONFIG = Path(__file__).parent.parent / "configs" / "cifar10_32px.py"


def context_of(tmp_path, teacher_config, **fields):
    data = Data(source="generated", id_set="cifar10", image_size=8, train_images=64, shift=1)
    config = Config(smoke=True, data=data, teacher=teacher_config, **fields)
    mesh = distributed.make_mesh()
    return Context(config, tmp_path / "run", mesh, jax.random.key(0))


def enlarged(images, size):
    """Bilinear, corners not aligned, edges repeated: row by row, then column by column."""
    old = images.shape[1]
    at = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
    low = np.floor(at).astype(int)
    high, part = np.minimum(low + 1, old - 1), at - low
    rows = images[:, low] * (1 - part)[:, None, None] + images[:, high] * part[:, None, None]
    return rows[:, :, low] * (1 - part)[:, None] + rows[:, :, high] * part[:, None]


@pytest.mark.parametrize("kind", [vit_file, pytest.param(resnet_file, marks=pytest.mark.slow)])
def test_a_file_s_network_sees_enlarged_images(tmp_path, kind):
    path = kind(tmp_path / "weights.safetensors")
    context = context_of(tmp_path, Teacher(weights=str(path), image_size=24))
    teacher.run(context)
    images = context.images("test", limit=8).images
    logits, features, *_ = compute(teacher.load(context), images)
    classifier = load_classifier(path, image_size=24)
    larger = enlarged(images / 255, 24).astype(np.float32)
    expected = jax.jit(classifier.net.apply)(classifier.variables, larger)
    np.testing.assert_allclose(logits, expected[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(features, expected[1], rtol=1e-4, atol=1e-4)
    assert np.std(features) > 0.05


def test_gray_images_become_those_of_three_channels():
    net = Resized(VisionTransformer(3, **SIZES), 16)
    gray = np.random.default_rng(0).uniform(size=(2, 16, 16, 1)).astype(np.float32)
    variables = random_variables(net, gray)
    both = [jax.jit(net.apply)(variables, images) for images in (gray, np.repeat(gray, 3, 3))]
    for ours, theirs in zip(*both, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_config_gets_the_sizes_of_the_file(tmp_path):
    path = vit_file(tmp_path / "weights.safetensors", width=32, depth=2, mlp_ratio=3.0)
    sizes = sized(Config(teacher=Teacher(weights=str(path)))).teacher
    assert (sizes.patch, sizes.width, sizes.depth, sizes.heads) == (8, 32, 2, 2)
    assert sizes.mlp_ratio == 3.0
    path = resnet_file(tmp_path / "resnet.safetensors")
    assert sized(Config(teacher=Teacher(weights=str(path)))).teacher.width == 16
    config = Config(teacher=Teacher(weights="nowhere.safetensors"))
    config.method.name = "ce"  # without a teacher
    assert sized(config) == config


def test_a_head_of_other_classes_is_replaced_only_where_it_is_trained(tmp_path):
    path = vit_file(tmp_path / "weights.safetensors", classes=7)
    message = refusal(teacher.run, context_of(tmp_path, Teacher(weights=str(path))))
    assert str(path) in message and "teacher.train=True" in message


def test_fine_tuning_moves_the_head_and_the_body_at_their_rates(tmp_path):
    path = vit_file(tmp_path / "weights.safetensors", classes=7)
    tuned = Teacher(
        weights=str(path), train=True, epochs=1, batch_size=32, body_rate=1e-5, head_rate=1e-3
    )
    context = context_of(tmp_path, tuned)
    teacher.run(context)
    tensors = load_file(context.directory("teacher") / "teacher.safetensors")
    before = load_file(path)
    assert tensors["head.kernel"].shape == (16, 10)
    assert tensors["blocks_0.attn.qkv.kernel"].dtype == np.float32
    moved = np.abs(tensors["blocks_0.attn.qkv.kernel"].T - before["blocks.0.attn.qkv.weight"])
    # Six steps of 32 of the 200 images, and an Adam step is about as long as its rate, at most.
    assert 0.5e-5 < moved.max() < 6.5e-5
    # The bias of a new head is zero before.
    assert 0.5e-3 < np.abs(tensors["head.bias"]).max() < 6.5e-3
    logits, *_ = compute(teacher.load(context), context.images("test", limit=4).images)
    assert logits.shape == (4, 10)


@pytest.mark.slow
def test_a_resnet_keeps_and_trains_its_statistics(tmp_path):
    path = resnet_file(tmp_path / "weights.safetensors")
    tuned = Teacher(weights=str(path), train=True, epochs=1, batch_size=32)
    context = context_of(tmp_path, tuned)
    teacher.run(context)
    tensors = load_file(context.directory("teacher") / "teacher.safetensors")
    before = load_file(path)["bn1.running_mean"]
    assert np.abs(tensors["batch_stats/bn1.mean"] - before).max() > 1e-3


def test_adam_by_part_against_a_transcription():
    rng = np.random.default_rng(0)
    params = {"student": {"body": rng.normal(size=4), "head": rng.normal(size=3)}}
    params = jax.tree.map(np.float32, params)
    rates, steps, floor = {"body": 0.01, "head": 0.5}, 5, 0.1
    optimizer = adam_by_part(rates, lambda path: path[-1].key, steps=steps, floor=floor)
    state, current = optimizer.init(params), params
    moments = {name: (0.0, 0.0) for name in rates}
    expected = {name: params["student"][name].astype(np.float64) for name in rates}
    for step in range(steps):
        grads = {"student": {n: rng.normal(size=p.shape).astype(np.float32) for n, p in
                             params["student"].items()}}  # fmt: skip
        updates, state = optimizer.update(grads, state, current)
        current = optax.apply_updates(current, updates)
        multiplier = floor + (1 - floor) * (1 + np.cos(np.pi * step / steps)) / 2
        for name, g in grads["student"].items():
            m, v = moments[name]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.astype(np.float64) ** 2
            moments[name] = m, v
            unbiased = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            rate = rates[name] * multiplier
            expected[name] = expected[name] - rate * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    for name, values in expected.items():
        np.testing.assert_allclose(current["student"][name], values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.data.root=."], "teacher.weights=vit_base_patch16_224.safetensors"),
        (["--config.data.root=.", "--config.teacher.weights={pickle}"], "x.ckpt"),
        (["--config.data.root=.", "--config.teacher.weights={other}"], "x.safetensors"),
        (["--config.teacher.weights={vit}"], "config data.root"),
    ],
)
def test_a_missing_file_is_one_line(tmp_path, capsys, flags, message):
    (tmp_path / "x.ckpt").write_bytes(b"\x80")
    other = tmp_path / "x.safetensors"
    other.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    paths = {"pickle": tmp_path / "x.ckpt", "other": other}
    paths["vit"] = vit_file(tmp_path / "vit.safetensors")
    argv = ["main", f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}"]
    assert main.guard(main.run, argv + [flag.format(**paths) for flag in flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
