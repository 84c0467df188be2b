"""Timings and comparisons of training methods. Results are kept in `docs/results`."""
