"""Metrics, the near/far protocol, parameter search, bootstrap intervals, tables.

Names are imported on first use, so that `oal_jax.evaluation.metrics` needs NumPy alone.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Evaluation": "protocol",
    "Inputs": "protocol",
    "Row": "tables",
    "evaluate": "protocol",
    "format_table": "tables",
    "id_accuracy": "metrics",
    "ood_metrics": "metrics",
    "threshold": "protocol",
    "write_csv": "tables",
    "write_tables": "protocol",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
