"""The config: its fields, its rules, its flags. Imports no JAX."""

from oal_jax.config.methods import Method
from oal_jax.config.outliers import Knn, Latents, Outliers
from oal_jax.config.schema import (
    DECODED,
    GENERATED,
    PROCEDURAL,
    SCORES,
    Config,
    Data,
    Evaluation,
    Generator,
    Mesh,
    Student,
    Teacher,
    Train,
    expand,
    flatten,
    reference_faults,
    unflatten,
    unleashed,
)

__all__ = [
    "DECODED",
    "GENERATED",
    "PROCEDURAL",
    "SCORES",
    "Config",
    "Data",
    "Evaluation",
    "Generator",
    "Knn",
    "Latents",
    "Mesh",
    "Method",
    "Outliers",
    "Student",
    "Teacher",
    "Train",
    "expand",
    "flatten",
    "reference_faults",
    "unflatten",
    "unleashed",
]
