"""The code of docs/own_model.md runs as it stands."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "own_model.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
# Libraries that the package does not need.
FOREIGN = ("equinox", "torch")


def needs(block):
    return [name for name in FOREIGN if f"import {name}" in block]


def run(blocks):
    names = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, "own_model.md", "exec"), names)
    return names


def test_the_page_runs_from_a_model_to_a_saved_detector(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run(block for block in BLOCKS if not needs(block))
    printed = capsys.readouterr().out
    assert "True" in printed and "Detector(react" in printed and "farood" in printed
    images, labels = names["sets"].validation
    detector = names["detector"]
    assert (detector(images).label == labels).mean() > 0.7
    assert detector(names["sets"].near["bag"]).is_ood.mean() > 0.3
    assert len(BLOCKS[0].splitlines()) < 60


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", FOREIGN)
def test_the_page_runs_with_other_libraries(name, tmp_path, monkeypatch, capsys):
    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    run([BLOCKS[0], *(block for block in BLOCKS if name in needs(block))])
    printed = capsys.readouterr()
    assert f"Detector({'energy' if name == 'torch' else 'react'}" in printed.out
    assert ("pure_callback" in printed.err) == (name == "torch")
