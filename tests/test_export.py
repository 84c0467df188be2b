"""Exports: that they run without the package and agree with it, and what they say of themselves."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

import oal_jax
from oal_jax import export, main, scores
from oal_jax.data import sources
from oal_jax.detection import exported
from oal_jax.detection.parts import predict
from oal_jax.evaluation.tables import read_csv
from oal_jax.runtime import artifacts
from oal_jax.scores.forward import as_forward

_RELOAD = """
import sys
import jax, numpy as np
from jax import export
with open(sys.argv[1] + "/detector.jax_export", "rb") as file:
    detector = jax.jit(export.deserialize(bytearray(file.read())).call)
images = np.load(sys.argv[1] + "/../images.npy")
results = {}
for n in (1, 3, 17):
    for i, value in enumerate(detector(images[:n])):
        results[f"{n}.{i}"] = np.asarray(value)
assert "oal_jax" not in sys.modules
np.savez(sys.argv[1] + "/../results.npz", **results)
"""


@pytest.fixture(scope="module")
def images():
    return sources.load("bundled", "fashion", "validation", limit=64).images


def run(capsys, *arguments):
    code = main.guard(export.run, ["export", *map(str, arguments)])
    return code, *(text.splitlines() for text in capsys.readouterr())


def test_it_runs_alone_and_agrees(capsys, finished_run, images, tmp_path):
    name = "knn"  # has a state, and works in blocks
    output = tmp_path / "new" / "exported"
    flags = ["--workdir", finished_run, "--output", output, "--score", name, "--keep-id=0.8"]
    code, out, err = run(capsys, *flags)
    assert (code, err) == (0, []) and f"detector by {name}" in out[0]
    np.save(tmp_path / "new" / "images.npy", images[:17])
    child = [sys.executable, "-c", _RELOAD, str(output)]
    subprocess.run(child, check=True, cwd=tmp_path, env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"})
    detector = oal_jax.load(finished_run, score=name, keep_id=0.8)
    with np.load(tmp_path / "new" / "results.npz") as results:
        for n in (1, 3, 17):
            expected = detector(images[:n])
            label, confidence, ood_score, is_ood = (results[f"{n}.{i}"] for i in range(4))
            assert [label.dtype, confidence.dtype] == [np.int32, np.float32]
            np.testing.assert_array_equal(label, expected.label)
            np.testing.assert_allclose(confidence, expected.confidence, rtol=1e-5)
            np.testing.assert_allclose(ood_score, expected.ood_score, rtol=1e-5)
            near = np.abs(expected.ood_score - detector.threshold) < 1e-5
            np.testing.assert_array_equal(is_ood[~near], expected.is_ood[~near])

    assert sorted(os.listdir(tmp_path / "new")) == ["exported", "images.npy", "results.npz"]
    described = json.loads((output / "model.json").read_text())
    assert described["threshold"] == detector.threshold and described["keep_id"] == 0.8
    assert described["class_names"] == list(detector.class_names)
    assert described["image_shape"] == [28, 28, 1]
    assert described["platforms"] == ["cpu", "cuda", "tpu"]
    assert described["versions"]["jax"] == jax.__version__
    files = {p.name for p in output.iterdir()} - {"model.json"}
    named = {"detector.jax_export", "weights.safetensors", "README.md", "preprocess.py"}
    assert described["files"].keys() == files == named
    for file, entry in described["files"].items():
        assert entry["sha256"] == artifacts.sha256(output / file)

    card = (output / "README.md").read_text()
    for row in read_csv(finished_run / "report" / "ood.csv"):
        if row.score == name:
            line = f"| {row.auroc:.2f} | {row.fpr_at_95_ood_tpr:.2f} | {row.fpr_at_95_id_tpr:.2f} |"
            assert line in card
    assert f"{detector.threshold:.6g}" in card and "keeps 80.0% of\n  200 ID" in card
    assert "$" not in card and "{" not in card.replace("{h}", "")

    weights = safetensors.numpy.load_file(output / "weights.safetensors")
    student = safetensors.numpy.load_file(finished_run / "train" / "student.safetensors")
    # No projector, nothing else of the method.
    of_student = {k for k in student if k.split(".")[1] == "student"}
    values = sorted(v.sum() for k, v in weights.items() if k.startswith("model."))
    np.testing.assert_allclose(values, sorted(student[k].sum() for k in of_student))
    assert "model.params.fc.kernel" in weights
    np.testing.assert_array_equal(weights["id_val_scores"], detector.id_val_scores)
    state = {k.removeprefix("score."): v for k, v in weights.items() if k.startswith("score.")}
    jax.tree.map(np.testing.assert_array_equal, state, dict(detector.state))


def test_the_program_is_for_every_platform(finished_run):
    program = exported.exported(oal_jax.load(finished_run))
    assert program.platforms == ("cpu", "cuda", "tpu") and program.nr_devices == 1
    assert [str(aval) for aval in program.in_avals] == ["uint8[b,28,28,1]"]
    assert [str(aval) for aval in program.out_avals] == [
        "int32[b]",
        "float32[b]",
        "float32[b]",
        "bool[b]",
    ]


_KERNEL = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)


def _toy(images):
    """Logits, features and two maps that do without a compiled model."""
    features = images[:, ::2, ::2, 0].reshape(images.shape[0], 9)
    maps = (images * np.float32(2), images[:, ::2, ::2])
    maps = tuple(jax.numpy.concatenate([m, 1 - m], axis=-1) for m in maps)
    return features @ _KERNEL, features, maps


# Those with blocks, lookups in their state, loops or gradients; to compile all takes a minute.
COMPARED = ("knn", "gram", "openmax", "odin")


@pytest.mark.parametrize(
    "name",
    [
        name if name in COMPARED else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(scores.SCORES)
    ],
)
def test_every_score_can_be_exported(name):
    """With any number of images, though some scores work in blocks."""
    rng = np.random.default_rng(1)
    images, labels = rng.integers(0, 256, (90, 6, 6, 1)).astype(np.uint8), rng.integers(0, 3, 90)
    score = scores.make(name)
    outputs = scores.summarise(*_toy(images / np.float32(255)), scores.FIELDS)
    head = scores.Head(_KERNEL, np.zeros(3, np.float32))
    state = scores.fit(score, outputs, labels, head)
    forward = as_forward(_toy)
    detector = oal_jax.Detector(forward, score, state, np.zeros(1, np.float32), (6, 6, 1))
    program = exported.exported(detector, ["cpu"])
    assert str(program.out_avals[2]) == "float32[b]"
    if name not in COMPARED:
        return
    label, _, ood_score, is_ood = jax.jit(program.call)(images[:7])
    expected = jax.jit(predict, static_argnums=0)(score, forward, state, images[:7])
    np.testing.assert_array_equal(label, expected[0])
    np.testing.assert_allclose(ood_score, expected[2], rtol=2e-4, atol=1e-5)
    np.testing.assert_array_equal(is_ood, np.asarray(ood_score) > 0)


def test_mistakes_are_one_line_and_leave_everything(capsys, finished_run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    (tmp_path / "file").write_text("")
    usual = {"--workdir": finished_run, "--output": tmp_path / "out"}
    cases = [
        ({"--output": tmp_path / "mine"}, "mine holds other files, such as thesis.txt; give"),
        ({"--output": tmp_path / "file"}, "file is a file; give a folder"),
        ({"--output": tmp_path / "file" / "x"}, "x can't be written (Not a directory)"),
        ({"--platforms": "cpu,gpu"}, "'gpu'"),
        ({"--score": "knm"}, "'knn'"),
        ({"--keep-id": "0"}, "--keep-id 0.0"),
        ({"--workdir": tmp_path}, "config.json"),
    ]
    for changed, message in cases:
        flags = [part for pair in (usual | changed).items() for part in pair]
        code, out, err = run(capsys, *flags)
        assert (code, out, len(err)) == (2, [], 1), flags
        assert message in err[0]
    assert sorted(os.listdir(tmp_path)) == ["file", "mine"]
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_an_export_replaces_an_export(capsys, finished_run, tmp_path, monkeypatch):
    output = tmp_path / "out"
    output.mkdir()  # empty: free to use
    flags = ["--workdir", finished_run, "--output", output, "--platforms=cpu"]
    assert run(capsys, *flags)[0] == 0
    (output / "__pycache__").mkdir()
    (output / "__pycache__" / "preprocess.cpython-312.pyc").write_bytes(b"")
    (output / "detector.onnx").write_bytes(b"")  # of an export with --onnx
    assert run(capsys, *flags, "--keep-id=0.7")[0] == 0
    assert json.loads((output / "model.json").read_text())["keep_id"] == 0.7
    assert not {"__pycache__", "detector.onnx"} & set(os.listdir(output))
    for name in ("notes.md", "__pycache__/mine.py"):
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("mine")
        code, _, err = run(capsys, *flags, "--keep-id=0.6")
        assert code == 2 and name.split("/")[0] in err[0] and len(err) == 1
        assert (output / name).read_text() == "mine"
        (output / name).unlink()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(exported, "card", fail)
    assert run(capsys, *flags, "--keep-id=0.6")[0] == 130
    assert json.loads((output / "model.json").read_text())["keep_id"] == 0.7
    assert os.listdir(tmp_path) == ["out"]
