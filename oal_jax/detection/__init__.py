"""Detectors of a finished run or of any classifier."""
