"""OAL in PyTorch, written from the paper: the parity reference and the rival in timings.

Nothing in this folder imports JAX, so a run of the twin starts as a PyTorch program does.
"""
