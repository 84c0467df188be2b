"""Every way from a file to a verdict agrees: the command, `load`, `save`, exports and ONNX."""

import csv
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import oal_jax
from oal_jax import export, main, score
from oal_jax.data.decoding import Decoding, Unreadable, decode

RNG = np.random.default_rng(0)
SHAPE, CLASSES = (12, 12, 3), 3


def smooth(height, width, channels):
    """Coarse noise enlarged: it survives lossy formats."""
    coarse = RNG.integers(0, 256, (4, 4, channels)).astype(np.uint8)
    planes = [Image.fromarray(coarse[..., c]).resize((width, height)) for c in range(channels)]
    return np.dstack(planes)


def write_files(folder):
    """Files of many formats, modes and sizes, in folders; one is damaged, one is no image."""
    (folder / "deep" / "er").mkdir(parents=True)
    for i, (height, width) in enumerate(((12, 12), (31, 17), (200, 90), (13, 64))):
        colour = Image.fromarray(smooth(height, width, 3))
        opacity = Image.fromarray(smooth(height, width, 4))
        turned = Image.Exif()
        turned[0x0112] = 6
        colour.save(folder / f"{i}.png")
        colour.save(folder / f"{i}.jpg", quality=80, exif=turned)
        colour.convert("CMYK").save(folder / "deep" / f"{i}.jpeg")
        colour.convert("L").save(folder / "deep" / f"{i}.pgm")
        colour.convert("1").save(folder / "deep" / f"{i}.bmp")
        colour.quantize(16).save(folder / f"{i}.gif")
        opacity.save(folder / "deep" / "er" / f"{i}.webp", lossless=True)
        opacity.save(folder / "deep" / "er" / f"a{i}.png")
        opacity.convert("LA").save(folder / "deep" / "er" / f"la{i}.png")
        opacity.save(folder / "deep" / "er" / f"{i}.tiff")
        deep = smooth(height, width, 1)[..., 0].astype(np.uint16) * 257
        Image.fromarray(deep).save(folder / f"deep{i}.tif")
    damaged = (folder / "1.png").read_bytes()
    (folder / "damaged.png").write_bytes(damaged[: len(damaged) // 2])
    (folder / "text.jpg").write_text("no image")


def own_detector():
    """A detector of a linear model, whose decoding is not the one of its image shape."""
    kernel = RNG.normal(size=(48, CLASSES)).astype(np.float32)

    def forward(images):
        features = images[:, ::3, ::3].reshape(images.shape[0], -1)
        return features @ kernel, features

    images = np.stack([smooth(*SHAPE) for _ in range(90)])
    pair = images, np.arange(90) % CLASSES
    names = ("a|`b`", "<b>", "$c$")
    options = {"params": {"k": 5}, "class_names": names, "decoding": Decoding(3, 16, SHAPE[:2])}
    return oal_jax.calibrate(forward, pair, pair, "knn", **options)


@pytest.fixture(scope="module", params=["own", pytest.param("run", marks=pytest.mark.slow)])
def ways(request, tmp_path_factory):
    """A detector, a folder of image files, and a folder of what was written of the detector."""
    folder = tmp_path_factory.mktemp("ways")
    write_files(folder / "images")
    if request.param == "own":
        detector = own_detector()
    else:
        detector = oal_jax.load(request.getfixturevalue("finished_run"), score="mahalanobis")
    detector.save(folder / "saved")
    detector.export(folder / "exported")
    rows = detector.score_files(folder / "images")
    return detector, folder, {os.path.relpath(r.path, folder / "images"): r for r in rows}


def assert_same(rows, others, threshold):
    """The same files are read, and get the same verdicts and labels; others: name to values."""
    read = {name: row.result for name, row in rows.items() if row.result is not None}
    assert read.keys() == others.keys()
    scores = np.array([result.ood_score for result in read.values()])
    for name, result in read.items():
        label, ood_score, is_ood = others[name]
        assert abs(ood_score - result.ood_score) < 1e-3 * np.ptp(scores), name
        assert label == result.label and is_ood == result.is_ood, (name, threshold)


def test_files_in_order_and_those_that_can_not_be_read(ways):
    detector, folder, rows = ways
    assert len(rows) == 4 * 11 + 2
    assert {name for name, row in rows.items() if row.reason} == {"damaged.png", "text.jpg"}
    assert all((row.result is None) == (row.reason is not None) for row in rows.values())
    paths = [folder / "images" / name for name in ("text.jpg", "2.png", "damaged.png", "0.gif")]
    some = detector.score_files([paths[0], str(paths[1]), paths[2], paths[3].read_bytes()])
    assert [row.path for row in some] == [*map(str, paths[:3]), None]
    assert [row.reason is None for row in some] == [False, True, False, True]
    assert some[1].result.label == rows["2.png"].result.label
    assert some[3].result.ood_score == pytest.approx(rows["0.gif"].result.ood_score, rel=1e-4)


def test_an_iterator_is_read_as_it_is_needed(ways):
    detector, folder, rows = ways
    taken = 0

    def forever():
        nonlocal taken
        while True:
            taken += 1
            yield folder / "images" / "0.png"

    stream = dataclasses.replace(detector, batch_size=8).iter_files(forever())
    first = next(stream)
    stream.close()
    assert first.result.label == rows["0.png"].result.label
    assert taken <= 32 * 4 * 8 + 32


def test_a_saved_detector_and_the_command_agree(ways, tmp_path, capsys):
    detector, folder, rows = ways
    again = oal_jax.load(folder / "saved")
    others = {
        os.path.relpath(row.path, folder / "images"): row.result
        for row in again.score_files(folder / "images")
        if row.result is not None
    }
    values = {name: (r.label, r.ood_score, r.is_ood) for name, r in others.items()}
    assert_same(rows, values, detector.threshold)

    flags = ["--detector", folder / "saved", "--images", folder / "images"]
    output = tmp_path / "scores.csv"
    assert main.guard(score.run, ["score", *map(str, flags), "--output", str(output)]) == 0
    capsys.readouterr()
    with output.open(newline="") as file:
        table = {row["path"]: row for row in csv.DictReader(file)}
    names = list(detector.class_names)
    values = {
        name: (names.index(row["prediction"]), float(row["ood_score"]), row["is_ood"] == "true")
        for name, row in table.items()
    }
    assert_same(rows, values, detector.threshold)
    for name, row in table.items():
        percentile = np.mean(detector.id_val_scores < rows[name].result.ood_score) * 100
        assert float(row["percentile"]) == pytest.approx(percentile, abs=2)


# Neither the package nor anything but JAX, NumPy and Pillow.
_ALONE = """
import json, sys, os
import jax, numpy as np
from jax import export
import preprocess
with open("detector.jax_export", "rb") as file:
    detector = jax.jit(export.deserialize(bytearray(file.read())).call)
names, images = [], []
for name in json.loads(sys.argv[2]):
    try:
        images.append(preprocess.read(os.path.join(sys.argv[1], name)))
        names.append(name)
    except preprocess.Unreadable:
        pass
label, _, ood_score, is_ood = detector(np.stack(images))
values = zip(label.tolist(), ood_score.tolist(), is_ood.tolist())
assert "oal_jax" not in sys.modules
np.save(sys.argv[3], np.stack(images))
print(json.dumps(dict(zip(names, values))))
"""


def alone(folder, code, *arguments):
    environment = {**os.environ, "PYTHONPATH": "", "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=folder, env=environment
    ).stdout


def test_an_export_agrees_and_reads_files_as_we_do(ways, tmp_path):
    detector, folder, rows = ways
    pixels = tmp_path / "pixels.npy"
    printed = alone(folder / "exported", _ALONE, folder / "images", json.dumps(list(rows)), pixels)
    values = json.loads(printed)
    assert_same(rows, values, detector.threshold)
    recipe = Decoding.from_json(
        json.loads((folder / "exported/model.json").read_text())["decoding"]
    )
    for name, image in zip(values, np.load(pixels), strict=True):
        np.testing.assert_array_equal(image, decode(folder / "images" / name, recipe), name)


def test_the_code_of_the_card_runs(ways, tmp_path):
    detector, folder, rows = ways
    shutil.copytree(folder / "exported", tmp_path / "exported")
    shutil.copy(folder / "images" / "2.jpg", tmp_path / "exported" / "photo.jpg")
    card = (tmp_path / "exported" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    printed = alone(tmp_path / "exported", code + "print(label[0], ood_score[0])")
    label, ood_score = printed.split()
    assert int(label) == rows["2.jpg"].result.label
    assert float(ood_score) == pytest.approx(rows["2.jpg"].result.ood_score, rel=1e-3)
    outside = card.replace(code, "")
    assert not re.search(r"(?<!\\)[|<$]", outside.split("## Measured")[0])


def test_unreadable_is_what_the_package_raises(ways):
    _, folder, rows = ways
    for name in ("damaged.png", "text.jpg"):
        with pytest.raises(Unreadable, match=re.escape(rows[name].reason)):
            decode(folder / "images" / name, Decoding(3))


def test_a_saved_detector_is_exported_by_the_command(ways, tmp_path, capsys):
    detector, folder, _ = ways
    flags = ["--detector", folder / "saved", "--output", tmp_path / "out", "--platforms=cpu"]
    assert main.guard(export.run, ["export", *map(str, flags)]) == 0
    assert f"detector by {detector.score.name}" in capsys.readouterr().out
    described = json.loads((tmp_path / "out" / "model.json").read_text())
    original = json.loads((folder / "exported" / "model.json").read_text())
    for name in ("class_names", "decoding", "threshold", "score", "parameters"):
        assert described[name] == original[name]
    if "trained_on" in original:
        card = (folder / "exported" / "README.md").read_text()
        assert (tmp_path / "out" / "README.md").read_text().split("## Measured")[1] in card
