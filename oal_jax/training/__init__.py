"""State, optimizer, the one loop, checkpoints."""
