"""What pyproject.toml has no words for: configs inside the package, and the README for PyPI.

A checkout has the configs beside the package, where they are easy to copy. An installed package has
them inside, where `--config NAME` finds them.
"""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildPy(build_py):
    """The build of the package, with `configs/*.py` as `oal_jax/configs/*.py`."""

    def run(self) -> None:
        """Build; where the package is not editable, copy the configs."""
        super().run()
        if self.editable_mode:  # uses the checkout
            return
        target = Path(self.build_lib, "oal_jax", "configs")
        self.mkpath(str(target))
        for file in sorted((ROOT / "configs").glob("*.py")):
            self.copy_file(str(file), str(target / file.name))


def readme_for_pypi() -> str:
    """The README without its figure and its links to files of the repository.

    PyPI shows the text alone, so such links would lead nowhere.
    """
    text = (ROOT / "README.md").read_text("utf-8")
    text = re.sub(r"!\[[^\]]*\]\((?!https:)[^)]*\)\n\n(\*[^*]*\*\n\n)?", "", text)
    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!https:)[^)]*\)", r"\1", text)


setup(
    cmdclass={"build_py": BuildPy},
    long_description=readme_for_pypi(),
    long_description_content_type="text/markdown",
)
