"""Tensor files: pickles are refused, damaged files are one line; and their converter."""

import pickle
import sys
import zipfile

import numpy as np
import pytest
from classifier_files import google_tensors, resnet_tensors, vit_tensors, write

from oal_jax.errors import UserError
from oal_jax.pretrained import convert
from oal_jax.pretrained.classifiers import load_classifier
from oal_jax.pretrained.tensor_files import read


def test_pickles_are_refused_whatever_they_are_called(tmp_path):
    command = r"oal_jax\.pretrained\.convert --input .* --output .*net\.safetensors$"
    for name in ("net.ckpt", "net.pth", "net.bin"):
        with pytest.raises(UserError, match=command):
            read(tmp_path / name)  # never opened
    path = tmp_path / "net.safetensors"
    for start in (b"PK\x03\x04\x00\x00\x08\x08", pickle.dumps({"a": [1.5]}, protocol=2)):
        path.write_bytes(start + bytes(100))
        with pytest.raises(UserError, match=command):
            read(path)


def test_damaged_files_are_one_line(tmp_path):
    path = write(tmp_path / "net.safetensors", resnet_tensors())
    whole = path.read_bytes()
    for size in (0, 5, 300, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"net\.safetensors.* not safetensors"):
            read(path)
    write(path, resnet_tensors(), oal_jax="{")
    with pytest.raises(UserError, match=r"net\.safetensors.*metadata"):
        load_classifier(path)
    archive = tmp_path / "vit.npz"
    np.savez(archive, **google_tensors(vit_tensors(), 2))
    whole = archive.read_bytes()
    for content in (b"", whole[:300], whole[:-30], b"text" * 9):
        archive.write_bytes(content)
        with pytest.raises(UserError, match=r"vit\.npz.* not npz"):
            read(archive)
    np.savez(archive, cls=np.array([{}], object))
    with pytest.raises(UserError, match=r"vit\.npz.* not npz .*allow_pickle"):
        read(archive)
    for name in ("absent.npz", "absent.safetensors"):
        with pytest.raises(UserError, match=rf"{name} .*No such file"):
            read(tmp_path / name)
    with pytest.raises(UserError, match=r"net\.h5.*\.safetensors or \.npz"):
        read(tmp_path / "net.h5")


def test_converter_without_torch_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    argv = ["convert", "--input", "a.ckpt", "--output"]
    assert convert.guard(convert.run, [*argv, str(tmp_path / "a.safetensors")]) == 2
    assert capsys.readouterr().err.startswith(
        "oal_jax: converting a PyTorch checkpoint needs torch"
    )
    assert convert.guard(convert.run, [*argv, "a.pt"]) == 2
    assert "must end in .safetensors" in capsys.readouterr().err
    assert convert.guard(convert.run, argv[:1]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_archive_that_unpacks_to_gigabytes_is_refused_unread(tmp_path):
    path = tmp_path / "bomb.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("w.npy", "w") as f,
    ):
        np.lib.format.write_array_header_1_0(
            f, {"descr": "<f4", "fortran_order": False, "shape": (150_000_000,)}
        )
        for _ in range(600):
            f.write(bytes(1_000_000))
    with pytest.raises(UserError, match=r"bomb\.npz: unpacks to 0\.6 GiB"):
        read(path)
