"""Out-of-distribution detection in JAX.

`load(DIR)` gives the detector of a finished run, `calibrate` makes one of any classifier, and
`benchmark` says how well post-hoc scores work on any classifier.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oal_jax.data.decoding import Decoding
    from oal_jax.detection.benchmark import Sets, benchmark, load_sets
    from oal_jax.detection.calibrate import calibrate
    from oal_jax.detection.detector import Detector, Result
    from oal_jax.detection.load import load
    from oal_jax.scores.forward import as_forward

__version__ = "0.1.0"
# Imported on first use, so that `import oal_jax` does not start JAX. No module of the package has
# one of these names: importing it would put the module in the name's place.
_HOME = {
    "Decoding": "data.decoding",
    "Detector": "detection.detector",
    "Result": "detection.detector",
    "Sets": "detection.benchmark",
    "as_forward": "scores.forward",
    "benchmark": "detection.benchmark",
    "calibrate": "detection.calibrate",
    "load": "detection.load",
    "load_sets": "detection.benchmark",
}
__all__ = [
    "Decoding",
    "Detector",
    "Result",
    "Sets",
    "as_forward",
    "benchmark",
    "calibrate",
    "load",
    "load_sets",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'oal_jax' has no attribute {name!r}")
    return getattr(import_module(f"oal_jax.{_HOME[name]}"), name)
