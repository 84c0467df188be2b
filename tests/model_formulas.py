"""NumPy's and XLA's formulas of the layers, for the tests of the models."""

import jax
import numpy as np


def normal(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def convolve(x, kernel, stride, pad):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def batch_norm(x, params, stats):
    return (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]


def assert_uniform(layer, fan_in):
    bound = fan_in**-0.5
    for name in ("kernel", "bias"):
        values = np.asarray(layer[name])
        assert np.abs(values).max() <= bound
        assert np.abs(values).max() > 0.97 * bound
        np.testing.assert_allclose(values.std(), bound / np.sqrt(3), rtol=0.1)
        assert abs(values.mean()) < 0.15 * bound
