"""Stable Diffusion: text conditioning with an injected embedding, samplers, training."""
