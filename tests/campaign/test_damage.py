"""Damage of one file of a finished run: it is named, or every result stays the same."""

import numpy as np
import pytest

import oal_jax
from oal_jax.errors import UserError
from oal_jax.stages import run as pipeline

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 28, 28, 1), np.uint8)
FLIPS = 10


def flip(path, place):
    data = bytearray(path.read_bytes())
    if data:
        data[int(place * len(data))] ^= 1 << int(8 * place * len(data) % 8)
    path.write_bytes(data)


def damages():
    yield "deleted", lambda path: path.unlink()
    yield "emptied", lambda path: path.write_bytes(b"")
    yield "halved", lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for number in range(FLIPS):
        place = (number + 0.37) / FLIPS
        yield f"flipped at {place:.2f}", lambda path, place=place: flip(path, place)


def result_of(config, run):
    """What a user gets from a finished run: the tables, and the verdicts of its detector."""
    pipeline.run(config, run)
    detector = oal_jax.load(run)
    tables = [(run / "report" / name).read_bytes() for name in ("ood.csv", "validation.csv")]
    return [*tables, (run / "metrics.jsonl").read_bytes(), *map(np.asarray, detector(IMAGES))]


@pytest.fixture(scope="session")
def expected(config, finished_run):
    return result_of(config, finished_run)


def test_damage_is_named_or_harmless(copy, config, expected, case):
    seed, number = case
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    pairs = [(path, *damage) for path in files for damage in damages()]
    order = np.random.default_rng(seed).permutation(len(pairs))
    path, how, damage = pairs[order[number % len(pairs)]]
    name = path.relative_to(copy)
    print(f"{name} {how}")
    damage(path)
    try:
        result = result_of(config, copy)
    except UserError as error:
        message = str(error)
        assert str(name) in message or path.name in message, f"{name} {how}: {message}"
        assert "\n" not in message
        return
    for value, same in zip(result, expected, strict=True):
        np.testing.assert_array_equal(value, same, err_msg=f"{name} {how}")
