"""Whole runs on a folder of images: `configs/own.py`, `student.weights`, `--check`."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from classifier_files import resnet_tensors, vit_tensors, write
from PIL import Image

import oal_jax
from oal_jax import main
from oal_jax.config.flags import parse
from oal_jax.runtime.command import guard
from oal_jax.stages import check_report
from oal_jax.stages.run import run

OWN = str(Path(__file__).parents[1] / "configs" / "own.py")
FORMATS = (("RGB", ".jpg"), ("RGBA", ".png"), ("L", ".tif"), ("P", ".gif"))


def picture(rng, label, size):
    """Stripes in the direction of the class."""
    y, x = np.mgrid[: size[0], : size[1]]
    wave = np.sin((x, y, x + y)[label] / 2 + rng.uniform(0, 6))
    pixels = 128 + 80 * wave[..., None] * (1, 0.5, 0.2) + rng.normal(0, 10, (*size, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of fourteen images of many sizes and formats, and an OOD set."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, count in (("rows", 14), ("columns", 14), ("slopes", 14), ("ood/noise", 6)):
        for i in range(count):
            mode, ending = FORMATS[i % 4]
            size = tuple(rng.integers(20, 50, 2))
            label = {"rows": 0, "columns": 1, "slopes": 2}.get(name)
            image = picture(rng, label, size) if label is not None else None
            image = image or Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
            path = root / name / f"day {i % 2}" / f"{i}{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.convert(mode).save(path)
    return root


def settings(root, *flags):
    argv = ["main", f"--config={OWN}", f"--config.data.root={root}"]
    return parse([*argv, *(f"--config.{flag}" for flag in flags)]).config


SHORT = (
    *("train.epochs=12", "evaluation.scores=msp,knn"),
    *("student.architecture=wide_resnet", "student.depth=10", "student.width=1"),  # compiles fast
)


def test_a_folder_becomes_a_detector(folder, tmp_path, capsys):
    run(settings(folder, *SHORT), tmp_path / "run")
    told = capsys.readouterr().out
    assert "3 classes, 42 colour images" in told and "noise (6)" in told
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data.image_size"] == 24 and config["data.far"] == ["noise"]
    assert config["train.batch_size"] == 8 and config["student.stem"] == "small"
    detector = oal_jax.load(tmp_path / "run")
    assert set(detector.class_names) == {"rows", "columns", "slopes"}
    rows = (tmp_path / "run" / "report" / "ood.csv").read_text().splitlines()
    assert any(row.startswith("knn,noise,far,") for row in rows)
    assert (tmp_path / "run" / "report" / "validation.csv").read_text().count("valood") == 2


def small_file(kind, path):
    stated = json.dumps({"heads": 2, "mean": [0.5] * 3, "std": [0.25] * 3})
    if kind == "vit":
        return write(path, vit_tensors(patch=8, grid=3, classes=5), oal_jax=stated)
    return write(path, resnet_tensors(classes=5), oal_jax=stated)


@pytest.mark.parametrize(("kind", "tune"), [("vit", "head"), ("resnet", "all")])
@pytest.mark.slow
def test_a_given_network_is_trained_evaluated_loaded_and_exported(folder, tmp_path, kind, tune):
    file = small_file(kind, tmp_path / "file.safetensors")
    flags = [f"student.weights={file}", "evaluation.scores=msp,mahalanobis", "train.epochs=3"]
    run(settings(folder, f"student.tune={tune}", *flags), tmp_path / "run")
    card = json.loads((tmp_path / "run" / "train" / "classifier.json").read_text())
    side = {"vit": 24, "resnet": 32}[kind]
    assert card["image_shape"] == [side, side, 3]
    file.unlink()  # a finished run does not need it
    detector = oal_jax.load(tmp_path / "run")
    images = np.random.default_rng(0).integers(0, 256, (4, side, side, 3), np.uint8)
    result = detector(images)
    assert np.isfinite(result.ood_score).all() and result.label.max() < 3
    from oal_jax.detection.exported import exported

    label, _, ood_score, _ = exported(detector, ["cpu"]).call(images)
    np.testing.assert_array_equal(label, result.label)
    np.testing.assert_allclose(ood_score, result.ood_score, rtol=1e-3, atol=1e-4)


def test_a_linear_head_on_frozen_features_leaves_them_as_the_file_has_them(folder, tmp_path):
    from oal_jax.pretrained.classifiers import load_classifier
    from oal_jax.runtime import artifacts

    file = small_file("vit", tmp_path / "file.safetensors")
    run(
        settings(folder, f"student.weights={file}", "train.epochs=30"),
        tmp_path / "run",
        only="train",
    )
    tensors = artifacts.read_tensors(tmp_path / "run" / "train" / "student.safetensors")
    original = load_classifier(file).variables["params"]
    kernel = tensors["params.student.blocks_0.attn.qkv.kernel"]
    np.testing.assert_array_equal(kernel, original["blocks_0"]["attn"]["qkv"]["kernel"])
    assert tensors["params.student.fc.kernel"].shape == (8, 3)
    log = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in log]
    assert losses[-1] < losses[0]


def test_check_lists_several_problems_at_once_and_writes_nothing(folder, tmp_path, capsys):
    bad = tmp_path / "images"
    for name in ("a", "b"):
        (bad / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (20, 20)).save(bad / name / f"{i}.png")
    (bad / "b" / "broken.jpg").write_bytes(b"nothing")
    argv = ["main", "--check", f"--config={OWN}", f"--config.data.root={bad}"]
    argv += [f"--workdir={tmp_path / 'run'}", "--config.train.batch_size=64"]
    argv += ["--config.data.near=nosuch", "--config.train.momentum=3", f"--reuse={tmp_path / 'no'}"]
    assert guard(main.run, argv) == 2
    problems = [line for line in capsys.readouterr().err.splitlines() if line.startswith("problem")]
    for word in ("train.momentum", "train.batch_size=64", "nosuch", "broken.jpg", "--reuse"):
        assert sum(word in line for line in problems) == 1, word
    assert not (tmp_path / "run").exists()
    check_report.run(settings(folder))
    told = capsys.readouterr().out
    assert "no problem" in told and "time: about" in told and "images decoded" in told


@pytest.mark.slow
def test_a_refused_start_does_not_block_its_directory(folder, tmp_path, capsys):
    argv = ["main", f"--config={OWN}", f"--config.data.root={folder}", f"--workdir={tmp_path}"]
    argv += [f"--config.{flag}" for flag in SHORT] + ["--config.train.epochs=1", "--stage=train"]
    assert guard(main.run, [*argv, "--config.train.batch_size=99"]) == 2
    assert "train.batch_size=99" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"method.name": "ce", "seed": 4}))
    assert guard(main.run, argv) == 0
    assert "warning: " in capsys.readouterr().out  # fewer than a hundred steps
    assert guard(main.run, [*argv, "--config.seed=3"]) == 2
    assert "seed was 0, now 3" in capsys.readouterr().err


def test_somebody_else_s_config_file_is_not_replaced(folder, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"architectures": ["ViT"]}')
    argv = ["main", f"--config={OWN}", f"--config.data.root={folder}", f"--workdir={tmp_path}"]
    assert guard(main.run, argv) == 2
    assert "config.json" in capsys.readouterr().err
    assert "ViT" in (tmp_path / "config.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "given"), [("ce", False), ("oal", True)])
def test_a_smoke_run_with_and_without_a_folder(folder, tmp_path, method, given):
    config = runpy.run_path(OWN)["get_config"]()
    config.smoke, config.method.name = True, method
    config.data.root = str(folder) if given else ""
    config.evaluation.scores = ("energy",)
    run(config, tmp_path / "run")
    assert (tmp_path / "run" / "report" / "index.html").exists()
    assert not (tmp_path / "run" / "generator").exists()
