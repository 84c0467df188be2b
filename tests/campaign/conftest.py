"""Faults at random: kills, damage, small disks. `pytest -m campaign tests/campaign` runs them.

`--cases N` bounds each kind, `--campaign-seed S` draws other ones. Each case is one line with `-v`.
"""

import shutil

import pytest

from oal_jax.stages import run as pipeline


def pytest_addoption(parser):
    parser.addoption("--cases", type=int, default=10, help="cases of each kind")
    parser.addoption("--campaign-seed", type=int, default=0, help="which cases")


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        seed, count = (metafunc.config.getoption(o) for o in ("campaign_seed", "cases"))
        metafunc.parametrize("case", [(seed, number) for number in range(count)], ids=str)


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.campaign)


@pytest.fixture
def copy(finished_run, tmp_path):
    """A finished run that a case may damage."""
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="session")
def config(finished_run):
    return pipeline.resolve(finished_run).config
