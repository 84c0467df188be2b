"""Suite `middle_stage`: the stage that is chosen, the summary, the pictures, all checkpoints."""

import io
import json
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks import middle_stage, middle_stage_figures, run
from oal_jax import main
from oal_jax.config import Config, flatten, unflatten
from oal_jax.config.rules import validate
from oal_jax.data.sources import ImageSet
from oal_jax.errors import UserError
from oal_jax.stages import estimate_loss, train
from oal_jax.stages import run as pipeline
from oal_jax.training.checkpoints import Checkpoints

CONFIG = Path(__file__).parent.parent / "configs" / "fashion.py"


def epoch(seed, number, validation, near, far, loss=1.0, accuracy=80.0, score="energy"):
    groups = {"validation": validation, "near": near, "far": far, "all": (near + far) / 2}
    of = {
        group: {"auroc": v, "fpr_at_95_ood_tpr": 100 - v, "fpr_at_95_id_tpr": 90 - v / 2}
        for group, v in groups.items()
    }
    return {
        "case": "epoch",
        "seed": seed,
        "epoch": number,
        "id_accuracy": accuracy,
        "train_loss": loss,
        "metrics": {score: of},
    }


def end(seed, crossing_epoch, examples=()):
    return {
        "case": "constraint",
        "seed": seed,
        "constraint": 0.5,
        "std": 0.05,
        "crossing_epoch": crossing_epoch,
        "atypical": list(examples),
        "typical": list(examples),
    }


def synthetic():
    """Two seeds of three epochs: validation chooses the 2nd and the 1st, far sets would not."""
    return [
        epoch(0, 1, 60, 50, 99, 1.0, 70),
        epoch(0, 2, 80, 64, 80, 0.4, 82),
        epoch(0, 3, 70, 60, 78, 0.2, 85),
        end(0, 2),
        epoch(1, 1, 90, 58, 86, 1.1, 74),
        epoch(1, 2, 85, 57, 99, 0.8, 80),
        epoch(1, 3, 85, 56, 80, 0.6, 84),
        end(1, None),
    ]


def test_the_stage_is_chosen_on_validation_sets_alone():
    assert middle_stage.best_epochs(synthetic()) == {("energy", 0): 2, ("energy", 1): 1}
    tied = [epoch(0, 1, 70, 1, 1), epoch(0, 2, 70, 99, 99)]
    assert middle_stage.best_epochs(tied) == {("energy", 0): 1}


@pytest.mark.parametrize(
    ("losses", "first"), [([1.0, 0.5, 0.4, 0.6, 0.3], 3), ([1.0, 0.5], None), ([0.1, 0.9], 1)]
)
def test_the_crossing_is_the_first_epoch_below_the_constraint(losses, first):
    rows = [epoch(0, number, 0, 0, 0, loss) for number, loss in enumerate(losses, 1)]
    assert middle_stage.crossing(rows, 0.5) == first


def test_the_summary_pairs_the_chosen_epoch_with_the_last():
    text = middle_stage.summary(synthetic())
    head, line = (
        [cell.strip() for cell in text.splitlines()[i].strip("|").split("|")] for i in (2, 4)
    )
    cells = dict(zip(head, line, strict=True))
    assert cells["best epoch"] == "2 1"
    assert cells["AUROC near, last"] == "58.0 ± 2.8"
    assert cells["best − last, near"] == "+3.0 ± 1.4 (+4.0 +2.0)"
    assert cells["best − last, far"] == "+4.0 ± 2.8 (+2.0 +6.0)"
    assert cells["best − last, all"] == "+3.5 ± 0.7 (+3.0 +4.0)"
    assert cells["best − last, ID acc"] == "-6.5 ± 4.9 (-3.0 -10.0)"
    assert cells["crossing − last, near"] == "+4.0"  # of the seed that crosses
    assert "seed 0: 0.5000 ± 0.0500, epoch 2; seed 1: 0.5000 ± 0.0500, never" in text
    assert text.splitlines()[-1].startswith(
        "`energy`: the middle stage is better than the end on all 2 seeds (AUROC over near and far"
        " sets +3.5 ± 0.7 (+3.0 +4.0))."
    )
    nowhere = [r | {"crossing_epoch": None} for r in synthetic()]
    assert middle_stage.summary(nowhere).splitlines()[4].endswith("| – | – |")


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ([1.0, 0.2], "is better than the end on all 2 seeds (AUROC over near and far sets +0.6"),
        (
            [0.0, -1.0],
            "is not better than the end on all 2 seeds (AUROC over near and far sets -0.5",
        ),
        ([2.0, -1.0, 0.0], "undecided, the middle stage is better than the end on 1 of 3 seeds"),
        ([0.0], "is not better than the end on the one seed (AUROC over near and far sets +0.0)"),
    ],
)
def test_the_verdict_follows_the_numbers(gains, words):
    assert words in middle_stage.verdict("energy", gains)


def test_atypical_images_are_right_without_a_mask_and_lose_most_under_it():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 60)
    logits = rng.normal(size=(60, 4)).astype(np.float32)
    logits[np.arange(40), labels[:40]] += 9  # these are right
    under = rng.normal(scale=3, size=(3, 60, 4)).astype(np.float32)
    found = middle_stage.pick(logits, under, labels, 5, seed=0)
    e = np.exp(under.astype(np.float64))
    shares = e / e.sum(-1, keepdims=True)
    loss = -np.log(shares[:, np.arange(60), labels]).mean(0)
    right = np.flatnonzero(logits.argmax(-1) == labels)
    hardest = sorted(right, key=lambda i: -loss[i])[:5]
    assert [x["index"] for x in found["atypical"]] == hardest
    np.testing.assert_allclose([x["loss"] for x in found["atypical"]], loss[hardest], rtol=1e-5)
    for x in found["atypical"] + found["typical"]:
        assert x["label"] == labels[x["index"]]
        assert x["prediction"] == shares[:, x["index"]].mean(0).argmax()
    typical = [x["index"] for x in found["typical"]]
    assert len(set(typical)) == 5 and set(typical) <= set(right)
    assert loss[typical].max() <= np.median(loss[right])
    assert json.loads(json.dumps(found)) == found


def test_few_right_images_give_a_smaller_picture():
    labels = np.array([0, 1, 0, 1])
    logits = np.eye(2, dtype=np.float32)[[0, 1, 1, 0]]
    found = middle_stage.pick(logits, logits[None], labels, 16, seed=0)
    assert [len(found[kind]) for kind in ("atypical", "typical")] == [1, 1]


def picture(path):
    image = np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("L"))
    assert image.std() > 5  # something was drawn
    return image


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_the_curves_are_drawn_from_rows(seeds, tmp_path):
    rows = [r for r in synthetic() if r["seed"] in seeds]
    figure = middle_stage_figures.curves(rows, middle_stage.best_epochs(rows))
    png, svg = middle_stage_figures.save(figure, tmp_path / "r_middle_stage", ("png", "svg"))
    assert (png.name, svg.name) == ("r_middle_stage.png", "r_middle_stage.svg")
    picture(png)
    assert svg.read_text().rstrip().endswith("</svg>")
    left, *panels = [axes for axes in figure.findobj(lambda a: hasattr(a, "get_lines"))][:6]
    last = [np.mean([r["id_accuracy"] for r in rows if r.get("epoch") == e]) for e in (1, 2, 3)]
    np.testing.assert_allclose(left.get_lines()[0].get_ydata(), last)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_examples_show_image_class_and_prediction(channels, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 8, 8, channels)).astype(np.uint8)
    data = ImageSet("x/train", images, np.zeros(20, np.int32), ("coat", "shirt"))
    shown = [{"index": i, "label": 0, "prediction": i % 2, "loss": i / 7} for i in range(3, 12)]
    figure = middle_stage_figures.examples(end(0, 1, shown), data)
    (png,) = middle_stage_figures.save(figure, tmp_path / "r_atypical", ("png",))
    picture(png)
    titles = [axes.get_title() for axes in figure.findobj(lambda a: hasattr(a, "get_title"))]
    assert "coat → shirt\n0.43" in titles and "coat\n0.57" in titles


@flax.struct.dataclass
class State:
    step: jnp.ndarray
    w: jnp.ndarray


def state_at(step):
    return State(jnp.int32(step), jnp.full((3,), step, jnp.float32))


@pytest.mark.parametrize(("keep", "left"), [(2, [20, 30]), (0, [0, 10, 20, 30])])
def test_checkpoints_keep_the_newest_or_all(keep, left, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep)
    for step in (0, 10, 20, 30):
        checkpoints.save(state_at(step))
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, keep)
    assert checkpoints.steps() == left
    for step in left:
        found = checkpoints.restore_step(step, state_at(7))
        assert int(found.step) == step and found.w.tolist() == [step] * 3
    assert int(checkpoints.restore(state_at(7)).step) == 30
    with pytest.raises(UserError, match=r"no checkpoint of step 11; it has: .*20, 30"):
        checkpoints.restore_step(11, state_at(7))
    checkpoints.close()


def test_a_damaged_step_is_told_and_stays(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=0)
    for step in (1, 2):
        checkpoints.save(state_at(step))
    checkpoints.close()
    for file in (tmp_path / "1" / "default" / "d").iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    checkpoints = Checkpoints(tmp_path, keep=0)
    with pytest.raises(UserError, match=r"checkpoint .*1 is damaged \(.*\); delete"):
        checkpoints.restore_step(1, state_at(7))
    assert int(checkpoints.restore_step(2, state_at(7)).step) == 2
    checkpoints.close()
    assert (tmp_path / "1").is_dir()


def test_the_training_is_a_valid_config_that_keeps_every_epoch():
    flat = flatten(Config()) | dict(middle_stage.CASES["ce"].changes)
    validate(unflatten(flat))
    assert flat["train.keep_checkpoints"] == 0 and flat["train.checkpoint_every"] == 1
    with pytest.raises(UserError, match=r"train\.keep_checkpoints=-1 must be 0 or greater"):
        validate(unflatten(flat | {"train.keep_checkpoints": -1}))


def test_a_mistake_is_told_before_any_training(tmp_path, capsys):
    argv = ["run", "--suite", "middle_stage", "--output", str(tmp_path / "r.json")]
    argv += [f"--config={CONFIG}", f"--workdir={tmp_path / 'runs'}"]
    assert main.guard(run.main, [*argv, "--scores", "energi"]) == 2
    err = capsys.readouterr().err
    assert "energi" in err and "'energy'" in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_suite_trains_measures_and_draws(tmp_path, capsys):
    output = tmp_path / "results.json"
    argv = ["run", "--suite", "middle_stage", "--output", str(output), "--seeds", "0"]
    argv += ["--epochs", "2", f"--config={CONFIG}", f"--workdir={tmp_path / 'runs'}"]
    argv += ["--scores", "msp,odin,mahalanobis", "--config.smoke=True"]
    assert main.guard(run.main, argv) == 0
    first = capsys.readouterr().out
    rows = json.loads(output.read_text())
    assert [(r["case"], r.get("epoch")) for r in rows] == [
        *(("epoch", 1), ("epoch", 2), ("constraint", None))
    ]
    assert rows[0]["step"] * 2 == rows[1]["step"]
    assert rows[0]["metrics"]["msp"] != rows[1]["metrics"]["msp"]
    assert set(rows[0]["metrics"]) == {"msp", "odin", "mahalanobis"}
    # The last epoch is the student that training wrote, and its constraint is the stage's.
    context = pipeline.resolve(tmp_path / "runs" / "seed0")
    data = context.train_images()
    net = train.student(context.config, len(data.class_names))
    (first_step, early), (_, late) = middle_stage._states(context, net, data, 2)
    written = train.student_variables(*train.load(context))
    assert first_step == rows[0]["step"]
    jax.tree.map(np.testing.assert_array_equal, written, late)
    assert np.any(np.asarray(written["params"]["fc"]["kernel"]) != early["params"]["fc"]["kernel"])
    start = {"train.start": str(context.workdir)}
    config = unflatten(flatten(context.config) | start)
    stage = context._replace(config=config, workdir=tmp_path / "stage")
    estimate_loss.run(stage)
    found = json.loads((tmp_path / "stage" / "estimate_loss" / "constraint.json").read_text())
    assert rows[2]["per_mask"] == pytest.approx(found["per_mask"], rel=1e-5)
    assert (rows[2]["constraint"], rows[2]["std"]) == pytest.approx(
        (found["constraint"], found["std"]), rel=1e-4
    )
    assert "the middle stage is" in first
    for name in ("results_middle_stage.png", "results_atypical.png"):
        picture(tmp_path / name)
    assert main.guard(run.main, argv) == 0
    again = capsys.readouterr().out
    assert "train: done already, skipped" in again
    keep = ("id_accuracy", "train_loss", "metrics", "constraint", "atypical")
    for a, b in zip(rows, json.loads(output.read_text()), strict=True):
        assert {k: a.get(k) for k in keep} == {k: b.get(k) for k in keep}
