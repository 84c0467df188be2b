"""The progress bar: what it says while XLA compiles, and what its rate counts."""

import io
import os
import re
import subprocess
import sys
import time

from oal_jax.runtime.progress import Bar


def shown(monkeypatch, work, **options):
    """All lines that a bar of 10 steps writes while `work(bar)` runs."""
    out = io.StringIO()
    monkeypatch.setattr("sys.stderr", out)
    with Bar(10, "train", "step", **options) as bar:
        work(bar)
    return [line for line in re.split(r"[\r\n]+", out.getvalue()) if line.strip()]


def test_the_time_of_compiling_is_in_no_rate(monkeypatch):
    def work(bar):
        time.sleep(1.2)
        for _ in range(10):
            bar.update()
            time.sleep(0.01)

    first, *_, last = shown(monkeypatch, work)
    assert first.startswith("compiling train:") and "0/10" in first and "?step/s" in first
    assert last.startswith("train:") and "10/10" in last
    rate = float(re.search(r"([\d.]+)step/s", last)[1])
    assert 20 < rate < 110  # 9 steps in 0.1 s; with the 1.2 s it would be 8


def test_a_later_program_is_announced_too(monkeypatch):
    def work(bar):
        bar.update()
        bar.compiling()
        time.sleep(0.3)
        bar.update(3)

    lines = shown(monkeypatch, work, initial=4)
    assert [line.split(":")[0] for line in lines][:4] == ["compiling train", "train"] * 2
    assert "5/10" in lines[1] and "8/10" in lines[-1]


def test_a_disabled_bar_writes_nothing():
    code = "from oal_jax.runtime.progress import Bar; b = Bar(3, 'x', 'step'); b.update();"
    code += "b.compiling(); b.update(2); b.set_postfix(loss='1'); b.close()"
    env = {**os.environ, "TQDM_DISABLE": "1"}
    child = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    assert child.stdout == child.stderr == b""
