"""Stable Diffusion: text conditioning with an injected embedding, samplers, training.

Importing this package is cheap: diffusers and transformers are imported when a model is built.
"""
