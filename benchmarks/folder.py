"""Suite `folder`: scoring a folder of images, its speed and its memory.

    python -m benchmarks.run --suite folder --workdir runs/fashion --output results.json
        [--sizes 10000,100000]

Writes embedded test images as PNG files into a temporary folder, over and over with another border
pixel, and has `python -m oal_jax.score` score it in a process of its own. A row a size, with
`images_per_s` (decoding, model, score, CSV; start-up apart) and `peak_mib` of that process:
memory is flat if the peaks are alike.
"""

import argparse
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.run import row
from oal_jax.data.sources import load
from oal_jax.errors import UserError

_PER_FOLDER = 1000


def run(argv: Sequence[str]) -> list[dict[str, Any]]:
    """Score folders of each size; print and return the rows."""
    parser = argparse.ArgumentParser(prog="benchmarks.run --suite folder")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--sizes", default="10000,100000")
    args = parser.parse_args(argv)
    rows = []
    for size in map(int, args.sizes.split(",")):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "images"
            write_images(folder, size)
            output = Path(temporary) / "scores.csv"
            seconds, speed, peak = score(args.workdir, folder, output)
            with output.open() as file:
                scored = sum(1 for _ in file) - 1
        if scored != size:
            raise UserError(f"{scored} of {size} images have a row in scores.csv")
        rows.append(row("folder", f"{size} images", [seconds], images_per_s=speed, peak_mib=peak))
        print(f"{size:7d} images  {seconds:7.1f} s  {speed} images/s  peak {peak} MiB", flush=True)
    return rows


def write_images(folder: Path, count: int) -> None:
    """`count` different PNG files of the embedded test sets, a thousand a sub-folder."""
    names = ("fashion", "sandal", "mnist", "photos")
    images = np.concatenate([load("bundled", name, "test").images for name in names])
    for i in range(count):
        image = images[i % len(images)].copy()
        image[0, :4, 0] = np.frombuffer(np.int32(i).tobytes(), np.uint8)
        path = folder / f"{i // _PER_FOLDER:04d}" / f"{i:06d}.png"
        if i % _PER_FOLDER == 0:
            path.parent.mkdir(parents=True)
        Image.fromarray(image[..., 0]).save(path)


def score(workdir: Path, folder: Path, output: Path) -> tuple[float, int, int]:
    """(seconds, images per second, peak MiB) of one run of the command."""
    argv = ["--workdir", str(workdir), "--images", str(folder), "--output", str(output)]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "oal_jax.score", *argv], capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise UserError(done.stderr.strip().splitlines()[-1])
    speed = int(re.search(r"(\d+) images/s", done.stdout)[1])
    # Of the largest child so far; sizes go up, so it is that of this one.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    return seconds, speed, peak
