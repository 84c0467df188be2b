"""Out-of-distribution detection in JAX.

`load(DIR)` gives the detector of a finished run, `calibrate` makes one of any classifier.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oal_jax.detector import Detector, Result, as_forward, calibrate, load

__version__ = "0.1.0"
__all__ = ["Detector", "Result", "as_forward", "calibrate", "load"]


def __getattr__(name: str) -> Any:
    # Looked up when asked for, so that `import oal_jax` does not start JAX.
    if name in __all__:
        from oal_jax import detector

        return getattr(detector, name)
    raise AttributeError(f"module 'oal_jax' has no attribute {name!r}")
