"""Measurements: every figure in the documentation comes from a suite in this folder."""
