"""OAL in PyTorch, written from the paper and a description of its code: what ours is timed against.

Nothing in this folder imports JAX, so that a run of the twin starts as a PyTorch program does.
"""
