"""Readers of outside bytes: whatever a file holds, it is read or refused in one line with its name.

`pytest tests/test_fuzz.py --hypothesis-profile fuzz` tries for minutes instead of seconds.
"""

import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from oal_jax.data import manifest, sources
from oal_jax.data.decoding import Decoding, Unreadable, decode
from oal_jax.data.stored import SetSpec
from oal_jax.errors import UserError
from oal_jax.pretrained import tensor_files
from oal_jax.runtime import artifacts
from oal_jax.stages import run as pipeline
from oal_jax.training import log

RELAXED = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "database": None,
}
settings.register_profile("fuzz", max_examples=20_000, **RELAXED)
SHORT = settings(settings.get_profile("default"), **RELAXED)


def npz(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def picture(form, mode="RGB"):
    file = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).convert(mode).save(
        file, form
    )
    return file.getvalue()


def read_list(path):
    root = path.parent
    lists = root / "benchmark_imglist" / "cifar10"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / "test_cifar10.txt").write_bytes(path.read_bytes())
    source = sources.open_source(SetSpec("imglist", "cifar10", "test", str(root)))
    source.fetch([0])


def read_run(path):
    pipeline.resolve(path.parent)


def read_manifest(path):
    artifacts.output_hashes(path.parent)
    artifacts.inputs_recorded(path.parent)


W = {"w": np.ones((2, 3), np.float32), "b": np.zeros(3, np.float16)}
# Name of the file, what reads it, and a sound one.
READERS = {
    "safetensors": ("a.safetensors", tensor_files.read, safetensors.numpy.save(W)),
    "artifact": ("a.safetensors", artifacts.read_tensors, safetensors.numpy.save(W)),
    "npz": ("a.npz", tensor_files.read, npz(**W)),
    "config": ("config.json", read_run, b'{"seed": 1, "data.near": ["a"], "train.epochs": 3}'),
    "stage": (
        "manifest.json",
        read_manifest,
        b'{"stage": "train", "inputs": {}, "seconds": 1, "versions": {}, '
        b'"outputs": {"x": {"sha256": "", "bytes": 0}}}',
    ),
    "log": ("metrics.jsonl", lambda p: log.read(p, "train"), b'{"stage": "train", "step": 1}\n'),
    "sums": ("SHA256SUMS", manifest.read, b"0" * 64 + b"  a/b.png\n"),
    "list": ("list.txt", read_list, b"cifar10/test/a.png 3\n"),
    **{
        form: ("a.bin", lambda p: decode(p, Decoding(3, 8, (8, 8))), picture(form))
        for form in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "TGA", "PCX", "ICO")
    },
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def damaged(draw, whole):
    """A sound file with some of its bytes replaced, left out or repeated; or another one."""
    kind = draw(
        st.sampled_from(["bytes", "json", "deep", "value", "mutated", "mutated", "mutated"])
    )
    if kind == "bytes":
        return draw(st.binary(max_size=64))
    if kind == "json":
        return json.dumps(draw(JSON)).encode()
    if kind == "deep":
        return b'{"a":' * 100_000
    if kind == "value" and whole.startswith(b"{"):
        content = json.loads(whole)
        content[draw(st.sampled_from(sorted(content)))] = draw(JSON)
        return json.dumps(content).encode()
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 8)))
        data[start:end] = draw(st.binary(max_size=8) | st.just(b"\xff" * 8) | st.just(b"\x00" * 8))
    return bytes(data)


@pytest.mark.parametrize("name", READERS)
def test_any_bytes_are_read_or_refused_by_name(tmp_path, name):
    file, read, whole = READERS[name]
    path = tmp_path / file

    @SHORT
    @given(damaged(whole))
    def check(data):
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read(path)
            except UserError as error:
                message = str(error)
                assert ("\n" not in message and Path(file).stem in message) or "list" in name
            except Unreadable as error:
                assert str(error)

    check()
