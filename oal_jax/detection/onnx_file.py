"""A detector as a program of ONNX, which runs without JAX; needs the extra `onnx`."""

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oal_jax.detection.parts import Parts, decide
from oal_jax.detection.program import row_by_row
from oal_jax.errors import UserError

_OUTPUTS = ("label", "confidence", "ood_score", "is_ood")


def convert(parts: Parts, described: Mapping[str, Any]) -> bytes:
    """The detector as bytes of an ONNX file, its weights inside, for batches of any size.

    Input `images`, uint8 (n, h, w, c); outputs `label`, `confidence`, `ood_score`, `is_ood`.

    Args:
      parts: of the detector.
      described: its values become metadata, those that are no text as JSON.

    Raises:
      UserError: the extra is not installed, or the model has an operation without a counterpart.
    """
    try:
        import onnxruntime
        from jax2onnx import to_onnx
    except ImportError:
        raise UserError("ONNX needs more packages: pip install 'oal-jax[onnx]'") from None
    arrays = jax.tree.map(np.asarray, (parts.forward, dict(parts.state)))
    score, threshold = row_by_row(parts.score), np.float32(parts.threshold)

    def call(images):
        return decide(score, *arrays, threshold, images)

    images = jax.ShapeDtypeStruct(("b", *parts.image_shape), jnp.uint8)
    names = {"input_names": ["images"], "output_names": _OUTPUTS}
    logger = logging.getLogger("onnx_ir")  # warns of every value whose type it leaves open
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        model = to_onnx(call, [images], model_name="oal_jax_detector", **names)
    except Exception as error:  # each converter of a primitive raises its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"score {parts.score.name} of this model has no form in ONNX ({reason[:200]}); a"
            " detector loaded from a saved one has none, and other scores may have one"
        ) from None
    finally:
        logger.setLevel(level)
    for name, value in described.items():
        text = value if isinstance(value, str) else json.dumps(value)
        model.metadata_props.add(key=name, value=text)
    program = model.SerializeToString()
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3  # it warns of every shape that jax2onnx notes in another order
    _check(lambda: onnxruntime.InferenceSession(program, quiet), call, parts)
    return program


def _check(opened: Callable[[], Any], call: Callable, parts: Parts) -> None:
    """Raise `UserError` unless onnxruntime and JAX agree on random images, in two batch sizes."""
    rng = np.random.default_rng(0)
    unit = max(1.0, np.abs(parts.id_val_scores).max())
    for count in (3, 2):
        images = rng.integers(0, 256, (count, *parts.image_shape)).astype(np.uint8)
        label, confidence, ood_score, _ = jax.jit(call)(images)
        try:
            results = opened().run(list(_OUTPUTS), {"images": images})
            np.testing.assert_array_equal(results[0], label)
            np.testing.assert_allclose(results[1], confidence, atol=1e-4)
            np.testing.assert_allclose(results[2], ood_score, rtol=1e-4, atol=1e-4 * unit)
        except Exception:  # of any kind: a program that does not run, and one that is wrong
            raise UserError(
                f"the ONNX program of score {parts.score.name} and this model does not agree with"
                " JAX, so it is not written; other scores may have a right one"
            ) from None
