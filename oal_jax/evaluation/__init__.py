"""Metrics, the near/far protocol, tables, and the report with pictures."""

from oal_jax.evaluation.metrics import id_accuracy, ood_metrics
from oal_jax.evaluation.protocol import Evaluation, Labelled, evaluate, threshold, write_tables
from oal_jax.evaluation.report import ReportInputs, write_report
from oal_jax.evaluation.tables import Row, format_table, write_csv

__all__ = [
    "Evaluation",
    "Labelled",
    "ReportInputs",
    "Row",
    "evaluate",
    "format_table",
    "id_accuracy",
    "ood_metrics",
    "threshold",
    "write_csv",
    "write_report",
    "write_tables",
]
