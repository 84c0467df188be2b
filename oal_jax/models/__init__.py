"""Linen modules; every classifier returns (logits, features)."""
