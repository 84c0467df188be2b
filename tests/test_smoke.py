"""Whole runs on tiny sizes with the shipped weights: oal once, every method in minutes (`slow`)."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from oal_jax import main
from oal_jax.config import SCORES
from oal_jax.methods.registry import METHODS

CONFIGS = Path(__file__).parent.parent / "configs"
CASES = {
    "diffusion": ["--config.outliers.source=diffusion"],
    "official-code": ["--config.method.oal.objective=club", "--config.outliers.official_code"],
    "alternate": ["--config.method.oal.objective=club_alternate"],
    "random": ["--config.outliers.source=random"],
    "images": ["--config.outliers.source=none", "--config.outliers.images=decoded"],
    "pixel": ["--config.method.name=pixel"],
    "kd": ["--config.method.name=kd"],
    "fresh-teacher-per-step": ["--config.method.name=kd", "--config.teacher.views=0"],
}
OF_ONE_SCORE = ["--config.evaluation.scores=energy"]
WITHOUT_TEACHER = {
    **{name: [f"--config.method.name={name}"] for name in ("logitnorm", "vos", "npos")},
    **{name: [f"--config.method.name={name}"] for name in ("oe", "energy")},
    "oe-decoded": ["--config.method.name=oe", "--config.outliers.images=decoded"],
}
FINE_TUNED = {
    **{name: [f"--config.method.name={name}"] for name in ("um", "umap", "woods")},
    "oe-um": ["--config.method.name=oe", "--config.method.unleash"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def start(workdir: Path, *flags: str, name: str = "fashion.py") -> int:
    argv = [
        "main",
        f"--config={CONFIGS / name}",
        f"--workdir={workdir}",
        "--config.smoke=True",
        *flags,
    ]
    return main.guard(main.run, argv)


@pytest.fixture(scope="module")
def diffusion(runs) -> Path:
    """A run with every stage of OAL, for others to take stages from."""
    assert start(runs / "diffusion", *CASES["diffusion"]) == 0
    return runs / "diffusion"


@pytest.fixture(scope="module")
def trained(runs) -> Path:
    """A classifier that others start from, evaluated with every score."""
    assert start(runs / "ce", "--config.method.name=ce", "--config.evaluation.scores=all") == 0
    return runs / "ce"


def read_finished(workdir: Path) -> tuple[list[dict], list[dict]]:
    """The rows of the table and of the log, both as they must be."""
    with (workdir / "report" / "ood.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["dataset"] for row in rows} >= {"sandal", "bag", "mnist", "nearood", "farood"}
    assert all(0 <= float(row["auroc"]) <= 100 for row in rows)
    page = (workdir / "report" / "index.html").read_text()
    assert "http" not in page and "SMOKE" in page
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(v) for row in logged for k, v in row.items() if k != "stage")
    return rows, logged


def test_the_cases_are_all_methods():
    flags = [flag for case in (CASES, WITHOUT_TEACHER, FINE_TUNED) for flag in case.values()]
    names = {
        f.partition("=")[2] for case in flags for f in case if f.startswith("--config.method.name")
    }
    assert names | {"ce", "oal"} == set(METHODS)


def test_a_whole_run_of_oal(finished_run):
    rows, logged = read_finished(finished_run)
    assert {row["score"] for row in rows} == {"energy", "mahalanobis", "knn"}
    assert {row["stage"] for row in logged} >= {"train"}
    train = [row for row in logged if row["stage"] == "train"]
    assert train[-1]["step"] == 4 and all(row["loss"] > 0 for row in train if "loss" in row)
    for kind in ("feature", "latent", "image"):
        assert any(f"outlier_neg_energy_{kind}" in row for row in train)
    stages = ("teacher", "generator", "features", "outliers", "latents", "train", "evaluate")
    assert all((finished_run / stage / "manifest.json").exists() for stage in stages)


def test_outliers_and_latents_are_as_documented(finished_run):
    outliers = load_file(finished_run / "outliers" / "outliers.safetensors")
    assert outliers["outliers"].dtype == np.float32 and outliers["outliers"].shape[0] == 8
    np.testing.assert_array_equal(outliers["labels"], np.arange(8))
    latents = load_file(finished_run / "latents" / "latents.safetensors")
    assert latents["latents"].shape == (32, 8, 8, 4)
    np.testing.assert_array_equal(np.bincount(latents["labels"]), np.full(8, 4))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_method_runs_from_start_to_report(runs, diffusion, case, capsys):
    reuse = [f"--reuse={diffusion}"] if case != "diffusion" else []
    assert start(runs / case, *CASES[case], *reuse) == 0
    out = capsys.readouterr().out
    assert "nearood" in out and "index.html" in out
    _, logged = read_finished(runs / case)
    if case == "official-code":
        last = logged[-1]
        # The estimate pulls, its mean over all pairings does not.
        assert last["club_gradient_outlier"] > 100 * last["club_expected_gradient_outlier"]


@pytest.mark.slow
def test_every_score_is_computed(trained):
    rows, _ = read_finished(trained)
    assert {row["score"] for row in rows} == set(SCORES)
    detectors = {path.stem for path in (trained / "report" / "detectors").iterdir()}
    assert detectors == set(SCORES)


@pytest.mark.slow
@pytest.mark.parametrize("case", WITHOUT_TEACHER)
def test_a_method_without_a_teacher_runs(runs, case):
    assert start(runs / case, *WITHOUT_TEACHER[case], *OF_ONE_SCORE) == 0
    _, logged = read_finished(runs / case)
    assert logged[-1]["step"] == 4 and logged[0]["loss"] > 0
    assert (runs / case / "latents").exists() == (case == "oe-decoded")


@pytest.mark.slow
@pytest.mark.parametrize("case", FINE_TUNED)
def test_a_method_goes_on_from_a_trained_model(runs, trained, case):
    flags = [*FINE_TUNED[case], *OF_ONE_SCORE, f"--config.train.start={trained}"]
    assert start(runs / case, *flags) == 0
    _, logged = read_finished(runs / case)
    assert (runs / case / "estimate_loss" / "constraint.json").exists()
    assert ("constraint" in logged[-1]) == (case != "woods")
    before, after = (load_file(d / "train" / "student.safetensors") for d in (trained, runs / case))
    kernel = "params.student.conv1.kernel"
    if case == "umap":  # the weights stay or go
        left = after[kernel] != 0
        assert 0.75 < left.mean() < 0.85
        np.testing.assert_array_equal(after[kernel][left], before[kernel][left])
    else:
        assert (after[kernel] != before[kernel]).any()


@pytest.mark.slow
def test_a_fine_tuning_without_a_start_is_one_line(runs, capsys):
    assert start(runs / "no-start", "--config.method.name=um") == 2
    error = capsys.readouterr().err
    assert "train.start" in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_second_start_skips_everything(diffusion, capsys):
    assert start(diffusion, *CASES["diffusion"]) == 0
    assert capsys.readouterr().out.count("done already, skipped") == 8


@pytest.mark.slow
def test_teacher_and_generator_train_in_their_stages(runs):
    flags = ["--config.teacher.train=True", "--config.generator.train=True"]
    small = ["--config.generator.batch_size=64", "--config.generator.vae_batch_size=64"]
    assert start(runs / "trained", *flags, *small) == 0
    assert (runs / "trained/generator/stable_diffusion/unet/config.json").exists()


@pytest.mark.slow
def test_the_reference_starts_from_another_runs_student(runs, trained):
    flags = [f"--config.train.start={trained}", "--config.latents.steps=4"]
    assert start(runs / "official", *flags, name="fashion_reference.py") == 0
    assert load_file(runs / "official" / "train" / "student.safetensors")


@pytest.mark.slow
def test_a_start_of_another_size_is_one_line(runs, trained, capsys):
    flags = [f"--config.train.start={trained}", "--config.method.name=ce"]
    assert start(runs / "deep", *flags, "--config.student.depth=34") == 2
    assert capsys.readouterr().err.count("\n") == 1
