"""The README's example runs, and what the pages name and link to exists."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from oal_jax.config import SCORES, Config, flatten
from oal_jax.config.methods import SECTIONS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def names(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """The text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and Sphinx (myst) make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in words}


@pytest.mark.slow
@pytest.mark.parametrize("code", EXAMPLES)
def test_the_examples_run(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert "mahalanobis" in done.stdout and "is_ood" in done.stdout


def test_the_readme_has_an_example_and_is_short():
    assert EXAMPLES
    assert len(README.read_text("utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_relative_links_resolve(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = (page.parent / path).resolve() if path else page
        known = target.exists() and target.is_relative_to(ROOT)
        if not known or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_every_page_has_one_title(page):
    assert len(re.findall(r"^# ", prose(page), re.MULTILINE)) == 1


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_named_configs_and_modules_exist(page):
    text = page.read_text("utf-8")
    named = re.findall(r"(?:configs|oal_jax|tests|benchmarks)/[\w/]+\.py", text)
    assert not [path for path in named if not (ROOT / path).is_file()]
    modules = re.findall(r"python -m ((?:oal_jax|benchmarks)[\w.]*)", text)
    paths = [ROOT / module.replace(".", "/") for module in modules]
    assert not [path for path in paths if not (path.is_dir() or path.with_suffix(".py").is_file())]


def test_the_functions_of_the_architecture_exist():
    text = prose(ROOT / "docs/architecture.md")
    folders = [path.name for path in (ROOT / "oal_jax").iterdir() if path.is_dir()]
    named = re.findall(rf"`((?:{'|'.join(folders)})\.\w+(?:\.\w+)+)`", text)
    assert len(named) > 30 and not [name for name in named if not defined(name)]


def defined(name: str) -> bool:
    """Whether `FOLDER.MODULE.NAME[.METHOD]` is a function, a class or a method."""
    folder, module, *names_inside = name.split(".")
    path = ROOT / "oal_jax" / folder / f"{module}.py"
    node = ast.parse(path.read_text("utf-8")) if path.is_file() else None
    for inside in names_inside:
        children = [n for n in getattr(node, "body", ()) if getattr(n, "name", "") == inside]
        node = children[0] if children else None
    return node is not None


def test_every_score_and_method_is_named():
    readme = README.read_text("utf-8")
    for names_of_kind, page in ((SCORES, "scores.md"), (SECTIONS, "methods.md")):
        text = (ROOT / "docs" / page).read_text("utf-8")
        assert not [n for n in names_of_kind if f"`{n}`" not in readme or f"`{n}`" not in text]


def test_named_config_keys_exist():
    """Keys set by a command, or named as a whole."""
    keys = flatten(Config())
    # The first three name removed keys, the last modules.
    others = ("CHANGELOG.md", "latent_outliers.md", "performance.md", "architecture.md")
    for page in PAGES:
        if page.name in others:
            continue
        text = page.read_text("utf-8")
        named = re.findall(r"--config\.([a-z_]+(?:\.[a-z_]+)*)=", text)
        named += re.findall(rf"`((?:{'|'.join(vars(Config()))})\.[a-z_.]+)(?:=[^`]*)?`", text)
        assert not [key for key in named if key not in keys and not is_section(key, keys)], page


def is_section(key: str, keys) -> bool:
    return any(known.startswith(f"{key}.") for known in keys)
