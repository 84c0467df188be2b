"""Images stored as lines of bytes."""

import jax
import numpy as np

from oal_jax.training.arrays import in_lines


def test_rows_of_lines_are_those_of_the_array():
    for shape in ((7, 8, 16, 3), (7, 4, 8, 8)):
        array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        lines = in_lines(array)
        assert lines.lines.shape == (7, 3 if shape[3] == 3 else 2, 128)
        assert lines.shape == np.shape(lines) == shape and np.shares_memory(lines.lines, array)
        rows = np.array([4, 0, 4])
        taken = jax.jit(lambda lines, rows: lines[rows])(lines, rows)
        np.testing.assert_array_equal(taken, array[rows])
        assert jax.eval_shape(in_lines, array).shape == shape
    every_second = in_lines(array[::2])
    np.testing.assert_array_equal(every_second[np.arange(4)], array[::2])
    for other in (np.zeros((3, 28, 28, 1)), np.zeros((3, 128)), np.zeros((2, 3, 128))):
        assert in_lines(other) is other
