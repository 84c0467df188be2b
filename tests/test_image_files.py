"""Image files of every kind as a model takes them; damaged ones; how far decoding runs ahead."""

import contextlib
import io
import os
import threading
import time

import numpy as np
import pytest
from PIL import Image

from oal_jax.data import image_files
from oal_jax.data.image_files import (
    CONVERTED,
    Decoding,
    Unreadable,
    decode,
    decode_with_notes,
    find,
    formats,
    stream,
)
from oal_jax.errors import UserError

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (28, 28)).astype(np.uint8)
# Smooth, so that lossy formats come close.
SMOOTH = np.stack(np.broadcast_arrays(*np.ogrid[0:250:28j, 0:250:28j], 90), -1).astype(np.uint8)


SQUARE = Decoding(3, 28, (28, 28))
GRAY_SQUARE = Decoding(1, 28, (28, 28))


def saved(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.mark.parametrize("ending", ["png", "bmp", "gif", "tif", "tiff", "pgm", "webp", "tga"])
def test_lossless_formats_of_the_right_size_stay_as_they_are(tmp_path, ending):
    options = {"lossless": True, "exact": True} if ending == "webp" else {}
    path = saved(tmp_path / f"a.{ending}", GRAY, **options)
    pixels = decode(path, GRAY_SQUARE)
    np.testing.assert_array_equal(pixels[..., 0], GRAY)


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "webp", "jp2", "png"])
def test_colour_formats(tmp_path, ending):
    pixels, notes = decode_with_notes(saved(tmp_path / f"a.{ending}", SMOOTH), SQUARE)
    assert pixels.shape == (28, 28, 3) and not notes
    assert np.abs(pixels.astype(int) - SMOOTH).mean() < 6


@pytest.mark.parametrize("ending", sorted(formats()[1]))
def test_every_format_that_pillow_reads_and_writes_is_listed_and_read(tmp_path, ending):
    file_format = Image.registered_extensions()[ending]
    if file_format not in Image.SAVE:
        return
    path, decoded = tmp_path / f"a{ending.upper()}", None
    for mode in ("RGB", "RGBA", "L", "1", "P"):  # some formats take one of them alone
        with contextlib.suppress(OSError, ValueError, KeyError), image_files.quiet():
            image = Image.new(mode, (32, 32), "white" if mode != "P" else 0)
            if mode == "P":
                image.putpalette([255] * 768)
            image.save(path, file_format)
            decoded = decode(path, SQUARE)
            break
    assert find(tmp_path).names == [path.name]
    assert decoded.shape == (28, 28, 3) and decoded.min() > 250


def test_gray_to_colour_and_back(tmp_path):
    pixels, notes = decode_with_notes(saved(tmp_path / "g.png", GRAY), SQUARE)
    np.testing.assert_array_equal(pixels, np.repeat(GRAY[..., None], 3, -1))
    assert notes == [CONVERTED]
    pixels, notes = decode_with_notes(saved(tmp_path / "c.png", SMOOTH), GRAY_SQUARE)
    luma = SMOOTH @ [0.299, 0.587, 0.114]  # ITU-R 601
    assert notes == [CONVERTED] and np.abs(pixels[..., 0] - luma).max() <= 1


def test_shorter_side_and_centre(tmp_path):
    wide = np.zeros((56, 140, 3), np.uint8)
    wide[:, 42:98] = np.kron(SMOOTH, np.ones((2, 2, 1))).astype(np.uint8)
    wide[:, :42], wide[:, 98:] = 255, 255
    for name, pixels in {"wide": wide, "tall": wide.swapaxes(0, 1)}.items():
        result = decode(saved(tmp_path / f"{name}.png", pixels), SQUARE)
        expected = SMOOTH if name == "wide" else SMOOTH.swapaxes(0, 1)
        inside = np.abs(result.astype(int) - expected)[2:-2, 2:-2]
        assert inside.max() <= 6  # the filter reaches over edges
    assert decode(tmp_path / "wide.png", Decoding.to_shape((20, 40, 3))).shape == (20, 40, 3)
    assert decode(saved(tmp_path / "s.png", GRAY[:3, :5]), GRAY_SQUARE).shape == (28, 28, 1)
    big = Image.fromarray(SMOOTH).resize((900, 900), Image.Resampling.NEAREST)
    big.save(tmp_path / "big.jpg", quality=95)  # decoded at a fraction of its size
    pixels = decode(tmp_path / "big.jpg", SQUARE)
    assert np.abs(pixels.astype(int) - SMOOTH).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_respected(tmp_path, orientation):
    """As the EXIF standard words it: where row 0 and column 0 of the stored image are."""
    upright = GRAY.reshape(28, 28)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.png", np.ascontiguousarray(stored), exif=exif)
    np.testing.assert_array_equal(decode(path, GRAY_SQUARE)[..., 0], upright)


def test_broken_exif_does_not_cost_the_image(tmp_path):
    path = saved(tmp_path / "a.png", GRAY, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(decode(path, GRAY_SQUARE)[..., 0], GRAY)


def _encoded(ending, pixels=SMOOTH):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, ending)
    return data.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"hello", "not an image"),
        (_encoded("png", np.dstack([GRAY] * 3))[:-60], "truncated"),
        (_encoded("jpeg")[:-60], "truncated"),
        (_encoded("jpeg")[:400], "Truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
def test_damaged_files_are_unreadable(tmp_path, data, reason):
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(Unreadable, match=reason):
        decode(path, SQUARE)


def test_files_that_can_not_be_used(tmp_path, monkeypatch):
    with pytest.raises(Unreadable, match="not a file"):
        decode(tmp_path / "missing.png", GRAY_SQUARE)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(Unreadable, match="not a file"):
        decode(tmp_path / "pipe.png", GRAY_SQUARE)
    Image.fromarray(GRAY.astype(np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(Unreadable, match="floats, whose range is not known"):
        decode(tmp_path / "f.tif", GRAY_SQUARE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 28 * 28 - 1)
    saved(tmp_path / "bomb.png", GRAY)
    with pytest.raises(UserError, match="2 channels: image files have 1, 3 or 4"):
        list(stream(["bomb.png"], Decoding(2), tmp_path))
    (chunk,) = stream(["bomb.png"], GRAY_SQUARE, tmp_path)
    assert (chunk.files, chunk.reasons) == (["bomb.png"], ["more than 783 pixels"])
    assert chunk.images.shape == (0, 28, 28, 1)


def test_random_damage_never_ends_the_stream(tmp_path):
    names = []
    for i in range(90):
        ending = ("png", "jpeg", "gif", "tiff", "bmp", "webp")[i % 6]
        data = bytearray(_encoded(ending))
        for at in RNG.integers(0, len(data), 1 + i % 9):
            data[at] = RNG.integers(256)
        names.append(f"{i:02d}.{ending}")
        (tmp_path / names[-1]).write_bytes(data)
    chunks = list(stream(names, SQUARE, tmp_path))
    assert [name for chunk in chunks for name in chunk.files] == names
    read = sum(reason is None for chunk in chunks for reason in chunk.reasons)
    assert 0 < read == sum(len(chunk.images) for chunk in chunks) < len(names)


def test_which_files_are_images(tmp_path):
    for name in ("b.png", "a.JPG", "sub/deep/c.jpeg", "sub.png/d.gif", "é ü,\n.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for name in (".hidden.png", "notes.txt", "scores.csv", "LICENSE", "x.eps", ".git/e.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    listing = find(tmp_path)
    assert listing.names == ["a.JPG", "b.png", "sub.png/d.gif", "sub/deep/c.jpeg", "é ü,\n.png"]
    others = [".git/", ".hidden.png", "LICENSE", "notes.txt", "scores.csv", "x.eps"]
    assert listing.others == others
    with pytest.raises(UserError, match="nothing does not exist; give one with images"):
        find(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"b\.png is not a folder"):
        find(tmp_path / "b.png")


def test_the_order_is_kept_and_decoding_stays_a_little_ahead(tmp_path, monkeypatch):
    names = [f"{i:04d}.png" for i in range(2000)]
    started, lock = [], threading.Lock()

    def stand_in(path, decoding):
        number = int(path.stem)
        with lock:
            started.append(number)
        if number % 64 == 0:
            time.sleep(0.002)  # the next chunks overtake this one
        return np.full((2, 2, 1), number % 256, np.uint8), []

    monkeypatch.setattr(image_files, "decode_with_notes", stand_in)
    seen, ahead = [], 0
    for chunk in stream(names, Decoding(1, 2, (2, 2)), tmp_path, workers=3):
        seen += chunk.files
        np.testing.assert_array_equal(
            chunk.images[:, 0, 0, 0], [int(n[:4]) % 256 for n in chunk.files]
        )
        with lock:
            ahead = max(ahead, len(started) - len(seen))
    assert seen == names
    assert 0 < ahead <= 4 * 3 * 32
    partial = stream(names, Decoding(1, 2, (2, 2)), tmp_path, workers=3)
    next(partial)
    partial.close()
    time.sleep(0.05)
    with lock:
        assert len(started) < 2000 + 20 * 32  # closing the stream stops the decoding
