"""What the README shows runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("code", EXAMPLES)
def test_the_examples_run(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert "mahalanobis" in done.stdout and "is_ood" in done.stdout


def test_there_is_an_example_and_every_config_it_names_exists():
    assert EXAMPLES
    for name in set(re.findall(r"configs/\w+\.py", README.read_text("utf-8"))):
        assert (README.parent / name).is_file(), name
