"""Detectors of a finished run: what they say, what they verify, what they refuse."""

import contextlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from scipy.special import logsumexp, softmax

import oal_jax
from oal_jax.data import sources
from oal_jax.errors import UserError
from oal_jax.runtime import artifacts
from oal_jax.stages import evaluate
from oal_jax.stages import run as pipeline


@pytest.fixture(scope="module")
def detector(finished_run):
    return oal_jax.load(finished_run)


@pytest.fixture(scope="module")
def images():
    return sources.load("bundled", "fashion", "validation", limit=200).images


@pytest.fixture
def copy(finished_run, tmp_path):
    """A copy of the run that may be damaged."""
    shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    return tmp_path / "run"


def test_what_it_says_is_what_the_run_measured(finished_run, detector, images):
    sets = evaluate.inputs(pipeline.resolve(finished_run))
    logits = np.float64(sets.id_val.outputs.logits)
    result = detector(images)
    np.testing.assert_array_equal(result.label, logits.argmax(1))
    np.testing.assert_allclose(result.confidence, softmax(logits, axis=1).max(1), rtol=1e-5)
    np.testing.assert_allclose(result.ood_score, -logsumexp(logits, axis=1), rtol=1e-5)
    names = sources.load("bundled", "fashion", "validation", limit=1).class_names
    assert result.class_names.tolist() == [names[k] for k in result.label]
    assert [x.dtype for x in result[:4]] == [np.int32, np.float32, np.float32, bool]
    written = artifacts.read_json(finished_run / "report" / "thresholds.json")
    assert detector.score.name == "energy"
    assert detector.threshold == written["energy"]
    assert repr(detector).startswith(f"Detector(energy > {written['energy']:.6g} is OOD, 28 x 28")
    np.testing.assert_array_equal(result.is_ood, result.ood_score > detector.threshold)


@pytest.mark.parametrize("name", ["energy", "mahalanobis", "knn"])
def test_the_threshold_keeps_its_share(finished_run, images, name):
    detector = oal_jax.load(finished_run, score=name)
    for keep in (0.5, 0.8, 0.95, 0.99):
        share = 1 - detector.with_keep_id(keep)(images).is_ood.mean()
        # One image may cross it: it was scored in another batch.
        assert abs(share - keep) <= 1.01 / len(images)
    assert oal_jax.load(finished_run, score=name, keep_id=0.8).keep_id == 0.8


def test_batches_floats_and_single_images_agree(detector, images):
    whole = detector(images[:200])
    for other in (
        detector(images[:200] / np.float32(255)),
        detector(images[:200].astype(np.float64) / 255),
        detector(jax.numpy.asarray(images[:200])),
        oal_jax.Detector(**{**vars(detector), "batch_size": 16})(images[:200]),
    ):
        np.testing.assert_array_equal(other.label, whole.label)
        np.testing.assert_allclose(other.ood_score, whole.ood_score, rtol=1e-5)
    one = detector(images[3])
    assert one.label == whole.label[3] and one.class_names == whole.class_names[3]
    assert one.ood_score.shape == () and abs(one.ood_score - whole.ood_score[3]) < 1e-4
    none = detector(images[:0])
    assert none.label.shape == none.is_ood.shape == none.class_names.shape == (0,)


def test_a_nan_is_ood(detector, images):
    weights = jax.tree.map(lambda x: x * np.nan, detector.forward)
    broken = oal_jax.Detector(**{**vars(detector), "forward": weights})
    assert broken(images[:3]).is_ood.all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 1, 28, 28), np.uint8), r"\(2, 1, 28, 28\), not \(n, 28, 28, 1\); .*channels"),
        (np.zeros((2, 32, 32, 2), np.uint8), r"\(2, 32, 32, 2\), not \(n, 28, 28, 1\); 2 channels"),
        (np.zeros((2, 3, 32, 40), np.uint8), r"channels last: images.transpose\(0, 2, 3, 1\)"),
        (np.zeros(28, np.uint8), r"\(28,\), not \(n, 28, 28, 1\)$"),
        (np.zeros((2, 28, 28, 1), int), r"int64; .*uint8"),
        (np.full((2, 28, 28, 1), 200.0), r"\[0, 1\].* 200 to 200; .*255"),
        (np.full((2, 28, 28, 1), -0.5), r"\[0, 1\].*-0.5"),
        (np.full((2, 28, 28, 1), np.nan), r"\[0, 1\].*nan"),
        (["a.png"], "strings.*score_files"),
    ],
)
def test_other_images_are_refused(detector, images, message):
    with pytest.raises(UserError, match=message):
        detector(images)


@pytest.mark.parametrize("name", ["gradnorm", pytest.param("odin", marks=pytest.mark.slow)])
def test_a_score_that_the_run_did_not_list_is_fitted(finished_run, images, capsys, name):
    detector = oal_jax.load(finished_run, score=name)
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and name in warning
    share = 1 - detector(images).is_ood.mean()
    assert abs(share - 0.95) <= 1.01 / len(images)


def test_parameters_of_the_report_are_used(copy, images):
    """As if the report had chosen them, in a search."""
    detector = oal_jax.load(copy, score="knn")
    report = copy / "report"
    state = {f"state.{k}": np.asarray(v) for k, v in detector.state.items()}
    first = sources.load("bundled", "fashion", "validation", limit=200).images
    path = report / "detectors" / "knn.safetensors"
    artifacts.write_tensors(path, {**state, "id_val_scores": detector(first).ood_score})
    artifacts.write_json(report / "parameters.json", {"knn": {"k": 1}})
    manifest = artifacts.read_json(report / "manifest.json")
    outputs = [report / name for name in manifest["outputs"]]
    artifacts.finish(report, "report", manifest["inputs"], outputs, 0)
    nearest = oal_jax.load(copy, score="knn")
    assert nearest.params == {"k": 1}
    features = evaluate.inputs(pipeline.resolve(copy))
    bank, queries = (
        x / np.linalg.norm(x, axis=1, keepdims=True)
        for x in (features.id_train.outputs.features, features.id_val.outputs.features)
    )
    squared = np.min(2 - 2 * np.float64(queries) @ np.float64(bank).T, axis=1)
    np.testing.assert_allclose(nearest(images).ood_score ** 2, squared, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["train/student.safetensors", "train/classifier.json", "report/detectors/energy.safetensors"],
)
@pytest.mark.parametrize("how", ["altered", "truncated", "deleted"])
def test_damage_is_told_by_name(copy, name, how):
    path = copy / name
    data = path.read_bytes()
    if how == "altered":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif how == "truncated":
        path.write_bytes(data[:-3])
    else:
        path.unlink()
    words = {"altered": "another sha256", "truncated": "bytes instead of", "deleted": "is missing"}
    with pytest.raises(UserError, match=f"{name} .*{words[how]}"):
        oal_jax.load(copy)


def test_unfinished_runs_are_told(copy, tmp_path):
    with pytest.raises(UserError, match=r"nothing .*config\.json"):
        oal_jax.load(tmp_path / "nothing")
    (copy / "report" / "manifest.json").unlink()
    assert oal_jax.load(copy, score="knn").id_val_scores.size == 200  # fitted on what there is
    (copy / "evaluate" / "manifest.json").unlink()
    with pytest.raises(UserError, match="stage evaluate of .*run"):
        oal_jax.load(copy)
    (copy / "train" / "manifest.json").unlink()
    with pytest.raises(UserError, match="stage train of .*run"):
        oal_jax.load(copy)


def test_what_was_fitted_to_another_student_is_not_used(copy):
    manifest = artifacts.read_json(copy / "train" / "manifest.json")
    path = copy / "train" / "student.safetensors"
    tensors = safetensors.numpy.load_file(path)
    artifacts.write_tensors(path, {name: value * 1.5 for name, value in tensors.items()})
    outputs = [copy / "train" / name for name in manifest["outputs"]]
    artifacts.finish(copy / "train", "train", manifest["inputs"], outputs, 0)
    with pytest.raises(UserError, match="stage evaluate of .*run"):
        oal_jax.load(copy)


def test_a_run_of_an_earlier_version_is_told(copy):
    manifest = artifacts.read_json(copy / "train" / "manifest.json")
    outputs = [copy / "train" / name for name in manifest["outputs"] if name != "classifier.json"]
    artifacts.finish(copy / "train", "train", manifest["inputs"], outputs, 0)
    with pytest.raises(UserError, match=r"classifier\.json"):
        oal_jax.load(copy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "enrgy"}, "'enrgy'.*'energy'"),
        ({"keep_id": 1.0}, "keep_id.* 1.0"),
        ({"keep_id": float("nan")}, "keep_id.* nan"),
        ({"batch_size": 0}, "batch_size.* 0"),
    ],
)
def test_bad_arguments_are_refused(finished_run, arguments, message):
    with pytest.raises(UserError, match=message):
        oal_jax.load(finished_run, **arguments)


def test_no_image_set_is_read(finished_run, images, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("an image set was read")

    monkeypatch.setattr("oal_jax.stages.context.read_set", refuse)
    with contextlib.redirect_stderr(None):
        assert len(oal_jax.load(finished_run)(images).label) == len(images)
