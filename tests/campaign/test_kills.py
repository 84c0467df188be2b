"""Kills at random moments and disks that fill up: the same command then gives the same table."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}


def start(workdir, *more):
    command = [sys.executable, "-m", "oal_jax.main", "--config", str(ROOT / "configs/fashion.py")]
    command += ["--workdir", str(workdir), "--config.smoke=True", *more]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(workdir, *more):
    """Run the command to its end; the table that it writes."""
    child = start(workdir, *more)
    _, err = child.communicate(timeout=600)
    assert child.returncode == 0, err
    return (workdir / "report" / "ood.csv").read_bytes()


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """(table, seconds) of a run that nothing stopped."""
    workdir = tmp_path_factory.mktemp("straight")
    finish(workdir / "warm")  # the others find the programs compiled
    begin = time.monotonic()
    return finish(workdir / "run"), time.monotonic() - begin


def test_a_run_killed_at_random_ends_the_same(straight, tmp_path, case):
    table, seconds = straight
    rng = np.random.default_rng(case)
    for _ in range(int(rng.integers(1, 3))):
        sign = list(CODES)[rng.integers(len(CODES))]
        moment = rng.uniform(0, 1.2 * seconds)
        print(f"{sign.name} after {moment:.2f} s")
        child = start(tmp_path)
        try:
            _, err = child.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            child.send_signal(sign)
            _, err = child.communicate(timeout=120)
        # Before Python has its handlers, a signal ends the process by itself.
        assert child.returncode in (0, CODES[sign], -sign), err
        assert "Traceback" not in err or moment < 3, err
    assert finish(tmp_path) == table


def test_a_disk_that_fills_up_costs_one_line(straight, tmp_path, case):
    table, _ = straight
    size = int(np.random.default_rng(case).integers(200, 20_000))  # KiB
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        print(f"{size} KiB")
        child = start(tmp_path / "run")
        _, err = child.communicate(timeout=600)
        if child.returncode:
            lines = [line for line in err.splitlines() if line.startswith("oal_jax:")]
            assert child.returncode == 2 and "Traceback" not in err, err
            assert "disk is full" in lines[-1]
            remount = ["mount", "-o", "remount,size=1g", str(tmp_path)]
            subprocess.run(remount, check=True)
        assert finish(tmp_path / "run") == table
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
