"""Classes left out of an ID set: what every source gives, the OOD sets, the teacher, the stages."""

import dataclasses
import functools
import itertools
import logging
import pickle

import jax
import numpy as np
import pytest
import tfds_sets
from PIL import Image

from oal_jax import main
from oal_jax.config import Config, Data, flatten, unflatten
from oal_jax.config.benchmarks import MADE, resolve
from oal_jax.config.class_names import generated_names
from oal_jax.config.smoke import shrink
from oal_jax.data import corruptions, generated, sources, stream
from oal_jax.data.leave_out import relabelled
from oal_jax.data.stored import SetSpec, Subset, read_all, select
from oal_jax.errors import UserError
from oal_jax.methods import registry
from oal_jax.runtime import artifacts, distributed
from oal_jax.scores import compute
from oal_jax.stages import evaluate, generator, teacher
from oal_jax.stages import run as pipeline
from oal_jax.stages.context import Context

NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "shirt", "sneaker", "boot")
ANIMALS = ("bird", "cat", "dog")


def context_of(tmp_path, leave_out=("coat",), key=0, **data):
    config = Config(data=Data(leave_out=leave_out, **data))
    return Context(config, tmp_path, distributed.make_mesh(), jax.random.key(key))


@functools.cache
def whole(split: str, name: str = "fashion") -> sources.ImageSet:
    return sources.load("bundled", name, split)


def refused(match, function, *args, **kwargs) -> None:
    with pytest.raises(UserError, match=match) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)


def test_labels_close_up_in_their_order():
    table, names = relabelled(NAMES, ["trouser", "boot"])
    assert table.tolist() == [0, -1, 1, 2, 3, 4, 5, -1]
    assert names == ("t-shirt", "pullover", "dress", "coat", "shirt", "sneaker")
    table, names = relabelled(NAMES, ["boot,trouser"], left_out=True)
    assert table.tolist() == [-1, 0, -1, -1, -1, -1, -1, 0]
    assert names == ("ood",)


def test_a_name_with_a_comma_is_one_name():
    assert relabelled(("a, b", "c", "d"), ["a, b"])[1] == ("c", "d")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["trousers"], "'trousers', which is no class of the ID set; nearest: 'trouser'"),
        ([",".join(NAMES[1:])], "leaves 1 of the 8 classes"),
    ],
)
def test_mistakes_are_one_line(names, words):
    refused(words, relabelled, NAMES, names)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_class_is_gone_from_every_split_and_the_others_stay(tmp_path, split):
    data, full = context_of(tmp_path).images(split), whole(split)
    rest = full.labels != NAMES.index("coat")
    np.testing.assert_array_equal(data.images, full.images[rest])
    names = [full.class_names[label] for label in full.labels[rest]]
    assert [data.class_names[label] for label in data.labels] == names
    assert len(data.class_names) == 7


def test_its_images_are_ood_sets_of_their_own_splits(tmp_path):
    context = context_of(tmp_path, ("coat", "boot"))
    groups = evaluate.groups(context)
    assert {groups["left_out"], groups["sandal"]} == {"near"}
    assert {groups["val_left_out"], groups["val_blend"]} == {"validation"}
    for name, split in {"left_out": "test", "val_left_out": "validation"}.items():
        assert evaluate._place(context, name)[:2] == (split, name)
        data, full = context.images(split, name), whole(split)
        expected = np.isin(full.labels, [NAMES.index("coat"), NAMES.index("boot")])
        np.testing.assert_array_equal(data.images, full.images[expected])
        assert data.class_names == ("ood",) and not data.labels.any()


def test_without_leave_out_nothing_changes(tmp_path):
    context = context_of(tmp_path, ())
    assert not {"left_out", "val_left_out"} & set(evaluate.groups(context))
    data = context.images("test")
    np.testing.assert_array_equal(data.images, whole("test").images)
    np.testing.assert_array_equal(data.labels, whole("test").labels)
    assert context.info.kept_labels.tolist() == list(range(8))


def test_other_sets_are_left_alone(tmp_path):
    data = context_of(tmp_path).images("test", "sandal")
    np.testing.assert_array_equal(data.images, whole("test", "sandal").images)


def test_shifted_sets_lose_the_class_too(tmp_path):
    name = "fashion_contrast"
    data, plain = (context_of(tmp_path).images("test", n) for n in (name, ""))
    np.testing.assert_array_equal(data.labels, plain.labels)
    np.testing.assert_array_equal(data.images, corruptions.corrupt(name, plain.images))


def test_limits_count_what_remains(tmp_path):
    context = context_of(tmp_path, ("t-shirt", "trouser"), train_images=300)
    data, all_of_it = context.train_images(), context.images("train")
    np.testing.assert_array_equal(data.images, all_of_it.images[:300])
    assert len(context.images("validation", limit=1).images) == 1
    more = sources.open_source(SetSpec("bundled", "fashion", "extra")).labels()
    expected = np.sum(whole("train").labels > 1) + np.sum(more > 1)
    assert context.all_train_images().examples == expected


@pytest.fixture
def folders(tmp_path):
    """ROOT/pets/SPLIT/CLASS/NUMBER.png: each image is of one gray level, its own."""
    levels = itertools.count(10)
    for split, name, number in itertools.product(
        ("train", "validation", "test"), ANIMALS, range(4)
    ):
        path = tmp_path / "pets" / split / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 6, 3), next(levels), np.uint8)).save(path)
    return tmp_path


def pets(root, tmp_path, leave_out=("cat",), **more):
    data = Data("folder", str(root), "pets", leave_out=leave_out, **more)
    return Context(Config(data=data), tmp_path, distributed.make_mesh(), jax.random.key(0))


def test_folders(folders, tmp_path):
    full = pets(folders, tmp_path, (), near=("x",)).images("train")
    data = pets(folders, tmp_path).images("train")
    np.testing.assert_array_equal(data.images, full.images[full.labels != 1])
    assert data.class_names == ("bird", "dog")
    np.testing.assert_array_equal(data.labels, full.labels[full.labels != 1] // 2)
    few = pets(folders, tmp_path).images("train", limit=4)
    assert sorted(few.labels) == [0, 0, 1, 1]
    left = pets(folders, tmp_path).images("test", "left_out")
    cats = np.asarray([Image.open(folders / f"pets/test/cat/{i}.png") for i in range(4)])
    np.testing.assert_array_equal(left.images, cats)
    refused("nearest: 'cat'", pets(folders, tmp_path, ("cats",)).images, "train")


def test_a_stream_is_the_set_in_memory(folders, tmp_path):
    held, streamed = (pets(folders, tmp_path, stream=on).opened("train") for on in (False, True))
    assert isinstance(streamed, stream.Streamed)
    assert (streamed.examples, streamed.class_names) == (held.examples, held.class_names)
    np.testing.assert_array_equal(streamed.labels, held.labels)
    for rows in (None, np.array([5, 0, 3])):
        pairs = zip(streamed.chunks(4, rows), held.chunks(4, rows), strict=True)
        for chunk, expected in pairs:
            np.testing.assert_array_equal(chunk.images, expected.images)
            np.testing.assert_array_equal(chunk.labels, expected.labels)
    # Other processes read it too.
    copy = pickle.loads(pickle.dumps(streamed.source))  # noqa: S301
    assert copy.fetch([5, 0]) == streamed.source.fetch([5, 0])
    assert "dog" in copy.where(5)


def test_a_split_without_the_class_is_named(folders, tmp_path):
    for path in (folders / "pets/validation/cat").iterdir():
        path.unlink()
    context = pets(folders, tmp_path)
    refused("no image of the classes", context.images, "validation", "val_left_out")


def test_a_bad_label_is_still_told(folders, tmp_path, monkeypatch):
    spec = SetSpec("folder", "pets", "train", root=str(folders))
    whole = sources.open_source(spec)
    wrong = Subset(whole, np.arange(len(whole)), whole.class_names, np.array([0, 7, 2]))
    selected = select(wrong, dataclasses.replace(spec, leave_out=("dog",)))
    refused("label 7 .* is out of range", read_all, selected)


def test_openoods_lists(tmp_path):
    lines, levels = [], []
    for i, label in enumerate([3, 5, 3, 0, 5]):
        path = tmp_path / "images_classic" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), 40 * i, np.uint8)).save(path)
        lines.append(f"{i}.png {label}")
        levels.append(40 * i)
    path = tmp_path / "benchmark_imglist/cifar10/test_cifar10.txt"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines))
    options = {"root": str(tmp_path), "leave_out": ["cat"]}
    data = sources.load("imglist", "cifar10", "test", **options)
    assert data.images[:, 0, 0, 0].tolist() == [40, 120, 160]
    assert [data.class_names[label] for label in data.labels] == ["dog", "airplane", "dog"]
    left = sources.load("imglist", "cifar10", "test", left_out=True, **options)
    assert left.images[:, 0, 0, 0].tolist() == [0, 80]


def test_tfds_records(tmp_path):
    def example(level, label):
        return {"image": tfds_sets.png(np.full((5, 5), level, np.uint8)), "label": label}

    examples = [example(9 * i, i % 3) for i in range(12)]
    described = {"image": tfds_sets.an_image((5, 5, 1)), "label": tfds_sets.a_class(3)}
    folder = tfds_sets.write(tmp_path, "digits3", {"train": examples}, described, shards=2)
    (folder / "label.labels.txt").write_text("\n".join(ANIMALS))
    options = {"root": str(tmp_path), "leave_out": ["bird"]}
    data = sources.load("tfds", "digits3", "train", limit=5, **options)
    assert data.images[:, 0, 0, 0].tolist() == [9, 18, 36, 45, 63]
    assert data.labels.tolist() == [0, 1, 0, 1, 0]
    assert data.class_names == ("cat", "dog")


@pytest.mark.parametrize("limit", [0, 1, 100])
def test_generated_images(limit):
    options = {"id_set": "cifar10", "leave_out": ["dog", "ship"], "limit": limit}
    data = sources.load("generated", "cifar10", "train", **options)
    names = [n for n in generated_names("cifar10") if n not in ("dog", "ship")]
    assert list(data.class_names) == names
    assert data.examples == (limit or 80)
    count = 10 * (-(-limit // 8)) or 100
    images, labels, _ = generated.draw(
        "cifar10", "train", id_set="cifar10", labelled=True, limit=count
    )
    rest = ~np.isin(labels, [5, 8])
    np.testing.assert_array_equal(data.images, images[rest][: data.examples])
    left = sources.load("generated", "cifar10", "test", left_out=True, **options)
    assert left.class_names == ("ood",)


def test_smoke_runs_find_a_class_to_leave_out():
    config = Config(data=Data("folder", id_set="pets", leave_out=("cat",)), smoke=True)
    config = shrink(config)
    names = generated_names("pets")
    assert config.data.leave_out == names[:1]
    config = shrink(Config(data=Data("imglist", id_set="cifar10", leave_out=("ship",)), smoke=True))
    assert config.data.leave_out == ("ship",)


def test_an_own_set_needs_no_other_ood_set():
    refused("has no benchmark", resolve, "pets")
    benchmark = resolve("pets", leave_out=["cat"])
    assert (benchmark.near, benchmark.validation) == (("left_out",), (*MADE, "val_left_out"))
    only = resolve("fashion", near=["none"], leave_out=["coat"])
    assert only.near == ("left_out",)
    refused("'left_out' is in data.near", resolve, "fashion", ["left_out"], leave_out=["coat"])


def test_its_training_images_are_no_outlier_images():
    changes = {"data.leave_out": ["coat"], "method.name": "oe", "outliers.images": "left_out"}
    refused("left_out", registry.check, unflatten(flatten(Config()) | changes))


def test_the_shipped_teacher_keeps_the_other_rows_of_its_head(tmp_path, caplog):
    full, cut = context_of(tmp_path / "a", ()), context_of(tmp_path / "b", ("coat", "t-shirt"))
    outputs = []
    for context in (full, cut):
        with caplog.at_level(logging.WARNING, "absl"):
            teacher.run(context)
        outputs.append(compute(teacher.load(context), whole("test").images[:8])[:2])
    (logits, plain), (fewer, same) = (map(np.asarray, pair) for pair in outputs)
    rest = [i for i, name in enumerate(NAMES) if name not in ("coat", "t-shirt")]
    np.testing.assert_allclose(fewer, logits[:, rest], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(same, plain, rtol=1e-5, atol=1e-5)
    (warning,) = (r.getMessage() for r in caplog.records if "leave_out" in r.getMessage())
    assert "coat', 't-shirt" in warning and "teacher.train=True" in warning


def test_prompts_are_of_the_remaining_classes(tmp_path):
    words = generator.class_words(context_of(tmp_path, ("trouser",)))
    assert len(words) == 7 and "trouser" not in words


@pytest.mark.slow
def test_stages_are_taken_from_any_of_several_runs(tmp_path, monkeypatch):
    ran = []

    def fake(path):
        name = path.rpartition(".")[2]

        class Module:
            @staticmethod
            def run(context):
                ran.append(name)
                return []

        return Module

    monkeypatch.setattr(pipeline, "import_module", fake)
    first, second = Config(seed=1), Config(seed=2)
    pipeline.run(first, tmp_path / "a", only="features")
    pipeline.run(second, tmp_path / "b", only="features")
    ran.clear()
    places = [tmp_path / "a", tmp_path / "b"]
    pipeline.run(second, tmp_path / "c", only="features", reuse=places)
    assert ran == []
    pipeline.run(Config(seed=3), tmp_path / "d", only="features", reuse=places)
    assert ran == ["teacher", "generator", "features"]


@pytest.mark.slow
def test_the_command_without_a_class(tmp_path):
    argv = ["main", "--config=configs/fashion_ce.py", f"--workdir={tmp_path / 'run'}"]
    argv += ["--config.smoke=True", "--config.data.leave_out=coat"]
    assert main.guard(main.run, [*argv, "--config.evaluation.scores=energy"]) == 0
    report = tmp_path / "run" / "report"
    assert "energy,left_out,near" in (report / "ood.csv").read_text()
    assert "energy,val_left_out,validation" in (report / "validation.csv").read_text()


@pytest.mark.slow
def test_the_teacher_is_trained_without_the_class(tmp_path):
    config = Config(smoke=True, data=Data(leave_out=("coat",)))
    config.method.name, config.teacher.train, config.teacher.batch_size = "kd", True, 100
    context = pipeline.resolve(pipeline.run(config, tmp_path / "run", only="features"))
    assert teacher.variables(context)["params"]["head"]["kernel"].shape == (128, 7)
    features = artifacts.read_tensors(context.directory("features") / "features.safetensors")
    data = context.train_images()
    np.testing.assert_array_equal(features["labels"], data.labels)
    assert features["logits"].shape == (data.examples, 7)


def test_the_generator_learns_the_remaining_classes(tmp_path, monkeypatch):
    fitted = []

    def fit(context, name, init, step, examples, plan):
        fitted.append((examples["image"].shape, sorted(set(examples["label"].tolist()))))
        raise KeyboardInterrupt

    monkeypatch.setattr(generator, "_fit", fit)
    monkeypatch.setattr(generator.stable_diffusion, "build", lambda *args, **kwargs: None)
    monkeypatch.setattr(generator, "make_vae_trainer", lambda *args, **kwargs: (None, None))
    context = context_of(tmp_path)
    smoke = dataclasses.replace(context.config, smoke=True)
    with pytest.raises(KeyboardInterrupt):
        generator._train(dataclasses.replace(context, config=smoke))
    assert fitted == [((400, 28, 28, 1), list(range(7)))]
    vocabulary = (tmp_path / "generator/stable_diffusion/tokenizer/vocab.json").read_text()
    assert "trouser" in vocabulary and "coat" not in vocabulary
