"""`oal_jax.score`: the CSV, what it says on the way, what it refuses, and its memory."""

import csv
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import oal_jax
from oal_jax import main, score
from oal_jax.data import image_files, sources
from oal_jax.data.decoding import Decoding

HEADER = "path,prediction,confidence,ood_score,threshold,is_ood,percentile"


@pytest.fixture(scope="module")
def images():
    return sources.load("bundled", "fashion", "validation", limit=40).images


@pytest.fixture
def folder(tmp_path, images):
    """Forty sound images in two folders, and files that are none."""
    for i, image in enumerate(images):
        path = tmp_path / "images" / ("a" if i % 2 else "b, c") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def run(capsys, *arguments):
    """(exit code, lines on stdout, lines on stderr without the progress bar)."""
    code = main.guard(score.run, ["score", *map(str, arguments)])
    out, err = capsys.readouterr()
    lines = [
        line
        for line in re.split(r"[\r\n]+", err)
        if line.strip() and not re.match("(compiling )?score: ", line)
    ]
    return code, out.splitlines(), lines


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_each_image_gets_its_row(capsys, finished_run, folder, images, tmp_path):
    output = tmp_path / "scores.csv"
    code, out, err = run(
        capsys, "--workdir", finished_run, "--images", folder, "--output", output, "--batch_size=16"
    )
    assert (code, err) == (0, [])
    assert output.read_text().splitlines()[0] == HEADER
    table = rows(output)
    paths = [row["path"] for row in table]
    assert paths == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    detector = oal_jax.load(finished_run)
    assert detector.decoding == Decoding(1, 28, (28, 28))
    expected = detector(images[[int(p[-6:-4]) for p in paths]])
    assert [row["prediction"] for row in table] == expected.class_names.tolist()
    # Another batch size rounds otherwise.
    values = [np.float32(row["ood_score"]) for row in table]
    np.testing.assert_allclose(values, expected.ood_score, rtol=1e-5)
    np.testing.assert_allclose(
        [float(row["confidence"]) for row in table], expected.confidence, atol=2e-6
    )
    for row in table:
        assert re.fullmatch(r"[01]\.\d{6}", row["confidence"])
        assert float(row["threshold"]) == detector.threshold
        is_ood = float(row["ood_score"]) > detector.threshold
        assert row["is_ood"] == ("true" if is_ood else "false")
        assert float(np.float32(row["ood_score"])) == float(row["ood_score"])  # nothing cut off
    ood = sum(row["is_ood"] == "true" for row in table)
    assert re.match(rf"40 images, {ood} of them OOD \({ood / 40:.1%}\) by energy above", out[0])
    assert re.search(r"; \d+ images/s: .*scores\.csv$", out[0])
    assert out[1] == "left out 1 other (notes.txt)"
    assert sorted(os.listdir(tmp_path)) == ["images", "scores.csv"]


def test_score_and_threshold_are_chosen(capsys, finished_run, folder, tmp_path):
    output = tmp_path / "scores.csv"
    flags = ["--images", folder, "--output", output, "--score=knn", "--keep-id", "0.5"]
    code, out, _ = run(capsys, "--workdir", finished_run, *flags)
    assert code == 0 and "by knn above" in out[0]
    threshold = oal_jax.load(finished_run, score="knn", keep_id=0.5).threshold
    assert {row["threshold"] for row in rows(output)} == {repr(threshold)}


def test_what_can_not_be_read_is_told_and_the_rest_is_scored(
    capsys, finished_run, folder, tmp_path
):
    whole = (folder / "a" / "01.png").read_bytes()
    (folder / "a" / "01.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty\n.jpg").write_bytes(b"")
    Image.new("RGB", (50, 40), (200, 20, 20)).save(folder / "red.jpg")
    Image.new("P", (9, 60)).save(folder / "palette.gif")
    output = tmp_path / "scores.csv"
    code, out, err = run(capsys, "--workdir", finished_run, "--images", folder, "--output", output)
    assert code == 0
    assert out[0].startswith("41 images, ")
    assert len(rows(output)) == 41 and "red.jpg" in {row["path"] for row in rows(output)}
    assert len(err) == 4
    assert re.match(r"oal_jax: a/01\.png is left out: .*truncated", err[0])
    assert err[1] == r"oal_jax: 'empty\n.jpg' is left out: not an image"
    assert err[2] == "oal_jax: 2 of 43 image files could not be read"
    assert err[3] == f"oal_jax: 2 of 41 images {image_files.CONVERTED}"


def test_names_of_any_bytes(capsys, finished_run, folder, tmp_path):
    name = b'\xff\xe9,".png'
    os.rename(folder / "a" / "01.png", os.fsencode(folder) + b"/" + name)
    output = tmp_path / "scores.csv"
    code, *_ = run(capsys, "--workdir", finished_run, "--images", folder, "--output", output)
    assert code == 0
    with output.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert os.fsdecode(name) in [row["path"] for row in csv.DictReader(file)]


def test_mistakes_are_one_line_and_leave_nothing(capsys, finished_run, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"x")
    usual = {
        "--workdir": finished_run,
        "--images": folder,
        "--output": tmp_path / "out" / "scores.csv",
    }
    (tmp_path / "out").mkdir()
    cases = [
        ({"--images": tmp_path / "nothing"}, "nothing"),
        ({"--images": tmp_path / "texts" / "a.txt"}, "a.txt"),
        ({"--images": tmp_path / "empty"}, "empty"),
        ({"--images": tmp_path / "texts"}, "texts"),
        ({"--images": tmp_path / "broken"}, "broken"),
        ({"--output": tmp_path / "no" / "s.csv"}, "no/s.csv"),
        ({"--output": folder / "notes.txt" / "s.csv"}, "notes.txt/s.csv"),
        ({"--output": tmp_path / "out"}, "out"),
        ({"--workdir": tmp_path}, "config.json"),
        ({"--score": "enrgy"}, "'energy'"),
        ({"--keep-id": "1"}, "--keep-id 1.0"),
        ({"--keep_id": "nan"}, "--keep-id nan"),
        ({"--keep-id": "most"}, "'most'"),
        ({"--batch-size": "0"}, "--batch-size 0"),
        ({"--imgs": "x"}, "--imgs"),
    ]
    for changed, message in cases:
        flags = [str(part) for pair in (usual | changed).items() for part in pair]
        code, out, err = run(capsys, *flags)
        assert (code, out) == (2, []), flags
        assert message in err[-1] and all(" is left out: " in line for line in err[:-1]), err
    code, _, err = run(capsys, "--workdir", finished_run)
    assert code == 2 and "the following arguments are required: --images, --output" in err[0]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_broken_off_file_is_never_taken_for_a_whole_one(
    capsys, finished_run, folder, tmp_path, monkeypatch
):
    output = tmp_path / "scores.csv"
    output.write_text("of before")
    seen = []

    def stop(self, images):
        seen.append([output.read_text(), sorted(os.listdir(tmp_path))])
        raise KeyboardInterrupt

    monkeypatch.setattr(oal_jax.Detector, "__call__", stop)
    code, *_ = run(capsys, "--workdir", finished_run, "--images", folder, "--output", output)
    assert code == 130
    (text, (partial, *others)), *_ = seen
    assert text == "of before" and others == ["images", "scores.csv"]
    assert partial.endswith(".partial")
    assert output.read_text() == "of before"
    assert sorted(os.listdir(tmp_path)) == ["images", "scores.csv"]


_MEASURE = """
import resource, sys
from oal_jax import score
from oal_jax.detection import detector
from oal_jax.detection.detector import Result
import numpy as np

def stand_in(self, images):
    n = len(images)
    zeros = np.zeros(n, np.float32)
    return Result(np.zeros(n, np.int32), zeros, zeros, zeros > 0, np.full(n, "x"), zeros)

detector.Detector.__call__ = stand_in  # the decoding is what could grow
for images in sys.argv[2:]:
    score.run(["score", "--workdir", sys.argv[1], "--images", images, "--output", images + ".csv"])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(finished_run, tmp_path):
    few, many = tmp_path / "few", tmp_path / "many"
    for directory, count in ((few, 100), (many, 900)):
        directory.mkdir()
        Image.new("L", (300, 300), 90).save(directory / "0000.png")
        for i in range(1, count):
            os.link(directory / "0000.png", directory / f"{i:04d}.png")
    child = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(finished_run), str(few), str(many)],
        capture_output=True,
        text=True,
        check=True,
    )
    peaks = [int(line) for line in child.stdout.splitlines() if line.isdigit()]
    assert len(rows(tmp_path / "many.csv")) == 900
    # 800 more images are 72 MB before they are resized.
    assert peaks[1] - peaks[0] < 15_000  # KiB


def test_help_needs_nothing(capsys):
    with pytest.raises(SystemExit) as caught:
        score.run(["score", "--help"])
    assert caught.value.code == 0
    assert "--keep-id" in capsys.readouterr().out
