"""Readers of other people's weights. Nothing here unpickles and nothing here needs torch."""
