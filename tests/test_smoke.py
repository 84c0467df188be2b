"""Every method through every stage on tiny sizes, with the shipped weights: minutes, so `slow`."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from oal_jax import main

CONFIGS = Path(__file__).parent.parent / "configs"
CASES = {
    "mixed": ["--config.outliers.source=mixed"],
    "reference": ["--config.method.micl=reference", "--config.latents.injection=first_piece"],
    "alternate": ["--config.method.micl=alternate"],
    "random": ["--config.outliers.source=random"],
    "pixel": ["--config.method.name=pixel"],
    "kd": ["--config.method.name=kd"],
    "fresh-teacher-per-step": ["--config.method.name=kd", "--config.teacher.views=0"],
    "ce": ["--config.method.name=ce"],
}

pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize("case", CASES)
def test_a_method_runs_from_start_to_report(runs, case, capsys):
    first = runs / "mixed"
    reuse = [f"--reuse={first}"] if case != "mixed" else []
    assert start(runs / case, *CASES[case], *reuse) == 0
    out = capsys.readouterr().out
    assert "nearood" in out and "index.html" in out
    with (runs / case / "report" / "ood.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["dataset"] for row in rows} >= {"sandal", "bag", "mnist", "nearood", "farood"}
    assert all(0 <= float(row["auroc"]) <= 100 for row in rows)
    page = (runs / case / "report" / "index.html").read_text()
    assert "http" not in page
    lines = (runs / case / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    assert all(np.isfinite(v) for row in logged for k, v in row.items() if k != "stage")
    if case == "reference":
        last = logged[-1]
        # The estimate pulls, its mean over all pairings does not.
        assert last["club_gradient_outlier"] > 100 * last["club_expected_gradient_outlier"]


def test_outliers_and_latents_are_as_documented(runs):
    first = runs / "mixed"
    outliers = load_file(first / "outliers" / "outliers.safetensors")
    assert outliers["outliers"].dtype == np.float32 and outliers["outliers"].shape[0] == 8
    np.testing.assert_array_equal(outliers["labels"], np.arange(8))
    latents = load_file(first / "latents" / "latents.safetensors")
    assert latents["latents"].shape == (32, 4, 8, 8)
    np.testing.assert_array_equal(np.bincount(latents["labels"]), np.full(8, 4))


def test_a_second_start_skips_everything(runs, capsys):
    assert start(runs / "mixed", *CASES["mixed"]) == 0
    assert capsys.readouterr().out.count("done already, skipped") == 8


def test_teacher_and_generator_train_in_their_stages(runs):
    flags = ["--config.teacher.train=True", "--config.generator.train=True"]
    small = ["--config.generator.batch_size=64", "--config.generator.vae_batch_size=64"]
    assert start(runs / "trained", *flags, *small) == 0
    assert (runs / "trained/generator/stable_diffusion/unet/config.json").exists()


def test_the_reference_starts_from_another_runs_student(runs):
    flags = [f"--config.train.start={runs / 'ce'}", "--config.latents.steps=4"]
    assert start(runs / "official", *flags, name="fashion_reference.py") == 0
    assert load_file(runs / "official" / "train" / "student.safetensors")


def test_a_start_of_another_size_is_told(runs, capsys):
    flags = [f"--config.train.start={runs / 'ce'}", "--config.method.name=ce"]
    assert start(runs / "deep", *flags, "--config.student.depth=34") == 2
    assert "another size" in capsys.readouterr().err
