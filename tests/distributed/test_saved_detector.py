"""A detector that is saved and loaded on several devices."""

import jax
import numpy as np

import oal_jax
from oal_jax.runtime import distributed


def test_a_loaded_detector_runs_on_all_devices(tmp_path):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(27, 3)).astype(np.float32)
    images = rng.integers(0, 256, (22, 6, 6, 3)).astype(np.uint8)

    def forward(images):
        features = images[:, ::2, ::2].reshape(images.shape[0], -1)
        return features @ kernel, features

    pair = images, np.arange(22) % 3
    detector = oal_jax.calibrate(forward, pair, pair, "knn", params={"k": 3})
    detector.save(tmp_path)
    again = oal_jax.load(tmp_path)
    assert again.mesh.size == len(jax.devices()) == 4
    np.testing.assert_allclose(again(images).ood_score, detector(images).ood_score, rtol=1e-4)
    batch = jax.device_put(images[:20], distributed.over_data(again.mesh))
    score = jax.jit(lambda x: again.function(x)[2])(batch)
    np.testing.assert_allclose(score, detector(images[:20]).ood_score, rtol=1e-4)
