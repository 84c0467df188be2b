"""Measurements: every figure in the README comes from a suite in this folder."""
