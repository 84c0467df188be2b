"""Outliers in the teacher's feature space, and as latents."""
