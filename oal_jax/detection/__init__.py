"""Detectors made of a finished run or of anybody's model."""
