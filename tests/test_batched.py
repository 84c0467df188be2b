"""Batches: every row comes back once and in order, whatever the sizes."""

import jax
import numpy as np
import pytest

from oal_jax.runtime import batched, distributed

MESH = distributed.make_mesh()


@jax.jit
def square(rows):
    return {"square": rows["x"] ** 2, "y": rows["y"]}


def rows(count, start=0):
    x = np.arange(start, start + count, dtype=np.int32)
    return {"x": x, "y": np.stack([x, -x], axis=1).astype(np.float32)}


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 24])
def test_rows_come_back_in_order(count):
    inputs = rows(count)
    result = batched.apply(square, [inputs], 8, MESH)
    np.testing.assert_array_equal(result["square"], inputs["x"] ** 2)
    np.testing.assert_array_equal(result["y"], inputs["y"])
    assert result["y"].shape == (count, 2) and result["y"].dtype == np.float32


def test_chunks_of_a_stream_are_joined():
    chunks = (rows(count, start) for start, count in ((0, 8), (8, 3), (11, 8)))
    result = batched.apply(square, chunks, 8, MESH)
    np.testing.assert_array_equal(result["square"], np.arange(19) ** 2)
    with pytest.raises(batched.NoRows):
        batched.apply(square, iter([]), 8, MESH)


def test_all_batches_have_one_shape_and_filling_repeats_the_last_row():
    shapes, counts, last = set(), [], None
    for batch, count in batched.batches([rows(10)], 4, MESH):
        shapes.add(batch["y"].shape)
        counts.append(count)
        last = np.asarray(batch["x"])
    assert shapes == {(4, 2)} and counts == [4, 4, 2]
    np.testing.assert_array_equal(last, [8, 9, 9, 9])


def test_a_result_is_read_after_the_next_batch_was_dispatched():
    events = []

    def function(batch):
        events.append("dispatch")
        return square(batch)

    for _ in batched.results(function, [rows(12)], 4, MESH):
        events.append("read")
    assert events == ["dispatch", "dispatch", "read", "dispatch", "read", "read"]
