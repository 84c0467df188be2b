"""Stable Diffusion: text conditioning with an injected embedding, samplers compiled as one scan, and training.

Importing this package is cheap: diffusers and transformers are imported when a model is loaded or made.
"""
