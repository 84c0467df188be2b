"""A detector as a program of ONNX (extra onnx): it runs without JAX and agrees."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from jax.tree_util import Partial
from small_detector import HEAD, IMAGES, LABELS, NAMES, blocks, with_kernel

import oal_jax
from oal_jax.data import sources
from oal_jax.detection import onnx_file
from oal_jax.errors import UserError

pytestmark = pytest.mark.onnx

# With NumPy and onnxruntime alone.
_ALONE = """
import sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
images = np.load(sys.argv[2])
results = {}
for n in (1, 5, len(images)):
    for output, value in zip(session.get_outputs(), session.run(None, {"images": images[:n]})):
        results[f"{output.name}.{n}"] = value
assert "jax" not in sys.modules and "oal_jax" not in sys.modules
np.savez(sys.argv[3], **results)
import json
print(json.dumps(session.get_modelmeta().custom_metadata_map))
"""


def assert_agrees(detector, images, folder):
    """The exported ONNX file against the detector, for several batch sizes."""
    detector.export(folder / "exported", platforms=("cpu",), onnx=True)
    np.save(folder / "images.npy", images)
    program, results = folder / "exported" / "detector.onnx", folder / "results.npz"
    command = [sys.executable, "-c", _ALONE, program, folder / "images.npy", results]
    done = subprocess.run(
        [str(x) for x in command],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    metadata = json.loads(done.stdout)
    assert float(metadata["threshold"]) == detector.threshold
    assert json.loads(metadata["class_names"]) == list(detector.class_names)
    assert metadata["score"] == detector.score.name
    with np.load(results) as values:
        for n in (1, 5, len(images)):
            expected = detector(images[:n])
            np.testing.assert_array_equal(values[f"label.{n}"], expected.label)
            np.testing.assert_allclose(values[f"confidence.{n}"], expected.confidence, atol=1e-4)
            scale = max(1, np.abs(detector.id_val_scores).max())
            close = dict(rtol=1e-4, atol=1e-4 * scale)
            np.testing.assert_allclose(values[f"ood_score.{n}"], expected.ood_score, **close)
            clear = np.abs(expected.ood_score - detector.threshold) > 1e-4 * scale
            np.testing.assert_array_equal(values[f"is_ood.{n}"][clear], expected.is_ood[clear])
    return metadata


@pytest.mark.parametrize(
    "score", ["msp", "energy", "max_logit", "gen", "knn", "vim", "mahalanobis"]
)
def test_the_student_of_a_run(finished_run, tmp_path, score):
    detector = oal_jax.load(finished_run, score=score)
    images = sources.load("bundled", "fashion", "validation", limit=30).images
    images = np.concatenate([images, sources.load("bundled", "mnist", "test", limit=10).images])
    assert_agrees(detector, images, tmp_path)
    assert "detector.onnx" in (tmp_path / "exported" / "README.md").read_text()


def test_ones_own_model(tmp_path):
    pair = IMAGES, LABELS
    model = Partial(with_kernel, HEAD[0])
    detector = oal_jax.calibrate(model, pair, pair, "energy", class_names=NAMES)
    metadata = assert_agrees(detector, IMAGES, tmp_path)
    assert json.loads(metadata["decoding"])["crop"] == [6, 6]


def test_what_has_no_right_form_is_refused(monkeypatch):
    import jax2onnx

    pair = IMAGES, LABELS
    with pytest.raises(UserError, match="energy .*ONNX"):  # it compares the batch's size
        onnx_file.convert(oal_jax.calibrate(blocks, pair, pair, "energy"), {})
    detector = oal_jax.calibrate(Partial(with_kernel, HEAD[0]), pair, pair, "energy")
    convert = jax2onnx.to_onnx
    wrong = lambda call, *args, **names: convert(lambda x: call(x // 2), *args, **names)
    monkeypatch.setattr(jax2onnx, "to_onnx", wrong)
    with pytest.raises(UserError, match="energy .*not agree"):
        onnx_file.convert(detector, {})


def test_a_saved_detector_is_refused_by_name(tmp_path):
    pair = IMAGES, LABELS
    oal_jax.calibrate(blocks, pair, pair, "energy").save(tmp_path / "saved")
    again = oal_jax.load(tmp_path / "saved")
    with pytest.raises(UserError, match=r"ONNX.*saved") as caught:
        onnx_file.convert(again, {})
    assert "\n" not in str(caught.value)
