"""Every mode of Pillow becomes the right pixels or is refused by name; one decoder everywhere."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from oal_jax.data import sources
from oal_jax.data.decoding import (
    SEVERAL,
    Decoding,
    Unreadable,
    decode,
    decode_with_notes,
    opened,
    upright_shape,
)
from oal_jax.data.image_files import stream

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 5, 3)).astype(np.uint8)
GRAY, ALPHA = RGB[..., 0], RNG.integers(0, 256, (6, 5)).astype(np.uint8)
LUMA = np.round(RGB @ [0.299, 0.587, 0.114]).astype(int)  # ITU-R 601
OVER_BLACK = np.round(RGB * (ALPHA[..., None] / 255)).astype(int)
GRAY_OVER_BLACK = np.round(GRAY * (ALPHA / 255)).astype(int)


def encoded(image, file_format, **options):
    data = io.BytesIO()
    image.save(data, file_format, **options)
    return data.getvalue()


def of(mode, pixels):
    return Image.frombytes(mode, pixels.shape[1::-1], np.ascontiguousarray(pixels).tobytes())


def palette(alpha=None):
    image = Image.fromarray(GRAY % 4).convert("P")
    image.putpalette(RGB[0, :4].tobytes())
    return encoded(image, "PNG", **({} if alpha is None else {"transparency": alpha}))


def png(depth, colour, rows, *chunks):
    """A PNG of any depth and colour type, which Pillow can't write."""
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    width = RGB.shape[1]
    parts = [(b"IHDR", struct.pack(">2I5B", width, len(rows), depth, colour, 0, 0, 0)), *chunks]
    parts += [(b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    body = (
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def deep(levels):
    """16-bit levels with these high bytes."""
    return (levels.astype(np.uint16) << 8 | 77).astype(">u2")


def tiff(levels, bits, *, photometric=1, sample_format=1):
    """An uncompressed little-endian TIFF of one channel."""
    data, tags = levels.tobytes(), []
    values = {256: levels.shape[1] if bits != 12 else 5, 257: levels.shape[0], 258: bits, 259: 1}
    values |= {262: photometric, 273: 8, 277: 1, 278: levels.shape[0], 279: len(data)}
    for tag, value in sorted((values | {339: sample_format}).items()):
        tags.append(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value))
    directory = struct.pack("<H", len(tags)) + b"".join(tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


def fits(levels):
    """An image of a telescope, whose levels are counts."""
    cards = {"SIMPLE": "T", "BITPIX": 16, "NAXIS": 2, "NAXIS1": 5, "NAXIS2": 6}
    text = "".join(f"{f'{key:8}= {value:>20}':80}" for key, value in cards.items())
    return f"{text}{'END':80}".ljust(2880).encode() + levels.tobytes().ljust(2880, b"\0")


CLEAR = np.where(GRAY[2, 2] == GRAY, 0, GRAY)  # one level is transparent
CASES = {
    "1": (encoded(Image.fromarray(GRAY > 99), "PNG"), np.where(GRAY > 99, 255, 0)),
    "L": (encoded(Image.fromarray(GRAY), "PNG"), GRAY),
    "L, a transparent level": (
        encoded(Image.fromarray(GRAY), "PNG", transparency=int(GRAY[2, 2])),
        CLEAR,
    ),
    "LA": (encoded(of("LA", np.dstack([GRAY, ALPHA])), "PNG"), GRAY_OVER_BLACK),
    "P": (palette(), RGB[0, :4][GRAY % 4]),
    "P, a transparent colour": (
        palette(1),
        np.where((GRAY % 4 == 1)[..., None], 0, RGB[0, :4][GRAY % 4]),
    ),
    "P, alpha": (
        palette(bytes([255, 128, 0, 255])),
        np.round(RGB[0, :4] * np.array([[1], [128 / 255], [0], [1]]))[GRAY % 4],
    ),
    "RGB": (encoded(Image.fromarray(RGB), "PNG"), RGB),
    "RGB, a transparent colour": (
        encoded(Image.fromarray(RGB), "PNG", transparency=tuple(RGB[1, 1].tolist())),
        np.where((RGB[1, 1] == RGB).all(-1, keepdims=True), 0, RGB),
    ),
    "RGBA": (encoded(of("RGBA", np.dstack([RGB, ALPHA])), "PNG"), OVER_BLACK),
    "RGBA in TIFF": (encoded(of("RGBA", np.dstack([RGB, ALPHA])), "TIFF"), OVER_BLACK),
    "RGBX": (encoded(of("RGBX", np.dstack([RGB, ALPHA])), "TIFF"), RGB),
    "CMYK": (encoded(of("CMYK", np.dstack([255 - RGB, 0 * ALPHA])), "TIFF"), RGB),
    "YCbCr": (encoded(Image.fromarray(RGB).convert("YCbCr"), "TIFF"), RGB),
    "16-bit PNG": (png(16, 0, deep(GRAY)), GRAY),
    "16-bit PNG, a transparent level": (
        png(16, 0, deep(GRAY), (b"tRNS", deep(GRAY[2:3, 2]).tobytes())),
        CLEAR,
    ),
    "16-bit colour PNG": (png(16, 2, deep(RGB)), RGB),
    "16-bit colour PNG, a transparent colour": (
        png(16, 2, deep(RGB), (b"tRNS", deep(RGB[1, 1]).tobytes())),
        np.where((RGB[1, 1] == RGB).all(-1, keepdims=True), 0, RGB),
    ),
    "16-bit PNG with alpha": (png(16, 6, deep(np.dstack([RGB, ALPHA]))), OVER_BLACK),
    "2-bit PNG": (
        png(2, 0, np.tile(np.uint8([0b00011011, 0]), (6, 1))),
        [[0, 85, 170, 255, 0]] * 6,
    ),
    "16-bit PGM": (b"P5 5 6 65535\n" + deep(GRAY).tobytes(), GRAY),
    "10-bit PGM": (b"P5 5 6 1023\n" + (GRAY.astype(np.uint16) << 2).astype(">u2").tobytes(), GRAY),
    "16-bit TIFF": (tiff(deep(GRAY).astype("<u2"), 16), GRAY),
    "16-bit TIFF, white is zero": (tiff(deep(GRAY).astype("<u2"), 16, photometric=0), 255 - GRAY),
    "I;16B": (encoded(of("I;16B", deep(GRAY)), "TIFF"), GRAY),
    "12-bit TIFF": (
        tiff(np.tile(np.uint8([0x12, 0x3F, 0x00, 0x80, 0x0F, 0xFF, 0xFF, 0xF0]), (6, 1)), 12),
        [[0x12, 0xF0, 0x80, 0xFF, 0xFF]] * 6,
    ),
    "16-bit JPEG 2000": (encoded(of("I;16", deep(GRAY).astype("<u2")), "JPEG2000"), GRAY),
}


@pytest.mark.parametrize("name", CASES)
def test_every_mode_gives_its_pixels(name):
    data, expected = CASES[name]
    expected = np.asarray(expected).astype(int)
    colour = decode(data, Decoding(3)).astype(int)
    tolerance = 3 if name in ("CMYK", "YCbCr") else 1 if "A" in name or "alpha" in name else 0
    as_colour = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, -1)
    assert np.abs(colour - as_colour).max() <= tolerance
    gray = decode(data, Decoding(1))[..., 0].astype(int)
    luma = expected @ [0.299, 0.587, 0.114] if expected.ndim == 3 else expected
    assert np.abs(gray - luma).max() <= tolerance + (expected.ndim == 3)
    whole = decode(data, Decoding(4)).astype(int)
    over_black = whole[..., :3] * (whole[..., 3:] / 255)
    assert np.abs(over_black - as_colour).max() <= tolerance + 1


def test_premultiplied_alpha_is_over_black_already():
    extra_samples = struct.Struct("<HHII")
    for mode, levels in (("RGBA", OVER_BLACK), ("LA", GRAY_OVER_BLACK[..., None])):
        data = encoded(of(mode, np.dstack([levels, ALPHA]).astype(np.uint8)), "TIFF")
        straight, premultiplied = (extra_samples.pack(338, 3, 1, kind) for kind in (2, 1))
        assert straight in data
        data = data.replace(straight, premultiplied)
        assert np.abs(decode(data, Decoding(3)).astype(int) - levels).max() <= 2


def test_inverted_cmyk_of_adobe_is_right():
    ink = np.dstack([255 - RGB, 0 * ALPHA])
    data = encoded(of("CMYK", 0 * ink + ink[:1, :1]), "JPEG", quality=100)
    assert b"Adobe" in data
    assert np.abs(decode(data, Decoding(3)).astype(int) - RGB[0, 0]).max() <= 3


REFUSED = {
    "floats": encoded(Image.fromarray(GRAY.astype(np.float32)), "TIFF"),
    "signed or 32-bit integers": encoded(Image.fromarray(GRAY.astype(np.int32)), "TIFF"),
    "signed or 32-bit": tiff(GRAY.astype("<i2"), 16, sample_format=2),
    "LAB: save it as RGB": encoded(of("LAB", RGB), "TIFF"),
    "FITS's 16-bit integers": fits(deep(GRAY)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_levels_of_unknown_range_are_refused_by_name(reason):
    for channels in (1, 3, 4):
        with pytest.raises(Unreadable, match=reason):
            decode(REFUSED[reason], Decoding(channels))


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_first_of_several_frames_is_read_and_counted(tmp_path, file_format):
    frames = [Image.new("RGB", (8, 8), (level, 40, 90)) for level in (10, 120, 250)]
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:])
    pixels, notes = decode_with_notes(data, Decoding(3))
    assert SEVERAL in notes and np.abs(pixels[0, 0].astype(int) - [10, 40, 90]).max() < 8
    (tmp_path / "a").write_bytes(data)
    (batch,) = stream([tmp_path / "a"], Decoding(3, 8, (8, 8)))
    assert SEVERAL in batch.notes[0]


@pytest.mark.parametrize("file_format", ["JPEG", "MPO", "PNG", "WEBP", "TIFF", "AVIF"])
def test_turned_files_of_every_format_are_upright(file_format):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera's right is up
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, :24] = 250
    data = encoded(Image.fromarray(pixels), file_format, exif=exif)
    upright = decode(data, Decoding(3)).astype(int)
    assert upright.shape == (48, 16, 3)
    assert upright[:20].min() > 200 and upright[-20:].max() < 50
    with opened(io.BytesIO(data)) as image:
        assert upright_shape(image, 3) == (48, 16, 3)


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (41, 97), (7, 90), (300, 3)])
@pytest.mark.parametrize("crop", [(20, 40), (28, 28), (31, 9)])
def test_any_size_fills_any_shape_from_its_centre(size, crop):
    columns = np.broadcast_to(np.linspace(0, 255, size[0])[None, :, None], (size[1], size[0], 3))
    data = encoded(Image.fromarray(columns.astype(np.uint8)), "PNG")
    pixels = decode(data, Decoding.to_shape((*crop, 3)))
    assert pixels.shape == (*crop, 3)
    middle = pixels[crop[0] // 2, [crop[1] // 2 - 1, crop[1] // 2], 0].astype(int)
    assert abs(middle.mean() - 127.5) < 20
    if size == crop[::-1]:
        np.testing.assert_array_equal(pixels, columns.astype(np.uint8))


def test_narrow_images_do_not_fill_the_memory():
    data = encoded(Image.new("1", (200_000, 1)), "PNG")
    with pytest.raises(Unreadable, match="200000 x 1, resized more than"):
        decode(data, Decoding.to_shape((224, 224, 3)))


@pytest.mark.parametrize("source", ["own", "folder"])
def test_training_and_scoring_read_the_same_pixels(tmp_path, source):
    """Hidden colours under transparency, EXIF turns, 16 bits, palettes, any size."""
    exif = Image.Exif()
    photo = Image.fromarray(RNG.integers(0, 256, (60, 41, 3)).astype(np.uint8))
    folder = tmp_path / ("train" if source == "own" else "mine/train")
    (folder / "a").mkdir(parents=True)
    (folder / "b").mkdir()
    for turn in range(1, 9):
        exif[0x0112] = turn
        photo.save(folder / f"a/{turn}.jpg", exif=exif)
    white = np.full((50, 30, 3), 255, np.uint8)
    of("RGBA", np.dstack([white, RNG.integers(0, 2, (50, 30)) * 255]).astype(np.uint8)).save(
        folder / "b/clear.png"
    )
    for number, (data, _) in enumerate(CASES.values()):
        (folder / f"b/{number}.png").write_bytes(data)  # by content, not by name
    splits = {"own": "own", "folder": "mine"}
    spec = sources.SetSpec(source, splits[source], "train", str(tmp_path), image_size=24)
    for split in ("validation", "test") if source == "own" else ():
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            photo.save(tmp_path / split / name / "0.png")
    opened, trained = sources.open_source(spec), sources.read_set(spec)
    paths = [opened.path(i) for i in range(len(opened))]
    assert len(paths) == 9 + len(CASES)
    batches = list(stream(paths, Decoding.to_shape((24, 24, 3))))
    assert not any(any(batch.reasons) for batch in batches)
    np.testing.assert_array_equal(np.concatenate([b.images for b in batches]), trained.images)


def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(Unreadable, match="not a file"), opened(tmp_path / "a.png"):
        pass
    with pytest.raises(Unreadable, match="not a file"):
        decode(tmp_path / "a.png", Decoding())
