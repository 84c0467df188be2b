"""What vouches for a finished run: an edited config and a damaged log are noticed."""

import json
import os
import shutil

import numpy as np
import pytest
import safetensors.numpy

import oal_jax
from oal_jax.errors import UserError
from oal_jax.runtime import artifacts
from oal_jax.stages import run as pipeline


@pytest.fixture
def copy(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("key", "value"), [("evaluation.keep_id", 0.5), ("student.width", 4), ("seed", 7)]
)
def test_an_edited_config_is_refused_with_its_key_and_both_values(copy, key, value):
    path = copy / "config.json"
    flat = json.loads(path.read_text())
    path.write_text(json.dumps(flat | {key: value}))
    with pytest.raises(UserError) as refused:
        oal_jax.load(copy)
    for part in (str(path), key, repr(value), repr(flat[key])):
        assert part in str(refused.value)


@pytest.mark.parametrize("how", ["cut", "emptied", "deleted"])
def test_a_damaged_log_comes_back(copy, how, capsys):
    path = copy / "metrics.jsonl"
    whole = path.read_bytes()
    if how == "deleted":
        path.unlink()
    else:
        path.write_bytes(whole[: len(whole) // 2] if how == "cut" else b"")
    pipeline.run(pipeline.resolve(copy).config, copy)
    assert path.read_bytes() == whole
    assert "metrics.jsonl" in capsys.readouterr().out


def forge(run, name, data):
    """Replace a file of a run, in a way that the manifests vouch for it."""
    path = run / name
    path.write_bytes(data)
    digest = artifacts.sha256(path)
    stage, _, below = name.partition("/")
    for directory in (run / "train", run / "evaluate", run / "report"):
        manifest = json.loads((directory / artifacts.MANIFEST).read_text())
        del manifest["sha256"]
        if directory.name == stage:
            manifest["outputs"][below] |= {"sha256": digest, "bytes": len(data)}
        elif stage in manifest["inputs"]["stages"]:
            manifest["inputs"]["stages"][stage][below] = digest
        manifest["sha256"] = artifacts.fingerprint(manifest)
        (directory / artifacts.MANIFEST).write_text(json.dumps(manifest))


TENSORS = (
    lambda tensors: {},
    lambda tensors: {"other": np.zeros(3, np.float32)},
    lambda tensors: {name: value[..., None] for name, value in tensors.items()},
    lambda tensors: {name: np.zeros(0, np.float32) for name in tensors},
)


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("train/classifier.json", ["[" * 100_000, "[]", {"class_names": 3}, {"decoding": [1]}]),
        ("report/parameters.json", ["[]", "null", {"mahalanobis": 3}]),
        ("report/headline.json", ["{}", {"score": None}, {"score": "../x"}]),
        ("train/student.safetensors", TENSORS),
        ("report/detectors/mahalanobis.safetensors", TENSORS),
    ],
)
def test_forged_contents_are_one_line(copy, name, contents):
    whole = (copy / name).read_bytes()
    for content in contents:
        if callable(content):
            data = safetensors.numpy.save(
                {
                    k: np.ascontiguousarray(v)
                    for k, v in content(safetensors.numpy.load(whole)).items()
                }
            )
        elif isinstance(content, dict):
            data = json.dumps(json.loads(whole) | content).encode()
        else:
            data = content.encode()
        forge(copy, name, data)
        with pytest.raises(UserError) as refused:
            score = None if "headline" in name else "mahalanobis"
            oal_jax.load(copy, score)(np.zeros((2, 28, 28, 1), np.uint8))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name", ["config.json", "train/manifest.json", "train/student.safetensors"]
)
def test_a_pipe_in_the_place_of_a_file_is_one_line(copy, name):
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(UserError, match=name.rpartition("/")[2]):
        oal_jax.load(copy)


@pytest.mark.parametrize("name", ["report/detectors", "train/checkpoints"])
def test_a_run_writes_to_no_linked_folder(copy, tmp_path, name):
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "mine.txt").write_text("mine")
    shutil.rmtree(copy / name)
    (copy / name).symlink_to(tmp_path / "others")
    with pytest.raises(UserError, match=f"{name} is a link"):
        pipeline.run(pipeline.resolve(copy).config, copy)
    assert [path.name for path in (tmp_path / "others").iterdir()] == ["mine.txt"]


def test_a_student_that_is_trained_again_is_not_called_damaged(copy):
    (copy / "train" / "manifest.json").unlink()
    with pytest.raises(UserError, match="stage train .* is not finished"):
        oal_jax.load(copy)
