"""The sha256 of every file of a data directory: written, compared, and what differs is named."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from oal_jax.data import manifest, sources
from oal_jax.errors import UserError

RNG = np.random.default_rng(0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("mine/train/cat/a.png", "mine/train/dog/b c.png", "mine/val/cat/v.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    (tmp_path / "mine/train/cat/notes.txt").write_text("no image")
    (tmp_path / "mine/.cache").write_text("hidden")
    return tmp_path


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "oal_jax.data.manifest", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def load(root: Path, split: str = "train", **more) -> sources.ImageSet:
    return sources.load("folder", "mine", split, root=str(root), **more)


def refused(match: str, function, *args, **kwargs) -> None:
    with pytest.raises(UserError, match=match) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)


def test_the_command_writes_what_sha256sum_reads(root):
    odd = root / "mine/odd \\ name\nof two lines.txt"
    odd.write_text("x")
    written = run("--root", root)
    assert (written.returncode, written.stderr) == (0, "")
    assert written.stdout == f"5 files are in {root}/SHA256SUMS\n"
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    theirs = subprocess.run(check, cwd=root, capture_output=True, text=True, check=False)
    assert (theirs.returncode, theirs.stdout) == (0, "")
    assert run("--root", root, "--check").stdout == f"5 files are as in {root}/SHA256SUMS\n"
    assert odd.relative_to(root).as_posix() in manifest.read(root / "SHA256SUMS").digests
    odd.write_text("y")
    differs = run("--root", root, "--check")
    assert differs.returncode == 2 and differs.stdout == "" and differs.stderr.count("\n") == 1
    assert "differs from its sha256" in differs.stderr
    assert run("--root", root / "no").returncode == 2


def test_sets_are_compared_as_they_are_read(root):
    before = load(root)
    manifest.write(root)
    np.testing.assert_array_equal(load(root).images, before.images)
    changed = root / "mine/train/dog/b c.png"
    good = changed.read_bytes()
    Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(changed)
    refused(f"{changed} differs from its sha256 in {root}/SHA256SUMS", load, root)
    refused("differs", load, root, on_corrupt="skip")  # not damage, but another image
    assert len(load(root, "validation").images) == 1
    changed.unlink()
    refused(f"{changed} is missing, {root}/SHA256SUMS has it", load, root)
    changed.write_bytes(good)
    (root / "mine/train/cat/notes.txt").unlink()
    refused("notes.txt is missing", load, root)
    (root / "mine/train/cat/notes.txt").write_text("no image")
    (root / "mine/train/cat/new.png").write_bytes(good)
    refused("new.png is not in .*SHA256SUMS", load, root)


def test_a_manifest_may_be_of_one_set(root):
    manifest.write(root / "mine")
    load(root)
    (root / "mine/train/cat/a.png").write_bytes(b"other")
    refused("a.png differs from its sha256 in .*mine/SHA256SUMS", load, root)


def test_a_folder_of_classes_is_compared_as_a_whole(tmp_path):
    for name in ("a/0.png", "a/1.png", "b/0.png", "elsewhere/2.png"):
        path = tmp_path / ("own" if name[0] in "ab" else "") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    (tmp_path / "own/b/more").symlink_to(tmp_path / "elsewhere")
    root = tmp_path / "own"
    assert manifest.write(root) == 4
    path = root / manifest.NAME
    path.write_text(path.read_text(), "utf-8-sig")  # as some editors save it

    def read():
        return sources.load("own", "own", "train", root=str(root))

    assert len(read().images) == 4
    (root / "a/1.png").unlink()
    refused("a/1.png is missing", read)


def test_lists_are_compared_too(tmp_path):
    listed = tmp_path / "benchmark_imglist/cifar10/test_cifar10.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("x.png 0\n")
    image = tmp_path / "images_classic/x.png"
    image.parent.mkdir()
    Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(image)
    manifest.write(tmp_path)

    def read():
        return sources.load("imglist", "cifar10", "test", root=str(tmp_path))

    assert len(read().images) == 1
    listed.write_text("x.png 1\n")
    refused("test_cifar10.txt differs", read)
    listed.write_text("x.png 0\n")
    image.write_bytes(image.read_bytes() + b" ")
    refused("line 1: .*x.png differs", read)


@pytest.mark.parametrize("line", ["abc  x\n", f"{'g' * 64}  x\n", f"{'a' * 64} x\n", "\n"])
def test_damaged_manifests_are_named(root, line):
    manifest.write(root)
    with (root / "SHA256SUMS").open("a") as file:
        file.write(line)
    refused(f"{root}/SHA256SUMS, line 5: not 'SHA256  PATH'", load, root)
