"""Saved detectors: that they work like the original, which files they refuse, what they replace."""

import dataclasses
import json
import os
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from PIL import Image
from small_detector import CLASSES, HEAD, IMAGES, LABELS, NAMES, SHAPE, blocks, with_kernel

import oal_jax
from oal_jax.detection import saved
from oal_jax.detection.folder import EXPORTED, MODEL, check_replaceable
from oal_jax.errors import UserError
from oal_jax.runtime import artifacts

MODELS = {
    "closure": lambda images: with_kernel(HEAD[0], images),
    "pytree": Partial(with_kernel, jnp.asarray(HEAD[0])),
    "half precision": Partial(with_kernel, jnp.bfloat16(HEAD[0])),
    "batch compared": blocks,
}


def calibrated(model="pytree", score="energy", **options):
    options = {"head": HEAD, "class_names": NAMES} | options
    return oal_jax.calibrate(
        MODELS[model], (IMAGES, LABELS), (IMAGES, LABELS), score, batch_size=16, **options
    )


def assert_same(one, other, images=IMAGES):
    a, b = one(images), other(images)
    np.testing.assert_array_equal(a.label, b.label)
    np.testing.assert_allclose(a.confidence, b.confidence, rtol=1e-4)
    np.testing.assert_allclose(a.ood_score, b.ood_score, rtol=1e-4, atol=1e-5)
    clear = np.abs(a.ood_score - one.threshold) > 1e-4  # the threshold is one of the scores
    np.testing.assert_array_equal(a.is_ood[clear], b.is_ood[clear])


@pytest.mark.parametrize(
    ("model", "score", "params"),
    [
        ("closure", "energy", {}),
        ("pytree", "knn", {"k": 3}),
        ("half precision", "mahalanobis", {}),
        pytest.param("batch compared", "odin", {}, marks=pytest.mark.slow),
    ],
)
def test_a_saved_detector_works_like_the_original(tmp_path, model, score, params):
    original = calibrated(model, score, params=params)
    original.save(tmp_path / "one")
    again = oal_jax.load(tmp_path / "one")
    assert repr(again) == repr(original) and again.params == params
    assert (again.class_names, again.batch_size) == (NAMES, 16)
    np.testing.assert_array_equal(again.id_val_scores, original.id_val_scores)
    assert_same(original, again)
    np.testing.assert_allclose(original(IMAGES).percentile, again(IMAGES).percentile, atol=2)
    assert_same(original.with_keep_id(0.5), again.with_keep_id(0.5))
    assert_same(original.with_keep_id(0.5), oal_jax.load(tmp_path / "one", keep_id=0.5))
    assert oal_jax.load(tmp_path / "one", batch_size=4).batch_size == 4
    again.save(tmp_path / "two")
    assert_same(original, oal_jax.load(tmp_path / "two"))


@pytest.mark.parametrize("score", ["energy", pytest.param("odin", marks=pytest.mark.slow)])
@pytest.mark.parametrize("is_saved", [False, True])
def test_the_function_is_pure_and_transforms(tmp_path, score, is_saved):
    detector = calibrated(score=score)
    if is_saved:
        detector.save(tmp_path)
        detector = oal_jax.load(tmp_path)
    function, images = detector.function, np.float32(IMAGES[:12] / 255)
    expected = detector(images)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    for results in (
        jax.jit(function)(images),
        jax.jit(lambda f, x: f(x))(function, IMAGES[:12]),
        jax.tree.map(jnp.concatenate, jax.vmap(function)(images.reshape(3, 4, *SHAPE))),
        jax.tree.map(
            jnp.concatenate,
            jax.lax.scan(lambda c, x: (c, function(x)), 0, images.reshape(3, 4, *SHAPE))[1],
        ),
    ):
        label, confidence, ood_score, is_ood = results
        np.testing.assert_array_equal(label, expected.label)
        clear = np.abs(expected.ood_score - detector.threshold) > 1e-5  # it is one of the scores
        np.testing.assert_array_equal(is_ood[clear], expected.is_ood[clear])
        close(confidence, expected.confidence)
        close(ood_score, expected.ood_score)
    # By a difference along the gradient.
    slope = jax.jit(jax.grad(lambda x: function(x)[2].sum()))
    gradient = slope(images)
    each = jax.vmap(jax.grad(lambda x: function(x[None])[2][0]))(images)
    close(each, gradient)
    if score == "energy":
        step = 1e-2 * gradient / np.linalg.norm(gradient)
        rise = function(images + step)[2].sum() - function(images - step)[2].sum()
        np.testing.assert_allclose(rise, 2e-2 * np.linalg.norm(gradient), rtol=2e-2)


def test_a_saved_detector_scores_within_another_step(tmp_path):
    calibrated().save(tmp_path)
    function = oal_jax.load(tmp_path).function

    @jax.jit
    def step(weight, images):
        def loss(weight):
            *_, ood_score, _ = function(jax.nn.sigmoid(weight) * images)
            return jnp.mean(ood_score)

        return weight - jax.grad(loss)(weight)

    assert np.isfinite(step(jnp.float32(0.5), np.float32(IMAGES / 255)))


def test_what_can_not_be_done_names_what_can(tmp_path):
    detector = calibrated()
    with pytest.raises(UserError, match=r"detector\.function"):
        jax.jit(lambda images: detector(images).ood_score)(IMAGES)
    with pytest.raises(UserError, match=r"save.*load"):
        pickle.dumps(detector)
    detector.save(tmp_path)
    with pytest.raises(UserError, match="by energy; knn"):
        oal_jax.load(tmp_path, score="knn")


def test_one_file_is_a_path_bytes_or_an_open_file(tmp_path):
    detector, path = calibrated(), tmp_path / "one.png"
    Image.fromarray(IMAGES[0]).save(path)
    expected = detector(IMAGES[0]).ood_score
    with path.open("rb") as file:
        for one in (path, str(path), path.read_bytes(), file, [path]):
            (row,) = detector.score_files(one)
            np.testing.assert_allclose(row.result.ood_score, expected, rtol=1e-5)
            assert row.path == (str(path) if one in (path, str(path), [path]) else None)


def on_the_host(images):
    shape = jax.ShapeDtypeStruct((images.shape[0], CLASSES), jnp.float32)
    return jax.pure_callback(lambda x: x[:, 0, 0], shape, images, vmap_method="expand_dims")


def test_a_model_that_calls_the_host_is_one_line(tmp_path):
    detector = oal_jax.calibrate(on_the_host, (IMAGES, LABELS), (IMAGES, LABELS))
    for write in (detector.save, detector.export):
        with pytest.raises(UserError, match="NumPy or PyTorch") as caught:
            write(tmp_path / "saved")
        assert "\n" not in str(caught.value) and not os.listdir(tmp_path)


def test_it_replaces_a_saved_detector_or_nothing(tmp_path, monkeypatch):
    detector, folder = calibrated(), tmp_path / "saved"
    folder.mkdir()
    detector.save(folder)  # an empty one
    detector.with_keep_id(0.7).save(folder)
    assert oal_jax.load(folder).keep_id == 0.7

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(artifacts, "write_json", fail)
        detector.save(folder)
    assert oal_jax.load(folder).keep_id == 0.7 and os.listdir(tmp_path) == ["saved"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"")
    for other in (tmp_path / "photos", tmp_path / "photos" / "a.png"):
        with pytest.raises(UserError, match="photos"):
            detector.save(other)
    assert os.listdir(tmp_path / "photos") == ["a.png"]
    (folder / "notes.md").write_text("mine")
    with pytest.raises(UserError, match="saved holds other files, such as notes.md"):
        detector.save(folder)
    assert (folder / "notes.md").read_text() == "mine"


def test_the_card_of_a_model_of_an_own_folder_says_so(tmp_path):
    trained = {"id_set": "own", "source": "own", "method": "ce", "epochs": 1, "seed": 0}
    detector = dataclasses.replace(calibrated(), about={"trained_on": trained})
    detector.export(tmp_path, platforms=["cpu"])
    card = (tmp_path / "README.md").read_text()
    assert "folder of one's own images, of 3 classes" in card and "own (own)" not in card
    assert "# OOD detector: energy\n" in card and "Classes: a, b, c." in card


# Files that someone else may have written


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "sound"
    calibrated(score="knn", params={"k": 3}).save(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def written(folder, files, **changes):
    """A detector of these files, the values of its description changed and its digests right."""
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    path = folder / "detector.json"
    values = json.loads(path.read_text()) | changes
    digests = {name: artifacts.sha256(folder / name) for name in files if name != path.name}
    path.write_text(json.dumps({"files": digests} | values | {"files": digests}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version"),
        ({"score": "enrgy"}, "enrgy"),
        ({"score": ["knn"]}, "score"),
        ({"score": "energy"}, "not fit|parameter"),
        ({"parameters": {"k": "many"}}, "k"),
        ({"parameters": {"__class__": 1}}, "__class__"),
        ({"threshold": 0.0}, "threshold"),
        ({"keep_id": 2}, "keep_id"),
        ({"image_shape": [6, 6]}, "image_shape"),
        ({"image_shape": [6, 6, 4]}, "not fit"),
        ({"decoding": {"channels": 2, "resize": 6, "crop": [6, 6]}}, "decoding"),
        ({"decoding": {"channels": 3, "resize": 6, "crop": [5, 5]}}, "decoding"),
        ({"class_names": [1, 2, 3]}, "class_names"),
        ({"class_names": ["a"]}, "1 class_names"),
        ({"batch_size": True}, "batch_size"),
        ({"weights": []}, "weights"),
        ({"about": {"measured": [[1]]}}, "about"),
    ],
)
def test_a_description_of_another_form_is_one_line(tmp_path, sound, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        oal_jax.load(written(tmp_path / "saved", sound, **changes))
    assert "\n" not in str(caught.value) and str(tmp_path / "saved") in str(caught.value)


@pytest.mark.parametrize("name", ["detector.json", saved.FORWARD, saved.TENSORS])
@pytest.mark.parametrize("how", ["altered", "truncated", "deleted", "forged"])
def test_a_damaged_file_is_named(tmp_path, sound, name, how):
    folder = written(tmp_path / "saved", sound)
    path, data = folder / name, sound[name]
    if how == "deleted":
        path.unlink()
    else:
        middle = len(data) // 2
        altered = data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]
        path.write_bytes({"altered": altered, "truncated": data[:middle]}.get(how, b"[1, 2]"))
    if how == "forged" and name != "detector.json":  # with a digest that is right
        written(
            folder,
            {name: path.read_bytes(), "detector.json": sound["detector.json"]}
            | {
                other: data for other, data in sound.items() if other not in (name, "detector.json")
            },
        )
    with pytest.raises(UserError, match=name if how != "deleted" else "detector.json|" + name):
        oal_jax.load(folder)


def test_tensors_that_do_not_fit_are_named(tmp_path, sound):
    folder = written(tmp_path / "saved", sound)
    tensors = artifacts.read_tensors(folder / saved.TENSORS)
    weight = next(name for name in tensors if name.startswith("weights."))
    for name, value in {
        weight: tensors[weight][:-1],
        "id_val_scores": tensors["id_val_scores"][::-1],
        "state.bank": tensors["state.bank"][:, :-1],
    }.items():
        artifacts.write_tensors(folder / saved.TENSORS, tensors | {name: value})
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(UserError, match="safetensors|not fit"):
            oal_jax.load(written(folder, files))


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "3"])
def test_a_folder_whose_description_is_not_ours_is_refused(tmp_path, text):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(UserError, match=r"holds other files, such as model\.json"):
        check_replaceable(tmp_path, MODEL, EXPORTED)
